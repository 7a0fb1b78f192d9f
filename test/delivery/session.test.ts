/** One session against a store that answers when it is told: orders of events that sockets can't bring about at will. */
import { beforeEach, describe, expect, it } from 'vitest';
import { createDeletedLately } from '../../src/delivery/deleted-lately.ts';
import { noReports } from '../../src/delivery/reports.ts';
import { createSession, type ServedSocket, type Session } from '../../src/delivery/session.ts';
import { contentBytesOf } from '../../src/delivery/window.ts';
import { silentLog } from '../../src/lib/log.ts';
import type { DeviceProof, MessageStore, Page, QueuedEnvelope } from '../../src/ports/message-store.ts';
import { GatewayError } from '../../src/protocol/errors.ts';
import type { MessagesAcknowledgement } from '../../src/protocol/events.ts';
import { createManualClock, type ManualClock } from '../support/manual-clock.ts';

const BOB = { userId: 'bob', deviceId: 1 };

let proof: DeviceProof;
let queue: QueuedEnvelope[];
/** While set, that question waits; what it found was found when it was asked. */
let waiting: Partial<Record<'serve' | 'read' | 'prove' | 'acknowledge' | 'bounce', Promise<void> | null>>;
/** What the next read can't hand out. */
let unreadable: Page['unreadable'];
let isKnown: boolean;
let reads: number;
let events: string[];
let warnings: string[];
let settled: MessagesAcknowledgement[];
let answers: ((acknowledgement: MessagesAcknowledgement | null) => void)[];
let socketPushed: () => void;
let clock: ManualClock;
let session: Session;

const messages = {
  async serve(_: unknown, keyVersion: number) {
    const result = {
      proof: { ...proof },
      served: proof.keyVersion === keyVersion,
      pendingCount: queue.length,
      newestSequence: queue.at(-1)?.sequence ?? 0,
    };
    await waiting.serve;
    return isKnown ? result : null;
  },
  async read(
    _: unknown,
    {
      inFlight,
      envelopesMax,
      bytesMax,
    }: { inFlight: readonly number[]; envelopesMax: number; bytesMax: number },
  ) {
    reads += 1;
    const found = queue.filter((envelope) => !inFlight.includes(envelope.sequence));
    let bytes = 0;
    const fitting = found.slice(0, envelopesMax).filter((envelope, nth) => {
      bytes += contentBytesOf(envelope);
      return nth === 0 || bytes <= bytesMax;
    });
    const page = {
      proof: { ...proof },
      envelopes: fitting,
      unreadable,
      oldestSequence: queue[0]?.sequence ?? null,
      nextDueAtMs: null,
      more: found.length > fitting.length,
    };
    await waiting.read;
    return isKnown ? page : null;
  },
  async prove() {
    const result = { ...proof };
    await waiting.prove;
    return isKnown ? result : null;
  },
  async putOff() {
    return { nextDueAtMs: null, bounced: false };
  },
  async bounce() {
    unreadable = [];
    await waiting.bounce;
  },
  async acknowledge(_: unknown, sequences: readonly number[]) {
    const before = queue.length;
    queue = queue.filter((envelope) => !sequences.includes(envelope.sequence));
    const deleted = before - queue.length;
    await waiting.acknowledge;
    return deleted;
  },
} as Partial<MessageStore> as MessageStore;

function put(sequence: number): QueuedEnvelope {
  const envelope: QueuedEnvelope = {
    sequence,
    id: `id ${sequence}`,
    messageId: `message ${sequence}`,
    storedAtMs: 0,
    body: { kind: 'message', sender: { userId: 'alice', deviceId: 1 }, type: 3, content: 'eA==' },
  };
  queue.push(envelope);
  return envelope;
}

/** One whose content is as long as any may be. */
function putLarge(sequence: number): QueuedEnvelope {
  const envelope = put(sequence);
  Object.assign(envelope.body, { content: 'A'.repeat(128 * 1024) });
  return envelope;
}

/** Stores a message and hands it over, as its sender's request does. @returns whether the session took it */
function putAndHandOver(sequence: number, readCount = session.readCount()): boolean {
  const others = queue.map((envelope) => envelope.sequence);
  const envelope = put(sequence);
  const { keyVersion, identityVersion, fence } = proof;
  const stored = { deviceId: 1, sequence, id: envelope.id, keyVersion, identityVersion, fence };
  return readCount !== null && session.handOver(envelope, { ...stored, waiting: others }, readCount);
}

function gate(): { promise: Promise<void>; open(): void } {
  let open = (): void => {};
  const promise = new Promise<void>((resolve) => {
    open = resolve;
  });
  return { promise, open };
}

/** How many envelopes each page had. */
function pushed(): number[] {
  return events.filter((event) => event.startsWith('messages')).map((event) => event.split(' ').length - 1);
}

/** Resolves when everything that was started and waits for nobody has ended. */
async function quiet(): Promise<void> {
  for (let i = 0; i < 5; i++) await new Promise((resolve) => setImmediate(resolve));
}

const rotated = (keyVersion: number) => async () => {
  proof.keyVersion = keyVersion;
  return { rotation: true, data: { keyVersion } };
};

beforeEach(() => {
  proof = {
    keyVersion: 1,
    identityVersion: 1,
    hasKeys: true,
    fence: 1,
    availableCounts: { ec: 100, pq: 100 },
    offersPq: true,
    countVersion: 1,
    lowNoticeVersion: 0,
    revokedAtMs: null,
  };
  queue = [];
  unreadable = [];
  waiting = {};
  isKnown = true;
  reads = 0;
  events = [];
  warnings = [];
  settled = [];
  answers = [];
  socketPushed = () => {};
  clock = createManualClock();
  const socket: ServedSocket = {
    isOpen: () => true,
    push: (name, payload) => events.push(`${name} ${Object.values(payload).join(' ')}`.trim()),
    pushMessages: (envelopes) =>
      new Promise((resolve) => {
        socketPushed();
        events.push(`messages ${envelopes.map((envelope) => envelope.id.slice(3)).join(' ')}`);
        answers.push(resolve);
      }),
    close: () => events.push('closed'),
    displace: () => events.push('cut'),
  };
  session = createSession(
    {
      messages,
      bounces: { settle: async () => {} },
      clock,
      log: { ...silentLog, warn: (_, text) => void warnings.push(text) },
      lowThreshold: 10,
      reports: { ...noReports, settled: (_, acknowledgement) => void settled.push(acknowledgement) },
      deleted: createDeletedLately(),
      forget: () => {},
    },
    { device: BOB, token: { issuedAtMs: 0 }, fence: 1, lowNoticeVersion: 0, socket },
  );
  session.validated(1);
});

describe('a session', () => {
  it('looks at what its own change has left behind a closed gate', async () => {
    await session.change(async () => {
      proof.availableCounts = { ec: 3, pq: 0 };
      proof.lowNoticeVersion = 7;
      return { rotation: false, data: { keyVersion: 2 } };
    });
    await quiet();
    expect(events).toEqual([expect.stringMatching(/^preKeysLow 3 /)]);
  });

  it('reads once for an opening, and once for a rotation', async () => {
    await session.ready(null);
    await quiet();
    expect([reads, ...events]).toEqual([1, 'queueEmpty 0']);
    await session.change(async () => {
      proof.keyVersion = 2;
      return { rotation: true, data: { keyVersion: 2 } };
    });
    await quiet();
    expect([reads, ...events]).toEqual([2, 'queueEmpty 0']);
  });

  it('pushes nothing of a page whose proof is of other keys than the gate’s', async () => {
    await session.ready(null);
    await quiet();
    put(1);
    proof.keyVersion = 2;
    session.look();
    await quiet();
    expect(events).toEqual(['queueEmpty 0', 'gateClosed keysRotated 2']);
  });

  it('pushes a page that was proven before the change, since its read began before it', async () => {
    await session.ready(null);
    await quiet();
    put(1);
    const read = gate();
    waiting.read = read.promise;
    session.look();
    proof.keyVersion = 2;
    read.open();
    waiting.read = null;
    await quiet();
    expect(events.slice(0, 2)).toEqual(['queueEmpty 0', 'messages 1']);
  });

  it('says queueEmpty with all that was processed, also where the store was quicker than its answer', async () => {
    put(1);
    put(2);
    await session.ready(null);
    await quiet();
    const acknowledge = gate();
    waiting.acknowledge = acknowledge.promise;
    answers[0]!({ processed: ['id 1', 'id 2'] });
    await quiet();
    session.look();
    await quiet();
    expect(events).toEqual(['messages 1 2']);
    acknowledge.open();
    await quiet();
    expect(events).toEqual(['messages 1 2', 'queueEmpty 2']);
  });

  it('drops a page that was read for an opening that is over, and reads anew', async () => {
    await session.ready(null);
    await quiet();
    put(1);
    session.look();
    await quiet();
    put(2);
    const read = gate();
    waiting.read = read.promise;
    // It leaves out 1, which is in flight, and must not be taken for the next opening’s first page.
    session.look();
    waiting.read = null;
    proof.keyVersion = 2;
    session.validated(2);
    await session.ready(null);
    read.open();
    await quiet();
    expect(events).toEqual(['queueEmpty 0', 'messages 1', 'gateClosed keysRotated 2', 'messages 1 2']);
    for (const answer of answers) answer({ processed: ['id 1', 'id 2'] });
    await quiet();
    expect(events.slice(4)).toEqual(['queueEmpty 2']);
  });

  it('takes a clientReady at its open gate for a new count, not for a new window', async () => {
    for (let sequence = 1; sequence <= 300; sequence++) put(sequence);
    await Promise.all(Array.from({ length: 8 }, () => session.ready(null)));
    await quiet();
    await session.ready(null);
    await quiet();
    expect(pushed()).toEqual([100, 100, 56]);
    for (const answer of answers) answer({ processed: queue.map((envelope) => envelope.id) });
    await quiet();
    expect(pushed()).toEqual([100, 100, 56, 44]);
    answers.at(-1)!({ processed: queue.map((envelope) => envelope.id) });
    await quiet();
    expect(events.at(-1)).toBe('queueEmpty 300');
  });

  it('closes the socket of a client that is silent, however often it says that it is ready', async () => {
    put(1);
    await session.ready(null);
    await quiet();
    await session.ready(null);
    await quiet();
    answers.shift()!(null);
    await quiet();
    expect(events).toEqual(['messages 1', 'closed']);
  });

  it('says queueEmpty for the clientReady that came last, not by a page that was read before it', async () => {
    await session.ready(null);
    await quiet();
    const read = gate();
    waiting.read = read.promise;
    session.look();
    put(1);
    waiting.read = null;
    await session.ready(null);
    read.open();
    await quiet();
    expect(events).toEqual(['queueEmpty 0', 'messages 1']);
    answers[0]!({ processed: ['id 1'] });
    await quiet();
    expect(events.slice(2)).toEqual(['queueEmpty 1']);
  });

  it('says queueEmpty as soon as nothing is left of what waited, however steadily more comes', async () => {
    put(1);
    await session.ready(null);
    await quiet();
    put(2);
    session.look();
    await quiet();
    const wasRead = messages.read;
    let sequence = 2;
    // More than a page is always there.
    messages.read = async (...asked) => {
      for (let i = 0; i < 100; i++) put(++sequence);
      return await wasRead(...asked);
    };
    answers[0]!({ processed: ['id 1'] });
    await quiet();
    messages.read = wasRead;
    expect(events.slice(0, 3)).toEqual(['messages 1', 'messages 2', 'queueEmpty 1']);
  });

  it('says queueEmpty when what waited is processed, also of a page that holds more', async () => {
    put(1);
    const wasRead = messages.read;
    messages.read = async (...asked) => {
      if (queue.length < 2) put(2);
      return await wasRead(...asked);
    };
    await session.ready(null);
    await quiet();
    messages.read = wasRead;
    expect(events).toEqual(['messages 1 2']);
    answers[0]!({ processed: ['id 1'] });
    await quiet();
    expect(events).toContain('queueEmpty 1');
  });

  it('tells of an acknowledgement what it says of the page, whatever else it names', async () => {
    put(1);
    put(2);
    put(3);
    await session.ready(null);
    await quiet();
    answers[0]!({
      processed: ['id 1', 'nonsense', 'id 1', 'id 9'],
      failed: [{ id: 'id 2', reason: 'undecryptable' }],
    });
    await quiet();
    const failed = [
      { id: 'id 2', reason: 'undecryptable' },
      { id: 'id 3', reason: 'temporary' },
    ];
    expect(settled).toEqual([{ processed: ['id 1'], failed }]);
  });

  it('counts what it pushed towards the window also when the gate was closed, until it is settled', async () => {
    for (let sequence = 1; sequence <= 200; sequence++) put(sequence);
    await session.ready(null);
    await quiet();
    for (const keyVersion of [2, 3, 4]) {
      proof.keyVersion = keyVersion;
      session.look();
      await quiet();
      session.validated(keyVersion);
      await session.ready(null);
      await quiet();
    }
    expect(pushed()).toEqual([100, 100, 56]);
    // Those that were pushed before the gate was closed may be silent: their time only makes room.
    answers[0]!(null);
    await quiet();
    expect(pushed()).toEqual([100, 100, 56, 100]);
    expect(events).not.toContain('closed');
  });

  it('reads on when an acknowledgement has come, before it is stored, but no more than a window of those', async () => {
    for (let sequence = 1; sequence <= 900; sequence++) put(sequence);
    await session.ready(null);
    await quiet();
    expect(pushed()).toEqual([100, 100, 56]);
    const storing = gate();
    waiting.acknowledge = storing.promise;
    const ids = events
      .filter((event) => event.startsWith('messages'))
      .map((event) => event.split(' ').slice(1));
    const acknowledge = (page: number) => answers[page]!({ processed: ids[page]!.map((id) => `id ${id}`) });
    acknowledge(0);
    await quiet();
    expect(pushed()).toEqual([100, 100, 56, 100]);
    acknowledge(1);
    await quiet();
    expect(pushed()).toEqual([100, 100, 56, 100, 100]);
    expect(session.window()).toMatchObject({ count: 256, isFull: true });
    acknowledge(2);
    await quiet();
    expect(pushed()).toEqual([100, 100, 56, 100, 100]);
    // What is acknowledged is the client's no more, though it counts until it is stored.
    expect(session.window()).toMatchObject({ count: 200, isFull: false });
    expect(session.reader().inFlight).toBe(456);
    waiting.acknowledge = null;
    storing.open();
    await quiet();
    expect(pushed()).toEqual([100, 100, 56, 100, 100, 56]);
  });

  it('tries again where a page can’t be written', async () => {
    put(1).storedAtMs = Number.NaN;
    await session.ready(null);
    await quiet();
    expect([pushed(), session.window().count]).toEqual([[], 0]);
    queue[0]!.storedAtMs = 0;
    await clock.advance(1_000);
    await quiet();
    expect(pushed()).toEqual([1]);
  });

  it('asks a store that is away less and less often, says nothing of it, and goes on when it is back', async () => {
    await session.ready(null);
    await quiet();
    put(1);
    const before = reads;
    const away = Promise.reject(new GatewayError('UNAVAILABLE'));
    away.catch(() => {});
    waiting.read = away;
    session.look();
    await clock.advance(60_000);
    // At once, after some 1 and 2 s, and every 4 s from then on; connections differ by a half less or more.
    expect(reads - before).toBeGreaterThan(10);
    expect(reads - before).toBeLessThan(35);
    expect(warnings).toEqual([]);
    waiting.read = null;
    await clock.advance(6_000);
    await quiet();
    expect(pushed()).toEqual([1]);

    const broken = Promise.reject(new Error('broken'));
    broken.catch(() => {});
    waiting.read = broken;
    const reset = reads;
    session.look();
    await clock.advance(1_500);
    expect(reads - reset).toBeGreaterThan(1);
    expect(warnings[0]).toBe('looking at a device failed');
  });

  it('pushes what can be read before what can’t be is brought home', async () => {
    put(2);
    unreadable = [{ sequence: 1, reason: 'EXPIRED' }];
    const bouncing = gate();
    waiting.bounce = bouncing.promise;
    await session.ready(null);
    await quiet();
    expect(pushed()).toEqual([1]);
    put(3);
    bouncing.open();
    await quiet();
    expect(pushed()).toEqual([1, 1]);
  });

  it('asks for the next page before it pushes the last', async () => {
    for (let sequence = 1; sequence <= 150; sequence++) put(sequence);
    const reading = gate();
    waiting.read = reading.promise;
    await session.ready(null);
    await quiet();
    const readsAtPush: number[] = [];
    socketPushed = () => readsAtPush.push(reads);
    reading.open();
    await quiet();
    expect(pushed()).toEqual([100, 50]);
    expect(readsAtPush[0]).toBeGreaterThan(1);
  });

  it('answers a clientReady that an own rotation overtook with an opening that delivers', async () => {
    await session.ready(null);
    await quiet();
    const serve = gate();
    waiting.serve = serve.promise;
    const again = session.ready(null);
    await session.change(rotated(2));
    await quiet();
    serve.open();
    expect(await again).toMatchObject({ keyVersion: 1 });
    await quiet();
    expect(events).toEqual(['queueEmpty 0', 'queueEmpty 0']);
    put(1);
    session.look();
    await quiet();
    expect(events.at(-1)).toBe('messages 1');
  });

  it('refuses a clientReady during which a newer key set was validated: its gate is not open', async () => {
    const serve = gate();
    waiting.serve = serve.promise;
    const ready = session.ready(null);
    proof.keyVersion = 2;
    session.validated(2);
    serve.open();
    await expect(ready).rejects.toMatchObject({ code: 'KEYS_OUT_OF_SYNC' });
    put(1);
    session.look();
    await quiet();
    expect(events).toEqual([]);
    waiting.serve = null;
    await session.ready(null);
    await quiet();
    expect(events).toEqual(['messages 1']);
  });

  it('stays open over own rotations that end in another order than they were made in', async () => {
    await session.ready(null);
    await quiet();
    const late = gate();
    const slow = session.change(async () => {
      await late.promise;
      return { rotation: true, data: { keyVersion: 2 } };
    });
    await session.change(rotated(3));
    session.look();
    await quiet();
    late.open();
    await slow;
    put(1);
    session.look();
    await quiet();
    expect(events).toEqual(['queueEmpty 0', 'messages 1']);
  });

  it('pushes nothing of a page that comes back when it was paused meanwhile, and all of it when it resumes', async () => {
    await session.ready(null);
    await quiet();
    put(1);
    const read = gate();
    waiting.read = read.promise;
    session.look();
    session.pause();
    read.open();
    waiting.read = null;
    await quiet();
    expect(events).toEqual(['queueEmpty 0']);
    session.resume({ issuedAtMs: 0 });
    await quiet();
    expect(events).toEqual(['queueEmpty 0', 'messages 1']);
  });

  it('pushes nothing after it ended, whatever comes back late', async () => {
    const serve = gate();
    const read = gate();
    await session.ready(null);
    await quiet();
    put(1);
    waiting = { serve: serve.promise, read: read.promise };
    session.look();
    const ready = session.ready(null);
    session.detach();
    serve.open();
    read.open();
    await ready.catch(() => {});
    session.look();
    await quiet();
    expect(events).toEqual(['queueEmpty 0']);
  });

  it('tells that it is displaced when a proof names a newer connection, and pushes nothing of that page', async () => {
    await session.ready(null);
    await quiet();
    put(1);
    proof.fence = 2;
    session.look();
    await quiet();
    expect(events).toEqual(['queueEmpty 0', 'displaced', 'cut']);
  });

  it('says that the server was restored when the number that it was served under is gone, and serves it anew', async () => {
    await session.ready(null);
    await quiet();
    put(1);
    proof.fence = 0;
    session.look();
    await quiet();
    expect(events).toEqual(['queueEmpty 0', 'gateClosed serverRestored 1']);
    await expect(session.ready(null)).rejects.toMatchObject({ code: 'KEYS_NOT_VALIDATED' });
    session.validated(1);
    proof.fence = 1;
    await session.ready(null);
    await quiet();
    expect(events.slice(2)).toEqual(['messages 1']);
  });

  it.each([
    ['a look', () => session.look()],
    ['a clientReady', () => session.ready(null).catch((error) => events.push(error.code))],
  ])('says that the server was restored when %s finds its device unknown', async (name, find) => {
    await session.ready(null);
    await quiet();
    isKnown = false;
    await find();
    await quiet();
    expect(events.slice(0, 2)).toEqual(['queueEmpty 0', 'gateClosed serverRestored 0']);
    expect(events.slice(2)).toEqual(name === 'a clientReady' ? ['KEYS_NOT_UPLOADED'] : []);
    expect(await session.hasKeys()).toBe(false);
    expect(session.gate()).toEqual({ name: 'connected' });
  });

  it('takes no proof from before it was served for a restored server', async () => {
    proof.fence = 0;
    const prove = gate();
    waiting.prove = prove.promise;
    session.look();
    proof.fence = 1;
    waiting.prove = null;
    await session.ready(null);
    prove.open();
    await quiet();
    expect(events).toEqual(['queueEmpty 0']);
  });

  it('believes no look that began before its own reset, nor a question of that time', async () => {
    const prove = gate();
    waiting.prove = prove.promise;
    session.look();
    const asked = session.hasKeys();
    waiting.prove = null;
    await session.change(async () => {
      proof = { ...proof, keyVersion: 2, hasKeys: false };
      return { rotation: false, data: { keyVersion: 2 } };
    });
    // The look that follows is not answered yet.
    waiting.prove = new Promise(() => {});
    prove.open();
    await asked;
    await quiet();
    const answer = await Promise.race([session.hasKeys(), quiet().then(() => 'it asks')]);
    expect(answer).toBe('it asks');
  });

  it('closes the socket of a client that is silent, but not for a page of an opening that is over', async () => {
    await session.ready(null);
    await quiet();
    put(1);
    session.look();
    await quiet();
    proof.keyVersion = 2;
    session.look();
    await quiet();
    answers.shift()!(null);
    await quiet();
    expect(events).toEqual(['queueEmpty 0', 'messages 1', 'gateClosed keysRotated 2']);
    session.validated(2);
    await session.ready(null);
    await quiet();
    answers.shift()!(null);
    await quiet();
    expect(events.slice(3)).toEqual(['messages 1', 'closed']);
  });

  it('drops a page that was read for an opening that is over, also where the next is of the same version', async () => {
    await session.ready(null);
    await quiet();
    put(1);
    session.look();
    await quiet();
    put(2);
    const read = gate();
    waiting.read = read.promise;
    // It leaves out 1, which is in flight.
    session.look();
    waiting.read = null;
    isKnown = false;
    await expect(session.ready(null)).rejects.toMatchObject({ code: 'KEYS_NOT_UPLOADED' });
    isKnown = true;
    session.validated(1);
    await session.ready(null);
    read.open();
    await quiet();
    expect(events).toEqual(['queueEmpty 0', 'messages 1', 'gateClosed serverRestored 0', 'messages 1 2']);
  });

  it('takes no look that began before its device was known for a restored server', async () => {
    isKnown = false;
    session.look();
    await quiet();
    expect(session.gate()).toEqual({ name: 'connected' });
    const prove = gate();
    waiting.prove = prove.promise;
    session.look();
    waiting.prove = null;
    // Uploaded and validated meanwhile.
    session.validated(1);
    prove.open();
    await quiet();
    isKnown = true;
    await session.ready(null);
    await quiet();
    expect(events).toEqual(['queueEmpty 0']);
  });

  it('forgets a validation of newer keys than the gate’s when the server was restored', async () => {
    await session.ready(null);
    await quiet();
    proof.fence = 0;
    session.validated(2);
    await quiet();
    expect(events).toEqual(['queueEmpty 0', 'gateClosed serverRestored 1']);
    proof.fence = 1;
    session.validated(1);
    expect(await session.ready(null)).toMatchObject({ keyVersion: 1 });
  });

  it('closes its gate when newer keys are validated on its socket, though no notice of the change has come', async () => {
    await session.ready(null);
    await quiet();
    proof.keyVersion = 2;
    session.validated(2);
    await quiet();
    expect(events).toEqual(['queueEmpty 0', 'gateClosed keysRotated 2']);
  });

  it('hears of a change of its keys also while it is paused', async () => {
    await session.ready(null);
    await quiet();
    session.pause();
    proof.keyVersion = 2;
    session.look();
    await quiet();
    expect(events).toEqual(['queueEmpty 0', 'gateClosed keysRotated 2']);
  });

  it('says queueEmpty for no older clientReady once another was answered', async () => {
    put(1);
    await session.ready(null);
    await quiet();
    const read = gate();
    waiting.read = read.promise;
    answers[0]!({ processed: ['id 1'] });
    await quiet();
    put(2);
    waiting.read = null;
    await session.ready(null);
    read.open();
    await quiet();
    expect(events).toEqual(['messages 1', 'messages 2']);
    answers[1]!({ processed: ['id 2'] });
    await quiet();
    expect(events.slice(2)).toEqual(['queueEmpty 1']);
  });

  it('counts the last message that waited, where the store was quicker than its answer', async () => {
    put(1);
    await session.ready(null);
    await quiet();
    const acknowledge = gate();
    waiting.acknowledge = acknowledge.promise;
    answers[0]!({ processed: ['id 1'] });
    await quiet();
    session.look();
    await quiet();
    acknowledge.open();
    await quiet();
    expect(events).toEqual(['messages 1', 'queueEmpty 1']);
  });

  describe('whose gate was closed and opened again while a page was in flight', () => {
    beforeEach(async () => {
      put(1);
      await session.ready(null);
      await quiet();
      proof.keyVersion = 2;
      session.look();
      await quiet();
      session.validated(2);
      await session.ready(null);
      await quiet();
      expect(events).toEqual(['messages 1', 'gateClosed keysRotated 2', 'messages 1']);
      events = [];
    });

    it('says queueEmpty without an answer to what was pushed before', async () => {
      answers[1]!({ processed: ['id 1'] });
      await quiet();
      expect(events).toEqual(['queueEmpty 1']);
    });

    it('says queueEmpty with what an answer to it counts for, while that is being stored', async () => {
      const acknowledge = gate();
      waiting.acknowledge = acknowledge.promise;
      answers[0]!({ processed: ['id 1'] });
      await quiet();
      waiting.acknowledge = null;
      answers[1]!({ processed: ['id 1'] });
      await quiet();
      expect(events).toEqual([]);
      acknowledge.open();
      await quiet();
      expect(events).toEqual(['queueEmpty 1']);
    });
  });

  it('tells of an acknowledgement that names more than its page no more than the page', async () => {
    put(1);
    await session.ready(null);
    await quiet();
    answers[0]!({ processed: ['id 1', 'id 9'] });
    await quiet();
    expect(settled).toEqual([{ processed: ['id 1'], failed: [] }]);
  });

  it('is full, and says so, when it holds no room for a message of the full size', async () => {
    for (let sequence = 1; sequence <= 30; sequence++) putLarge(sequence);
    await session.ready(null);
    await quiet();
    const { bytes, isFull } = session.window();
    expect(bytes).toBeLessThanOrEqual(2 * 1024 * 1024);
    expect(isFull).toBe(true);
  });

  it('answers clientReady with UNAVAILABLE where a newer connection is served, and is displaced', async () => {
    proof.fence = 2;
    const wasServed = messages.serve;
    messages.serve = async (...asked) => ({ ...(await wasServed(...asked))!, served: false });
    const ready = session.ready(null);
    messages.serve = wasServed;
    await expect(ready).rejects.toMatchObject({ code: 'UNAVAILABLE' });
    expect(events).toEqual(['displaced', 'cut']);
  });

  it('answers clientReady with FORBIDDEN where its token was revoked, says why, and ends', async () => {
    Object.assign(proof, { keyVersion: 2, hasKeys: false, revokedAtMs: 0 });
    await expect(session.ready(null)).rejects.toMatchObject({ code: 'FORBIDDEN' });
    expect(events).toEqual(['gateClosed deviceRevoked 2', 'closed']);
  });

  it('waits before it offers again what could not be deleted', async () => {
    put(1);
    await session.ready(null);
    await quiet();
    const away = Promise.reject(new GatewayError('UNAVAILABLE'));
    away.catch(() => {});
    waiting.acknowledge = away;
    answers[0]!({ processed: ['id 1'] });
    await quiet();
    waiting.acknowledge = null;
    // Nothing was deleted.
    put(1);
    expect(events).toEqual(['messages 1']);
    await clock.advance(1_500);
    await quiet();
    expect(events).toEqual(['messages 1', 'messages 1']);
    answers[1]!({ processed: ['id 1'] });
    await quiet();
    expect(events.at(-1)).toBe('queueEmpty 1');
  });

  it('leaves no timer behind when it ends', async () => {
    put(1).storedAtMs = Number.NaN;
    await session.ready(null);
    await quiet();
    expect(clock.timerCount()).toBe(1);
    session.detach();
    expect(clock.timerCount()).toBe(0);
  });

  it('sets none after its end, whatever fails late', async () => {
    await session.ready(null);
    await quiet();
    let fail = (_: GatewayError): void => {};
    waiting.read = new Promise((_, reject) => {
      fail = reject;
    });
    session.look();
    session.detach();
    fail(new GatewayError('UNAVAILABLE'));
    await quiet();
    expect(clock.timerCount()).toBe(0);
  });

  it('keeps one timer, for what falls due first', async () => {
    const putOff = messages.putOff;
    const delaysMs = [5_000, 1_000, 3_000];
    messages.putOff = async () => ({ nextDueAtMs: clock.nowMs() + delaysMs.shift()!, bounced: false });
    put(1);
    await session.ready(null);
    await quiet();
    for (let offers = 0; offers < 3; offers++) {
      answers[offers]!({ processed: [], failed: [{ id: 'id 1', reason: 'temporary' }] });
      await quiet();
    }
    messages.putOff = putOff;
    expect(clock.timerCount()).toBe(1);
    const before = reads;
    await clock.advance(1_000);
    expect(reads).toBe(before + 1);
  });

  it('asks anew whether its device has keys after a change of its own', async () => {
    expect(await session.hasKeys()).toBe(true);
    const prove = gate();
    await session.change(async () => {
      proof = { ...proof, keyVersion: 2, hasKeys: false };
      // The look that follows is not answered yet.
      waiting.prove = prove.promise;
      return { rotation: false, data: { keyVersion: 2 } };
    });
    const asked = session.hasKeys();
    prove.open();
    expect(await asked).toBe(false);
  });

  describe('preKeysLow', () => {
    const low = () => events.filter((event) => event.startsWith('preKeysLow'));

    it.each([
      ['both pools are at the threshold', { ec: 10, pq: 10 }, true, 0],
      ['the EC pool is below it', { ec: 9, pq: 10 }, true, 1],
      ['the PQ pool is below it', { ec: 10, pq: 9 }, true, 1],
      ['the PQ pool was never filled', { ec: 10, pq: 0 }, false, 0],
    ])('follows clientReady as it should where %s', async (_, availableCounts, offersPq, times) => {
      Object.assign(proof, { availableCounts, offersPq });
      await session.ready(null);
      await quiet();
      session.look();
      await quiet();
      expect(low()).toHaveLength(times);
    });

    it('comes once for each crossing, though its socket is looked at again', async () => {
      Object.assign(proof, { availableCounts: { ec: 9, pq: 100 }, countVersion: 4, lowNoticeVersion: 4 });
      for (let look = 0; look < 3; look++) {
        session.look();
        await quiet();
      }
      expect(low()).toEqual(['preKeysLow 9 100 10 4']);
      Object.assign(proof, { availableCounts: { ec: 0, pq: 100 }, countVersion: 5, lowNoticeVersion: 5 });
      session.look();
      await quiet();
      expect(low().slice(1)).toEqual(['preKeysLow 0 100 10 5']);
    });

    it('does not come for a pool that went with its key set', async () => {
      Object.assign(proof, { hasKeys: false, availableCounts: { ec: 0, pq: 0 }, lowNoticeVersion: 4 });
      session.look();
      await quiet();
      expect(low()).toEqual([]);
    });
  });

  describe('handed a message that was just stored', () => {
    beforeEach(async () => {
      await session.ready(null);
      await quiet();
      events = [];
      reads = 0;
    });

    it('pushes it without reading it, together with what was stored with it, and looks for nothing more', async () => {
      expect([1, 2].map((sequence) => putAndHandOver(sequence))).toEqual([true, true]);
      await quiet();
      expect(putAndHandOver(3)).toBe(true);
      await quiet();
      expect(events).toEqual(['messages 1 2', 'messages 3']);
      answers.shift()!({ processed: ['id 1', 'id 2'] });
      answers.shift()!({ processed: ['id 3'] });
      await quiet();
      expect([queue, reads]).toEqual([[], 0]);
    });

    it('refuses one that something else may have to precede', async () => {
      put(1);
      expect(putAndHandOver(2)).toBe(false);
      session.look();
      await quiet();
      expect(events).toEqual(['messages 1 2']);
      // Of a longer queue the store tells no more.
      const stored = { deviceId: 1, sequence: 3, id: 'id 3', keyVersion: 1, identityVersion: 1, fence: 1 };
      expect(session.handOver(put(3), { ...stored, waiting: null }, session.readCount()!)).toBe(false);
    });

    it('pushes one whose statement still saw wait what was deleted meanwhile, and no other', async () => {
      expect(putAndHandOver(1)).toBe(true);
      await quiet();
      answers.shift()!({ processed: ['id 1'] });
      await quiet();
      const stored = { deviceId: 1, keyVersion: 1, identityVersion: 1, fence: 1 };
      const handOver = (sequence: number, waiting: number[]): boolean =>
        session.handOver(
          put(sequence),
          { ...stored, sequence, id: `id ${sequence}`, waiting },
          session.readCount()!,
        );
      expect(handOver(3, [1, 2])).toBe(false);
      expect(handOver(4, [1])).toBe(true);
      await quiet();
      expect(events).toEqual(['messages 1', 'messages 4']);
    });

    it.each([
      ['other keys', () => ({ keyVersion: 2 })],
      ['another identity', () => ({ identityVersion: 2 })],
      ['a newer connection', () => ({ fence: 2 })],
    ])('refuses one whose statement saw %s', async (_, change) => {
      Object.assign(proof, change());
      expect(putAndHandOver(1)).toBe(false);
    });

    it('refuses one that a read may have found: it is pushed once', async () => {
      const read = gate();
      waiting.read = read.promise;
      const readCount = session.readCount();
      session.look();
      await quiet();
      expect(session.readCount()).toBeNull();
      expect(putAndHandOver(1, readCount)).toBe(false);
      read.open();
      await quiet();
      // The read is over, and may have begun after the message was stored.
      expect(putAndHandOver(2, readCount)).toBe(false);
      expect(putAndHandOver(3)).toBe(false);
    });

    it('refuses it before queueEmpty, while paused, behind a closed gate and after the end', async () => {
      const readCount = session.readCount();
      session.pause();
      expect(putAndHandOver(1)).toBe(false);
      session.resume({ issuedAtMs: 0 });
      await quiet();
      answers.shift()!({ processed: ['id 1'] });
      await quiet();
      put(2);
      await session.ready(null);
      await quiet();
      expect(events).toEqual(['messages 1', 'messages 2']);
      expect(putAndHandOver(3)).toBe(false);
      proof.keyVersion = 2;
      session.look();
      await quiet();
      expect(putAndHandOver(4)).toBe(false);
      session.detach();
      expect(putAndHandOver(5, readCount)).toBe(false);
    });

    it('refuses one that a read has found in between: it is pushed once', async () => {
      const readCount = session.readCount()!;
      const envelope = put(1);
      session.look();
      await quiet();
      const stored = { deviceId: 1, sequence: 1, id: 'id 1', keyVersion: 1, identityVersion: 1, fence: 1 };
      expect(session.handOver(envelope, { ...stored, waiting: [] }, readCount)).toBe(false);
      await quiet();
      expect(events).toEqual(['messages 1']);
    });

    it('pushes nothing where its keys are found changed before the turn ends', async () => {
      const serve = gate();
      waiting.serve = serve.promise;
      proof.keyVersion = 2;
      const ready = session.ready(null);
      // The statement that stores the message began before the change.
      proof.keyVersion = 1;
      serve.open();
      expect(putAndHandOver(1)).toBe(true);
      await expect(ready).rejects.toMatchObject({ code: 'KEYS_OUT_OF_SYNC' });
      await quiet();
      expect(events).toEqual(['gateClosed keysRotated 2']);
    });

    it('begins another page where 512 KiB would be exceeded', async () => {
      for (let sequence = 1; sequence <= 6; sequence++) {
        const envelope = putLarge(sequence);
        const stored = {
          deviceId: 1,
          sequence,
          id: envelope.id,
          keyVersion: 1,
          identityVersion: 1,
          fence: 1,
        };
        expect(session.handOver(envelope, { ...stored, waiting: [] }, session.readCount()!)).toBe(true);
      }
      await quiet();
      expect(events).toEqual(['messages 1 2 3 4 5', 'messages 6']);
    });

    it('leaves it to the queue where the gate closes before the turn ends', async () => {
      expect(putAndHandOver(1)).toBe(true);
      session.pause();
      await quiet();
      expect(events).toEqual([]);
      session.resume({ issuedAtMs: 0 });
      await quiet();
      expect(events).toEqual(['messages 1']);
    });

    it('refuses more than the window holds, and goes on by reading once there is room', async () => {
      const taken = Array.from({ length: 300 }, (_, index) => {
        const envelope = put(index + 1);
        const stored = {
          deviceId: 1,
          sequence: index + 1,
          id: envelope.id,
          keyVersion: 1,
          identityVersion: 1,
          fence: 1,
        };
        return session.handOver(envelope, { ...stored, waiting: [] }, session.readCount()!);
      });
      expect(taken.filter(Boolean)).toHaveLength(256);
      session.look();
      await quiet();
      expect(pushed()).toEqual([100, 100, 56]);
      answers.shift()!({ processed: Array.from({ length: 100 }, (_, index) => `id ${index + 1}`) });
      await quiet();
      expect(pushed()).toEqual([100, 100, 56, 44]);
    });
  });
});
