/** What an operator's commands do in PostgreSQL. */
import { type SQL, sql } from 'drizzle-orm';
import type { Maintenance, PoolTotals } from '../../ports/maintenance.ts';
import { numberArray, textArray } from './array-literal.ts';
import type { Database } from './database.ts';
import { lastUsedAt } from './key-retention.ts';
import {
  connectionFence,
  devices,
  messageReceipts,
  messageSequence,
  messages,
  oneTimePreKeys,
  prekeyClaims,
  signedPreKeys,
  usedPreKeyIds,
} from './schema.ts';
import { momentOf } from './time-sql.ts';

/** More messages than this are not stored within a millisecond. */
const MESSAGES_PER_MS_MAX = 1_000;

interface PoolRow {
  ec_available: number;
  ec_claimed: number;
  pq_available: number;
  pq_claimed: number;
}

function poolsOf(row: PoolRow): { ec: PoolTotals; pq: PoolTotals } {
  return {
    ec: { available: row.ec_available, consumed: row.ec_claimed },
    pq: { available: row.pq_available, consumed: row.pq_claimed },
  };
}

export function createMaintenance(database: Database): Maintenance {
  async function one<Row>(statement: SQL): Promise<Row | undefined> {
    const [row] = await database.patient(async (tx) => (await tx.execute(statement)) as unknown as Row[]);
    return row;
  }

  return {
    async totals() {
      const row = await one<PoolRow & { device_count: number; with_keys: number; pending: number }>(sql`
        SELECT count(*)::float8 AS device_count, count(identity_key)::float8 AS with_keys,
               coalesce(sum(ec_available), 0)::float8 AS ec_available, coalesce(sum(ec_claimed), 0)::float8 AS ec_claimed,
               coalesce(sum(pq_available), 0)::float8 AS pq_available, coalesce(sum(pq_claimed), 0)::float8 AS pq_claimed,
               (SELECT count(*)::float8 FROM ${messages} WHERE pending) AS pending
        FROM ${devices}`);
      return {
        deviceCount: row!.device_count,
        deviceWithKeysCount: row!.with_keys,
        ...poolsOf(row!),
        pendingCount: row!.pending,
      };
    },

    async totalsOf({ userId, deviceId }) {
      const row = await one<
        PoolRow & {
          has_keys: boolean;
          key_version: number;
          count_version: number;
          served_ms: number | null;
          updated_ms: number | null;
          restored_ms: number | null;
          pending: number;
        }
      >(sql`
        SELECT identity_key IS NOT NULL AS has_keys, key_version, count_version, ec_available, ec_claimed,
               pq_available, pq_claimed, extract(epoch FROM updated_at)::float8 * 1000 AS updated_ms,
               extract(epoch FROM served_at)::float8 * 1000 AS served_ms,
               extract(epoch FROM restored_at)::float8 * 1000 AS restored_ms,
               (SELECT count(*)::float8 FROM ${messages} m
                WHERE m.user_id = d.user_id AND m.device_id = d.device_id AND m.pending) AS pending
        FROM ${devices} d WHERE user_id = ${userId} AND device_id = ${deviceId}`);
      if (row === undefined) return null;
      return {
        hasKeys: row.has_keys,
        keyVersion: row.key_version,
        countVersion: row.count_version,
        ...poolsOf(row),
        updatedAtMs: row.updated_ms,
        pendingCount: row.pending,
        servedAtMs: row.served_ms,
        restoredAtMs: row.restored_ms,
      };
    },

    async dueForSweep(cut) {
      const idleBefore = cut.idleBeforeMs === null ? sql`NULL` : momentOf(cut.idleBeforeMs);
      const row = await one<Record<'claims' | 'signed' | 'expired' | 'remembered' | 'idle', number>>(sql`
        SELECT (SELECT count(*)::float8 FROM ${prekeyClaims} WHERE claimed_at < ${momentOf(cut.claimedBeforeMs)}) AS claims,
               (SELECT count(*)::float8 FROM ${signedPreKeys} WHERE replaced_at < ${momentOf(cut.replacedBeforeMs)}) AS signed,
               (SELECT count(*)::float8 FROM ${messages} WHERE expires_at <= ${momentOf(cut.nowMs)}) AS expired,
               (SELECT count(*)::float8 FROM ${messageReceipts}
                WHERE finished_at <= ${momentOf(cut.forgetBeforeMs)}) AS remembered,
               (SELECT count(*)::float8 FROM ${devices}
                WHERE identity_key IS NOT NULL AND ${lastUsedAt} < ${idleBefore}) AS idle`);
      return {
        claimCount: row!.claims,
        signedPreKeyCount: row!.signed,
        expiredMessageCount: row!.expired,
        rememberedMessageCount: row!.remembered,
        idleDeviceCount: row!.idle,
      };
    },

    async countDevices() {
      const row = await one<{ count: number }>(sql`SELECT count(*)::float8 AS count FROM ${devices}`);
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
            SELECT setval(${name}, ${least}::int8) FROM ${sql.identifier(name)} WHERE last_value < ${least}::int8`),
        );
      }
    },

    async withdrawAfterRestore({ after, restoredAtMs, versionMin, devicesMax, keysMax }) {
      return await database.patient(async (tx) => {
        const rows = (await tx.execute(sql`
          WITH next AS (
            SELECT user_id, device_id, ec_available + pq_available AS keys FROM ${devices}
            WHERE (user_id, device_id) > (${after?.userId ?? ''}, ${after?.deviceId ?? 0}::int2)
            ORDER BY user_id, device_id LIMIT ${devicesMax}
          ),
          counted AS (
            SELECT user_id, device_id, sum(keys) OVER (ORDER BY user_id, device_id) - keys AS keys_before FROM next
          )
          SELECT d.user_id, d.device_id FROM counted c
          JOIN ${devices} d ON d.user_id = c.user_id AND d.device_id = c.device_id
          WHERE c.keys_before < ${keysMax}
          ORDER BY d.user_id, d.device_id
          FOR NO KEY UPDATE OF d`)) as unknown as { user_id: string; device_id: number }[];
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
              ec_available = 0, pq_available = 0, offers_pq = d.offers_pq OR d.pq_available + d.pq_claimed > 0,
              key_version = greatest(d.key_version, ${versionMin}::int8) + 1,
              count_version = greatest(d.count_version, ${versionMin}::int8) + 1,
              low_notice_version = greatest(d.count_version, ${versionMin}::int8) + 1,
              revision = greatest(d.revision, ${versionMin}::int8) + 1,
              fence = 0,
              restored_at = ${momentOf(restoredAtMs)}
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
