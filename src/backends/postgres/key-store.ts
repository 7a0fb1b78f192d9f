/** The key store in PostgreSQL: reads, and changes in turn for each device; claims and retention lie beside it. */
import { randomBytes } from 'node:crypto';
import { and, eq, sql } from 'drizzle-orm';
import { type Clock, steadyClock } from '../../lib/clock.ts';
import { createSlots, NoSlotError, type Slots } from '../../lib/slots.ts';
import type { KeyReader, KeyStore } from '../../ports/key-store.ts';
import { addressKey, type DeviceAddress } from '../../protocol/ids.ts';
import { DEVICE_ID_MAX } from '../../protocol/limits.ts';
import { numberArray } from './array-literal.ts';
import { createClaims } from './claims.ts';
import { type Database, hotStatement, type Queryable, select } from './database.ts';
import { unavailable } from './faults.ts';
import { createKeyRetention } from './key-retention.ts';
import { createKeySetTransaction, lockKeys, readKeys } from './key-set-transaction.ts';
import { devices, oneTimePreKeys, PRE_KEY_KIND, prekeyClaims, sharedSecrets } from './schema.ts';
import { momentOf } from './time-sql.ts';
import { usedAmong } from './used-ids.ts';

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
    ...createKeyReader((query) => database.run(query)),
    ...createClaims(database),
    ...createKeyRetention(database),

    atOneMoment: (action) => database.snapshot((tx) => action(createKeyReader((query) => query(tx)))),

    async change(device, action, { isUpkeep = false, fence = null } = {}) {
      return await inTurn(device, () =>
        database[isUpkeep ? 'upkeep' : 'transaction'](async (tx) => {
          let current = await lockKeys(tx, device);
          if (current === null) {
            await tx.insert(devices).values(device).onConflictDoNothing();
            current = await lockKeys(tx, device);
          }
          const result = await action(createKeySetTransaction(tx, device, current!));
          // Also where nothing was changed: whoever asked is told how things stand.
          if (fence !== null && fence > current!.fence) {
            await tx
              .update(devices)
              .set({ fence })
              .where(and(eq(devices.userId, device.userId), eq(devices.deviceId, device.deviceId)));
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

/** @param run sends the queries of one call */
function createKeyReader(
  run: <Result>(query: (db: Queryable) => Promise<Result>) => Promise<Result>,
): KeyReader {
  return {
    read: (device) => run((db) => readKeys(db, device)),

    async compareIds({ device, identity }, kind, localIds) {
      const canonicalKey = sql`${identity}`;
      const rows = await run(
        async (db) =>
          await select<{ key_id: number; fate: 'used' | 'unknown' | 'notListed' }>(
            db,
            sql`
            WITH local AS (SELECT DISTINCT id FROM unnest(${numberArray(localIds)}::int8[]) AS l (id)),
            pooled AS (
              SELECT key_id FROM ${oneTimePreKeys}
              WHERE user_id = ${device.userId} AND device_id = ${device.deviceId} AND kind = ${PRE_KEY_KIND[kind]}
                AND (SELECT d.identity_canonical = ${canonicalKey} FROM ${devices} d
                     WHERE d.user_id = ${device.userId} AND d.device_id = ${device.deviceId}))
            SELECT l.id AS key_id, CASE WHEN u.id IS NULL THEN 'unknown' ELSE 'used' END AS fate
            FROM local l LEFT JOIN (${usedAmong(device, kind, canonicalKey, localIds)}) u ON u.id = l.id
            WHERE NOT EXISTS (SELECT 1 FROM pooled p WHERE p.key_id = l.id)
            UNION ALL
            SELECT p.key_id, 'notListed' FROM pooled p WHERE NOT EXISTS (SELECT 1 FROM local l WHERE l.id = p.key_id)
            ORDER BY 1`,
          ),
      );
      const idsOf = (fate: string) => rows.filter((row) => row.fate === fate).map((row) => row.key_id);
      return { used: idsOf('used'), unknown: idsOf('unknown'), notListed: idsOf('notListed') };
    },

    async claimedIdsSince(device, kind, sinceMs, limit) {
      const column = kind === 'ec' ? prekeyClaims.ecKeyId : prekeyClaims.pqKeyId;
      const rows = await run(
        async (db) =>
          await db
            .select({ keyId: column })
            .from(prekeyClaims)
            .where(
              and(
                eq(prekeyClaims.userId, device.userId),
                eq(prekeyClaims.deviceId, device.deviceId),
                sql`${column} IS NOT NULL`,
                sql`${prekeyClaims.claimedAt} >= ${momentOf(sinceMs)}`,
              ),
            )
            .orderBy(sql`${prekeyClaims.claimedAt} DESC`)
            .limit(limit),
      );
      return rows.map((row) => row.keyId!);
    },
  };
}

const devicesOfStatement = hotStatement<{ device_id: number; registration_id: number }>(sql`
  SELECT device_id, registration_id FROM ${devices}
  WHERE user_id = ${sql.placeholder('userId')} AND identity_key IS NOT NULL
  ORDER BY user_id, device_id LIMIT ${sql.raw(String(DEVICE_ID_MAX))}`);
