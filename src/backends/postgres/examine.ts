/** What is asked of PostgreSQL for its operator's sake. */
import { sql } from 'drizzle-orm';
import { reasonOf } from '../../lib/reason.ts';
import type { Database } from './database.ts';

export interface PostgresFacts {
  version: string;
  /** As `server_version_num`: 140000 is 14.0. */
  versionNumber: number;
  nowMs: number;
  /** What keeps it from serving, though it can be reached: a line, or null. */
  trouble: string | null;
}

export const READ_ONLY = 'PostgreSQL is read-only: a standby, or made so';

/** @throws GatewayError UNAVAILABLE where it can't be reached */
export async function examinePostgres(database: Database): Promise<PostgresFacts> {
  const [row] = await database.run(
    async (db) =>
      (await db.execute(sql`
        SELECT current_setting('server_version') AS version,
               current_setting('server_version_num')::int4 AS version_number,
               extract(epoch FROM clock_timestamp())::float8 * 1000 AS now_ms,
               current_setting('transaction_read_only') = 'on' AS is_read_only`)) as unknown as {
        version: string;
        version_number: number;
        now_ms: number;
        is_read_only: boolean;
      }[],
  );
  return {
    version: row!.version,
    versionNumber: row!.version_number,
    nowMs: row!.now_ms,
    trouble: row!.is_read_only ? READ_ONLY : null,
  };
}

/** @returns what keeps it from serving, in a line; null where nothing does */
export async function troubleOfPostgres(database: Database): Promise<string | null> {
  try {
    return (await examinePostgres(database)).trouble;
  } catch (error) {
    return reasonOf(error);
  }
}
