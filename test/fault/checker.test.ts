/** The checker itself: what it accepts, and what it finds in histories into which a violation of one rule was planted. */
import { describe, expect, it } from 'vitest';
import type { Rule } from './book.ts';
import { check } from './checker.ts';
import type { Answer, Asked, Envelope, FinalState, HistoryEvent } from './history.ts';

const ALICE = 'alice.1';
const BOB = 'bob.1';
const EMPTY: FinalState = { queued: [], pool: [], claims: [] };

/** Writes a history line by line; every request is a number that the next lines may name. */
function scene() {
  const events: HistoryEvent[] = [];
  let requests = 0;
  const scene = {
    events,
    ask(device: string, asked: Asked, connection: number | null = device === ALICE ? 1 : 2): number {
      events.push({ event: 'asked', request: ++requests, device, connection, asked });
      return requests;
    },
    answer(request: number, answer: Answer): void {
      events.push({ event: 'answered', request, answer });
    },
    refuse(request: number, code = 'UNAVAILABLE'): void {
      events.push({ event: 'answered', request, answer: { ok: false, code } });
    },
    lose(request: number): void {
      events.push({ event: 'broken', request });
    },
    uploaded(
      device: string,
      preKeys: string[],
      more: { replaces?: boolean; keyVersion?: number } = {},
    ): void {
      const asked: Asked = { name: 'upload', preKeys, replacesIdentity: more.replaces ?? false };
      scene.answer(scene.ask(device, asked), { ok: true, name: 'upload', keyVersion: more.keyVersion ?? 1 });
    },
    ready(device: string, connection: number, keyVersion = 1, pendingCount = 0): void {
      const request = scene.ask(device, { name: 'ready' }, connection);
      scene.answer(request, { ok: true, name: 'ready', keyVersion, pendingCount });
    },
    emptied(deliveredCount: number, connection = 2): void {
      events.push({ event: 'queueEmpty', device: BOB, connection, deliveredCount });
    },
    claim(claimId: string, target = BOB): number {
      return scene.ask(ALICE, { name: 'claim', claimId, target });
    },
    gave(request: number, preKey: string): void {
      scene.answer(request, { ok: true, name: 'claim', preKey, absent: null });
    },
    saidNone(request: number): void {
      scene.answer(request, { ok: true, name: 'claim', preKey: null, absent: 'noneLeft' });
    },
    send(messageId: string): number {
      return scene.ask(ALICE, { name: 'send', messageId, recipient: BOB, text: messageId });
    },
    sent(...messageIds: string[]): void {
      for (const messageId of messageIds) scene.answer(scene.send(messageId), { ok: true, name: 'send' });
    },
    delivered(messageIds: string[], connection = 2): void {
      const envelopes = messageIds.map(message);
      events.push({ event: 'delivered', device: BOB, connection, envelopes });
    },
    processed(messageIds: string[], connection = 2): void {
      const processed = messageIds.map((messageId) => `id of ${messageId}`);
      events.push({ event: 'acknowledged', device: BOB, connection, processed, failed: [] });
    },
    failed(messageIds: string[]): void {
      const failed = messageIds.map((messageId) => `id of ${messageId}`);
      events.push({ event: 'acknowledged', device: BOB, connection: 2, processed: [], failed });
    },
  };
  return scene;
}

function message(messageId: string): Envelope {
  return { kind: 'message', id: `id of ${messageId}`, messageId, sender: ALICE, text: messageId };
}

function claimRow(claimId: string, preKey: string | null): FinalState['claims'][number] {
  return { device: BOB, claimer: ALICE, claimId, preKey };
}

function waiting(messageId: string): FinalState['queued'][number] {
  return { device: BOB, kind: 'message', peer: ALICE, messageId };
}

function rulesBroken(events: HistoryEvent[], final: Partial<FinalState> = {}): Rule[] {
  return check(events, { ...EMPTY, ...final }).map((violation) => violation.rule);
}

describe('the checker accepts', () => {
  it('a quiet afternoon: claims until none is left, messages in order, one put off, one bounced', () => {
    const story = scene();
    story.uploaded(BOB, ['k1', 'k2']);
    story.ready(BOB, 2);
    story.gave(story.claim('c1'), 'k1');
    story.gave(story.claim('c2'), 'k2');
    story.saidNone(story.claim('c3'));
    story.sent('m1', 'm2', 'm3');
    story.delivered(['m1', 'm2', 'm3']);
    story.failed(['m1']);
    story.processed(['m2']);
    story.delivered(['m1']);
    story.processed(['m1']);
    story.events.push({
      ...{ event: 'delivered', device: ALICE, connection: 1 },
      envelopes: [{ kind: 'bounce', id: 'b3', messageId: 'm3', recipient: BOB }],
    });
    story.events.unshift({
      event: 'asked',
      request: 99,
      device: ALICE,
      connection: 1,
      asked: { name: 'ready' },
    });
    const claims = [claimRow('c1', 'k1'), claimRow('c2', 'k2'), claimRow('c3', null)];
    expect(check(story.events, { ...EMPTY, claims })).toEqual([]);
  });

  it('what lost answers leave open: the same claim and the same message, asked again', () => {
    const story = scene();
    story.uploaded(BOB, ['k1']);
    story.ready(BOB, 2);
    story.lose(story.claim('c1'));
    // While the lost one may have taken it, the other is rightly told that there is none.
    story.saidNone(story.claim('c2'));
    story.gave(story.claim('c1'), 'k1');
    story.lose(story.send('m1'));
    story.sent('m1');
    story.delivered(['m1']);
    expect(
      check(story.events, {
        ...EMPTY,
        claims: [claimRow('c1', 'k1'), claimRow('c2', null)],
        queued: [waiting('m1')],
      }),
    ).toEqual([]);
  });

  it('"none" while another claim that was under way got the last one', () => {
    const story = scene();
    story.uploaded(BOB, ['k1']);
    const [one, other] = [story.claim('c1'), story.claim('c2')];
    story.saidNone(one);
    story.gave(other, 'k1');
    expect(rulesBroken(story.events, { claims: [claimRow('c2', 'k1')] })).toEqual([]);
  });

  it('an order between messages of which the first was not yet accepted when the second was sent', () => {
    const story = scene();
    story.ready(BOB, 2);
    const [one, other] = [story.send('m1'), story.send('m2')];
    story.answer(other, { ok: true, name: 'send' });
    story.answer(one, { ok: true, name: 'send' });
    story.delivered(['m2', 'm1']);
    expect(rulesBroken(story.events, { queued: [waiting('m1'), waiting('m2')] })).toEqual([]);
  });

  it('what a gateway that stood still brings by an old connection, and was sent back since', () => {
    const story = scene();
    story.ready(BOB, 2);
    story.sent('m1');
    story.uploaded(BOB, [], { replaces: true, keyVersion: 2 });
    story.ready(BOB, 3, 2);
    story.sent('m2');
    story.delivered(['m2'], 3);
    story.delivered(['m1'], 2);
    expect(rulesBroken(story.events, { queued: [waiting('m1'), waiting('m2')] })).toEqual([]);
  });

  it('what a device is told of its queue, where it can be so', () => {
    const story = scene();
    story.sent('m1', 'm2');
    // One more is on its way: it may be among them, and may not.
    const third = story.send('m3');
    story.ready(BOB, 2, 1, 3);
    story.answer(third, { ok: true, name: 'send' });
    story.delivered(['m1', 'm2']);
    story.processed(['m1', 'm2']);
    // Nobody knows whether the two were gone yet when it counted.
    story.ready(BOB, 3, 1, 3);
    story.delivered(['m3'], 3);
    story.processed(['m3'], 3);
    story.emptied(1, 3);
    story.sent('m4');
    story.ready(BOB, 3, 1, 1);
    story.uploaded(BOB, [], { replaces: true, keyVersion: 2 });
    story.ready(BOB, 4, 2, 0);
    story.emptied(0, 4);
    expect(rulesBroken(story.events, { queued: [waiting('m4')] })).toEqual([]);
  });

  it('queueEmpty through a gate that a clientReady opened whose answer was lost', () => {
    const story = scene();
    story.lose(story.ask(BOB, { name: 'ready' }));
    story.emptied(0);
    expect(rulesBroken(story.events)).toEqual([]);
  });

  it('a rotation by the socket itself, which carries its open gate', () => {
    const story = scene();
    story.ready(BOB, 2);
    story.answer(story.ask(BOB, { name: 'rotate' }), { ok: true, name: 'rotate', keyVersion: 2 });
    story.sent('m1');
    story.delivered(['m1']);
    expect(rulesBroken(story.events, { queued: [waiting('m1')] })).toEqual([]);
  });
});

describe('the checker finds', () => {
  it('a one-time prekey that was given twice', () => {
    const story = scene();
    story.uploaded(BOB, ['k1']);
    story.gave(story.claim('c1'), 'k1');
    story.gave(story.claim('c2'), 'k1');
    expect(rulesBroken(story.events, { claims: [claimRow('c1', 'k1')] })).toEqual([
      'a one-time prekey is given once',
    ]);
  });

  it('a repeated claim that spent another prekey', () => {
    const story = scene();
    story.uploaded(BOB, ['k1', 'k2']);
    story.gave(story.claim('c1'), 'k1');
    story.gave(story.claim('c1'), 'k2');
    expect(rulesBroken(story.events, { claims: [claimRow('c1', 'k1'), claimRow('c1', 'k2')] })).toEqual([
      'a repeated claim gets its first answer',
    ]);
  });

  it.each([
    ['is still there at the end', { pool: [{ device: BOB, preKey: 'k1' }] }, false],
    ['was given to one who asked later', { claims: [claimRow('c2', 'k1')] }, true],
    ['was given to one who asked later, whose answer was lost', { claims: [claimRow('c2', 'k1')] }, false],
  ])('"none" about a prekey that %s', (_what, final, isAnswered) => {
    const story = scene();
    story.uploaded(BOB, ['k1']);
    story.saidNone(story.claim('c1'));
    const later = story.claim('c2');
    if (isAnswered) story.gave(later, 'k1');
    else story.lose(later);
    expect(rulesBroken(story.events, final)).toEqual(['no false empty']);
  });

  it('a message before clientReady was asked', () => {
    const story = scene();
    story.sent('m1');
    story.delivered(['m1']);
    expect(rulesBroken(story.events, { queued: [waiting('m1')] })).toEqual(['nothing passes a closed gate']);
  });

  it('a message after gateClosed', () => {
    const story = scene();
    story.ready(BOB, 2);
    story.sent('m1');
    story.events.push({ event: 'gateClosed', device: BOB, connection: 2 });
    story.delivered(['m1']);
    expect(rulesBroken(story.events, { queued: [waiting('m1')] })).toEqual(['nothing passes a closed gate']);
  });

  it('a message that was sent after a change elsewhere, through the gate that the change should have closed', () => {
    const story = scene();
    story.ready(BOB, 2);
    const change = story.ask(BOB, { name: 'upload', preKeys: [], replacesIdentity: false }, null);
    story.answer(change, { ok: true, name: 'upload', keyVersion: 2 });
    story.sent('m1');
    story.delivered(['m1']);
    expect(rulesBroken(story.events, { queued: [waiting('m1')] })).toEqual(['nothing passes a closed gate']);
  });

  it('a message for a replaced identity', () => {
    const story = scene();
    story.sent('m1');
    story.uploaded(BOB, [], { replaces: true, keyVersion: 2 });
    story.ready(BOB, 2, 2);
    story.delivered(['m1']);
    expect(rulesBroken(story.events, { queued: [waiting('m1')] })).toEqual(['nothing passes a closed gate']);
  });

  it('a message that came by a connection which a newer one had superseded', () => {
    const story = scene();
    story.ready(BOB, 2);
    story.ready(BOB, 3);
    story.sent('m1');
    story.delivered(['m1'], 2);
    expect(rulesBroken(story.events, { queued: [waiting('m1')] })).toEqual([
      'a superseded connection gets nothing',
    ]);
  });

  it('a message that was accepted and is nowhere', () => {
    const story = scene();
    story.ready(BOB, 2);
    story.sent('m1', 'm2');
    story.delivered(['m1', 'm2']);
    story.processed(['m1']);
    expect(rulesBroken(story.events)).toEqual(['accepted is processed, bounced or pending']);
  });

  it('a message that only a superseded connection has processed, and that is gone', () => {
    const story = scene();
    story.ready(BOB, 2);
    story.sent('m1');
    story.delivered(['m1']);
    story.ready(BOB, 3, 1, 1);
    story.processed(['m1'], 2);
    expect(rulesBroken(story.events)).toEqual(['accepted is processed, bounced or pending']);
  });

  it('a message that was stored twice', () => {
    const story = scene();
    story.ready(BOB, 2);
    story.sent('m1');
    story.delivered(['m1']);
    story.processed(['m1']);
    story.events.push({
      ...{ event: 'delivered', device: BOB, connection: 2 },
      envelopes: [{ ...message('m1'), id: 'another id' }],
    });
    expect(rulesBroken(story.events)).toEqual(['stored once']);
  });

  it('a message that overtook another', () => {
    const story = scene();
    story.ready(BOB, 2);
    story.sent('m1', 'm2');
    story.delivered(['m2', 'm1']);
    story.processed(['m2', 'm1']);
    // Over all connections, and on this one.
    expect(rulesBroken(story.events)).toEqual(['in order', 'in order']);
  });

  it('a message that another overtook, though it has come late by an older connection', () => {
    const story = scene();
    story.ready(BOB, 2);
    story.sent('m1', 'm2');
    story.ready(BOB, 3, 1, 2);
    story.delivered(['m2'], 3);
    story.delivered(['m1'], 2);
    story.delivered(['m1'], 3);
    story.processed(['m2', 'm1'], 3);
    // Over all connections, and on this one.
    expect(rulesBroken(story.events)).toEqual(['in order', 'in order']);
  });

  it('a message that overtook another when both came again', () => {
    const story = scene();
    story.ready(BOB, 2);
    story.sent('m1', 'm2');
    story.delivered(['m1', 'm2']);
    story.ready(BOB, 3, 1, 2);
    story.delivered(['m2', 'm1'], 3);
    story.processed(['m2', 'm1'], 3);
    expect(rulesBroken(story.events)).toEqual(['in order']);
  });

  it.each([
    ['less than what waited', 1],
    ['more than what may have waited', 4],
  ])('a pendingCount of %s', (_what, pendingCount) => {
    const story = scene();
    story.sent('m0');
    story.ready(BOB, 2, 1, 1);
    story.delivered(['m0']);
    story.processed(['m0']);
    story.emptied(1);
    story.sent('m1', 'm2');
    story.send('m3');
    story.ready(BOB, 3, 1, pendingCount);
    expect(rulesBroken(story.events, { queued: [waiting('m1'), waiting('m2')] })).toEqual([
      'pendingCount is what waited',
    ]);
  });

  it.each<[string, (story: ReturnType<typeof scene>) => void]>([
    ['before what waited was processed', (story) => story.emptied(0)],
    [
      'a second time',
      (story) => {
        story.processed(['m1']);
        story.emptied(1);
        story.emptied(1);
      },
    ],
    [
      'through a gate that is closed',
      (story) => {
        story.processed(['m1']);
        story.events.push({ event: 'gateClosed', device: BOB, connection: 2 });
        story.emptied(1);
      },
    ],
    [
      'that counts more than was processed',
      (story) => {
        story.processed(['m1']);
        story.emptied(2);
      },
    ],
  ])('queueEmpty %s', (_what, tell) => {
    const story = scene();
    story.sent('m1');
    story.ready(BOB, 2, 1, 1);
    story.delivered(['m1']);
    tell(story);
    expect(rulesBroken(story.events, { queued: [waiting('m1')] })).toEqual([
      'queueEmpty after everything that waited',
    ]);
  });

  it('an answer of which the store knows nothing', () => {
    const story = scene();
    const request = story.send('m1');
    story.answer(request, { ok: true, name: 'send' });
    story.events.push({ event: 'witnessed', request, committed: false });
    story.events.push({ event: 'missed', device: BOB, what: 'identity' });
    expect(rulesBroken(story.events, { queued: [waiting('m1')] })).toEqual([
      'no answer before its commit',
      'no answer before its commit',
    ]);
  });

  it('an upload, or a claim, that the store has lost', () => {
    const uploading = scene();
    uploading.uploaded(BOB, ['k1']);
    expect(rulesBroken(uploading.events)).toEqual(['no answer before its commit']);

    const claiming = scene();
    claiming.uploaded(BOB, ['k1']);
    claiming.gave(claiming.claim('c1'), 'k1');
    expect(rulesBroken(claiming.events, { pool: [{ device: BOB, preKey: 'k1' }] })).toEqual([
      'no answer before its commit',
      'no answer before its commit',
    ]);
  });

  it('what nobody sent, and what nobody uploaded', () => {
    const story = scene();
    story.ready(BOB, 2);
    story.delivered(['m1']);
    story.gave(story.claim('c1'), 'k1');
    expect(rulesBroken(story.events, { claims: [claimRow('c1', 'k1')] })).toEqual([
      'nothing that nobody sent',
      'nothing that nobody sent',
    ]);
  });

  it('a message whose text was altered', () => {
    const story = scene();
    story.ready(BOB, 2);
    story.sent('m1');
    story.events.push({
      ...{ event: 'delivered', device: BOB, connection: 2 },
      envelopes: [{ ...message('m1'), text: 'altered' } as Envelope],
    });
    expect(rulesBroken(story.events, { queued: [waiting('m1')] })).toEqual(['nothing that nobody sent']);
  });

  it('a fault of the server, and a gateway that ended by itself', () => {
    const story = scene();
    story.refuse(story.send('m1'), 'INTERNAL');
    story.refuse(story.send('m2'), 'UNAVAILABLE');
    story.events.push({ event: 'gatewayEnded', expected: false, how: 'with 1' });
    story.events.push({ event: 'gatewayEnded', expected: true, how: 'by SIGKILL' });
    expect(rulesBroken(story.events)).toEqual(['no fault of the server', 'no fault of the server']);
  });
});
