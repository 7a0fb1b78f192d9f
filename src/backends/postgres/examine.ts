/** What `keygate doctor` asks PostgreSQL. */
import { sql } from 'drizzle-orm';
import type { Database } from './database.ts';

export interface PostgresFacts {
  version: string;
  /** As `server_version_num`: 140000 is 14.0. */
  versionNumber: number;
  nowMs: number;
}

/** @throws GatewayError UNAVAILABLE where it can't be reached */
export async function examinePostgres(database: Database): Promise<PostgresFacts> {
  const [row] = await database.run(
    async (db) =>
      (await db.execute(sql`
        SELECT current_setting('server_version') AS version,
               current_setting('server_version_num')::int4 AS version_number,
               extract(epoch FROM clock_timestamp())::float8 * 1000 AS now_ms`)) as unknown as {
        version: string;
        version_number: number;
        now_ms: number;
      }[],
  );
  return { version: row!.version, versionNumber: row!.version_number, nowMs: row!.now_ms };
}
