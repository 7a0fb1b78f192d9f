/** What PostgreSQL tells the inspector of messages and pools. */
import { randomUUID } from 'node:crypto';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { type Database, openDatabase } from '../../src/backends/postgres/database.ts';
import { createInspectionStore } from '../../src/backends/postgres/inspection.ts';
import { createKeyStore } from '../../src/backends/postgres/key-store.ts';
import { createMessageStore } from '../../src/backends/postgres/message-store.ts';
import { migrateDatabase } from '../../src/backends/postgres/migrations.ts';
import { systemClock } from '../../src/lib/clock.ts';
import { silentLog } from '../../src/lib/log.ts';
import type { InspectionStore } from '../../src/ports/inspection.ts';
import type { KeyStore } from '../../src/ports/key-store.ts';
import type { MessageStore, Reader } from '../../src/ports/message-store.ts';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import { newDevice, storeKeySet } from '../contract/key-store.ts';
import { createDatabase } from '../support/engines.ts';

const NOW = { nowMs: 0, expiresAtMs: 1_000 };

let database: Database;
let keys: KeyStore;
let messages: MessageStore;
let inspection: InspectionStore;
let drop: () => Promise<void>;

beforeAll(async () => {
  const made = await createDatabase();
  drop = made.drop;
  const address = { kind: 'url', url: made.url } as const;
  await migrateDatabase(address);
  database = openDatabase({ address, clock: systemClock, log: silentLog });
  keys = createKeyStore(database);
  messages = createMessageStore(database);
  inspection = createInspectionStore(database);
});
afterAll(async () => {
  await database.close();
  await drop();
});

async function enrolled(pools: { ec?: number; pq?: number } = {}): Promise<DeviceAddress> {
  const device = newDevice();
  const ids = (count = 0) => Array.from({ length: count }, (_, id) => id);
  await storeKeySet(keys, device, { lastResortPreKeyId: 1, ec: ids(pools.ec), pq: ids(pools.pq) });
  return device;
}

async function store(sender: DeviceAddress, to: DeviceAddress, messageId: string): Promise<number> {
  const stored = await messages.store({
    ...{ sender, messageId, recipientUserId: to.userId, sendAnyway: false, queueMax: 10, ...NOW },
    messages: [{ deviceId: to.deviceId, registrationId: 7, type: 3, content: '' }],
  });
  return stored!.fresh[0]!.sequence;
}

async function served(device: DeviceAddress): Promise<Reader> {
  const { fence } = await messages.connect(device);
  const { keyVersion } = (await messages.prove(device))!;
  await messages.serve({ device, fence }, keyVersion, NOW.nowMs);
  return { device, fence };
}

async function acknowledge(device: DeviceAddress, sequence: number): Promise<void> {
  expect(await messages.acknowledge(await served(device), [sequence])).toBe(1);
}

const stateOf = async (messageId: string, { userId }: DeviceAddress) =>
  (await inspection.trace(messageId, { userId, deviceId: null })).map(({ state }) => state);

it('a message is delivered though another waits for the same device', async () => {
  const [alice, bob] = [await enrolled(), await enrolled()];
  const [first, second] = [randomUUID(), randomUUID()];
  const sequence = await store(alice, bob, first);
  await store(alice, bob, second);
  await acknowledge(bob, sequence);
  expect(await stateOf(first, bob)).toEqual(['delivered']);
  expect(await stateOf(second, bob)).toEqual(['waiting']);
});

it('a message that failed is put off, and one that nobody failed at waits', async () => {
  const [alice, bob] = [await enrolled(), await enrolled()];
  const [failed, other] = [randomUUID(), randomUUID()];
  const sequence = await store(alice, bob, failed);
  await store(alice, bob, other);
  await messages.putOff(await served(bob), [{ sequence, reason: 'temporary' }], NOW.nowMs);
  expect(await stateOf(failed, bob)).toEqual(['putOff']);
  expect(await stateOf(other, bob)).toEqual(['waiting']);
});

it('claims are told from the newest to the oldest, and no more than were asked for', async () => {
  const bob = await enrolled({ ec: 3 });
  for (const nowMs of [1_000, 3_000, 2_000]) {
    const request = { claimer: newDevice(), claimId: randomUUID(), ...bob, isTargetSpared: false };
    await keys.claim([request], { nowMs, lowThreshold: 0, waits: false });
  }
  const timesOf = async (limit: number) =>
    (await inspection.claimsOf(bob, limit)).map(({ claimedAtMs }) => claimedAtMs);
  expect(await timesOf(10)).toEqual([3_000, 2_000, 1_000]);
  expect(await timesOf(2)).toEqual([3_000, 2_000]);
});

it('a message is delivered though its like came back from another recipient', async () => {
  const [alice, bob, carol] = [await enrolled(), await enrolled(), await enrolled()];
  const messageId = randomUUID();
  const sequence = await store(alice, bob, messageId);
  await acknowledge(carol, await store(alice, carol, messageId));
  await messages.bounce(bob, [{ sequence, reason: 'EXPIRED' }]);
  await messages.settleBounces(bob, { ...NOW, limit: 10 });
  expect(await stateOf(messageId, bob)).toEqual(['bounced']);
  expect(await stateOf(messageId, carol)).toEqual(['delivered']);
});

it('a device is low by what it offers: one without one-time PQ prekeys is not by their absence', async () => {
  const [low, lowOfPq] = [await enrolled({ ec: 1, pq: 2 }), await enrolled({ ec: 2, pq: 1 })];
  const [full, fullOfEc] = [await enrolled({ ec: 2, pq: 2 }), await enrolled({ ec: 2 })];
  const found = (await inspection.lowDevices(2, 100))!.map(({ device }) => device);
  expect(found).toEqual(expect.arrayContaining([low, lowOfPq]));
  expect(found).not.toContainEqual(full);
  expect(found).not.toContainEqual(fullOfEc);
});
