// What an operator's commands do in PostgreSQL, which may take longer than a request.
import { randomUUID } from 'node:crypto';
import { sql } from 'drizzle-orm';
import postgres from 'postgres';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { type Database, openDatabase } from '../../src/backends/postgres/database.ts';
import { createKeyStore } from '../../src/backends/postgres/key-store.ts';
import { createMaintenance } from '../../src/backends/postgres/maintenance.ts';
import { createMessageStore } from '../../src/backends/postgres/message-store.ts';
import { migrateDatabase } from '../../src/backends/postgres/migrations.ts';
import { QUERY_TIMEOUT_MS } from '../../src/backends/postgres/settings.ts';
import { withdrawAfterRestore } from '../../src/keys/restored.ts';
import { systemClock } from '../../src/lib/clock.ts';
import { silentLog } from '../../src/lib/log.ts';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import { storeKeySet } from '../contract/key-store.ts';
import { createDatabase } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { createManualClock } from '../support/manual-clock.ts';

const clock = createManualClock();
let database: Database;
let admin: postgres.Sql;
/** What a transaction sees of activity stands still. */
let observer: postgres.Sql;
let drop: () => Promise<void>;

beforeAll(async () => {
  const made = await createDatabase();
  drop = made.drop;
  const address = { kind: 'url', url: made.url } as const;
  await migrateDatabase(address);
  database = openDatabase({ address, clock, log: silentLog });
  admin = postgres(made.url, { max: 1, onnotice: () => {} });
  observer = postgres(made.url, { max: 1, onnotice: () => {} });
});

afterAll(async () => {
  await database.close();
  await admin.end();
  await observer.end();
  await drop();
});

it('takes more time than a request may', async () => {
  const counted = await admin.begin(async (tx) => {
    await tx`LOCK TABLE devices`;
    const count = createMaintenance(database).countDevices();
    await eventually(async () =>
      expect(
        await observer`
          SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`,
      ).not.toHaveLength(0),
    );
    await clock.advance(2 * QUERY_TIMEOUT_MS);
    return { count };
  });
  expect(await counted.count).toBe(0);
  const [limit] = await database.patient((tx) => tx.execute(sql`SHOW statement_timeout`));
  expect(limit).toEqual({ statement_timeout: '15min' });
});

it('after a restore withdraws every unclaimed key, of so many devices at a time as have a bounded number of them', async () => {
  const store = createKeyStore(database);
  const maintenance = createMaintenance(database);
  const devices: DeviceAddress[] = ['anna', 'bea', 'cleo', 'dora'].map((userId) => ({ userId, deviceId: 1 }));
  for (const [index, device] of devices.entries()) {
    // None, one, two and three of each kind.
    const ids = Array.from({ length: index }, (_, id) => id);
    await storeKeySet(store, device, { lastResortPreKeyId: 1, ec: ids, pq: ids });
  }
  const batch = { restoredAtMs: 0, versionMin: 0, devicesMax: 3 };
  const first = await maintenance.withdrawAfterRestore({ ...batch, after: null, keysMax: 1 });
  expect(first).toEqual({ devices: devices.slice(0, 2), withdrawnCount: 2 });
  const next = await maintenance.withdrawAfterRestore({ ...batch, after: devices[1]!, keysMax: 1 });
  expect(next).toEqual({ devices: [devices[2]], withdrawnCount: 4 });

  const told: DeviceAddress[] = [];
  const all = await withdrawAfterRestore({
    maintenance,
    clock: systemClock,
    onBatch: (some) => told.push(...some),
  });
  expect(all).toEqual({ deviceCount: 4, withdrawnCount: 6 });
  expect(told).toEqual(devices);
});

it('after a restore has a device’s versions go on above all that it may have told', async () => {
  const store = createKeyStore(database);
  const maintenance = createMaintenance(database);
  const device = { userId: 'erna', deviceId: 1 };
  await storeKeySet(store, device, { lastResortPreKeyId: 1, ec: [1], pq: [1] });
  const restoredAtMs = Date.UTC(2026, 0, 1);
  const restore = async (versionMin: number) => {
    const batch = { after: { userId: 'erna', deviceId: 0 }, devicesMax: 1, keysMax: 1 };
    await maintenance.withdrawAfterRestore({ ...batch, restoredAtMs, versionMin });
    expect(await store.read(device)).toMatchObject({ restoredAtMs });
    const { keyVersion, countVersion, lowNoticeVersion } = (await createMessageStore(database).prove(
      device,
    ))!;
    return [keyVersion, countVersion, lowNoticeVersion];
  };
  expect(await restore(1_000)).toEqual([1_001, 1_001, 1_001]);
  // Above those that it has, where they are beyond that already.
  expect(await restore(500)).toEqual([1_002, 1_002, 1_002]);
});

it('after a restore numbers connections and messages above all before it, whatever another clock has said', async () => {
  const maintenance = createMaintenance(database);
  const messages = createMessageStore(database);
  const device = { userId: 'frida', deviceId: 1 };
  await storeKeySet(createKeyStore(database), device, { registrationId: 7 });
  const numbers = async (): Promise<[fence: number, sequence: number]> => {
    const { fence } = await messages.connect(device);
    const stored = await messages.store({
      ...{ sender: { userId: 'anna', deviceId: 1 }, messageId: randomUUID(), recipientUserId: 'frida' },
      messages: [{ deviceId: 1, registrationId: 7, type: 3, content: '' }],
      ...{ sendAnyway: false, nowMs: 0, expiresAtMs: 1, queueMax: 10 },
    });
    return [fence, stored!.fresh[0]!.sequence];
  };
  const restoredAtMs = Date.UTC(2026, 0, 1);
  await maintenance.liftSequences(restoredAtMs);
  const lifted = await numbers();
  expect(lifted[0]).toBeGreaterThan(restoredAtMs);
  // A millisecond has room for a thousand messages.
  expect(lifted[1]).toBeGreaterThan(restoredAtMs * 1_000);
  await maintenance.liftSequences(restoredAtMs - 86_400_000);
  const later = await numbers();
  for (const [nth, number] of later.entries()) expect(number).toBeGreaterThan(lifted[nth]!);
});
