/** A device's row that moves between the claim's snapshot and its lock. */
import { randomUUID } from 'node:crypto';
import postgres from 'postgres';
import { expect, it } from 'vitest';
import { type ClaimRow, claimStatement } from '../../src/backends/postgres/claim-statement.ts';
import { openDatabase } from '../../src/backends/postgres/database.ts';
import { createKeyStore } from '../../src/backends/postgres/key-store.ts';
import { migrateDatabase } from '../../src/backends/postgres/migrations.ts';
import { HOT_PLAN_SETTINGS } from '../../src/backends/postgres/settings.ts';
import { systemClock } from '../../src/lib/clock.ts';
import { silentLog } from '../../src/lib/log.ts';
import { newDevice, storeKeySet } from '../contract/key-store.ts';
import { createDatabase } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { undoAfterEach } from '../support/flow.ts';

const undo = undoAfterEach();
/** Any number: the statement waits for it when it has read its snapshot and locked nothing yet. */
const HALT = 42;

it.each([
  // A connection that is served changes the row and leaves its revision; so do a note of use and a revocation.
  ['without another revision', 'fence = fence + 1'],
  ['with another revision', 'revision = revision + 1'],
])('gives nothing and spends nothing where the row moves %s', async (_, change) => {
  const { url, drop } = await createDatabase();
  undo.push(drop);
  const address = { kind: 'url', url } as const;
  await migrateDatabase(address);
  const database = openDatabase({ address, clock: systemClock, log: silentLog });
  undo.push(() => database.close());
  const device = newDevice();
  await storeKeySet(createKeyStore(database), device, {
    lastResortPreKeyId: 1,
    ec: [1, 2, 3],
    pq: [1, 2, 3],
  });
  const [claimer, other] = [1, 2].map(() =>
    postgres(url, { max: 1, fetch_types: false, onnotice: () => {}, connection: HOT_PLAN_SETTINGS }),
  ) as [postgres.Sql, postgres.Sql];
  undo.push(
    () => claimer.end(),
    () => other.end(),
  );
  const books = async () => {
    const [row] = await other`
      SELECT ec_available, pq_available, ec_claimed, pq_claimed,
             (SELECT count(*)::int4 FROM one_time_prekeys) AS pooled,
             (SELECT count(*)::int4 FROM prekey_claims) AS claims
      FROM devices WHERE user_id = ${device.userId}`;
    return row;
  };
  const before = await books();

  const halting = claimStatement.text.replace(
    'WHERE w.is_new AND w.nth = 1',
    `WHERE (SELECT pg_advisory_xact_lock(${HALT})) IS NOT NULL AND w.is_new AND w.nth = 1`,
  );
  expect(halting).not.toBe(claimStatement.text);
  await other`SELECT pg_advisory_lock(${HALT})`;
  const claiming = claimer.unsafe<ClaimRow[]>(
    halting,
    claimStatement.bind({
      ords: '{0}',
      userIds: `{"${device.userId}"}`,
      firstDeviceIds: `{${device.deviceId}}`,
      lastDeviceIds: `{${device.deviceId}}`,
      exceptDeviceIds: '{0}',
      claimerUserIds: '{"claimer"}',
      claimerDeviceIds: '{1}',
      claimIds: `{"${randomUUID()}"}`,
      sparedTargets: '{false}',
      lowThreshold: 2,
      nowMs: 0,
    }) as never[],
  );
  const rows = claiming.then((list) => list.map(({ outcome }) => outcome));
  await eventually(async () => {
    const waiting = await other`
      SELECT 1 FROM pg_locks
      WHERE locktype = 'advisory' AND NOT granted AND objid = ${HALT}
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`;
    expect(waiting).toHaveLength(1);
  });
  await other.unsafe(`UPDATE devices SET ${change} WHERE user_id = '${device.userId}'`);
  await other`SELECT pg_advisory_unlock(${HALT})`;
  expect(await rows).toEqual(['again']);
  expect(await books()).toEqual(before);
});
