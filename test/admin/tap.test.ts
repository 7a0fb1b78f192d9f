/** What this node saw, as viewers are told of it and as a timeline remembers it. */
import { randomBytes, randomUUID } from 'node:crypto';
import { expect, it } from 'vitest';
import { createLiveSockets } from '../../src/admin/live-sockets.ts';
import { createRedactor } from '../../src/admin/redactor.ts';
import { createTap, type Watcher } from '../../src/admin/tap.ts';
import { silentLog } from '../../src/lib/log.ts';
import type { QueuedEnvelope } from '../../src/ports/message-store.ts';
import type { StreamEvent } from '../../src/protocol/inspector/events.ts';
import type { StreamFilter } from '../../src/protocol/inspector/filter.ts';
import { createObserver } from '../../src/requests/observe.ts';
import { createManualClock } from '../support/manual-clock.ts';

/** Steps of messages' lives that are remembered. */
const STEPS_MAX = 4_000;
const alice = { userId: 'alice', deviceId: 1 };
const bob = { userId: 'bob', deviceId: 1 };
const reader = { device: bob, fence: 7, keyVersion: 1 };

function setup() {
  const clock = createManualClock();
  const observer = createObserver(silentLog);
  const sockets = createLiveSockets({ observer, node: 'here', clock });
  const redactor = createRedactor(randomBytes(32));
  const tap = createTap({ observer, node: 'here', sockets, redactor, clock });
  /** A viewer that takes everything. */
  const watch = (filter: StreamFilter = {}) => {
    const events: StreamEvent[] = [];
    const outbox: Watcher = { hasRoom: () => true, offer: (event) => events.push(event) > 0 };
    return { events, leave: tap.watch(filter, outbox) };
  };
  const sent = (messageId: string, count = 1) => ({
    sender: alice,
    messageId,
    recipientUserId: bob.userId,
    deviceIds: Array.from({ length: count }, (_, index) => index + 1),
  });
  const stagesOf = (messageId: string) =>
    tap.lifeOf(messageId).map((event) => event.kind === 'message' && event.stage);
  return { clock, observer, tap, watch, sent, stagesOf };
}

function envelopeOf(messageId: string, id: string): QueuedEnvelope {
  return { id, messageId, body: { kind: 'message', sender: alice } } as unknown as QueuedEnvelope;
}

it('remembers the last steps of messages’ lives, oldest first, and no more of them than there is room for', () => {
  const { observer, watch, sent, stagesOf } = setup();
  watch();
  const [other, messageId] = [randomUUID(), randomUUID()];
  observer.stored(sent(other, STEPS_MAX - 1));
  observer.stored(sent(messageId));
  observer.poked(sent(messageId));
  expect(stagesOf(messageId)).toEqual(['stored', 'poked']);
  observer.stored(sent(other, STEPS_MAX - 2));
  expect(stagesOf(messageId)).toEqual(['stored', 'poked']);
  observer.stored(sent(other));
  expect(stagesOf(messageId)).toEqual(['poked']);
  observer.stored(sent(other));
  expect(stagesOf(messageId)).toEqual([]);
});

it('remembers while anybody looks, and begins anew when the last one has left', () => {
  const { observer, watch, sent, stagesOf } = setup();
  const [first, second] = [watch(), watch()];
  const [before, after] = [randomUUID(), randomUUID()];
  observer.stored(sent(before));
  first.leave();
  observer.poked(sent(before));
  expect(stagesOf(before)).toEqual(['stored', 'poked']);
  second.leave();
  expect(stagesOf(before)).toEqual([]);
  observer.stored(sent(before));
  watch();
  observer.stored(sent(after));
  observer.stored(sent(randomUUID(), STEPS_MAX - 2));
  observer.poked(sent(after));
  expect([stagesOf(before), stagesOf(after)]).toEqual([[], ['stored', 'poked']]);
});

it('tells of a page of messages when its acknowledgement has come or not, and how long that took', async () => {
  const { clock, observer, watch } = setup();
  const all = watch();
  const push = () => observer.pushSent(bob, reader.fence, 'messages', { envelopes: [] })!;
  const [quick, late, never] = [push(), push(), push()];
  const processed = [randomUUID()];
  const sentAtMs = clock.nowMs();
  const timeAfter = (ms: number) => new Date(sentAtMs + ms).toISOString();
  expect(all.events).toEqual([]);
  await clock.advance(100);
  quick({ processed });
  await clock.advance(1);
  late({ processed });
  never(null);
  expect(all.events).toMatchObject([
    {
      time: timeAfter(100),
      latencyMs: 100,
      acknowledged: true,
      input: { envelopes: [] },
      answer: { processed },
    },
    { latencyMs: 101, acknowledged: true, input: { envelopes: [] }, answer: { processed } },
    { latencyMs: 101, acknowledged: false, input: { envelopes: [] }, answer: null },
  ]);

  all.leave();
  const slow = watch({ slowerThanMs: 100 });
  const [onTime, tooLate] = [push(), push()];
  await clock.advance(100);
  onTime({ processed });
  await clock.advance(1);
  tooLate({ processed });
  expect(slow.events).toMatchObject([{ latencyMs: 101, input: { envelopes: [] } }]);
});

it('tells once that a message was acknowledged, and each time that it was put off, with why', () => {
  const { observer, watch } = setup();
  const { events } = watch();
  const messageId = randomUUID();
  observer.pushed(reader, [envelopeOf(messageId, '1')]);
  observer.settled(reader, { processed: [], failed: [{ id: '1', reason: 'temporary' }] });
  observer.settled(reader, { processed: [], failed: [{ id: '1', reason: 'undecryptable' }] });
  observer.settled(reader, { processed: ['1'] });
  observer.settled(reader, { processed: ['1'], failed: [{ id: '2', reason: 'temporary' }] });
  expect(events.map((event) => event.kind === 'message' && [event.stage, event.reason])).toEqual([
    ['pushed', null],
    ['putOff', 'temporary'],
    ['putOff', 'undecryptable'],
    ['acknowledged', null],
  ]);
});

it('tells what a claim gave of each kind, and nothing of one that was refused', () => {
  const { observer, watch } = setup();
  const { events } = watch({ event: ['claim'] });
  const claimId = randomUUID();
  const ended = { door: 'socket', device: alice, name: 'requestBundle', durationMs: 1 } as const;
  const device = {
    registrationId: 1,
    identityKey: 'k',
    signedPreKey: { keyId: 1, publicKey: 'k', signature: 's' },
  };
  const preKey = (keyId: number) => ({ keyId, publicKey: 'k', signature: 's' });
  const input = { claimId, userId: bob.userId };
  const devices = [
    { ...device, deviceId: 1, oneTimePreKey: preKey(5), pqPreKey: { ...preKey(6), lastResort: false } },
    {
      ...device,
      deviceId: 2,
      oneTimePreKey: null,
      oneTimePreKeyAbsent: 'limited' as const,
      pqPreKey: { ...preKey(7), lastResort: true },
    },
    { ...device, deviceId: 3, oneTimePreKey: null, oneTimePreKeyAbsent: 'noneLeft' as const, pqPreKey: null },
  ];
  const data = { userId: bob.userId, devices };
  observer.requestEnded({ ...ended, code: null, input, reply: { ok: true, data } });
  const error = { code: 'USER_NOT_FOUND' as const, message: 'no such user', retryable: false };
  observer.requestEnded({ ...ended, code: 'USER_NOT_FOUND', input, reply: { ok: false, error } });
  const told = { peer: 'alice.1', claimId };
  expect(events).toMatchObject([
    { ...told, device: 'bob.1', keyId: 5, absent: null, pqKeyId: 6, pqFallback: false },
    { ...told, device: 'bob.2', keyId: null, absent: 'limited', pqKeyId: 7, pqFallback: true },
    { ...told, device: 'bob.3', keyId: null, absent: 'noneLeft', pqKeyId: null, pqFallback: false },
  ]);
});

it('tells the id of a fault of ours, by which it is found in the log, and of no other refusal', () => {
  const { observer, watch } = setup();
  const { events } = watch();
  const refused = { door: 'socket', errorId: 'an id', error: new Error('refused') } as const;
  observer.handshakeRefused({ ...refused, code: 'INTERNAL' });
  observer.handshakeRefused({ ...refused, code: 'UNAUTHENTICATED' });
  observer.handshakeRefused({ ...refused, code: 'INTERNAL', errorId: undefined });
  expect(events).toMatchObject([
    { code: 'INTERNAL', errorId: 'an id' },
    { code: 'UNAUTHENTICATED', errorId: null },
    { code: 'INTERNAL', errorId: null },
  ]);
});
