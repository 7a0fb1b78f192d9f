/** What an operator's commands do in PostgreSQL. */
import { sql } from 'drizzle-orm';
import type { Maintenance } from '../../ports/maintenance.ts';
import { numberArray, textArray } from './array-literal.ts';
import type { Database } from './database.ts';
import { connectionFence, devices, messageSequence, oneTimePreKeys, usedPreKeyIds } from './schema.ts';

/** More messages than this are not stored within a millisecond. */
const MESSAGES_PER_MS_MAX = 1_000;

export function createMaintenance(database: Database): Maintenance {
  return {
    async countDevices() {
      const [row] = await database.run(
        async (db) =>
          (await db.execute(sql`SELECT count(*)::float8 AS count FROM ${devices}`)) as unknown as {
            count: number;
          }[],
      );
      return row!.count;
    },

    async liftSequences(restoredAtMs) {
      const lifts = [
        [connectionFence.seqName!, restoredAtMs],
        [messageSequence.seqName!, restoredAtMs * MESSAGES_PER_MS_MAX],
      ] as const;
      for (const [name, least] of lifts) {
        // Never down: it may have been lifted before, by a clock that was ahead.
        await database.run(
          async (db) =>
            await db.execute(sql`
            SELECT setval(${name}, greatest(last_value, ${least}::int8)) FROM ${sql.identifier(name)}`),
        );
      }
    },

    async withdrawAfterRestore({ after, restoredAtMs, versionMin, limit }) {
      return await database.transaction(async (tx) => {
        const rows = (await tx.execute(sql`
          SELECT user_id, device_id FROM ${devices}
          WHERE (user_id, device_id) > (${after?.userId ?? ''}, ${after?.deviceId ?? 0}::int2)
          ORDER BY user_id, device_id LIMIT ${limit}
          FOR NO KEY UPDATE`)) as unknown as { user_id: string; device_id: number }[];
        // A second statement: its snapshot shows what was committed before the rows were locked.
        const [done] = (await tx.execute(sql`
          WITH batch AS MATERIALIZED (
            SELECT d.user_id, d.device_id, d.identity_canonical
            FROM unnest(
              ${textArray(rows.map((row) => row.user_id))}::text[],
              ${numberArray(rows.map((row) => row.device_id))}::int2[]
            ) AS a (user_id, device_id)
            JOIN ${devices} d ON d.user_id = a.user_id AND d.device_id = a.device_id
          ),
          withdrawn AS (
            DELETE FROM ${oneTimePreKeys} k USING batch b
            WHERE k.user_id = b.user_id AND k.device_id = b.device_id
            RETURNING k.user_id, k.device_id, b.identity_canonical, k.kind, k.key_id
          ),
          kept AS (
            INSERT INTO ${usedPreKeyIds} AS u (user_id, device_id, identity_canonical, kind, signed, ids)
            SELECT user_id, device_id, identity_canonical, kind, false, range_agg(int8range(key_id, key_id, '[]'))
            FROM withdrawn
            GROUP BY user_id, device_id, identity_canonical, kind
            ON CONFLICT (user_id, device_id, identity_canonical, kind, signed) DO UPDATE
            SET ids = u.ids + excluded.ids
          ),
          lifted AS (
            UPDATE ${devices} d SET
              ec_available = 0, pq_available = 0,
              key_version = greatest(d.key_version, ${versionMin}::int8) + 1,
              count_version = greatest(d.count_version, ${versionMin}::int8) + 1,
              low_notice_version = greatest(d.count_version, ${versionMin}::int8) + 1,
              revision = greatest(d.revision, ${versionMin}::int8) + 1,
              fence = 0,
              restored_at = to_timestamp(${restoredAtMs}::float8 / 1000)
            FROM batch b
            WHERE d.user_id = b.user_id AND d.device_id = b.device_id
          )
          SELECT count(*)::float8 AS count FROM withdrawn`)) as unknown as { count: number }[];
        return {
          devices: rows.map((row) => ({ userId: row.user_id, deviceId: row.device_id })),
          withdrawnCount: done!.count,
        };
      });
    },
  };
}
