/** What is asked of PostgreSQL for its operator's sake. */
import { getTableName, is, type SQL, sql } from 'drizzle-orm';
import { isPgSequence, PgTable } from 'drizzle-orm/pg-core';
import { reasonOf } from '../../lib/reason.ts';
import { textArray } from './array-literal.ts';
import { type Database, hotStatement, SETTINGS_KEPT_OUT, select } from './database.ts';
import * as schema from './schema.ts';
import { HOT_PLAN_SETTINGS, SETTINGS } from './settings.ts';

const parts = Object.values(schema);
const TABLES = parts.filter((part) => is(part, PgTable)).map(getTableName);
const SEQUENCES = parts.filter(isPgSequence).map(({ seqName }) => seqName!);

export interface PostgresFacts {
  version: string;
  /** As `server_version_num`: 140000 is 14.0. */
  versionNumber: number;
  nowMs: number;
}

export const READ_ONLY = 'PostgreSQL is read-only: a standby, or made so';

/** @throws GatewayError UNAVAILABLE where it can't be reached */
export async function examinePostgres(database: Database): Promise<PostgresFacts> {
  const [row] = await asked<{ version: string; version_number: number; now_ms: number }>(
    database,
    sql`SELECT current_setting('server_version') AS version,
               current_setting('server_version_num')::int4 AS version_number,
               extract(epoch FROM clock_timestamp())::float8 * 1000 AS now_ms`,
  );
  return { version: row!.version, versionNumber: row!.version_number, nowMs: row!.now_ms };
}

/**
 * @returns what keeps PostgreSQL from serving as it must though it can be reached, each in a line for its operator
 * @throws GatewayError UNAVAILABLE where it can't be reached
 */
export async function troublesOfPostgres(database: Database): Promise<string[]> {
  const [row] = await asked<{ is_read_only: boolean; role: string; is_hidden: boolean }>(
    database,
    sql`SELECT current_setting('transaction_read_only') = 'on' AS is_read_only, current_user AS role,
               to_regclass(${getTableName(schema.devices)}) IS NULL
                 AND to_regclass('drizzle.__drizzle_migrations') IS NOT NULL AS is_hidden`,
  );
  return [
    ...(row!.is_read_only ? [READ_ONLY] : []),
    ...(row!.is_hidden
      ? [
          'this role sees no tables of Keygate: its search_path leads to another schema, or it may not use theirs',
        ]
      : []),
    ...(await missingRights(database)),
    ...(await missingSettings(database, row!.role)),
  ];
}

/** What a role that does not own the tables must have been granted. */
async function missingRights(database: Database): Promise<string[]> {
  const rows = await asked<{ what: string }>(
    database,
    sql`SELECT r.name || ' on ' || t.name AS what
        FROM unnest(${textArray(TABLES)}::text[]) AS t (name)
        CROSS JOIN (VALUES ('SELECT'), ('INSERT'), ('UPDATE'), ('DELETE')) AS r (name)
        WHERE NOT has_table_privilege(to_regclass(t.name), r.name)
        UNION ALL
        SELECT 'USAGE on ' || s.name
        FROM unnest(${textArray(SEQUENCES)}::text[]) AS s (name)
        WHERE NOT has_sequence_privilege(to_regclass(s.name), 'USAGE')`,
  );
  return rows.length === 0
    ? []
    : [`this role has not been granted ${rows.map(({ what }) => what).join(', ')}`];
}

const planStatement = hotStatement<{ mode: string }>(sql`SELECT current_setting('plan_cache_mode') AS mode`);

/**
 * A pooler may leave out what connections set, and swap the sessions on which statements are prepared; and where nothing
 * can be set, the role must have it.
 */
async function missingSettings(database: Database, role: string): Promise<string[]> {
  if (database.isPrepared) {
    const [row] = await database.hot(planStatement, {});
    return row!.mode === HOT_PLAN_SETTINGS.plan_cache_mode
      ? []
      : [`${SETTINGS_KEPT_OUT} and leaves it out: add ?prepare=false to it`];
  }
  const rows = await asked<{ name: string; setting: string }>(
    database,
    sql`SELECT lower(name) AS name, setting FROM pg_settings
        WHERE lower(name) = ANY (${textArray(Object.keys(SETTINGS))}::text[])`,
  );
  const wrong = rows.filter(({ name, setting }) => !SETTINGS[name]!.suits(setting));
  if (wrong.length === 0) return [];
  const commands = wrong.map(({ name }) => `ALTER ROLE "${role}" SET ${name} = '${SETTINGS[name]!.value}'`);
  return [
    `nothing is set by a connection where nothing is prepared, so the role must have it: ${commands.join('; ')}`,
  ];
}

async function asked<Row>(database: Database, question: SQL): Promise<Row[]> {
  return await database.run((db) => select<Row>(db, question));
}

/** @returns what keeps it from serving, in a line; null where nothing does */
export async function troubleOfPostgres(database: Database): Promise<string | null> {
  try {
    const troubles = await troublesOfPostgres(database);
    return troubles.length === 0 ? null : troubles.join('; ');
  } catch (error) {
    return reasonOf(error);
  }
}
