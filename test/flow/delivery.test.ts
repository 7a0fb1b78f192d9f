/** Delivery through sockets: at least once, in order, bounded, and never lost on the way. */
import { randomUUID } from 'node:crypto';
import postgres from 'postgres';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openDatabase } from '../../src/backends/postgres/database.ts';
import { createMessageStore } from '../../src/backends/postgres/message-store.ts';
import { systemClock } from '../../src/lib/clock.ts';
import { type LogFields, silentLog } from '../../src/lib/log.ts';
import type { MessagesAcknowledgement, PushPayload, RequestInput } from '../../src/protocol/events.ts';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import { eventually } from '../support/eventually.ts';
import {
  afterOthersGotTheirs,
  FEW_KEYS,
  gatewayFor,
  heard,
  hold,
  opened,
  reopened,
  someone,
  undoAfterEach,
} from '../support/flow.ts';
import {
  type Client,
  contents,
  enrol,
  open,
  type Party,
  send,
  startGateway,
  type TestGateway,
} from '../support/gateway.ts';
import { SignalDevice } from '../support/libsignal-device.ts';
import { createManualClock, type ManualClock } from '../support/manual-clock.ts';

type Pages = PushPayload<'messages'>[];

const undo = undoAfterEach();
let shared: TestGateway;

beforeAll(async () => {
  shared = await startGateway();
});
afterAll(() => shared.stop());

function pagesOf(client: Client): Pages {
  return client.pushes
    .filter((push) => push.name === 'messages')
    .map((push) => push.payload as PushPayload<'messages'>);
}

function numbers(count: number): string[] {
  return Array.from({ length: count }, (_, i) => String(i));
}

async function sendAll(from: Client, to: Party, texts: readonly string[]): Promise<string[]> {
  const ids: string[] = [];
  for (const text of texts) ids.push(await send(from, to, text));
  return ids;
}

const processedAll = (page: PushPayload<'messages'>): MessagesAcknowledgement => ({
  processed: page.envelopes.map((envelope) => envelope.id),
});

/** An envelope for a device, as `sendMessages` takes it. */
function envelopeFor(device: SignalDevice, text = 'x') {
  return {
    deviceId: device.deviceId,
    registrationId: device.registrationId,
    type: 3,
    content: Buffer.from(text).toString('base64'),
  };
}

function sending(
  userId: string,
  devices: SignalDevice[],
  more: Partial<RequestInput<'sendMessages'>> = {},
): RequestInput<'sendMessages'> {
  return {
    messageId: randomUUID(),
    userId,
    envelopes: devices.map((device) => envelopeFor(device)),
    ...more,
  };
}

/** What waits for a device and is put off, as any node would find it. */
function queueOf(at: TestGateway) {
  const database = openDatabase({
    address: { kind: 'url', url: at.databaseUrl },
    clock: systemClock,
    log: silentLog,
  });
  undo.push(() => database.close());
  const messages = createMessageStore(database);
  return {
    async nextDueAtMs(device: DeviceAddress, nowMs: number): Promise<number | null> {
      const page = { inFlight: [], envelopesMax: 1, bytesMax: 1, nowMs };
      return (await messages.read({ device, fence: 0 }, page))!.nextDueAtMs;
    },
  };
}

describe('order', () => {
  it('of one sender is kept under concurrent senders, live and from the backlog', async () => {
    const senders = await Promise.all([1, 2, 3, 4].map(() => opened(shared)));
    const bob = await enrol(shared, someone(), FEW_KEYS);
    const texts = numbers(60);
    const streams = Promise.all(
      senders.map((sender) =>
        sendAll(
          sender.client,
          bob,
          texts.map((text) => `${sender.address.userId} ${text}`),
        ),
      ),
    );
    await open(bob);
    await streams;
    await eventually(() => expect(bob.client.envelopes).toHaveLength(240));
    for (const { address } of senders) {
      const got = contents(bob.client).filter((text) => text.startsWith(address.userId));
      expect(got).toEqual(texts.map((text) => `${address.userId} ${text}`));
    }
  });

  it('immunity 25: what is sent while the backlog drains comes after it', async () => {
    const alice = await opened(shared);
    const bob = await enrol(shared, someone(), FEW_KEYS);
    // More than the window, so that a part of the backlog waits in the store while live messages come.
    await sendAll(alice.client, bob, numbers(300));
    const held = hold(bob.client);
    expect(await open(bob)).toMatchObject({ pendingCount: 300 });
    await eventually(() => expect(bob.client.envelopes).toHaveLength(256));
    await sendAll(alice.client, bob, ['live 1', 'live 2']);
    await afterOthersGotTheirs(shared, alice.client);
    expect(bob.client.envelopes).toHaveLength(256);
    held.letGo();
    await eventually(() => expect(bob.client.envelopes).toHaveLength(302));
    expect(contents(bob.client)).toEqual([...numbers(300), 'live 1', 'live 2']);
  });
});

describe('the window', () => {
  it('holds 256 envelopes in pages of at most 100, and moves on with each acknowledgement', async () => {
    const alice = await opened(shared);
    const bob = await enrol(shared, someone(), FEW_KEYS);
    await sendAll(alice.client, bob, numbers(300));
    const held = hold(bob.client);
    await open(bob);
    await eventually(() => expect(bob.client.envelopes).toHaveLength(256));
    await afterOthersGotTheirs(shared, alice.client);
    expect(pagesOf(bob.client).map((page) => page.envelopes.length)).toEqual([100, 100, 56]);
    held.answerOne();
    await eventually(() => expect(bob.client.envelopes).toHaveLength(300));
    held.letGo();
    expect(await bob.client.next('queueEmpty')).toEqual({ deliveredCount: 300 });
  });

  it('holds 2 MiB in pages of at most 512 KiB, however large the envelopes', async () => {
    const alice = await opened(shared);
    const bob = await enrol(shared, someone(), FEW_KEYS);
    const sizes = Array.from({ length: 60 }, (_, i) => (i % 3 === 2 ? 40 : 96) * 1024);
    for (const size of sizes) await send(alice.client, bob, 'x'.repeat(size));
    let inFlightBytes = 0;
    let inFlightBytesMax = 0;
    const pageBytes: number[] = [];
    const answers: (() => void)[] = [];
    bob.client.onMessages = () => null;
    bob.client.socket.on('messages', (page, acknowledge) => {
      const bytes = page.envelopes.reduce(
        (sum, envelope) =>
          sum + (envelope.kind === 'message' ? Buffer.from(envelope.content, 'base64').length : 0),
        0,
      );
      pageBytes.push(bytes);
      inFlightBytes += bytes;
      inFlightBytesMax = Math.max(inFlightBytesMax, inFlightBytes);
      answers.push(() => {
        inFlightBytes -= bytes;
        acknowledge({ processed: page.envelopes.map((envelope) => envelope.id) });
      });
    });
    await open(bob);
    await eventually(() => expect(inFlightBytes).toBeGreaterThan(1.5 * 1024 * 1024));
    while (bob.client.waiting('queueEmpty') === 0) {
      await afterOthersGotTheirs(shared, alice.client);
      answers.splice(0, 2).forEach((answer) => {
        answer();
      });
    }
    expect(bob.client.envelopes).toHaveLength(sizes.length);
    expect(Math.max(...pageBytes)).toBeLessThanOrEqual(512 * 1024);
    expect(inFlightBytesMax).toBeLessThanOrEqual(2 * 1024 * 1024);
  });
});

describe('acknowledgement', () => {
  it('that does not come within 30 seconds closes the socket; the messages come again, as they were', async () => {
    const clock = createManualClock();
    const at = await gatewayFor(undo, { clock });
    const alice = await opened(at);
    const bob = await opened(at);
    hold(bob.client);
    await sendAll(alice.client, bob, ['one', 'two']);
    await eventually(() => expect(bob.client.envelopes).toHaveLength(2));
    await clock.advance(29_999);
    await afterOthersGotTheirs(at, alice.client);
    expect(bob.client.socket.connected).toBe(true);
    await clock.advance(1);
    expect(await bob.client.disconnected).toBe('transport close');

    const again = await reopened(at, bob);
    expect(await again.client.next('queueEmpty')).toEqual({ deliveredCount: 2 });
    expect(again.client.envelopes).toEqual(bob.client.envelopes);
  });

  it('that leaves ids out is taken for a temporary failure of those; unknown ids and other pages’ are ignored', async () => {
    const clock = createManualClock();
    const at = await gatewayFor(undo, { clock });
    const alice = await opened(at);
    const bob = await enrol(at, someone(), FEW_KEYS);
    const carol = await opened(at);
    hold(carol.client);
    await send(alice.client, carol, 'carol’s');
    await eventually(() => expect(carol.client.envelopes).toHaveLength(1));
    await sendAll(alice.client, bob, ['processed', 'left out']);
    bob.client.onMessages = (page) => {
      bob.client.onMessages = processedAll;
      const foreign = [randomUUID(), carol.client.envelopes[0]!.id, '', 'no id'];
      return {
        processed: [...foreign, page.envelopes[0]!.id, page.envelopes[0]!.id],
        failed: [
          // It is processed already, and stays so.
          { id: page.envelopes[0]!.id, reason: 'undecryptable' },
          { id: carol.client.envelopes[0]!.id, reason: 'undecryptable' },
        ],
      };
    };
    await open(bob);
    await putOff(at, bob, clock, 1_000);
    await clock.advance(1_000);
    expect(await bob.client.next('queueEmpty')).toEqual({ deliveredCount: 2 });
    expect(contents(bob.client)).toEqual(['processed', 'left out', 'left out']);
    // Carol's is still hers.
    const again = await reopened(at, carol);
    expect(await again.client.next('queueEmpty')).toEqual({ deliveredCount: 1 });
    expect(contents(again.client)).toEqual(['carol’s']);
  });

  it.each([
    ['nothing', undefined],
    ['null', null],
    ['a list', ['x']],
    ['a text', 'processed'],
    ['processed that is no list', { processed: 'all' }],
    ['ids that are no texts', { processed: [1, 2] }],
    ['a reason that nobody knows', { processed: [], failed: [{ id: 'x', reason: 'tired' }] }],
  ])('that is %s is none: the socket is closed and the messages stay', async (_, garbage) => {
    const alice = await opened(shared);
    const bob = await opened(shared);
    bob.client.onMessages = () => null;
    bob.client.socket.on('messages', (_page, acknowledge) => acknowledge(garbage as never));
    await send(alice.client, bob, 'stays');
    expect(await bob.client.disconnected).toBe('transport close');
    const again = await reopened(shared, bob);
    await again.client.next('queueEmpty');
    expect(contents(again.client)).toEqual(['stays']);
  });
});

/** Waits until something of the party's is put off until `delayMs` from now. */
async function putOff(at: TestGateway, party: Party, clock: ManualClock, delayMs: number): Promise<void> {
  const queue = queueOf(at);
  await eventually(async () => {
    expect(await queue.nextDueAtMs(party.address, clock.nowMs())).toBe(clock.nowMs() + delayMs);
  });
}

/** Fails what says `bad`, and processes the rest. */
function failing(reason: 'undecryptable' | 'temporary') {
  return (page: PushPayload<'messages'>): MessagesAcknowledgement => {
    const isBad = (envelope: PushPayload<'messages'>['envelopes'][number]) =>
      envelope.kind === 'message' && Buffer.from(envelope.content, 'base64').toString() === 'bad';
    return {
      processed: page.envelopes.filter((envelope) => !isBad(envelope)).map((envelope) => envelope.id),
      failed: page.envelopes.filter(isBad).map((envelope) => ({ id: envelope.id, reason })),
    };
  };
}

describe('an envelope that failed', () => {
  it('as undecryptable is offered three times, after 1 and 5 seconds, then bounces; others pass it by', async () => {
    const clock = createManualClock();
    const at = await gatewayFor(undo, { clock });
    const alice = await opened(at);
    const bob = await opened(at);
    bob.client.onMessages = failing('undecryptable');
    const messageId = await send(alice.client, bob, 'bad');
    const offers = () => bob.client.envelopes.filter((envelope) => envelope.messageId === messageId);
    for (const [index, delayMs] of [1_000, 5_000].entries()) {
      await putOff(at, bob, clock, delayMs);
      await send(alice.client, bob, `passes ${index}`);
      await eventually(() => expect(contents(bob.client)).toContain(`passes ${index}`));
      await clock.advance(delayMs - 1);
      await afterOthersGotTheirs(at, alice.client);
      expect(offers()).toHaveLength(index + 1);
      await clock.advance(1);
      await eventually(() => expect(offers()).toHaveLength(index + 2));
    }
    await eventually(() => expect(alice.client.envelopes).toHaveLength(1));
    expect(alice.client.envelopes).toMatchObject([
      { kind: 'bounce', messageId, recipient: bob.address, reason: 'UNDECRYPTABLE' },
    ]);
    expect(new Set(offers().map((envelope) => envelope.id)).size).toBe(1);
    await heard(alice.client);
    await clock.advance(200_000);
    await afterOthersGotTheirs(at, alice.client);
    expect(offers()).toHaveLength(3);
  });

  it('temporarily is offered again after 1, 5, 30, and then every 120 seconds, while others pass', async () => {
    const clock = createManualClock();
    const at = await gatewayFor(undo, { clock });
    const alice = await opened(at);
    const bob = await opened(at);
    bob.client.onMessages = failing('temporary');
    await send(alice.client, bob, 'bad');
    const offers = () => contents(bob.client).filter((text) => text === 'bad').length;
    for (const [index, delayMs] of [1_000, 5_000, 30_000, 120_000, 120_000, 120_000].entries()) {
      await putOff(at, bob, clock, delayMs);
      await send(alice.client, bob, `passes ${index}`);
      await eventually(() => expect(contents(bob.client)).toContain(`passes ${index}`));
      await heard(bob.client);
      await clock.advance(delayMs - 1);
      await afterOthersGotTheirs(at, alice.client);
      expect(offers()).toBe(index + 1);
      await clock.advance(1);
      await eventually(() => expect(offers()).toBe(index + 2));
    }
    bob.client.onMessages = processedAll;
    await putOff(at, bob, clock, 120_000);
    await clock.advance(120_000);
    await eventually(() => expect(offers()).toBe(8));
    expect(alice.client.envelopes).toEqual([]);
  });

  it('goes on waiting where its device has reconnected, and queueEmpty waits with it', async () => {
    const clock = createManualClock();
    const at = await gatewayFor(undo, { clock });
    const alice = await opened(at);
    const bob = await opened(at);
    bob.client.onMessages = failing('temporary');
    await send(alice.client, bob, 'bad');
    await putOff(at, bob, clock, 1_000);
    const again = await reopened(at, bob);
    await send(alice.client, bob, 'live');
    await eventually(() => expect(contents(again.client)).toEqual(['live']));
    expect(again.client.waiting('queueEmpty')).toBe(0);
    await clock.advance(1_000);
    expect(await again.client.next('queueEmpty')).toEqual({ deliveredCount: 2 });
    expect(contents(again.client)).toEqual(['live', 'bad']);
  });
});

describe('a messageId that is sent again', () => {
  it('is stored once and delivered once, before and after it was processed, by any connection of the sender', async () => {
    const alice = await opened(shared);
    const bob = await enrol(shared, someone(), FEW_KEYS);
    const request = sending(bob.address.userId, [bob.device]);
    const first = await alice.client.call('sendMessages', request);
    expect(await alice.client.call('sendMessages', request)).toEqual(first);
    await Promise.all(Array.from({ length: 10 }, () => alice.client.call('sendMessages', request)));
    expect(await open(bob)).toMatchObject({ pendingCount: 1 });
    expect(await bob.client.next('queueEmpty')).toEqual({ deliveredCount: 1 });

    const again = await shared.connect(alice.address);
    expect(await again.call('sendMessages', request)).toEqual(first);
    await afterOthersGotTheirs(shared, again);
    expect(bob.client.envelopes).toHaveLength(1);
  });

  it('of another sender, or to another device, is another message', async () => {
    const alice = await opened(shared);
    const carol = await opened(shared);
    const bob = await opened(shared);
    const messageId = randomUUID();
    await send(alice.client, bob, 'alice’s', messageId);
    await send(carol.client, bob, 'carol’s', messageId);
    await send(alice.client, carol, 'for carol', messageId);
    await eventually(() => expect(contents(bob.client)).toEqual(['alice’s', 'carol’s']));
    await eventually(() => expect(contents(carol.client)).toEqual(['for carol']));
  });
});

describe('the devices that are addressed', () => {
  it('must be those of the recipient: missing, extra and stale ones are all named, and nothing is stored', async () => {
    const alice = await opened(shared);
    const userId = someone().userId;
    const [one, two, three] = (await Promise.all(
      [1, 2, 3].map((deviceId) => opened(shared, { userId, deviceId })),
    )) as [Party, Party, Party];
    const stale = { ...envelopeFor(two.device), registrationId: (two.device.registrationId + 1) % 16_384 };
    const extra = { ...envelopeFor(one.device), deviceId: 9 };
    const request = sending(userId, [], { envelopes: [envelopeFor(one.device), stale, extra] });
    expect(await alice.client.refusal('sendMessages', request)).toMatchObject({
      code: 'DEVICES_MISMATCHED',
      details: { missingDevices: [3], extraDevices: [9], staleDevices: [2] },
    });
    await afterOthersGotTheirs(shared, alice.client);
    for (const party of [one, two, three]) expect(party.client.envelopes).toEqual([]);

    // Nothing was stored, so that the same id is still free.
    expect(await alice.client.call('sendMessages', { ...request, onMismatch: 'sendAnyway' })).toMatchObject({
      accepted: [1],
      rejected: [],
      missingDevices: [3],
      extraDevices: [9],
      staleDevices: [2],
    });
    await eventually(() => expect(one.client.envelopes).toHaveLength(1));
    expect([...two.client.envelopes, ...three.client.envelopes]).toEqual([]);

    // The mended list under the same id brings what is missing, and nothing twice.
    const mended = { ...request, envelopes: [one, two, three].map((party) => envelopeFor(party.device)) };
    expect(await alice.client.call('sendMessages', mended)).toMatchObject({ accepted: [1, 2, 3] });
    await eventually(() => expect([...two.client.envelopes, ...three.client.envelopes]).toHaveLength(2));
    expect(one.client.envelopes).toHaveLength(1);
  });

  it('a user without keys is USER_NOT_FOUND, and with devices that don’t match sendAnyway stores nothing', async () => {
    const alice = await opened(shared);
    const bob = await opened(shared);
    expect(await alice.client.refusal('sendMessages', sending(someone().userId, [bob.device]))).toMatchObject(
      {
        code: 'USER_NOT_FOUND',
      },
    );
    const extra = { ...envelopeFor(bob.device), deviceId: 2 };
    expect(
      await alice.client.call(
        'sendMessages',
        sending(bob.address.userId, [], { envelopes: [extra], onMismatch: 'sendAnyway' }),
      ),
    ).toMatchObject({ accepted: [], rejected: [], missingDevices: [1], extraDevices: [2], staleDevices: [] });
  });

  it('of the sender’s own user are the others: its own is neither required nor allowed', async () => {
    const phone = await opened(shared);
    const desk = await opened(shared, { ...phone.address, deviceId: 2 });
    const { userId } = phone.address;
    await phone.client.call('sendMessages', sending(userId, [desk.device]));
    await eventually(() => expect(desk.client.envelopes).toMatchObject([{ sender: phone.address }]));
    expect(
      await phone.client.refusal('sendMessages', sending(userId, [desk.device, phone.device])),
    ).toMatchObject({
      code: 'DEVICES_MISMATCHED',
      details: { missingDevices: [], extraDevices: [1], staleDevices: [] },
    });
    expect(phone.client.envelopes).toEqual([]);
  });
});

describe('a full queue', () => {
  const QUEUE_MAX = { QUEUE_MAX: '3' };

  it('takes no more until its device has processed something, and says when to try again', async () => {
    const at = await gatewayFor(undo, { env: QUEUE_MAX });
    const alice = await opened(at);
    const bob = await enrol(at, someone(), FEW_KEYS);
    const sent = await sendAll(alice.client, bob, numbers(3));
    const request = sending(bob.address.userId, [bob.device]);
    expect(await alice.client.refusal('sendMessages', request)).toMatchObject({
      code: 'QUEUE_FULL',
      retryable: true,
      retryAfterMs: expect.any(Number),
    });
    // What is in the queue already is no more of it.
    expect(await send(alice.client, bob, '0', sent[0])).toBe(sent[0]);
    await open(bob);
    await bob.client.next('queueEmpty');
    await alice.client.call('sendMessages', request);
    await eventually(() => expect(bob.client.envelopes).toHaveLength(4));
  });

  it('of one device never fails the others', async () => {
    const at = await gatewayFor(undo, { env: QUEUE_MAX });
    const alice = await opened(at);
    const bob = await opened(at);
    const away = await enrol(at, { ...bob.address, deviceId: 2 }, FEW_KEYS);
    const devices = [bob.device, away.device];
    for (let i = 0; i < 3; i++) {
      await alice.client.call('sendMessages', sending(bob.address.userId, devices));
      await eventually(() => expect(bob.client.envelopes).toHaveLength(i + 1));
    }
    // What he has processed leaves his queue a moment later.
    await eventually(async () => expect(await open(bob)).toMatchObject({ pendingCount: 0 }));
    expect(await alice.client.call('sendMessages', sending(bob.address.userId, devices))).toMatchObject({
      accepted: [1],
      rejected: [{ deviceId: 2, code: 'QUEUE_FULL' }],
    });
    await eventually(() => expect(bob.client.envelopes).toHaveLength(4));
    expect(await open(away)).toMatchObject({ pendingCount: 3 });
  });

  it('is not filled by bounces, and bounces pass a full one', async () => {
    const at = await gatewayFor(undo, { env: QUEUE_MAX });
    const alice = await enrol(at, someone(), FEW_KEYS);
    const bob = await opened(at);
    const carol = await opened(at);
    for (const party of [bob, carol]) hold(party.client);
    const lost = [
      ...(await sendAll(alice.client, bob, numbers(3))),
      ...(await sendAll(alice.client, carol, numbers(3))),
    ];
    await sendAll(bob.client, alice, numbers(2));
    await bob.client.call('resetKeys');
    await carol.client.call('resetKeys');
    const dave = await opened(at);
    await send(dave.client, alice, 'the third');
    await expect(send(dave.client, alice, 'one too many')).rejects.toThrow('QUEUE_FULL');
    await open(alice);
    await eventually(() => expect(alice.client.envelopes).toHaveLength(9));
    const bounced = alice.client.envelopes.filter((envelope) => envelope.kind === 'bounce');
    expect(bounced.map((envelope) => envelope.messageId).sort()).toEqual(lost.sort());
  });
});

describe('a device without keys', () => {
  it('sends nothing from the moment that its own reset is answered', async () => {
    const alice = await opened(shared);
    const bob = await enrol(shared, someone(), FEW_KEYS);
    await send(alice.client, bob, 'before');
    await alice.client.call('resetKeys');
    await expect(send(alice.client, bob, 'after')).rejects.toThrow('KEYS_NOT_UPLOADED');
  });
});

describe('bounces', () => {
  it('survive the sender’s own reset, and are never bounced themselves', async () => {
    const alice = await enrol(shared, someone(), FEW_KEYS);
    const bob = await opened(shared);
    hold(bob.client);
    const messageId = await send(alice.client, bob, 'lost');
    await bob.client.call('resetKeys');
    await bob.client.next('gateClosed');
    await alice.client.call('resetKeys');
    const device = new SignalDevice(alice.address);
    await alice.client.call('uploadKeys', device.uploadInput(FEW_KEYS));
    await alice.client.call('uploadKeys', {
      ...alice.device.uploadInput(FEW_KEYS),
      replaceIdentity: true,
    });
    await open(alice);
    await eventually(() => expect(alice.client.envelopes).toHaveLength(1));
    expect(alice.client.envelopes).toMatchObject([
      { kind: 'bounce', messageId, reason: 'RECIPIENT_KEYS_RESET', recipient: bob.address },
    ]);
    expect(bob.client.envelopes).toHaveLength(1);
  });

  it('that the sender can’t process are offered again, and dropped after three undecryptable answers', async () => {
    const clock = createManualClock();
    const at = await gatewayFor(undo, { clock });
    const alice = await opened(at);
    const bob = await opened(at);
    hold(bob.client);
    alice.client.onMessages = (page) => ({
      processed: [],
      failed: page.envelopes.map((envelope) => ({ id: envelope.id, reason: 'undecryptable' })),
    });
    await send(alice.client, bob, 'lost');
    await bob.client.call('resetKeys');
    for (const [index, delayMs] of [1_000, 5_000].entries()) {
      await eventually(() => expect(alice.client.envelopes).toHaveLength(index + 1));
      await putOff(at, alice, clock, delayMs);
      await clock.advance(delayMs);
    }
    await eventually(() => expect(alice.client.envelopes).toHaveLength(3));
    await eventually(async () => {
      const again = await reopened(at, alice);
      expect(await again.client.next('queueEmpty')).toEqual({ deliveredCount: 0 });
    });
    expect(bob.client.envelopes).toHaveLength(1);
  });

  it('finish their messageId: sent again it is no new message', async () => {
    const alice = await opened(shared);
    const bob = await opened(shared);
    hold(bob.client);
    const messageId = await send(alice.client, bob, 'lost');
    await bob.client.call('resetKeys');
    await eventually(() => expect(alice.client.envelopes).toHaveLength(1));
    await bob.client.call('uploadKeys', bob.device.uploadInput(FEW_KEYS));
    await send(alice.client, bob, 'again', messageId);
    expect(await open(bob)).toMatchObject({ pendingCount: 0 });
    await send(alice.client, bob, 'under a new id');
    await eventually(() => expect(contents(bob.client)).toContain('under a new id'));
    expect(contents(bob.client)).not.toContain('again');
  });
});

describe('a bounce', () => {
  it('that a crash interrupted comes home with the next sweep of any node', async () => {
    const clock = createManualClock();
    const at = await gatewayFor(undo, { clock });
    const alice = await opened(at);
    const bob = await enrol(at, someone(), FEW_KEYS);
    const messageId = await send(alice.client, bob, 'for an identity that is gone');
    // What a gateway leaves that ends between the two steps.
    const sql = postgres(at.databaseUrl, { max: 1, onnotice: () => {} });
    undo.push(() => sql.end());
    await sql`UPDATE messages SET pending = false, content = NULL, bounce_reason = 'RECIPIENT_IDENTITY_CHANGED'`;
    await clock.advance(15_000);
    await eventually(() =>
      expect(alice.client.envelopes).toMatchObject([
        { kind: 'bounce', messageId, reason: 'RECIPIENT_IDENTITY_CHANGED', recipient: bob.address },
      ]),
    );
    await eventually(async () => expect(await sql`SELECT 1 FROM messages`).toHaveLength(0));
  });
});

describe('expiry', () => {
  const DAY_MS = 86_400_000;

  it('immunity 19: when half of the backlog expires, queueEmpty is right and the expired half bounces', async () => {
    const clock = createManualClock();
    const at = await gatewayFor(undo, { clock, env: { MESSAGE_TTL_DAYS: '2' } });
    const alice = await enrol(at, someone(), FEW_KEYS);
    const bob = await enrol(at, someone(), FEW_KEYS);
    const expired = await sendAll(alice.client, bob, ['a', 'b', 'c']);
    await clock.advance(DAY_MS);
    const sender = await at.connect(alice.address);
    await sendAll(sender, bob, ['d', 'e']);
    // Up to the very moment, and then not any more.
    const held = await reopened(at, bob, () => null);
    await eventually(() => expect(contents(held.client)).toEqual(['a', 'b', 'c', 'd', 'e']));
    held.client.close();
    await clock.advance(DAY_MS);
    const again = await at.connect(bob.address);
    expect(await open({ client: again, device: bob.device })).toMatchObject({ pendingCount: 2 });
    expect(await again.next('queueEmpty')).toEqual({ deliveredCount: 2 });
    expect(contents(again)).toEqual(['d', 'e']);

    const home = await reopened(at, alice);
    await eventually(() => expect(home.client.envelopes).toHaveLength(3));
    expect(home.client.envelopes).toMatchObject(
      expired.map((messageId) => ({ kind: 'bounce', messageId, reason: 'EXPIRED', recipient: bob.address })),
    );
  });

  it('is not believed of a node whose clock has leapt', async () => {
    const time = createManualClock();
    let leapMs = 0;
    const clock: ManualClock = { ...time, nowMs: () => time.nowMs() + leapMs };
    const warnings: string[] = [];
    const log = { ...silentLog, warn: (_: LogFields, message: string) => void warnings.push(message) };
    const env = { MESSAGE_TTL_DAYS: '1' };
    const at = await gatewayFor(undo, { clock, comparesClock: true, log, env });
    const alice = await enrol(at, someone(), FEW_KEYS);
    const bob = await enrol(at, someone(), FEW_KEYS);
    await sendAll(alice.client, bob, numbers(3));
    const sql = postgres(at.databaseUrl, { max: 1, onnotice: () => {} });
    undo.push(() => sql.end());
    const waiting = async () => (await sql`SELECT 1 FROM messages WHERE pending AND kind = 0`).length;
    leapMs = 2 * DAY_MS;
    await eventually(async () => {
      await clock.advance(60_000);
      expect(warnings).toContain('this node sweeps nothing: its clock differs from that of PostgreSQL');
    });
    expect(await waiting()).toBe(3);
    // Another node, of which nobody asks it.
    await gatewayFor(undo, { clock, databaseUrl: at.databaseUrl, env });
    await eventually(async () => {
      await clock.advance(60_000);
      expect(await waiting()).toBe(0);
    });
  });

  it('of messages whose device never comes back is found by the sweep', async () => {
    const clock = createManualClock();
    const at = await gatewayFor(undo, { clock, env: { MESSAGE_TTL_DAYS: '1' } });
    const alice = await enrol(at, someone(), FEW_KEYS);
    const bob = await enrol(at, someone(), FEW_KEYS);
    const expired = await sendAll(alice.client, bob, numbers(3));
    await clock.advance(DAY_MS);
    const home = await reopened(at, alice);
    await eventually(async () => {
      await clock.advance(10_000);
      expect(home.client.envelopes.map((envelope) => envelope.messageId).sort()).toEqual(expired.sort());
    });
    expect(contents(home.client)).toEqual(['EXPIRED', 'EXPIRED', 'EXPIRED']);
  });
});
