/** `keygate tail`: the inspector's stream in a terminal, or as NDJSON for other programs. */
import type { ParseArgsConfig } from 'node:util';
import { readStream } from './admin/stream-client.ts';
import { lineOf } from './admin/tail-lines.ts';
import type { Config } from './config.ts';
import { existingSecret } from './embedded-secret.ts';
import { systemClock } from './lib/clock.ts';
import { streamEventNames } from './protocol/inspector/events.ts';
import { filterFromQuery, type StreamFilter } from './protocol/inspector/filter.ts';
import { UsageError } from './usage-error.ts';

export const TAIL_HELP = `Usage: keygate tail [--device <device>] [--event <name>] [--json] …

Shows what a gateway's inspector sees, as it happens, on every node.

  --device      a device (alice.1) or a user (alice)
  --event       a request, a push, gate, claim, message, handshakeRefused, socketOpened or socketClosed
  --direction   in, out or server
  --code        an error code, or ok
  --slower-than only what took longer, in milliseconds
  --gate        the gate's state when it happened: connected, validated or open
  --message     one message's life, by its message id
  --json        NDJSON, also on a terminal; elsewhere it is the form anyway
  --url         the admin listener (default http://127.0.0.1 and ADMIN_PORT)

Filters may be given several times, or with commas; all of them must hold, and they run on the server.
The token is ADMIN_TOKEN or, where none is set, the file in DATA_DIR.`;

export const TAIL_OPTIONS = {
  device: { type: 'string', multiple: true },
  event: { type: 'string', multiple: true },
  direction: { type: 'string', multiple: true },
  code: { type: 'string', multiple: true },
  'slower-than': { type: 'string' },
  gate: { type: 'string', multiple: true },
  message: { type: 'string' },
  json: { type: 'boolean' },
  url: { type: 'string' },
} as const satisfies NonNullable<ParseArgsConfig['options']>;

type Values = Record<string, string | boolean | (string | boolean)[] | undefined>;

/** Where the lines go, and what tells to end. */
export interface TailOutput {
  isTerminal: boolean;
  colours: boolean;
  line(text: string): void;
  /** What is no event. */
  notice(text: string): void;
  signal: AbortSignal;
}

/**
 * Shows events until it is told to end.
 *
 * @throws UsageError for a bad filter or address, Error where there is no token or it is refused
 */
export async function runTail(values: Values, config: Config, output: TailOutput): Promise<void> {
  const filter = filterOf(values);
  const url = addressOf(values, config);
  const isJson = values.json === true || !output.isTerminal;
  let isLost = false;
  await readStream({
    url,
    token: await tokenOf(config),
    filter,
    clock: systemClock,
    signal: output.signal,
    onFrame(frame) {
      if (frame.type === 'hello') {
        if (isLost) output.notice('connected again; what happened meanwhile is not shown');
        isLost = false;
      }
      if (frame.type !== 'events') return;
      for (const event of frame.events) {
        output.line(isJson ? JSON.stringify(event) : lineOf(event, { colours: output.colours }));
      }
      if (frame.dropped > 0) output.notice(`${frame.dropped} events were left out: they come too fast`);
    },
    onLost(reason, delayMs) {
      isLost = true;
      output.notice(`${reason}; trying again in ${delayMs} ms`);
    },
  });
}

/** What each option is called in the filter's text form. */
const FILTER_NAMES = {
  device: 'device',
  event: 'event',
  direction: 'direction',
  code: 'code',
  'slower-than': 'slowerThanMs',
  gate: 'gate',
  message: 'messageId',
} as const satisfies Record<string, keyof StreamFilter>;

function filterOf(values: Values): StreamFilter {
  const query = new URLSearchParams();
  for (const [option, name] of Object.entries(FILTER_NAMES)) {
    for (const value of [values[option] ?? []].flat()) query.append(name, String(value));
  }
  const read = filterFromQuery(query);
  if (read.ok) return read.filter;
  const option = Object.entries(FILTER_NAMES).find(([, name]) => read.message.startsWith(`${name}:`))?.[0];
  const hint = option === 'event' ? `; there are ${streamEventNames.join(', ')}` : '';
  throw new UsageError(`--${option ?? 'device'}${read.message.replace(/^\w+/, '')}${hint}`);
}

function addressOf(values: Values, { admin }: Config): string {
  if (values.url === undefined) {
    const isEverywhere = admin.host === '0.0.0.0' || admin.host === '::';
    const host = isEverywhere ? '127.0.0.1' : admin.host.includes(':') ? `[${admin.host}]` : admin.host;
    return `http://${host}:${admin.port}`;
  }
  const url = String(values.url);
  if (!/^https?:\/\//.test(url) || !URL.canParse(url)) {
    throw new UsageError('--url must be an address that begins with https:// or http://');
  }
  const { username, password } = new URL(url);
  if (username !== '' || password !== '') {
    throw new UsageError('--url must hold no name and no password: what opens the inspector is ADMIN_TOKEN');
  }
  return url;
}

async function tokenOf({ admin: { token } }: Config): Promise<string> {
  if (token?.kind === 'token') return token.token;
  const secret = token === null ? null : await existingSecret(token.dataDir, 'admin-token');
  if (secret === null) throw new Error('ADMIN_TOKEN is not set, and no gateway has made one in DATA_DIR');
  return new TextDecoder().decode(secret);
}
