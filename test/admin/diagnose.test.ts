import { describe, expect, it } from 'vitest';
import { type DeviceFacts, diagnose, type PutOff, SLOW_BYTES } from '../../src/admin/diagnose.ts';
import { bounceReason } from '../../src/protocol/envelope.ts';
import { diagnosis } from '../../src/protocol/inspector/diagnosis.ts';
import type { SocketFacts } from '../../src/protocol/inspector/facts.ts';

const NOW = Date.parse('2026-03-01T12:00:00.000Z');
const EARLIER = '2026-03-01T11:59:50.000Z';
const messageId = 'a9a35a0e-4b1c-4d5e-8c2e-2f3a4b5c6d7e';

const socket: SocketFacts = {
  node: 'here',
  socket: 7,
  device: 'bob.1',
  openedAt: EARLIER,
  gate: 'open',
  keyVersion: 3,
  gateHistory: [],
  windowCount: 0,
  windowBytes: 0,
  windowFull: false,
  oldestPushAt: null,
  roundTripMs: 12,
  bufferedBytes: 0,
  tokenExpiresAt: '2026-03-01T13:00:00.000Z',
  paused: false,
};

const healthy: DeviceFacts = {
  device: 'bob.1',
  nowMs: NOW,
  node: 'here',
  nodes: [{ node: 'here', answering: true }],
  state: 'uploaded',
  keyVersion: 3,
  sockets: [socket],
  pendingCount: 2,
  putOff: null,
  message: null,
};

const putOff: PutOff = { messageId, dueAtMs: NOW + 5_000, undecryptableCount: 1, temporaryCount: 0 };
const on = (changes: Partial<SocketFacts>): Partial<DeviceFacts> => ({
  sockets: [{ ...socket, ...changes }],
});
const message = (state: 'waiting' | 'putOff' | 'bounced' | 'delivered' | 'neverStored') => ({
  messageId,
  state,
  reason: null,
  putOff: state === 'putOff' ? putOff : null,
});

describe('the diagnosis', () => {
  it.each<[string, Partial<DeviceFacts>, RegExp]>([
    ['neverUploaded', { state: 'neverUploaded', sockets: [], keyVersion: 0 }, /never uploaded/],
    ['neverUploaded', { state: 'neverUploaded', keyVersion: 0, ...on({ gate: 'connected' }) }, /uploadKeys/],
    ['keysReset', { state: 'reset' }, /key version 3/],
    ['noSocket', { sockets: [] }, /not connected; 2 envelopes wait/],
    ['noSocket', { sockets: [], pendingCount: 1 }, /1 envelope waits/],
    ['neverValidated', on({ gate: 'connected', keyVersion: null }), /validateKeys/],
    [
      'neverValidated',
      on({
        gate: 'connected',
        keyVersion: null,
        gateHistory: [{ time: EARLIER, to: 'connected', keyVersion: null, reason: 'serverRestored' }],
      }),
      /restored from an older backup/,
    ],
    [
      'validatedOlderKeySet',
      on({
        gate: 'validated',
        keyVersion: 2,
        gateHistory: [{ time: EARLIER, to: 'validated', keyVersion: 2, reason: 'keysRotated' }],
      }),
      /key version 2, but the server has 3 \(keysRotated\)/,
    ],
    ['notReady', on({ gate: 'validated' }), /has not said clientReady/],
    ['tokenExpired', on({ tokenExpiresAt: EARLIER, paused: true }), /refreshToken/],
    ['tokenExpired', on({ tokenExpiresAt: EARLIER, gate: 'connected', keyVersion: null }), /ran out/],
    ['slow', on({ bufferedBytes: SLOW_BYTES + 1, windowFull: true, windowCount: 256 }), /256 KiB/],
    ['windowFull', on({ windowFull: true, windowCount: 256, oldestPushAt: EARLIER }), /holds 256/],
    ['notAcknowledged', on({ windowCount: 1, oldestPushAt: EARLIER }), /1 envelope was pushed/],
    ['putOff', { putOff }, /undecryptable 1/],
    ['putOff', { message: message('putOff') }, /after three undecryptable answers/],
    ['putOff', { putOff: { ...putOff, undecryptableCount: 0, temporaryCount: 2 } }, /temporary 2/],
    ['onItsWay', {}, /nothing holds it up/],
    ['onItsWay', { message: message('waiting'), pendingCount: 1 }, /1 envelope waits/],
    ['nothingPending', { pendingCount: 0 }, /queue is empty/],
    ['delivered', { message: message('delivered') }, /processed it/],
    ['delivered', { message: message('delivered'), sockets: [] }, /processed it/],
    ['bounced', { message: message('bounced') }, /the sender has taken the bounce/],
    ['neverStored', { message: message('neverStored') }, /No message/],
  ])('is %s for %o', (kind, changes, text) => {
    const [first, ...rest] = diagnose({ ...healthy, ...changes });
    expect(first).toMatchObject({ kind });
    expect(`${first!.text} ${first!.nextStep}`).toMatch(text);
    expect(rest).toEqual([]);
    expect(diagnosis.parse(first)).toEqual(first);
  });

  it('says of each bounce why', () => {
    const texts = bounceReason.options.map((reason) => {
      const [first] = diagnose({ ...healthy, message: { ...message('bounced'), reason } });
      expect(first).toMatchObject({ kind: 'bounced', reason });
      return first!.text;
    });
    expect(new Set(texts).size).toBe(bounceReason.options.length);
  });

  it('explains why a message waits by what holds up its device', () => {
    const [first] = diagnose({ ...healthy, message: message('waiting'), sockets: [] });
    expect(first).toMatchObject({ kind: 'noSocket' });
  });

  it('adds that the socket is on another node', () => {
    expect(diagnose({ ...healthy, ...on({ node: 'there', gate: 'validated' }) })).toMatchObject([
      { kind: 'notReady' },
      { kind: 'otherNode', node: 'there', answering: true },
    ]);
  });

  it('adds that a node which may have the socket did not answer', () => {
    const nodes = [...healthy.nodes, { node: 'there', answering: false }];
    expect(diagnose({ ...healthy, nodes, sockets: [] })).toMatchObject([
      { kind: 'noSocket' },
      { kind: 'otherNode', node: 'there', answering: false },
    ]);
    expect(diagnose({ ...healthy, nodes })).toHaveLength(1);
  });

  it('goes by the newest socket while a displaced one is still there', () => {
    const older = { ...socket, socket: 6, gate: 'connected' as const, keyVersion: null };
    expect(diagnose({ ...healthy, sockets: [older, socket] })).toMatchObject([{ kind: 'onItsWay' }]);
  });
});
