/** The key store in PostgreSQL: reads, and changes in turn for each device; claims and retention lie beside it. */
import { randomBytes } from 'node:crypto';
import { eq, sql } from 'drizzle-orm';
import type { Clock } from '../../lib/clock.ts';
import type { KeyStore } from '../../ports/key-store.ts';
import { DEVICE_ID_MAX } from '../../protocol/limits.ts';
import { createClaims } from './claims.ts';
import { type Database, hotStatement, prepared } from './database.ts';
import { createDeviceTurns } from './device-turns.ts';
import { createKeyReader } from './key-reader.ts';
import { createKeyRetention } from './key-retention.ts';
import { fenceStatement } from './key-set-statements.ts';
import { createKeySetTransaction, lockKeys } from './key-set-transaction.ts';
import { devices, sharedSecrets } from './schema.ts';

/** @param how.clock by default the steady one */
export function createKeyStore(database: Database, { clock }: { clock?: Clock } = {}): KeyStore {
  /** Changes that wait for a device's row hold one connection in all. */
  const inTurn = createDeviceTurns(clock);

  return {
    ...createKeyReader(database),
    ...createClaims(database),
    ...createKeyRetention(database),

    async change(device, action, { isUpkeep = false, fence = null } = {}) {
      return await inTurn(device, () =>
        database[isUpkeep ? 'upkeep' : 'transaction'](async (tx) => {
          const current = await lockKeys(tx, device);
          const result = await action(createKeySetTransaction(tx, device, current));
          // Also where nothing was changed: whoever asked is told how things stand.
          if (fence !== null && fence > current.fence) {
            await prepared(tx, fenceStatement, { ...device, fence });
          }
          return result;
        }),
      );
    },

    async devicesOf(userId) {
      const rows = await database.hot(devicesOfStatement, { userId });
      return rows.map((row) => ({ deviceId: row.device_id, registrationId: row.registration_id }));
    },

    async sharedSecret(name) {
      return await database.run(async (db) => {
        await db
          .insert(sharedSecrets)
          .values({ name, value: randomBytes(32) })
          .onConflictDoNothing();
        const [row] = await db.select().from(sharedSecrets).where(eq(sharedSecrets.name, name));
        return row!.value;
      });
    },
  };
}

const devicesOfStatement = hotStatement<{ device_id: number; registration_id: number }>(sql`
  SELECT device_id, registration_id FROM ${devices}
  WHERE user_id = ${sql.placeholder('userId')} AND identity_key IS NOT NULL
  ORDER BY user_id, device_id LIMIT ${sql.raw(String(DEVICE_ID_MAX))}`);
