/**
 * A fuzzer of both doors: requests with something wrong in their structure, packets and frames with something wrong in
 * their bytes, HTTP requests with either. Whatever comes, each is answered or cut, and nothing is a fault of the server.
 *
 * All chance comes from the seed: the same seed and the same number of cases make the same attempts.
 */
import { connect } from 'node:net';
import { errorObject } from '../../src/protocol/errors.ts';
import { type RequestName, requestNames, requests } from '../../src/protocol/events.ts';
import { httpRoutes } from '../../src/protocol/http-routes.ts';
import { FRAME_BYTES_MAX } from '../../src/protocol/limits.ts';
import { frame, OPCODE, openAdmittedPeer, openPeer, type RawPeer, text, upgradeRequest } from './raw-peer.ts';
import { type Path, placesOf, sampleOf, samples, withFieldAt, withValueAt } from './registry.ts';

export interface FuzzOptions {
  url: string;
  cases: number;
  seed: number;
  /** A token for one of the fuzzer's own devices. */
  tokenOf(device: string): Promise<string>;
  /** Whether the gateway still lives: what it says of its own faults. */
  complaints(): Promise<string | null>;
  onProgress?(progress: { done: number; findings: number }): void;
}

export interface Finding {
  /** Says it again: the seed of its batch. */
  seed: number;
  what: string;
  cases: string[];
}

export interface FuzzReport {
  requests: number;
  frames: number;
  http: number;
  answered: number;
  cut: number;
  findings: Finding[];
}

const BATCH_CASES = 200;
const WORKERS = 24;
const FINDINGS_MAX = 20;
/** Nothing is answered later than this, unless it hangs. */
const ANSWER_MAX_MS = 60_000;
/** An HTTP request that is not whole yet: its end is told after so long. */
const HTTP_PATIENCE_MS = 150;

export async function fuzz(options: FuzzOptions): Promise<FuzzReport> {
  const report: FuzzReport = { requests: 0, frames: 0, http: 0, answered: 0, cut: 0, findings: [] };
  const batches = Math.ceil(options.cases / BATCH_CASES);
  let next = 0;
  let done = 0;

  const work = async (worker: number): Promise<void> => {
    const device = `fuzzer-${worker}`;
    const token = await options.tokenOf(device);
    let complained: string | null = null;
    while (next < batches && report.findings.length < FINDINGS_MAX) {
      const batch = next++;
      const cases = Math.min(BATCH_CASES, options.cases - batch * BATCH_CASES);
      const chance = createChance(options.seed + batch);
      const note = (what: string, tried: string[]): void => {
        report.findings.push({ seed: options.seed + batch, what, cases: tried.slice(0, 20) });
      };
      // Of twenty batches, fourteen are of requests, five of frames and one of HTTP.
      const kind = batch % 20;
      if (kind < 14) {
        const peer = await openAdmittedPeer(options.url, token);
        await fuzzRequests({ peer, cases, chance, note, report });
        peer.destroy();
        report.requests += cases;
      } else if (kind < 19) {
        await fuzzFrames({ ...options, token, cases, chance, note, report });
        report.frames += cases;
      } else {
        await fuzzHttp({ ...options, token, cases, chance, note, report });
        report.http += cases;
      }
      done += cases;
      const complaint = await options.complaints();
      if (complaint !== complained && worker === 0) note(complaint ?? '', ['in a batch of about that time']);
      complained = complaint;
      options.onProgress?.({ done, findings: report.findings.length });
    }
  };
  await Promise.all(Array.from({ length: WORKERS }, (_, worker) => work(worker)));
  return report;
}

interface Batch {
  cases: number;
  chance: Chance;
  note(what: string, tried: string[]): void;
  report: FuzzReport;
}

/** Each is a whole request: it must be answered, in the shape that the registry promises. */
async function fuzzRequests({ peer, cases, chance, note, report }: Batch & { peer: RawPeer }): Promise<void> {
  const packets = Array.from({ length: cases }, (_, id) => {
    const name = chance.pick(requestNames);
    const input = mutatedValue(samples.get(name), chance);
    const packet = `42${id}${JSON.stringify([name, input])}`;
    // What is larger than a frame ends the connection, as it should: that is another test's.
    return { name, text: packet.length < FRAME_BYTES_MAX / 2 ? packet : `42${id}["${name}",[]]` };
  });
  const replies = await collectReplies(
    peer,
    packets.map((packet) => packet.text),
  );
  if (peer.isCut) {
    // A request whose input is gone altogether is no packet of an event.
    const unanswered = packets.filter((_, id) => !replies.has(id));
    return note(
      `whole requests were answered by cutting the connection: ${peer.received.slice(-200)}`,
      unanswered.map((packet) => packet.text),
    );
  }
  for (const [id, { name, text: packet }] of packets.entries()) {
    const fault = faultOf(name, replies.get(id));
    if (fault === null) report.answered += 1;
    else note(fault, [packet, JSON.stringify(replies.get(id))]);
  }
}

/** Resolves when all are answered, or the connection is cut, or nothing comes any more. */
function collectReplies(peer: RawPeer, packets: readonly string[]): Promise<Map<number, unknown>> {
  return new Promise((resolve) => {
    const replies = new Map<number, unknown>();
    const settle = (): void => {
      clearTimeout(timer);
      peer.onText = () => {};
      resolve(replies);
    };
    const timer = setTimeout(settle, ANSWER_MAX_MS);
    void peer.closed.then(settle);
    peer.onText = (message) => {
      const [, id, body] = /^43(\d+)(\[.*\])$/s.exec(message) ?? [];
      if (id === undefined) return;
      replies.set(Number(id), JSON.parse(body!)[0]);
      if (replies.size === packets.length) settle();
    };
    void peer.write(Buffer.concat(packets.map(text)));
  });
}

function faultOf(name: RequestName, reply: unknown): string | null {
  if (typeof reply !== 'object' || reply === null) return 'a request was not answered';
  if ('ok' in reply && reply.ok === true) {
    const { data } = reply as { data?: unknown };
    return requests[name].data.safeParse(data).success ? null : 'an answer has not the shape of its request';
  }
  const { error } = reply as { error?: unknown };
  const parsed = errorObject.safeParse(error);
  if (!parsed.success) return 'a refusal is no error object';
  return parsed.data.code === 'INTERNAL' ? 'a fault of the server' : null;
}

const placeholder = '{"_placeholder":true,"num":0}';

/** Packets as clients write them, each in its frame. */
const VALID_FRAMES: readonly Buffer[] = [
  ...requestNames.map((name) => text(`421${JSON.stringify([name, samples.get(name)])}`)),
  text('42["keyStatus",{}]'),
  text('431[{"processed":[]}]'),
  text('40{"token":"x"}'),
  text('40/other,{}'),
  text('41'),
  text('44{"message":"x"}'),
  text('2'),
  text('3'),
  text('5'),
  text('6'),
  text('bAAAA'),
  Buffer.concat([text(`451-1["keyStatus",${placeholder}]`), frame(OPCODE.binary, Buffer.from('attached'))]),
  Buffer.concat([text(`461-1[${placeholder}]`), frame(OPCODE.binary, Buffer.from('attached'))]),
  Buffer.concat([
    frame(OPCODE.text, '421["key', { isLast: false }),
    frame(OPCODE.continuation, 'Status",{}]'),
  ]),
  frame(OPCODE.ping, 'ping'),
  frame(OPCODE.pong, 'pong'),
  frame(OPCODE.close, Buffer.from([3, 232])),
];

const FRAMES_PER_CONNECTION = 20;

/** Bytes that were frames once: the connection is served on or cut, and nothing else. */
async function fuzzFrames(options: Batch & { url: string; token: string }): Promise<void> {
  const { url, token, cases, chance, report } = options;
  for (let tried = 0; tried < cases; tried += FRAMES_PER_CONNECTION) {
    const count = Math.min(FRAMES_PER_CONNECTION, cases - tried);
    // Every fourth has shown no token.
    const isStranger = chance.below(4) === 0;
    const peer = isStranger ? await openPeer(url) : await openAdmittedPeer(url, token);
    if (isStranger) await peer.write(upgradeRequest(url));
    const written: Buffer[] = [];
    for (let n = 0; n < count; n++) {
      const half = chance.below(2) === 0;
      const bytes = half
        ? text(mutatedBytes(payloadOf(chance.pick(VALID_FRAMES)), chance).toString('latin1'))
        : mutatedBytes(chance.pick(VALID_FRAMES), chance);
      written.push(bytes);
    }
    await peer.write(Buffer.concat(written));
    // Every request is answered in turn: this one comes after the others, or in the middle of a frame that never ends.
    await peer.write(text('42777["keyStatus",{}]'));
    const outcome = await Promise.race([
      peer.seen('43777[').then((isServed) => (isServed ? 'answered' : 'cut')),
      silence(peer),
    ]);
    report[outcome] += count;
    // One who waits in the middle of a frame is cut when his time is over; here he leaves.
    peer.destroy();
  }
}

/** What is announced and not sent leaves the connection waiting for the rest: it counts as cut. */
function silence(peer: RawPeer): Promise<'cut'> {
  return new Promise((resolve) => {
    let last = peer.received.length;
    const timer = setInterval(() => {
      if (peer.received.length !== last && !peer.isCut) {
        last = peer.received.length;
        return;
      }
      clearInterval(timer);
      resolve('cut');
    }, HTTP_PATIENCE_MS);
  });
}

function payloadOf(frames: Buffer): Buffer {
  const length = frames[1]! & 0x7f;
  return frames.subarray(length < 126 ? 6 : length === 126 ? 8 : 14);
}

/** Requests as they are, with something wrong in the body's structure or anywhere in the bytes. */
async function fuzzHttp(options: Batch & { url: string; token: string }): Promise<void> {
  const { url, token, cases, chance, note, report } = options;
  const { hostname, port } = new URL(url);
  for (let tried = 0; tried < cases; tried++) {
    const route = chance.pick(Object.values(httpRoutes));
    const valid = 'body' in route ? sampleOf(route.body) : null;
    const isWhole = chance.below(2) === 0;
    const body = valid === null ? '' : JSON.stringify(isWhole ? mutatedValue(valid, chance) : valid);
    const head = [
      `${route.method} ${route.path.replace(':userId', 'bystander')} HTTP/1.1`,
      'Host: x',
      `Authorization: Bearer ${token}`,
      ...(body === ''
        ? []
        : ['Content-Type: application/json', `Content-Length: ${Buffer.byteLength(body)}`]),
      'Connection: close',
    ];
    const whole = Buffer.from(`${head.join('\r\n')}\r\n\r\n${body}`);
    const bytes = isWhole ? whole : mutatedBytes(whole, chance);
    const answer = await exchange({ host: hostname, port: Number(port), bytes });
    if (answer === null) note('an HTTP connection did not end', [bytes.toString('latin1')]);
    else {
      report[answer === '' ? 'cut' : 'answered'] += 1;
      const [, status = '0'] = /^HTTP\/1\.1 (\d{3})/.exec(answer) ?? [];
      if (Number(status) >= 500) note(`HTTP ${status}`, [bytes.toString('latin1'), answer]);
    }
  }
}

/** @returns what came before the connection ended; null where it did not end */
function exchange(to: { host: string; port: number; bytes: Buffer }): Promise<string | null> {
  return new Promise((resolve) => {
    let received = '';
    const socket = connect({ host: to.host, port: to.port, noDelay: true }, () => socket.write(to.bytes));
    const patience = setTimeout(() => socket.end(), HTTP_PATIENCE_MS);
    const limit = setTimeout(() => {
      resolve(null);
      socket.destroy();
    }, ANSWER_MAX_MS);
    socket.on('data', (chunk) => {
      received += chunk.toString('latin1');
    });
    socket.on('error', () => {});
    socket.once('close', () => {
      clearTimeout(patience);
      clearTimeout(limit);
      resolve(received);
    });
  });
}

export interface Chance {
  /** A whole number from 0 to below `bound`. */
  below(bound: number): number;
  pick<Item>(items: readonly Item[]): Item;
}

/** Numbers that follow from the seed alone (mulberry32). */
export function createChance(seed: number): Chance {
  let state = Math.imul(seed + 1, 0x9e3779b1) >>> 0;
  const next = (): number => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
  const below = (bound: number): number => Math.floor(next() * bound);
  return { below, pick: (items) => items[below(items.length)]! };
}

const ODD_VALUES: readonly unknown[] = [
  null,
  true,
  0,
  -1,
  1,
  1.5,
  127,
  128,
  255,
  256,
  2 ** 31,
  2 ** 32 - 1,
  2 ** 32,
  2 ** 48,
  2 ** 53,
  1e308,
  -1e308,
  '',
  ' ',
  '0',
  '\0',
  '\ud800',
  'bystander',
  '__proto__',
  'a'.repeat(129),
  'A'.repeat(44),
  '='.repeat(44),
  [],
  [[]],
  [null],
  {},
  { length: 1 },
  { toString: 1, valueOf: null },
  { _placeholder: true, num: 0 },
  { type: 'Buffer', data: [1, 2, 3] },
];
const ODD_NAMES = [
  '__proto__',
  'constructor',
  'prototype',
  'privateKey',
  'userId',
  'sub',
  'toJSON',
  'then',
  '',
  '0',
  '\ud800',
];

/** A copy with one to three things wrong, or, by chance, with none. */
function mutatedValue(value: unknown, chance: Chance): unknown {
  let mutated = value;
  for (let times = chance.below(4); times > 0; times--) mutated = mutatedOnce(mutated, chance);
  return mutated ?? null;
}

function mutatedOnce(value: unknown, chance: Chance): unknown {
  const places = allPlaces(value);
  const path = chance.pick(places);
  const at = valueAt(value, path);
  switch (chance.below(8)) {
    case 0:
    case 1:
      return withValueAt(value, path, chance.pick(ODD_VALUES));
    case 2:
      return typeof at === 'string' ? withValueAt(value, path, mutatedText(at, chance)) : value;
    case 3:
      return typeof at === 'number'
        ? withValueAt(value, path, at + chance.pick([-1, 1, 0.5, 2 ** 31, 2 ** 53]))
        : withValueAt(value, path, [at]);
    case 4: {
      // Another field's value, of another kind.
      return withValueAt(value, path, valueAt(value, chance.pick(places)));
    }
    case 5: {
      if (!Array.isArray(at)) return value;
      const length = chance.pick([0, 2, 101, 1001, 2001]);
      return withValueAt(
        value,
        path,
        Array.from({ length }, (_, n) => (chance.below(2) === 0 ? at[0] : n)),
      );
    }
    case 6: {
      const { objects } = placesOf(value);
      if (objects.length === 0) return value;
      return withFieldAt(value, chance.pick(objects), chance.pick(ODD_NAMES), chance.pick(ODD_VALUES));
    }
    default: {
      const [last] = path.slice(-1);
      if (typeof last !== 'string') return value;
      const holder = { ...(valueAt(value, path.slice(0, -1)) as object) } as Record<string, unknown>;
      delete holder[last];
      return withValueAt(value, path.slice(0, -1), holder);
    }
  }
}

function allPlaces(value: unknown, path: Path = []): Path[] {
  if (typeof value !== 'object' || value === null) return [path];
  const entries: [string | number, unknown][] = Array.isArray(value)
    ? value.slice(0, 3).map((item, index) => [index, item])
    : Object.entries(value);
  return [path, ...entries.flatMap(([name, inner]) => allPlaces(inner, [...path, name]))];
}

function valueAt(value: unknown, path: Path): unknown {
  return path.reduce<unknown>((at, step) => (at as Record<string | number, unknown>)[step], value);
}

function mutatedText(value: string, chance: Chance): string {
  const at = chance.below(value.length + 1);
  const odd = chance.pick([
    '\0',
    '\ud800',
    ' ',
    '\n',
    '=',
    '/',
    '_',
    "'",
    '"',
    'é',
    '😀',
    '\u2028',
    'A',
    '5',
    '',
  ]);
  return chance.below(2) === 0
    ? value.slice(0, at) + odd + value.slice(at)
    : value.slice(0, at) + odd + value.slice(at + 1);
}

/** One to four bytes, or stretches of them, changed, lost, doubled or moved. */
function mutatedBytes(bytes: Buffer, chance: Chance): Buffer {
  let mutated = Buffer.from(bytes);
  for (let times = 1 + chance.below(4); times > 0; times--) {
    const at = chance.below(mutated.length + 1);
    const length = chance.pick([1, 1, 1, 2, 4, 16, 100]);
    const before = mutated.subarray(0, at);
    const after = mutated.subarray(at);
    switch (chance.below(6)) {
      case 0: {
        if (at < mutated.length) mutated[at]! ^= 1 << chance.below(8);
        break;
      }
      case 1: {
        if (at < mutated.length)
          mutated[at] = chance.pick([0, 1, 0x20, 0x22, 0x2d, 0x5b, 0x7f, 0x80, 0xc0, 0xff]);
        break;
      }
      case 2:
        mutated = Buffer.concat([before, after.subarray(length)]);
        break;
      case 3:
        mutated = Buffer.concat([before, after.subarray(0, length), after]);
        break;
      case 4:
        mutated = Buffer.concat([
          before,
          Buffer.from(Array.from({ length }, () => chance.below(256))),
          after,
        ]);
        break;
      default:
        mutated = Buffer.concat([after, before]);
    }
  }
  return mutated;
}
