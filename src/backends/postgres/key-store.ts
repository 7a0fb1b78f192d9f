/** The key store in PostgreSQL: reads, and changes in turn for each device; claims and retention lie beside it. */
import { randomBytes } from 'node:crypto';
import { eq, sql } from 'drizzle-orm';
import { type Clock, steadyClock } from '../../lib/clock.ts';
import { createSlots, NoSlotError, type Slots } from '../../lib/slots.ts';
import type { KeyStore } from '../../ports/key-store.ts';
import { addressKey, type DeviceAddress } from '../../protocol/ids.ts';
import { DEVICE_ID_MAX } from '../../protocol/limits.ts';
import { createClaims } from './claims.ts';
import { type Database, hotStatement, prepared } from './database.ts';
import { unavailable } from './faults.ts';
import { createKeyReader } from './key-reader.ts';
import { createKeyRetention } from './key-retention.ts';
import { addDeviceStatement, fenceStatement } from './key-set-statements.ts';
import { createKeySetTransaction, lockKeys } from './key-set-transaction.ts';
import { devices, sharedSecrets } from './schema.ts';

/** Changes of one device that wait for those before them. Whoever waits longer may have given up: nothing was begun for him. */
const LINE = { slotCount: 1, waitingMax: 1_000, waitMaxMs: 5_000 };

/** @param how.clock by default the steady one */
export function createKeyStore(
  database: Database,
  { clock = steadyClock }: { clock?: Clock } = {},
): KeyStore {
  /** Of the devices that are being changed by this process. */
  const lines = new Map<string, { slots: Slots; length: number }>();

  /** Runs one after the other what is of one device, so that changes that wait for its row hold one connection in all. */
  async function inTurn<Result>(device: DeviceAddress, action: () => Promise<Result>): Promise<Result> {
    const key = addressKey(device);
    const line = lines.get(key) ?? { slots: createSlots({ clock, ...LINE }), length: 0 };
    lines.set(key, line);
    line.length += 1;
    try {
      return await line.slots.run(action);
    } catch (error) {
      throw error instanceof NoSlotError ? unavailable(error) : error;
    } finally {
      line.length -= 1;
      if (line.length === 0) lines.delete(key);
    }
  }

  return {
    ...createKeyReader(database),
    ...createClaims(database),
    ...createKeyRetention(database),

    async change(device, action, { isUpkeep = false, fence = null } = {}) {
      return await inTurn(device, () =>
        database[isUpkeep ? 'upkeep' : 'transaction'](async (tx) => {
          let current = await lockKeys(tx, device);
          if (current === null) {
            await prepared(tx, addDeviceStatement, { ...device });
            current = await lockKeys(tx, device);
          }
          const result = await action(createKeySetTransaction(tx, device, current!));
          // Also where nothing was changed: whoever asked is told how things stand.
          if (fence !== null && fence > current!.fence) {
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
