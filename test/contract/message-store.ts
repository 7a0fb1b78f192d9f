// The promises of ports/message-store, for every engine that keeps them.
import { randomUUID } from 'node:crypto';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { KeyStore } from '../../src/ports/key-store.ts';
import {
  type MessageStore,
  type Page,
  type Reader,
  type StoreRequest,
  WAITING_TOLD_MAX,
} from '../../src/ports/message-store.ts';
import { addressKey, type DeviceAddress } from '../../src/protocol/ids.ts';
import { identityOf, newDevice, storeKeySet, updateOf, wipeKeySet } from './key-store.ts';

export interface OpenMessageStore {
  messages: MessageStore;
  /** The same store, as another node sees it, or this node after a restart. */
  otherNode: MessageStore;
  /** Of the same engine: whose devices these are. */
  keys: KeyStore;
  /** The same store on a node that dies in `settleBounces` once the copies are made, before the rows are removed. */
  dyingAfterCopy: MessageStore;
  close(): Promise<void>;
}

const NOW_MS = Date.UTC(2026, 0, 1);
const DAY_MS = 24 * 3_600_000;
const EXPIRES_MS = NOW_MS + 30 * DAY_MS;
const REGISTRATION_ID = 7;

type StoreOptions = Partial<Omit<StoreRequest, 'sender' | 'recipientUserId' | 'messages'>> & {
  content?: string;
};

const ids = (from: number, count: number): number[] => Array.from({ length: count }, (_, i) => from + i);
const text = (content: string): string => Buffer.from(content, 'base64').toString();

/** @param open an empty store; every test has devices of its own on it */
export function describeMessageStore(engine: string, open: () => Promise<OpenMessageStore>): void {
  describe(`the message store (${engine})`, () => {
    let opened: OpenMessageStore;
    let messages: MessageStore;
    let otherNode: MessageStore;
    let keys: KeyStore;
    beforeAll(async () => {
      opened = await open();
      ({ messages, otherNode, keys } = opened);
    });
    afterAll(() => opened.close());

    async function enrolled(deviceId = 1, userId?: string): Promise<DeviceAddress> {
      const device = { ...newDevice(deviceId), ...(userId === undefined ? {} : { userId }) };
      await storeKeySet(keys, device, { registrationId: REGISTRATION_ID });
      return device;
    }

    /** A device and a connection of it that is served. */
    async function served(device: DeviceAddress, store = messages): Promise<Reader> {
      const { fence } = await store.connect(device);
      const proof = await store.prove(device);
      const reader = { device, fence };
      expect(await store.serve(reader, proof!.keyVersion, NOW_MS)).toMatchObject({ served: true });
      return reader;
    }

    function storeFor(
      sender: DeviceAddress,
      recipient: DeviceAddress | { userId: string; devices: [deviceId: number, registrationId: number][] },
      { content = 'x', ...options }: StoreOptions = {},
      store = messages,
    ) {
      const devices: [number, number][] =
        'devices' in recipient ? recipient.devices : [[recipient.deviceId, REGISTRATION_ID]];
      return store.store({
        sender,
        messageId: randomUUID(),
        recipientUserId: recipient.userId,
        messages: devices.map(([deviceId, registrationId]) => ({
          deviceId,
          registrationId,
          type: 3,
          content: Buffer.from(content).toString('base64'),
        })),
        sendAnyway: false,
        nowMs: NOW_MS,
        expiresAtMs: EXPIRES_MS,
        queueMax: 1000,
        ...options,
      });
    }

    const read = async (
      reader: Reader,
      page: Partial<Parameters<MessageStore['read']>[1]> = {},
      store = messages,
    ): Promise<Page> =>
      (await store.read(reader, {
        inFlight: [],
        envelopesMax: 100,
        bytesMax: 1 << 20,
        nowMs: NOW_MS,
        ...page,
      }))!;

    /** What a reader sees, shortest form: a message's content, a bounce's reason. */
    const seen = async (reader: Reader, nowMs = NOW_MS): Promise<string[]> =>
      (await read(reader, { nowMs })).envelopes.map(({ body }) =>
        body.kind === 'message' ? text(body.content) : body.reason,
      );

    const settle = (of: DeviceAddress | null, store = messages, limit = 100) =>
      store.settleBounces(of, { nowMs: NOW_MS, expiresAtMs: EXPIRES_MS, limit });

    const sweep = (nowMs: number, forgetBeforeMs = 0, limit = 10_000) =>
      messages.sweep({ nowMs, forgetBeforeMs, limit });

    describe('storing', () => {
      it('keeps an envelope as it was sent, and gives it to another node', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        const messageId = randomUUID();
        const content = `${String.fromCharCode(0, 1, 2, 127)}\\x"{},NULL`;
        const result = await storeFor(alice, bob, { messageId, content, nowMs: NOW_MS + 7 });
        expect(result).toEqual({
          storedAtMs: NOW_MS + 7,
          accepted: [1],
          full: [],
          missingDevices: [],
          extraDevices: [],
          staleDevices: [],
          stored: true,
          fresh: [expect.objectContaining({ deviceId: 1, waiting: [] })],
        });
        const reader = await served(bob);
        const page = await read(reader, {}, otherNode);
        expect(page.envelopes).toHaveLength(1);
        const [envelope] = page.envelopes;
        expect(envelope).toMatchObject({
          messageId,
          storedAtMs: NOW_MS + 7,
          body: { kind: 'message', sender: alice, type: 3 },
        });
        expect(envelope!.body.kind === 'message' && text(envelope!.body.content)).toBe(content);
        // The id is the envelope's own, and the same when it is read again.
        expect(envelope!.id).not.toBe(messageId);
        expect((await read(reader)).envelopes[0]!.id).toBe(envelope!.id);
        expect(page.oldestSequence).toBe(envelope!.sequence);
      });

      it('is null where the recipient has no device with keys', async () => {
        const alice = await enrolled();
        expect(await storeFor(alice, newDevice())).toBeNull();
        const bob = await enrolled();
        await wipeKeySet(keys, bob);
        expect(await storeFor(alice, bob)).toBeNull();
      });

      it('is refused whole where devices are missing, unknown or stale, and says which', async () => {
        const alice = await enrolled();
        const { userId } = newDevice();
        const bobs = await Promise.all([1, 2, 3].map((deviceId) => enrolled(deviceId, userId)));
        const result = await storeFor(alice, {
          userId,
          devices: [
            [2, REGISTRATION_ID],
            [3, REGISTRATION_ID + 1],
            [9, REGISTRATION_ID],
            [8, 1],
          ],
        });
        expect(result).toMatchObject({
          stored: false,
          missingDevices: [1],
          extraDevices: [8, 9],
          staleDevices: [3],
        });
        for (const bob of bobs) expect(await seen(await served(bob))).toEqual([]);
      });

      it('with sendAnyway goes to those that match, and still says which don’t', async () => {
        const alice = await enrolled();
        const { userId } = newDevice();
        const bobs = await Promise.all([1, 2, 3].map((deviceId) => enrolled(deviceId, userId)));
        const devices: [number, number][] = [
          [2, REGISTRATION_ID],
          [3, REGISTRATION_ID + 1],
          [9, REGISTRATION_ID],
        ];
        expect(await storeFor(alice, { userId, devices }, { sendAnyway: true })).toMatchObject({
          stored: true,
          accepted: [2],
          missingDevices: [1],
          extraDevices: [9],
          staleDevices: [3],
        });
        const queues = [];
        for (const bob of bobs) queues.push(await seen(await served(bob)));
        expect(queues).toEqual([[], ['x'], []]);
      });

      it('neither demands nor takes the sender’s own device', async () => {
        const { userId } = newDevice();
        const [phone, laptop] = [await enrolled(1, userId), await enrolled(2, userId)];
        const both = { userId, devices: [1, 2].map((id): [number, number] => [id, REGISTRATION_ID]) };
        expect(await storeFor(phone, laptop)).toMatchObject({
          stored: true,
          accepted: [2],
          missingDevices: [],
        });
        expect(await storeFor(phone, both)).toMatchObject({ stored: false, extraDevices: [1] });
        expect(await storeFor(phone, both, { sendAnyway: true })).toMatchObject({
          accepted: [2],
          extraDevices: [1],
        });
        expect(await seen(await served(phone))).toEqual([]);
        expect(await seen(await served(laptop))).toEqual(['x', 'x']);
      });

      it('keeps the order of one sender’s messages', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        for (const i of ids(0, 12))
          await storeFor(alice, bob, { content: `${i}` }, i % 2 ? messages : otherNode);
        expect(await seen(await served(bob))).toEqual(ids(0, 12).map(String));
      });

      it('fails for a full device, and for no other', async () => {
        const alice = await enrolled();
        const { userId } = newDevice();
        const [full, free] = [await enrolled(1, userId), await enrolled(2, userId)];
        const both = { userId, devices: [1, 2].map((id): [number, number] => [id, REGISTRATION_ID]) };
        for (const _ of ids(0, 2))
          await storeFor(alice, { userId, devices: [[1, REGISTRATION_ID]] }, { sendAnyway: true });
        const messageId = randomUUID();
        expect(await storeFor(alice, both, { queueMax: 2, messageId })).toMatchObject({
          stored: true,
          accepted: [2],
          full: [1],
        });
        expect(await seen(await served(free))).toEqual(['x']);
        // The same message again, once there is room: it reaches the one that was full, and the other not twice.
        const reader = await served(full);
        const { envelopes } = await read(reader);
        await messages.acknowledge(reader, [envelopes[0]!.sequence]);
        expect(await storeFor(alice, both, { queueMax: 2, messageId })).toMatchObject({
          accepted: [1, 2],
          full: [],
        });
        expect(await seen(await served(free))).toEqual(['x']);
        expect(await seen(await served(full))).toEqual(['x', 'x']);
      });

      it('tells of a fresh message what a read would prove, and what else waits', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        const first = await storeFor(alice, bob);
        const reader = await served(bob);
        const second = (await storeFor(alice, bob))!.fresh[0]!;
        const page = await read(reader);
        expect(second).toEqual({
          deviceId: 1,
          sequence: page.envelopes[1]!.sequence,
          id: page.envelopes[1]!.id,
          keyVersion: page.proof.keyVersion,
          identityVersion: page.proof.identityVersion,
          fence: reader.fence,
          waiting: [first!.fresh[0]!.sequence],
        });
        for (const _ of ids(2, WAITING_TOLD_MAX)) await storeFor(alice, bob);
        expect((await storeFor(alice, bob))!.fresh[0]!.waiting).toBeNull();
        const messageId = randomUUID();
        await storeFor(alice, bob, { messageId });
        expect(await storeFor(alice, bob, { messageId })).toMatchObject({ accepted: [1], fresh: [] });
      });

      it('answers each of many requests at once as if it were alone', async () => {
        const userId = newDevice().userId;
        const [alice, phone, laptop] = [
          await enrolled(),
          await enrolled(1, userId),
          await enrolled(2, userId),
        ];
        const both = {
          userId,
          devices: [
            [1, REGISTRATION_ID],
            [2, REGISTRATION_ID],
          ] as [number, number][],
        };
        const messageId = randomUUID();
        const [sent, repeated, toOne, toStale, toNobody, toThree] = await Promise.all([
          storeFor(alice, both, { messageId, content: 'once' }),
          storeFor(alice, both, { messageId, content: 'again' }),
          storeFor(alice, laptop),
          storeFor(
            alice,
            {
              userId,
              devices: [
                [1, REGISTRATION_ID],
                [2, 99],
              ],
            },
            { sendAnyway: true, content: 'y' },
          ),
          storeFor(alice, newDevice()),
          storeFor(laptop, {
            userId,
            devices: [
              [1, REGISTRATION_ID],
              [3, 7],
            ],
          }),
        ]);
        expect(sent).toMatchObject({ accepted: [1, 2], stored: true });
        expect(repeated).toMatchObject({ accepted: [1, 2], stored: true });
        expect(sent!.fresh.length + repeated!.fresh.length).toBe(2);
        expect(toOne).toMatchObject({ missingDevices: [1], stored: false, fresh: [] });
        expect(toStale).toMatchObject({ accepted: [1], staleDevices: [2], stored: true });
        expect(toNobody).toBeNull();
        // To the sender's own user: its own device is neither required nor allowed.
        expect(toThree).toMatchObject({ missingDevices: [], extraDevices: [3], stored: false });
        expect((await seen(await served(phone))).toSorted()).toEqual(['once', 'y']);
        expect(await seen(await served(laptop))).toEqual(['once']);
      });

      it('lets no batch overfill a queue', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        await storeFor(alice, bob);
        const results = await Promise.all(ids(0, 9).map(() => storeFor(alice, bob, { queueMax: 4 })));
        expect(results.flatMap((result) => result!.accepted)).toHaveLength(3);
        expect(results.flatMap((result) => result!.full)).toHaveLength(6);
        expect(await seen(await served(bob))).toHaveLength(4);
      });

      it('bounds a queue also where more waits in it than a fresh message tells of', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        const queueMax = WAITING_TOLD_MAX + 2;
        await Promise.all(ids(0, queueMax).map(() => storeFor(alice, bob, { queueMax })));
        expect(await storeFor(alice, bob, { queueMax })).toMatchObject({ accepted: [], full: [1] });
        expect(await storeFor(alice, bob, { queueMax: queueMax + 1 })).toMatchObject({ accepted: [1] });
      });

      it('holds each request of a batch to its own bound', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        for (const _ of ids(0, 4)) await storeFor(alice, bob);
        const results = await Promise.all([2, 4, 7].map((queueMax) => storeFor(alice, bob, { queueMax })));
        expect(results.map((result) => result!.full)).toEqual([[1], [1], []]);
      });

      it('keeps no place in a queue for what is refused', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        await storeFor(alice, bob);
        const both: [number, number][] = [
          [bob.deviceId, REGISTRATION_ID],
          [bob.deviceId + 1, REGISTRATION_ID],
        ];
        const [refused, taken] = await Promise.all([
          storeFor(alice, { userId: bob.userId, devices: both }, { queueMax: 2 }),
          storeFor(alice, bob, { queueMax: 2 }),
        ]);
        expect(refused).toMatchObject({ stored: false });
        expect(taken).toMatchObject({ accepted: [bob.deviceId], full: [] });
      });

      it('keeps no place in a queue for what was stored before, nor for what is stale', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        const messageId = randomUUID();
        await storeFor(alice, bob, { messageId });
        const stale: [number, number][] = [[bob.deviceId, REGISTRATION_ID + 1]];
        const [repeated, refused, taken] = await Promise.all([
          storeFor(alice, bob, { messageId, queueMax: 2 }),
          storeFor(alice, { userId: bob.userId, devices: stale }, { sendAnyway: true, queueMax: 2 }),
          storeFor(alice, bob, { queueMax: 2 }),
        ]);
        expect(repeated).toMatchObject({ accepted: [bob.deviceId], full: [] });
        expect(refused).toMatchObject({ accepted: [], staleDevices: [bob.deviceId] });
        expect(taken).toMatchObject({ accepted: [bob.deviceId], full: [] });
      });

      it('counts no bounces towards a full queue', async () => {
        const [alice, bob, carol] = [await enrolled(), await enrolled(), await enrolled()];
        await storeFor(alice, bob);
        await wipeKeySet(keys, bob);
        await settle(bob);
        expect(await storeFor(carol, alice, { queueMax: 1 })).toMatchObject({ accepted: [1], full: [] });
        expect(await storeFor(carol, alice, { queueMax: 1 })).toMatchObject({ accepted: [], full: [1] });
      });
    });

    describe('a message that is sent again', () => {
      it('is stored once, and was stored when it was stored first', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        const messageId = randomUUID();
        await storeFor(alice, bob, { messageId, content: 'first' });
        expect(
          await storeFor(alice, bob, { messageId, content: 'second', nowMs: NOW_MS + 999 }, otherNode),
        ).toMatchObject({ stored: true, accepted: [1], storedAtMs: NOW_MS });
        expect(await seen(await served(bob))).toEqual(['first']);
      });

      it('was stored when the first of its recipient’s devices was given it', async () => {
        const alice = await enrolled();
        const { userId } = newDevice();
        for (const deviceId of [1, 2, 3]) await enrolled(deviceId, userId);
        const messageId = randomUUID();
        const sendTo = (deviceIds: number[], nowMs: number) => {
          const devices = deviceIds.map((id): [number, number] => [id, REGISTRATION_ID]);
          return storeFor(alice, { userId, devices }, { messageId, sendAnyway: true, nowMs });
        };
        await sendTo([2], NOW_MS);
        expect(await sendTo([1, 2, 3], NOW_MS + 1)).toMatchObject({ storedAtMs: NOW_MS + 1 });
        expect(await sendTo([1, 2, 3], NOW_MS + 2)).toMatchObject({ storedAtMs: NOW_MS });
      });

      it('is stored once also when its copies come at once, over two nodes', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        const messageId = randomUUID();
        const results = await Promise.all(
          ids(0, 20).map((i) => storeFor(alice, bob, { messageId }, i % 2 ? messages : otherNode)),
        );
        expect(results.every((result) => result?.accepted.length === 1)).toBe(true);
        expect(await seen(await served(bob))).toEqual(['x']);
      });

      it('is stored once also where two nodes store many of them at once, each in another order', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        for (const _ of ids(0, 5)) {
          const messageIds = ids(0, 40).map(() => randomUUID());
          const storeAll = (list: readonly string[], store: MessageStore) =>
            Promise.all(list.map((messageId) => storeFor(alice, bob, { messageId }, store)));
          await Promise.all([storeAll(messageIds, messages), storeAll(messageIds.toReversed(), otherNode)]);
        }
        const { envelopes } = await read(await served(bob), { envelopesMax: 1_000 });
        expect(envelopes).toHaveLength(200);
      });

      it('is stored once also after it was processed, and after the recipient has reset', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        const messageId = randomUUID();
        await storeFor(alice, bob, { messageId });
        const reader = await served(bob);
        const { envelopes } = await read(reader);
        expect(
          await messages.acknowledge(
            reader,
            envelopes.map((envelope) => envelope.sequence),
          ),
        ).toBe(1);
        expect(await storeFor(alice, bob, { messageId })).toMatchObject({ stored: true, accepted: [1] });
        expect(await seen(reader)).toEqual([]);
        await wipeKeySet(keys, bob);
        expect(await storeFor(alice, bob, { messageId })).toMatchObject({ stored: true, accepted: [1] });
      });

      it('is another message from another sender, under another id, and to another device', async () => {
        const { userId } = newDevice();
        const bobs = [await enrolled(1, userId), await enrolled(2, userId)];
        const [alice, aliceTwo, carol] = [await enrolled(), newDevice(2), newDevice()];
        const messageId = randomUUID();
        for (const sender of [alice, { ...aliceTwo, userId: alice.userId }, carol]) {
          for (const bob of bobs) await storeFor(sender, bob, { messageId, sendAnyway: true });
        }
        for (const bob of bobs) expect(await seen(await served(bob))).toHaveLength(3);
      });

      it('is another message than the one of the same id that bounced to its recipient', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        const messageId = randomUUID();
        await storeFor(bob, alice, { messageId });
        await storeKeySet(keys, alice, { identity: identityOf('B'), registrationId: REGISTRATION_ID });
        await settle(alice);
        await storeFor(alice, bob, { messageId });
        expect(await seen(await served(bob))).toEqual(['RECIPIENT_IDENTITY_CHANGED', 'x']);
      });

      it('is remembered while it waits and for a day after it was finished, then forgotten', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        const messageId = randomUUID();
        await storeFor(alice, bob, { messageId });
        const reader = await served(bob);
        const again = (days: number) => storeFor(alice, bob, { messageId, nowMs: NOW_MS + days * DAY_MS });
        // Each sweep forgets what was finished a day before it.
        const sweepAt = (days: number) => sweep(NOW_MS + days * DAY_MS, NOW_MS + (days - 1) * DAY_MS);
        await sweepAt(5);
        await sweepAt(7);
        await again(8);
        const { envelopes } = await read(reader);
        expect(envelopes).toHaveLength(1);
        await messages.acknowledge(reader, [envelopes[0]!.sequence]);
        // The first sweep after the end notes it; a day later it goes, and not before.
        await sweepAt(9);
        await sweepAt(9.9);
        await again(9.9);
        expect(await seen(reader)).toEqual([]);
        await sweepAt(10.1);
        await again(10.2);
        expect(await seen(reader)).toEqual(['x']);
      });

      it('is forgotten although others still wait for its device', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        const messageId = randomUUID();
        await storeFor(alice, bob, { messageId });
        const reader = await served(bob);
        await storeFor(alice, bob, { content: 'other' });
        await messages.acknowledge(reader, [(await read(reader)).envelopes[0]!.sequence]);
        for (const days of [1, 2]) await sweep(NOW_MS + days * DAY_MS, NOW_MS + (days - 1) * DAY_MS);
        await storeFor(alice, bob, { messageId, content: 'again' });
        expect(await seen(reader)).toEqual(['other', 'again']);
      });
    });

    describe('connections', () => {
      it('are numbered upwards over all nodes and devices', async () => {
        const [alice, bob] = [newDevice(), await enrolled()];
        const fences: number[] = [];
        for (const i of ids(0, 10)) {
          const { fence } = await (i % 2 ? messages : otherNode).connect(i % 3 ? alice : bob);
          fences.push(fence);
        }
        expect(fences).toEqual([...new Set(fences)].sort((a, b) => a - b));
      });

      it('know when the device last ran low', async () => {
        const bob = newDevice();
        await storeKeySet(keys, bob, { ec: [1] });
        expect((await messages.connect(bob)).lowNoticeVersion).toBe(0);
        await keys.claim([{ claimer: newDevice(), claimId: randomUUID(), userId: bob.userId, deviceId: 1 }], {
          nowMs: NOW_MS,
          lowThreshold: 10,
          waits: true,
        });
        const { lowNoticeVersion } = await messages.connect(bob);
        expect(lowNoticeVersion).toBeGreaterThan(0);
        expect(await messages.prove(bob)).toMatchObject({
          lowNoticeVersion,
          countVersion: lowNoticeVersion,
          availableCounts: { ec: 0, pq: 0 },
          offersPq: false,
        });
        expect((await messages.connect(newDevice())).lowNoticeVersion).toBe(0);
      });

      it('know it of a batch that goes on below the threshold, and over claims that cross nothing', async () => {
        const bob = newDevice();
        await storeKeySet(keys, bob, { ec: ids(1, 6) });
        const claim = (count: number) =>
          keys.claim(
            ids(0, count).map(() => ({ claimer: newDevice(), claimId: randomUUID(), ...bob })),
            { nowMs: NOW_MS, lowThreshold: 4, waits: true },
          );
        await claim(4);
        const { countVersion, lowNoticeVersion } = (await messages.prove(bob))!;
        expect(lowNoticeVersion).toBe(countVersion);
        await claim(1);
        expect((await messages.prove(bob))!.lowNoticeVersion).toBe(lowNoticeVersion);
      });

      it('are served where the key version stands, and otherwise change nothing', async () => {
        const bob = await enrolled();
        const { keyVersion } = (await messages.prove(bob))!;
        const reader = { device: bob, fence: (await messages.connect(bob)).fence };
        expect(await messages.serve(reader, keyVersion + 1, NOW_MS)).toMatchObject({
          served: false,
          proof: { keyVersion, fence: 0 },
        });
        expect(await messages.serve(reader, keyVersion, NOW_MS)).toMatchObject({
          served: true,
          proof: { keyVersion, fence: reader.fence, hasKeys: true },
          pendingCount: 0,
          newestSequence: 0,
        });
        await wipeKeySet(keys, bob);
        const wiped = (await messages.prove(bob))!;
        expect(await messages.serve(reader, wiped.keyVersion, NOW_MS)).toMatchObject({
          served: false,
          proof: { hasKeys: false },
        });
      });

      it('are told the version that stands, where they waited for the change that refuses them', async () => {
        const bob = await enrolled();
        const { keyVersion } = (await messages.prove(bob))!;
        const reader = { device: bob, fence: (await messages.connect(bob)).fence };
        let serving: ReturnType<MessageStore['serve']> | undefined;
        await keys.change(bob, async (set) => {
          await set.save({ ...updateOf(set), keyVersion: keyVersion + 1 });
          serving = messages.serve(reader, keyVersion, NOW_MS);
          // It has been asked, and waits for the row by the time that another statement has been answered.
          for (let i = 0; i < 20; i++) await messages.prove(bob);
        });
        expect(await serving).toMatchObject({ served: false, proof: { keyVersion: keyVersion + 1 } });
      });

      it('are not served, where they waited for a change by a newer one', async () => {
        const bob = await enrolled();
        const { keyVersion } = (await messages.prove(bob))!;
        const [older, newer] = [await messages.connect(bob), await otherNode.connect(bob)];
        let serving: ReturnType<MessageStore['serve']> | undefined;
        await keys.change(
          bob,
          async () => {
            serving = messages.serve({ device: bob, fence: older.fence }, keyVersion, NOW_MS);
            for (let i = 0; i < 20; i++) await messages.prove(bob);
          },
          { fence: newer.fence },
        );
        expect(await serving).toMatchObject({ served: false, proof: { keyVersion, fence: newer.fence } });
      });

      it('of an unknown device are neither served nor proven nor read', async () => {
        const reader = { device: newDevice(), fence: 1 };
        expect(await messages.serve(reader, 0, NOW_MS)).toBeNull();
        expect(await messages.prove(reader.device)).toBeNull();
        const page = { inFlight: [], envelopesMax: 1, bytesMax: 1, nowMs: NOW_MS };
        expect(await messages.read(reader, page)).toBeNull();
        expect(await messages.acknowledge(reader, [1])).toBe(0);
      });

      it('tell what waits when they are served: how many, and up to where', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        for (const _ of ids(0, 3)) await storeFor(alice, bob);
        await storeFor(alice, bob, { expiresAtMs: NOW_MS });
        const reader = await served(bob);
        const { envelopes } = await read(reader);
        const proof = (await messages.prove(bob))!;
        expect(await messages.serve(reader, proof.keyVersion, NOW_MS)).toMatchObject({
          pendingCount: 3,
          newestSequence: envelopes[2]!.sequence,
        });
      });

      it('tell of bounces among what waits', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        await storeFor(alice, bob);
        await wipeKeySet(keys, bob);
        await settle(bob);
        const { fence } = await messages.connect(alice);
        const { keyVersion } = (await messages.prove(alice))!;
        const waiting = await messages.serve({ device: alice, fence }, keyVersion, NOW_MS);
        const { envelopes } = await read({ device: alice, fence });
        expect(waiting).toMatchObject({ pendingCount: 1, newestSequence: envelopes[0]!.sequence });
      });

      it('that were superseded are served, read, delete, put off and see nothing', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        await storeFor(alice, bob);
        const old = await served(bob);
        const { envelopes } = await read(old);
        const newer = await served(bob, otherNode);
        expect(newer.fence).toBeGreaterThan(old.fence);

        const page = await read(old);
        expect(page.proof.fence).toBe(newer.fence);
        expect(page.envelopes).toEqual([]);
        const sequences = envelopes.map((envelope) => envelope.sequence);
        expect(await messages.acknowledge(old, sequences)).toBe(0);
        const failures = sequences.map((sequence) => ({ sequence, reason: 'temporary' as const }));
        expect(await messages.putOff(old, failures, NOW_MS)).toEqual({ nextDueAtMs: null, bounced: false });
        expect(await messages.serve(old, page.proof.keyVersion, NOW_MS)).toMatchObject({
          served: false,
          proof: { fence: newer.fence },
        });
        expect(await seen(newer)).toEqual(['x']);
        expect(await messages.acknowledge(newer, sequences)).toBe(1);
      });

      it('race: of many that are served at once, the newest is the one that stays', async () => {
        const bob = await enrolled();
        const { keyVersion } = (await messages.prove(bob))!;
        const fences = await Promise.all(ids(0, 12).map(async () => (await messages.connect(bob)).fence));
        await Promise.all(
          fences.map((fence, i) =>
            (i % 2 ? messages : otherNode).serve({ device: bob, fence }, keyVersion, NOW_MS),
          ),
        );
        expect((await messages.prove(bob))?.fence).toBe(Math.max(...fences));
      });

      it('of many that come back at once are each told what is its own, and wait for no row that another holds', async () => {
        const alice = await enrolled();
        const returning = await Promise.all(
          ids(0, 150).map(async (nth) => {
            const device = await enrolled();
            for (let i = 0; i < nth % 3; i++) await storeFor(alice, device);
            return { device, fence: (await messages.connect(device)).fence };
          }),
        );
        const { keyVersion } = (await messages.prove(alice))!;
        const [held, ...others] = returning;
        let late: ReturnType<MessageStore['serve']> | undefined;
        await keys.change(held!.device, async () => {
          late = messages.serve(held!, keyVersion, NOW_MS);
          const answers = await Promise.all(
            others.map((reader, nth) =>
              // Every tenth proved older keys.
              messages.serve(reader, nth % 10 === 0 ? keyVersion + 1 : keyVersion, NOW_MS),
            ),
          );
          answers.forEach((answer, nth) => {
            const isServed = nth % 10 !== 0;
            expect(answer).toMatchObject({
              served: isServed,
              proof: { keyVersion, fence: isServed ? others[nth]!.fence : 0 },
              pendingCount: isServed ? (nth + 1) % 3 : 0,
            });
          });
        });
        expect(await late).toMatchObject({ served: true, proof: { fence: held!.fence }, pendingCount: 0 });
      });

      it('of one device that is being changed wait in one place, however many they are', async () => {
        const [held, other] = [await enrolled(), await enrolled()];
        const { keyVersion } = (await messages.prove(held))!;
        const connected = async (device: DeviceAddress) => ({
          device,
          fence: (await messages.connect(device)).fence,
        });
        const waiting = await Promise.all(ids(0, 10).map(() => connected(held)));
        const reader = await connected(other);
        let late: ReturnType<MessageStore['serve']>[] = [];
        await keys.change(held, async () => {
          late = waiting.map((one) => messages.serve(one, keyVersion, NOW_MS));
          let soon: ReturnType<MessageStore['serve']> | undefined;
          await keys.change(other, async () => {
            soon = messages.serve(reader, keyVersion, NOW_MS);
            for (let i = 0; i < 20; i++) await messages.prove(other);
          });
          expect(await soon).toMatchObject({ served: true, proof: { fence: reader.fence } });
        });
        const newest = Math.max(...waiting.map(({ fence }) => fence));
        expect((await Promise.all(late)).some((answer) => answer?.served)).toBe(true);
        expect((await messages.prove(held))?.fence).toBe(newest);
      });

      it('note when they were served, also where many are at once', async () => {
        const devices = await Promise.all(ids(0, 3).map(() => enrolled()));
        await Promise.all(
          devices.map(async (device, nth) => {
            const { fence } = await messages.connect(device);
            await messages.serve({ device, fence }, 1, NOW_MS + nth * 1_000);
          }),
        );
        const noted = devices.map(async (device) => (await keys.read(device))!.servedAtMs);
        expect(await Promise.all(noted)).toEqual([NOW_MS, NOW_MS + 1_000, NOW_MS + 2_000]);
      });
    });

    describe('reading', () => {
      it('gives the first that are not in flight, as many as asked for, and one at least', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        for (const i of ids(0, 6)) await storeFor(alice, bob, { content: `${i}`.repeat(100) });
        const reader = await served(bob);
        const sequencesOf = (page: Page) => page.envelopes.map((envelope) => envelope.sequence);
        const all = sequencesOf(await read(reader));
        expect(all).toHaveLength(6);
        expect(sequencesOf(await read(reader, { envelopesMax: 2 }))).toEqual(all.slice(0, 2));
        expect(sequencesOf(await read(reader, { inFlight: [all[0]!, all[2]!], envelopesMax: 2 }))).toEqual([
          all[1],
          all[3],
        ]);
        for (const bytesMax of [200, 299]) {
          expect(sequencesOf(await read(reader, { bytesMax }))).toEqual(all.slice(0, 2));
        }
        expect(sequencesOf(await read(reader, { bytesMax: 1 }))).toEqual(all.slice(0, 1));
        const rest = await read(reader, { inFlight: all });
        expect(rest).toMatchObject({ envelopes: [], oldestSequence: all[0] });
      });

      it('says whether there may be more: where the page is full, by number or by bytes', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        for (const _ of ids(0, 3)) await storeFor(alice, bob, { content: 'x'.repeat(100) });
        const reader = await served(bob);
        for (const full of [{ envelopesMax: 2 }, { bytesMax: 299 }]) {
          expect(await read(reader, full)).toMatchObject({ more: true });
        }
        expect(await read(reader)).toMatchObject({ more: false });
        // What can't be read is on the page too.
        expect(await read(reader, { nowMs: EXPIRES_MS })).toMatchObject({ more: false, envelopes: [] });
        expect(await read(reader, { nowMs: EXPIRES_MS, envelopesMax: 2 })).toMatchObject({ more: true });
      });

      it('leaves out what is in flight and nothing else, however the list of it is ordered', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        for (const _ of ids(0, 40)) await storeFor(alice, bob);
        const reader = await served(bob);
        const all = (await read(reader)).envelopes.map((envelope) => envelope.sequence);
        const [first, last] = [all[0]!, all.at(-1)!];
        const gone = all.splice(0, 3);
        expect(await messages.acknowledge(reader, gone)).toBe(3);
        await fc.assert(
          fc.asyncProperty(fc.shuffledSubarray(all), async (waiting) => {
            // What was acknowledged meanwhile, or was never this queue's, is left out too, and hides nothing.
            const inFlight = [last + 1_000, ...waiting, ...gone, first - 1];
            const page = await read(reader, { inFlight });
            expect(page.envelopes.map(({ sequence }) => sequence)).toEqual(
              all.filter((sequence) => !waiting.includes(sequence)),
            );
            expect(page.oldestSequence).toBe(all[0]);
          }),
          { numRuns: 40 },
        );
      });

      it('proves the device in the same page: key version, stamp, counts', async () => {
        const bob = newDevice();
        await storeKeySet(keys, bob, { lastResortPreKeyId: 1, ec: [1, 2], pq: [1] });
        const reader = await served(bob);
        expect(await read(reader)).toMatchObject({
          proof: {
            keyVersion: 1,
            identityVersion: 1,
            hasKeys: true,
            fence: reader.fence,
            availableCounts: { ec: 2, pq: 1 },
            offersPq: true,
          },
          envelopes: [],
          unreadable: [],
          oldestSequence: null,
          nextDueAtMs: null,
        });
      });

      it('gives nothing that expired, and names it for its bounce', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        await storeFor(alice, bob, { content: 'late', expiresAtMs: NOW_MS + 1 });
        await storeFor(alice, bob, { content: 'good' });
        const reader = await served(bob);
        expect(await seen(reader, NOW_MS)).toEqual(['late', 'good']);
        const page = await read(reader, { nowMs: NOW_MS + 1 });
        expect(page.envelopes.map(({ body }) => body.kind === 'message' && text(body.content))).toEqual([
          'good',
        ]);
        expect(page.unreadable).toEqual([{ sequence: page.oldestSequence, reason: 'EXPIRED' }]);
      });

      it('gives messages and bounces on one page, each as what it is', async () => {
        const dotted = (deviceId: number) => enrolled(deviceId, `a.7:b@-.${newDevice(1).userId}`);
        const [alice, bob, carol] = [await dotted(2), await enrolled(), await dotted(3)];
        const ids = { lost: randomUUID(), first: randomUUID(), last: randomUUID() };
        await storeFor(alice, bob, { messageId: ids.first, content: 'first' });
        await storeFor(bob, carol, { messageId: ids.lost, expiresAtMs: NOW_MS + 1 });
        const { unreadable } = await read(await served(carol), { nowMs: NOW_MS + 1 });
        await messages.bounce(carol, unreadable);
        await settle(carol);
        await storeFor(alice, bob, { messageId: ids.last, content: 'last', nowMs: NOW_MS + 1_234 });
        const { envelopes } = await read(await served(bob));
        const message = { kind: 'message', sender: alice, type: 3 };
        expect(envelopes.map(({ messageId, storedAtMs, body }) => ({ messageId, storedAtMs, body }))).toEqual(
          [
            { messageId: ids.first, storedAtMs: NOW_MS, body: { ...message, content: 'Zmlyc3Q=' } },
            {
              messageId: ids.lost,
              storedAtMs: NOW_MS,
              body: { kind: 'bounce', recipient: carol, reason: 'EXPIRED' },
            },
            { messageId: ids.last, storedAtMs: NOW_MS + 1_234, body: { ...message, content: 'bGFzdA==' } },
          ],
        );
      });
    });

    describe('stamps', () => {
      /** Starts a change of `device` that holds its row, and lets a message be stored before it commits. */
      async function storedBeside(
        device: DeviceAddress,
        change: (store: KeyStore) => Promise<void>,
        sender: DeviceAddress,
      ): Promise<void> {
        let changed: Promise<void> = Promise.resolve();
        const stored = await new Promise<Awaited<ReturnType<typeof storeFor>>>((resolve, reject) => {
          const held: KeyStore = {
            ...keys,
            change: (target, action) =>
              keys.change(target, async (set) => {
                const result = await action(set);
                resolve(await storeFor(sender, device));
                return result;
              }),
          };
          changed = change(held);
          changed.catch(reject);
        });
        await changed;
        expect(stored).toMatchObject({ accepted: [device.deviceId] });
      }

      it('show a message that was stored beside a replacement to be unreadable', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        const replace = (store: KeyStore) =>
          storeKeySet(store, bob, { identity: identityOf('B'), registrationId: REGISTRATION_ID });
        await storedBeside(bob, replace, alice);
        await storeFor(alice, bob, { content: 'new' });
        const reader = await served(bob);
        const { keyVersion } = (await messages.prove(bob))!;
        expect(await messages.serve(reader, keyVersion, NOW_MS)).toMatchObject({ pendingCount: 1 });
        const page = await read(reader);
        expect(page.envelopes.map(({ body }) => body.kind === 'message' && text(body.content))).toEqual([
          'new',
        ]);
        expect(page.unreadable).toEqual([
          { sequence: page.oldestSequence, reason: 'RECIPIENT_IDENTITY_CHANGED' },
        ]);
        await messages.bounce(bob, page.unreadable);
        expect((await settle(bob)).senders).toEqual([alice]);
        expect(await seen(await served(alice))).toEqual(['RECIPIENT_IDENTITY_CHANGED']);
        expect(await read(reader)).toMatchObject({
          unreadable: [],
          envelopes: [{ body: { kind: 'message' } }],
        });
      });

      it('show a message that was stored beside a reset to be unreadable, and why', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        const reader = await served(bob);
        await storedBeside(bob, (store) => wipeKeySet(store, bob), alice);
        const page = await read(reader);
        expect(page).toMatchObject({
          envelopes: [],
          unreadable: [{ sequence: page.oldestSequence, reason: 'RECIPIENT_KEYS_RESET' }],
        });
      });

      it('let the sweep bounce what was stored beside a replacement or a reset that nobody reads after', async () => {
        const alice = await enrolled();
        const [replaced, reset] = [await enrolled(), await enrolled()];
        await storedBeside(
          replaced,
          (store) => storeKeySet(store, replaced, { identity: identityOf('B') }),
          alice,
        );
        await storedBeside(reset, (store) => wipeKeySet(store, reset), alice);
        await messages.bounceStale(null, { nowMs: NOW_MS, limit: 10_000 });
        await settle(replaced);
        await settle(reset);
        expect(await seen(await served(alice))).toEqual([
          'RECIPIENT_IDENTITY_CHANGED',
          'RECIPIENT_KEYS_RESET',
        ]);
      });

      it('let a wipe leave what waits to be bounced a few at a time, read by nobody meanwhile', async () => {
        const [alice, bob, other] = [await enrolled(), await enrolled(), await enrolled()];
        for (const _ of ids(0, 5)) await storeFor(alice, bob);
        await storeFor(alice, other);
        await wipeKeySet(keys, bob, NOW_MS, { leavesMessages: true });
        await storeKeySet(keys, bob, { identity: identityOf('B') });
        await storeFor(alice, bob, { content: 'new' });
        expect(await seen(await served(bob))).toEqual(['new']);
        const counts: number[] = [];
        do counts.push(await messages.bounceStale(bob, { nowMs: NOW_MS + 2 * DAY_MS, limit: 2 }));
        while (counts.at(-1)! > 0);
        expect(counts).toEqual([2, 2, 1, 0]);
        await settle(bob);
        expect(await seen(await served(alice))).toEqual(Array(5).fill('RECIPIENT_IDENTITY_CHANGED'));
        expect(await seen(await served(bob))).toEqual(['new']);
        expect(await seen(await served(other))).toEqual(['x']);
      });

      it('don’t part a message from a key set that was only rotated or added to', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        await storeFor(alice, bob);
        await storeKeySet(keys, bob, { registrationId: REGISTRATION_ID, signedPreKeyId: 2, ec: [1] });
        expect(await seen(await served(bob))).toEqual(['x']);
      });
    });

    describe('acknowledging', () => {
      it('deletes what was processed, says how much, and nothing of another device', async () => {
        const { userId } = newDevice();
        const [alice, bob, laptop] = [await enrolled(), await enrolled(1, userId), await enrolled(2, userId)];
        const both = { userId, devices: [1, 2].map((id): [number, number] => [id, REGISTRATION_ID]) };
        for (const i of ids(0, 3)) await storeFor(alice, both, { content: `${i}` });
        const [reader, other] = [await served(bob), await served(laptop)];
        const sequences = (await read(reader)).envelopes.map((envelope) => envelope.sequence);
        expect(await messages.acknowledge(other, sequences)).toBe(0);
        expect(await messages.acknowledge(reader, [sequences[2]!, sequences[0]!, 1])).toBe(2);
        expect(await messages.acknowledge(reader, sequences)).toBe(1);
        expect(await messages.acknowledge(reader, [])).toBe(0);
        expect(await seen(other)).toEqual(['0', '1', '2']);
      });

      it('counts once what is acknowledged twice at once', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        for (const _ of ids(0, 2)) await storeFor(alice, bob);
        const reader = await served(bob);
        const [first, second] = (await read(reader)).envelopes.map(({ sequence }) => sequence);
        const counts = await Promise.all([
          messages.acknowledge(reader, [first!]),
          messages.acknowledge(reader, [second!, first!]),
        ]);
        expect(counts).toEqual([1, 1]);
      });

      it('waits for no bounce that is under way: a message that stays after all is offered again', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        await storeFor(alice, bob);
        const reader = await served(bob);
        const [envelope] = (await read(reader)).envelopes;
        const failure = new Error('no');
        await expect(
          keys.change(bob, async (set) => {
            await set.wipe('RECIPIENT_KEYS_RESET', NOW_MS);
            expect(await otherNode.acknowledge(reader, [envelope!.sequence])).toBe(0);
            throw failure;
          }),
        ).rejects.toBe(failure);
        expect(await seen(reader)).toEqual(['x']);
        expect(await messages.acknowledge(reader, [envelope!.sequence])).toBe(1);
      });

      it('races with the bounce for every row, and one of them wins it', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        const reader = await served(bob);
        let acknowledged = 0;
        const rounds = 8;
        const perRound = 24;
        for (const _ of ids(0, rounds)) {
          await Promise.all(ids(0, perRound).map(() => storeFor(alice, bob)));
          const sequences = (await read(reader)).envelopes.map((envelope) => envelope.sequence);
          const unreadable = sequences
            .map((sequence) => ({ sequence, reason: 'EXPIRED' as const }))
            .reverse();
          const counts = await Promise.all([
            messages.acknowledge(
              reader,
              sequences.filter((_, i) => i % 2),
            ),
            otherNode.bounce(bob, unreadable),
            messages.acknowledge(reader, sequences.filter((_, i) => i % 2 === 0).reverse()),
          ]);
          acknowledged += (counts[0] ?? 0) + (counts[2] ?? 0);
        }
        while ((await settle(bob)).more);
        const bounced = (await read(await served(alice), { envelopesMax: 1000 })).envelopes;
        expect(acknowledged + bounced.length).toBe(rounds * perRound);
        expect(new Set(bounced.map((bounce) => bounce.messageId)).size).toBe(bounced.length);
      });

      it('races with a reset without a deadlock, whatever the order of the list', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        for (const round of ids(0, 6)) {
          const reader = await served(bob);
          await Promise.all(ids(0, 40).map(() => storeFor(alice, bob)));
          const sequences = (await read(reader)).envelopes.map((envelope) => envelope.sequence).reverse();
          const failures = sequences.map((sequence) => ({ sequence, reason: 'temporary' as const }));
          await Promise.all([
            otherNode.acknowledge(reader, sequences),
            messages.putOff(reader, failures, NOW_MS),
            wipeKeySet(keys, bob),
            messages.bounceStale(bob, { nowMs: NOW_MS, limit: 7 }),
            sweep(NOW_MS),
          ]);
          await storeKeySet(keys, bob, { registrationId: REGISTRATION_ID, signedPreKeyId: round + 2 });
        }
      });
    });

    describe('what failed', () => {
      async function oneMessage() {
        const [alice, bob] = [await enrolled(), await enrolled()];
        await storeFor(alice, bob);
        const reader = await served(bob);
        const [envelope] = (await read(reader)).envelopes;
        const fail = (reason: 'temporary' | 'undecryptable', nowMs: number) =>
          messages.putOff(reader, [{ sequence: envelope!.sequence, reason }], nowMs);
        return { alice, bob, reader, envelope: envelope!, fail };
      }

      it('as temporary is put off by 1, 5, 30, then every 120 s, and keeps its id', async () => {
        const { reader, envelope, fail } = await oneMessage();
        let nowMs = NOW_MS;
        for (const delayS of [1, 5, 30, 120, 120, 120]) {
          const dueAtMs = nowMs + delayS * 1000;
          expect(await fail('temporary', nowMs)).toEqual({ nextDueAtMs: dueAtMs, bounced: false });
          expect(await read(reader, { nowMs: dueAtMs - 1 })).toMatchObject({
            envelopes: [],
            nextDueAtMs: dueAtMs,
            oldestSequence: envelope.sequence,
          });
          const due = await read(reader, { nowMs: dueAtMs });
          expect(due.envelopes.map(({ id }) => id)).toEqual([envelope.id]);
          expect(due.nextDueAtMs).toBeNull();
          nowMs = dueAtMs;
        }
      });

      it('as undecryptable is offered three times in all, after 1 s and 5 s, then bounced', async () => {
        const { alice, bob, reader, envelope, fail } = await oneMessage();
        expect(await fail('undecryptable', NOW_MS)).toEqual({ nextDueAtMs: NOW_MS + 1_000, bounced: false });
        expect(await fail('undecryptable', NOW_MS + 1_000)).toEqual({
          nextDueAtMs: NOW_MS + 6_000,
          bounced: false,
        });
        expect(await seen(reader, NOW_MS + 6_000)).toEqual(['x']);
        expect(await fail('undecryptable', NOW_MS + 6_000)).toEqual({ nextDueAtMs: null, bounced: true });
        // On its way back it neither waits nor falls due.
        expect(await read(reader, { nowMs: NOW_MS + 6_000 })).toMatchObject({
          envelopes: [],
          oldestSequence: null,
          nextDueAtMs: null,
        });
        expect(await messages.acknowledge(reader, [envelope.sequence])).toBe(0);
        expect(await fail('undecryptable', NOW_MS + 6_000)).toEqual({ nextDueAtMs: null, bounced: false });
        expect(await settle(bob)).toMatchObject({ senders: [alice], more: false });
        const page = await read(await served(alice));
        expect(page.envelopes).toMatchObject([
          {
            messageId: envelope.messageId,
            body: { kind: 'bounce', recipient: bob, reason: 'UNDECRYPTABLE' },
          },
        ]);
      });

      it('counts the two reasons apart', async () => {
        const { fail } = await oneMessage();
        for (const _ of ids(0, 5)) await fail('temporary', NOW_MS);
        expect((await fail('undecryptable', NOW_MS)).nextDueAtMs).toBe(NOW_MS + 1_000);
        expect((await fail('undecryptable', NOW_MS)).nextDueAtMs).toBe(NOW_MS + 5_000);
        expect((await fail('undecryptable', NOW_MS)).bounced).toBe(true);
      });

      it('falls due, of several, with the first of them', async () => {
        const { alice, bob, reader, envelope, fail } = await oneMessage();
        await fail('temporary', NOW_MS);
        await storeFor(alice, bob);
        const other = (await read(reader)).envelopes[0]!;
        const failures = [other, envelope].map(({ sequence }) => ({
          sequence,
          reason: 'temporary' as const,
        }));
        expect(await messages.putOff(reader, failures, NOW_MS)).toMatchObject({
          nextDueAtMs: NOW_MS + 1_000,
        });
        expect(await read(reader)).toMatchObject({ envelopes: [], nextDueAtMs: NOW_MS + 1_000 });
      });

      it('does not hold up the others', async () => {
        const { alice, bob, reader, fail } = await oneMessage();
        await fail('temporary', NOW_MS);
        await storeFor(alice, bob, { content: 'later' });
        expect(await seen(reader)).toEqual(['later']);
        expect(await seen(reader, NOW_MS + 1_000)).toEqual(['x', 'later']);
      });

      it('of bounces is dropped after as many offers, and bounces no more', async () => {
        const { alice, bob, fail } = await oneMessage();
        for (const _ of ids(0, 3)) await fail('undecryptable', NOW_MS);
        await settle(bob);
        const reader = await served(alice);
        const [bounce] = (await read(reader)).envelopes;
        const failures = [{ sequence: bounce!.sequence, reason: 'undecryptable' as const }];
        for (const _ of ids(0, 2))
          expect((await messages.putOff(reader, failures, NOW_MS)).bounced).toBe(false);
        expect(await seen(reader, NOW_MS + 5_000)).toEqual(['UNDECRYPTABLE']);
        // A connection that was superseded drops nothing.
        await messages.putOff({ ...reader, fence: reader.fence - 1 }, failures, NOW_MS);
        expect(await seen(reader, NOW_MS + 5_000)).toEqual(['UNDECRYPTABLE']);
        expect(await messages.putOff(reader, failures, NOW_MS)).toEqual({
          nextDueAtMs: null,
          bounced: false,
        });
        expect(await seen(reader, NOW_MS + DAY_MS)).toEqual([]);
        expect(await settle(alice)).toMatchObject({ senders: [], more: false });
        expect(await seen(await served(bob))).toEqual([]);
      });
    });

    describe('bounces', () => {
      it('of a reset or a replacement are one for each message, in the senders’ queues', async () => {
        const [alice, carol, bob] = [await enrolled(), await enrolled(), await enrolled()];
        const sent: string[] = [];
        for (const sender of [alice, carol, alice]) {
          const messageId = randomUUID();
          await storeFor(sender, bob, { messageId });
          if (sender === alice) sent.push(messageId);
        }
        await wipeKeySet(keys, bob);
        const { senders, more } = await settle(bob);
        expect(senders.map(addressKey).sort()).toEqual([alice, carol].map(addressKey).sort());
        expect(more).toBe(false);
        const { envelopes } = await read(await served(alice));
        expect(envelopes.map((envelope) => envelope.messageId)).toEqual(sent);
        expect(envelopes).toMatchObject(
          sent.map(() => ({ body: { kind: 'bounce', recipient: bob, reason: 'RECIPIENT_KEYS_RESET' } })),
        );
        expect(await seen(await served(carol))).toEqual(['RECIPIENT_KEYS_RESET']);
      });

      it('leave the recipient’s queue at once: nobody can acknowledge or read what is on its way back', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        await storeFor(alice, bob);
        const before = await served(bob);
        const [envelope] = (await read(before)).envelopes;
        await wipeKeySet(keys, bob);
        await storeKeySet(keys, bob, { identity: identityOf('B'), registrationId: REGISTRATION_ID });
        expect(await messages.acknowledge(before, [envelope!.sequence])).toBe(0);
        expect(await read(await served(bob))).toMatchObject({
          envelopes: [],
          unreadable: [],
          oldestSequence: null,
        });
        // The first reason stands.
        await messages.bounce(bob, [{ sequence: envelope!.sequence, reason: 'EXPIRED' }]);
        await settle(bob);
        expect(await seen(await served(alice))).toEqual(['RECIPIENT_KEYS_RESET']);
      });

      it('fall due no more, whatever was put off before', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        for (const _ of ids(0, 2)) await storeFor(alice, bob);
        const before = await served(bob);
        const [first, second] = (await read(before)).envelopes.map(({ sequence }) => sequence);
        const failures = [first!, second!].map((sequence) => ({ sequence, reason: 'temporary' as const }));
        await messages.putOff(before, failures, NOW_MS);
        await messages.bounce(bob, [{ sequence: first!, reason: 'EXPIRED' }]);
        expect(await read(before)).toMatchObject({ nextDueAtMs: NOW_MS + 1_000, oldestSequence: second });
        await messages.bounce(bob, [{ sequence: second!, reason: 'EXPIRED' }]);
        expect(await read(before)).toMatchObject({ nextDueAtMs: null, oldestSequence: null });

        await storeFor(alice, bob);
        const [third] = (await read(before)).envelopes;
        await messages.putOff(before, [{ sequence: third!.sequence, reason: 'temporary' }], NOW_MS);
        await storeKeySet(keys, bob, { identity: identityOf('B') });
        expect(await read(await served(bob))).toMatchObject({ nextDueAtMs: null, oldestSequence: null });
      });

      it('happen once however often settling is tried, over a crash between copy and removal', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        for (const _ of ids(0, 3)) await storeFor(alice, bob);
        await wipeKeySet(keys, bob);
        for (const _ of ids(0, 2)) {
          await expect(settle(bob, opened.dyingAfterCopy)).rejects.toThrow('died');
        }
        const reader = await served(alice);
        // The copies are there, and may be processed before anybody tidies up.
        const { envelopes } = await read(reader);
        expect(envelopes).toHaveLength(3);
        expect(
          await messages.acknowledge(
            reader,
            envelopes.map((envelope) => envelope.sequence),
          ),
        ).toBe(3);
        await Promise.all([settle(bob), settle(bob, otherNode)]);
        expect(await settle(bob)).toMatchObject({ senders: [], more: false });
        expect(await seen(reader)).toEqual([]);
      });

      it('happen once also where two nodes settle at the same time', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        await Promise.all(ids(0, 30).map(() => storeFor(alice, bob)));
        await wipeKeySet(keys, bob);
        const told = await Promise.all(
          ids(0, 6).map((i) => settle(i % 3 ? bob : null, i % 2 ? messages : otherNode, 500)),
        );
        expect(
          told.flatMap(({ bounced }) => bounced).filter(({ recipient }) => recipient.userId === bob.userId),
        ).toHaveLength(30);
        expect(await seen(await served(alice))).toHaveLength(30);
      });

      it('are settled a limited number at a time, until there are no more', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        for (const _ of ids(0, 5)) await storeFor(alice, bob);
        await wipeKeySet(keys, bob);
        const turns: boolean[] = [];
        for (let more = true; more; turns.push(more)) ({ more } = await settle(bob, messages, 2));
        expect(turns).toEqual([true, true, false]);
        expect(await seen(await served(alice))).toHaveLength(5);
      });

      it('survive their receiver’s reset, are no messages for the old key set, and are never bounced', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        await storeFor(alice, bob);
        await wipeKeySet(keys, bob);
        await settle(bob);
        await wipeKeySet(keys, alice);
        await messages.bounceStale(null, { nowMs: NOW_MS, limit: 10_000 });
        await sweep(NOW_MS);
        await settle(null);
        await storeKeySet(keys, alice, { identity: identityOf('C') });
        const reader = await served(alice);
        const page = await read(reader);
        expect(page.unreadable).toEqual([]);
        expect(page.envelopes).toMatchObject([{ body: { kind: 'bounce' } }]);
        await messages.bounce(alice, [{ sequence: page.envelopes[0]!.sequence, reason: 'EXPIRED' }]);
        expect(await seen(reader)).toEqual(['RECIPIENT_KEYS_RESET']);
      });

      it('alone make no device idle that has lost its keys, as messages do', async () => {
        const { userId } = newDevice();
        const [alice, bob] = [await enrolled(1, userId), await enrolled(2, userId)];
        await storeFor(alice, bob);
        await wipeKeySet(keys, bob);
        await settle(bob);
        await storeKeySet(keys, bob, { identity: identityOf('B'), registrationId: REGISTRATION_ID });
        await storeFor(alice, bob);
        for (const device of [alice, bob]) await wipeKeySet(keys, device, NOW_MS, { leavesMessages: true });
        const after = { userId, deviceId: 0 };
        const { idle } = await keys.findIdle({ idleBeforeMs: NOW_MS, after, limit: 2 });
        expect(idle).toEqual([bob]);
      });

      it('between a user’s own devices reach the sending one', async () => {
        const { userId } = newDevice();
        const [phone, laptop] = [await enrolled(1, userId), await enrolled(2, userId)];
        await storeFor(phone, laptop);
        await wipeKeySet(keys, laptop);
        expect(await settle(laptop)).toMatchObject({ senders: [phone], more: false });
        expect(await seen(await served(phone))).toEqual(['RECIPIENT_KEYS_RESET']);
      });
    });

    describe('the sweep', () => {
      it('immunity 19: bounces what expired, and leaves the other half and its count right', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        for (const i of ids(0, 6)) {
          await storeFor(alice, bob, { content: `${i}`, expiresAtMs: i % 2 ? EXPIRES_MS : NOW_MS + 5 });
        }
        await sweep(NOW_MS + 4);
        await sweep(NOW_MS + 5);
        await settle(bob);
        const reader = await served(bob);
        expect(await seen(reader)).toEqual(['1', '3', '5']);
        const { keyVersion } = (await messages.prove(bob))!;
        expect(await messages.serve(reader, keyVersion, NOW_MS + 5)).toMatchObject({ pendingCount: 3 });
        expect(await seen(await served(alice))).toEqual(['EXPIRED', 'EXPIRED', 'EXPIRED']);
      });

      it('drops expired bounces', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        await storeFor(alice, bob);
        await wipeKeySet(keys, bob);
        await settle(bob);
        await sweep(EXPIRES_MS - 1);
        const reader = await served(alice);
        expect(await seen(reader, EXPIRES_MS)).toEqual(['RECIPIENT_KEYS_RESET']);
        await sweep(EXPIRES_MS);
        expect(await seen(reader, EXPIRES_MS)).toEqual([]);
        expect(await settle(alice)).toMatchObject({ senders: [], more: false });
      });

      it('looks at the memory of a message that still waits once a day, not at every run', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        const at = (days: number) => sweep(NOW_MS + days * DAY_MS, NOW_MS + (days - 1) * DAY_MS);
        for (const _ of ids(0, 5)) await storeFor(alice, bob, { nowMs: NOW_MS + 2 * DAY_MS });
        // Other tests' rows are in it too.
        expect(await at(3)).toBeGreaterThanOrEqual(5);
        for (const days of [3, 3.9]) expect(await at(days)).toBe(0);
        expect(await at(4)).toBeGreaterThanOrEqual(5);
        expect(await at(4.9)).toBe(0);
      });

      it('bounces no bounce that expires, also where messages that expired lie before it', async () => {
        const [alice, bob, carol] = [await enrolled(), await enrolled(), await enrolled()];
        await storeFor(alice, bob);
        await wipeKeySet(keys, bob);
        await messages.settleBounces(bob, { nowMs: NOW_MS, expiresAtMs: NOW_MS + 6, limit: 100 });
        for (const _ of ids(0, 5)) await storeFor(alice, carol, { expiresAtMs: NOW_MS + 5 });
        while ((await sweep(NOW_MS + 6, 0, 1)) > 0);
        expect(await settle(alice)).toMatchObject({ bounced: [], senders: [] });
      });

      it('leaves what another holds to him, and waits for nobody', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        await storeFor(alice, bob, { expiresAtMs: NOW_MS + 5 });
        await keys.change(bob, async (set) => {
          await set.wipe('RECIPIENT_KEYS_RESET', NOW_MS);
          await otherNode.sweep({ nowMs: NOW_MS + 5, forgetBeforeMs: 0, limit: 10_000 });
          await otherNode.bounceStale(bob, { nowMs: NOW_MS, limit: 10_000 });
        });
        await settle(bob);
        expect(await seen(await served(alice))).toEqual(['RECIPIENT_KEYS_RESET']);
      });

      it('touches at most so many rows of each kind, and ends', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        await sweep(NOW_MS + 5);
        for (const _ of ids(0, 5)) await storeFor(alice, bob, { expiresAtMs: NOW_MS + 5 });
        const touched: number[] = [];
        do touched.push(await sweep(NOW_MS + 5, 0, 2));
        while (touched.at(-1)! > 0);
        expect(touched).toEqual([2, 2, 1, 0]);
      });
    });

    describe('a look at many devices', () => {
      it('finds those that need one, and no others', async () => {
        const alice = await enrolled();
        const quiet = await served(await enrolled());
        const withMail = await served(await enrolled());
        const inFlightOnly = await served(await enrolled());
        const superseded = await served(await enrolled());
        const changed = await served(await enrolled());
        const lowDevice = newDevice();
        await storeKeySet(keys, lowDevice, { ec: [1] });
        const low = await served(lowDevice);
        await storeFor(alice, withMail.device);
        await storeFor(alice, inFlightOnly.device);
        const watched = async (reader: Reader, inFlight = 0) => {
          const { keyVersion, lowNoticeVersion } = (await messages.prove(reader.device))!;
          return { ...reader, keyVersion, lowNoticeVersion, inFlight };
        };
        const readers = [
          await watched(quiet),
          await watched(withMail),
          await watched(inFlightOnly, 1),
          await watched(superseded),
          await watched(changed),
          await watched(low),
        ];
        expect(await messages.inNeedOfALook([readers[0]!, readers[2]!], NOW_MS)).toEqual([]);
        await served(superseded.device, otherNode);
        await storeKeySet(keys, changed.device, { signedPreKeyId: 2 });
        await keys.claim(
          [{ claimer: alice, claimId: randomUUID(), userId: low.device.userId, deviceId: 1 }],
          { nowMs: NOW_MS, lowThreshold: 10, waits: true },
        );
        const found = await messages.inNeedOfALook(readers, NOW_MS);
        expect(found.map(addressKey).sort()).toEqual(
          [withMail, superseded, changed, low].map((reader) => addressKey(reader.device)).sort(),
        );
        expect(await messages.inNeedOfALook([], NOW_MS)).toEqual([]);
      });

      it('finds a reader that the store does not serve: under another number or version, or of a device that is gone', async () => {
        const reader = await served(await enrolled());
        const { keyVersion, lowNoticeVersion } = (await messages.prove(reader.device))!;
        const watched = { ...reader, keyVersion, lowNoticeVersion, inFlight: 0 };
        const ahead = { ...watched, fence: reader.fence + 1 };
        const gone = { ...watched, device: newDevice() };
        expect(await messages.inNeedOfALook([watched], NOW_MS)).toEqual([]);
        expect(await messages.inNeedOfALook([ahead, gone], NOW_MS)).toEqual([ahead.device, gone.device]);
        const newer = { ...watched, keyVersion: keyVersion + 1 };
        expect(await messages.inNeedOfALook([newer], NOW_MS)).toEqual([reader.device]);
      });

      it('finds an envelope that was put off by a clock that has been set back, as a read does', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        await storeFor(alice, bob);
        const reader = await served(bob);
        const [envelope] = (await read(reader)).envelopes;
        const failures = [{ sequence: envelope!.sequence, reason: 'temporary' as const }];
        await messages.putOff(reader, failures, NOW_MS + 3_600_000);
        expect(await seen(reader)).toEqual(['x']);
        const looking = { ...reader, keyVersion: 1, lowNoticeVersion: 0, inFlight: 0 };
        expect(await messages.inNeedOfALook([looking], NOW_MS)).toEqual([bob]);
      });

      it('notes who is still served, each after half a day, and no reader that is served no more', async () => {
        const [reader, older] = [await served(await enrolled()), await served(await enrolled())];
        const servedAt = async ({ device }: Reader) => (await keys.read(device))!.servedAtMs;
        expect([await servedAt(reader), await servedAt(older)]).toEqual([NOW_MS, NOW_MS]);
        await served(older.device, otherNode);
        const halfADayMs = 12 * 3_600_000;
        await messages.noteServed([reader, older], NOW_MS + halfADayMs - 1);
        expect(await servedAt(reader)).toBe(NOW_MS);
        await messages.noteServed([reader, older], NOW_MS + halfADayMs);
        expect([await servedAt(reader), await servedAt(older)]).toEqual([NOW_MS + halfADayMs, NOW_MS]);
        await messages.noteServed([], NOW_MS);
      });

      it('finds those that were revoked since a time, the latest first, and never earlier than they were', async () => {
        const sinceMs = NOW_MS + 1_000 * DAY_MS;
        const revoke = (device: DeviceAddress, atMs: number) =>
          keys.change(device, (set) => set.revoke(atMs));
        const [before, at, after] = [newDevice(), newDevice(), newDevice()];
        await revoke(at, sinceMs);
        await revoke(after, sinceMs + 1);
        await revoke(before, sinceMs - 1);
        await revoke(after, sinceMs - 1);
        expect(await messages.revokedSince(sinceMs, 9)).toEqual([after, at]);
        expect(await messages.revokedSince(sinceMs, 1)).toEqual([after]);
      });

      it('notes nobody whose keys are being changed, and waits for none of them', async () => {
        const [changing, free] = [await served(await enrolled()), await served(await enrolled())];
        const laterMs = NOW_MS + DAY_MS;
        await keys.change(changing.device, () => otherNode.noteServed([changing, free], laterMs));
        const servedAt = async ({ device }: Reader) => (await keys.read(device))!.servedAtMs;
        expect([await servedAt(changing), await servedAt(free)]).toEqual([NOW_MS, laterMs]);
      });

      it('finds an envelope that was put off when it falls due, and not before', async () => {
        const [alice, bob] = [await enrolled(), await enrolled()];
        await storeFor(alice, bob);
        const reader = await served(bob);
        const [envelope] = (await read(reader)).envelopes;
        await messages.putOff(reader, [{ sequence: envelope!.sequence, reason: 'temporary' }], NOW_MS);
        const { keyVersion, lowNoticeVersion } = (await messages.prove(bob))!;
        const watched = [{ ...reader, keyVersion, lowNoticeVersion, inFlight: 0 }];
        expect(await messages.inNeedOfALook(watched, NOW_MS + 999)).toEqual([]);
        expect(await messages.inNeedOfALook(watched, NOW_MS + 1_000)).toEqual([bob]);
      });
    });
  });
}
