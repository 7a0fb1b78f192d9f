/** The inspector as a browser uses it: logs in, keeps the cookie, reads streams. */
import { type AdminAnswer, type AdminError, adminRoutes } from '../../src/protocol/inspector/admin-api.ts';
import type { StreamEvent, StreamEventKind } from '../../src/protocol/inspector/events.ts';
import { filterToQuery, type StreamFilter } from '../../src/protocol/inspector/filter.ts';
import { type OverviewSample, overviewSample } from '../../src/protocol/inspector/overview.ts';
import { type StreamFrame, streamFrame } from '../../src/protocol/inspector/stream.ts';
import { eventually } from './eventually.ts';

export const ADMIN_TOKEN = 'the-admin-token-of-the-tests';
export const WITH_INSPECTOR = { ADMIN_TOKEN };

export interface Stream {
  frames: StreamFrame[];
  /** Of all frames so far, in the order of arrival. */
  events(): StreamEvent[];
  dropped(): number;
  /** The first event that matches, waited for. */
  event<Kind extends StreamEventKind>(
    kind: Kind,
    matches?: (event: Extract<StreamEvent, { kind: Kind }>) => boolean,
  ): Promise<Extract<StreamEvent, { kind: Kind }>>;
  /** Resolves when the server ends it. */
  ended: Promise<void>;
  close(): void;
}

export interface Answer {
  status: number;
  /** Null unless it is JSON. */
  body: { error?: AdminError['error'] } | null;
  text: string;
  headers: Headers;
}

export interface InspectorClient {
  cookie: string;
  get(path: string): Promise<Answer>;
  post(path: string, body?: unknown, headers?: Record<string, string>): Promise<Answer>;
  /** What must be answered, checked against the protocol. */
  sockets(query?: Record<string, string>): Promise<AdminAnswer<'sockets'>>;
  device(device: string, messageId?: string): Promise<AdminAnswer<'device'>>;
  message(messageId: string, recipient?: string): Promise<AdminAnswer<'message'>>;
  /** Open when it resolves: what happens from then on is shown. */
  stream(filter?: StreamFilter): Promise<Stream>;
  overview(): Promise<{ samples: OverviewSample[]; close(): void }>;
  close(): void;
}

export async function login(adminUrl: string, token = ADMIN_TOKEN): Promise<InspectorClient> {
  const response = await fetch(`${adminUrl}/api/login`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ token }),
  });
  if (response.status !== 200) throw new Error(`login: ${response.status} ${await response.text()}`);
  return withCookie(adminUrl, response.headers.get('set-cookie')?.split(';')[0] ?? '');
}

export function withCookie(adminUrl: string, cookie: string): InspectorClient {
  const closing = new AbortController();

  async function open(path: string, onData: (data: unknown) => void) {
    const aborting = new AbortController();
    const signal = AbortSignal.any([aborting.signal, closing.signal]);
    const response = await fetch(`${adminUrl}${path}`, { headers: { cookie }, signal });
    if (response.status !== 200) throw new Error(`${path}: ${response.status} ${await response.text()}`);
    const ended = (async () => {
      let text = '';
      const decoder = new TextDecoder();
      for await (const chunk of response.body!) {
        const blocks = (text + decoder.decode(chunk, { stream: true })).split('\n\n');
        text = blocks.pop()!;
        for (const block of blocks) if (block.startsWith('data: ')) onData(JSON.parse(block.slice(6)));
      }
    })().catch(() => {});
    return { ended, close: () => aborting.abort() };
  }

  async function ask(path: string, init: RequestInit): Promise<Answer> {
    const response = await fetch(`${adminUrl}${path}`, init);
    const text = await response.text();
    const isJson = response.headers.get('content-type')?.startsWith('application/json') === true;
    const { status, headers } = response;
    return { status, body: isJson ? JSON.parse(text) : null, text, headers };
  }

  const get = (path: string) => ask(path, { headers: { cookie } });

  return {
    cookie,
    get,

    post: (path, body, headers = {}) =>
      ask(path, {
        method: 'POST',
        headers: {
          cookie,
          ...(body === undefined ? {} : { 'content-type': 'application/json' }),
          ...headers,
        },
        ...(body === undefined ? {} : { body: JSON.stringify(body) }),
      }),

    sockets: async (query = {}) =>
      adminRoutes.sockets.answer.parse((await get(`/api/sockets?${new URLSearchParams(query)}`)).body),

    device: async (device, messageId) =>
      adminRoutes.device.answer.parse(
        (
          await get(
            `/api/devices/${encodeURIComponent(device)}${messageId === undefined ? '' : `?messageId=${messageId}`}`,
          )
        ).body,
      ),

    message: async (messageId, recipient) =>
      adminRoutes.message.answer.parse(
        (await get(`/api/messages/${messageId}${recipient === undefined ? '' : `?recipient=${recipient}`}`))
          .body,
      ),

    async stream(filter = {}) {
      const frames: StreamFrame[] = [];
      const { ended, close } = await open(`/api/stream?${filterToQuery(filter)}`, (data) =>
        frames.push(streamFrame.parse(data)),
      );
      const events = () => frames.flatMap((frame) => (frame.type === 'events' ? frame.events : []));
      await eventually(() => frames.length > 0);
      return {
        frames,
        events,
        dropped: () => frames.reduce((sum, frame) => sum + (frame.type === 'events' ? frame.dropped : 0), 0),
        event: async (kind, matches = () => true) => {
          const find = () => events().find((event) => event.kind === kind && matches(event as never));
          const found = await eventually(() => find() ?? false, { that: `an event of kind ${kind}` });
          return found as never;
        },
        ended,
        close,
      };
    },

    async overview() {
      const samples: OverviewSample[] = [];
      const { close } = await open('/api/overview', (data) => samples.push(overviewSample.parse(data)));
      return { samples, close };
    },

    close: () => closing.abort(),
  };
}
