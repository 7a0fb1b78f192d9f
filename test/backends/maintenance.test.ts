// What an operator's commands do in PostgreSQL, which may take longer than a request.
import { sql } from 'drizzle-orm';
import postgres from 'postgres';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { type Database, openDatabase } from '../../src/backends/postgres/database.ts';
import { createKeyStore } from '../../src/backends/postgres/key-store.ts';
import { createMaintenance } from '../../src/backends/postgres/maintenance.ts';
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
