/** The store as a whole, without ever reading the whole of a large table. */
import { sql } from 'drizzle-orm';
import type { Statistics } from '../../ports/statistics.ts';
import type { Database } from './database.ts';
import { devices, messages } from './schema.ts';

const AVAILABLE_BOUNDS = [0, 5, 10, 25, 50, 100, 250, 500, 1000];
/** More devices than these are looked at by sample: some hundred milliseconds of one core. */
const SAMPLED_DEVICES_MAX = 200_000;

export function createStatistics(database: Database): Statistics {
  return {
    async read() {
      return await database.run(async (db) => {
        const [facts] = (await db.execute(sql`
          SELECT (SELECT greatest(reltuples, 0)::float8 FROM pg_class WHERE oid = 'devices'::regclass) AS device_estimate,
                 (SELECT n_live_tup::float8 FROM pg_stat_user_tables WHERE relid = 'messages'::regclass) AS pending,
                 (SELECT extract(epoch FROM stored_at)::float8 * 1000 FROM ${messages}
                  ORDER BY expires_at LIMIT 1) AS oldest_ms`)) as unknown as {
          device_estimate: number;
          pending: number | null;
          oldest_ms: number | null;
        }[];
        const { device_estimate: deviceEstimate, pending, oldest_ms: oldestStoredAtMs } = facts!;
        const sampledShare = Math.min(1, SAMPLED_DEVICES_MAX / Math.max(1, deviceEstimate));
        const sample =
          sampledShare === 1 ? sql`` : sql.raw(` TABLESAMPLE SYSTEM (${(sampledShare * 100).toFixed(6)})`);
        const rows = (await db.execute(sql`
          SELECT width_bucket(ec_available - 0.5, ${sql.raw(`ARRAY[${AVAILABLE_BOUNDS.join(', ')}]::numeric[]`)}) AS bucket,
                 count(*)::float8 AS count
          FROM ${devices}${sample}
          WHERE identity_key IS NOT NULL
          GROUP BY 1`)) as unknown as { bucket: number; count: number }[];
        const countOf = (bucket: number): number => rows.find((row) => row.bucket === bucket)?.count ?? 0;
        return {
          pendingCount: pending ?? 0,
          oldestStoredAtMs,
          devicesByAvailable: [...AVAILABLE_BOUNDS, null].map((upTo, bucket) => ({
            upTo,
            deviceCount: countOf(bucket) / sampledShare,
          })),
          sampledShare,
        };
      });
    },
  };
}
