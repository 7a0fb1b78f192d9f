/** What is asked of PostgreSQL for its operator's sake. */
import { getTableName, is, type SQL, sql } from 'drizzle-orm';
import { isPgSequence, PgTable } from 'drizzle-orm/pg-core';
import { reasonOf } from '../../lib/reason.ts';
import { textArray } from './array-literal.ts';
import { type Database, hotStatement, select } from './database.ts';
import { SETTINGS_KEPT_OUT } from './faults.ts';
import * as schema from './schema.ts';
import { HOT_PLAN_SETTINGS, SETTINGS, SETTINGS_LOOKED_AT } from './settings.ts';

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

/** No standby that keeps up lets a commit wait for so long. */
const COMMIT_WAIT_MAX_S = 3;

/**
 * @returns what keeps PostgreSQL from serving though it can be reached, each in a line for its operator
 * @throws GatewayError UNAVAILABLE where it can't be reached
 */
export async function troublesOfPostgres(database: Database): Promise<string[]> {
  const [row] = await asked<{ is_read_only: boolean; is_stuck: boolean; is_hidden: boolean }>(
    database,
    sql`SELECT current_setting('transaction_read_only') = 'on' AS is_read_only,
               -- Of a role's own sessions everybody may see it.
               EXISTS (
                 SELECT FROM pg_stat_activity
                 WHERE datname = current_database() AND wait_event = 'SyncRep'
                   AND query_start < clock_timestamp() - make_interval(secs => ${COMMIT_WAIT_MAX_S})) AS is_stuck,
               to_regclass('drizzle.__drizzle_migrations') IS NOT NULL AND EXISTS (
                 SELECT FROM unnest(${textArray([getTableName(schema.devices), ...SEQUENCES])}::text[]) AS t (name)
                 WHERE to_regclass(t.name) IS NULL) AS is_hidden`,
  );
  return [
    ...(row!.is_read_only ? [READ_ONLY] : []),
    ...(row!.is_stuck
      ? ['commits wait for a synchronous standby: bring it back, or take it out of synchronous_standby_names']
      : []),
    ...(row!.is_hidden
      ? [
          'this role sees no tables or sequences of Keygate: its search_path leaves out their schema, or it may not use it',
        ]
      : []),
  ];
}

/**
 * What must be put right before a gateway starts, and does not keep a running one from answering.
 *
 * @returns each in a line for the operator
 * @throws GatewayError UNAVAILABLE where PostgreSQL can't be reached
 */
export async function shortcomingsOfPostgres(database: Database): Promise<string[]> {
  return [...(await missingRights(database)), ...(await missingSettings(database))];
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
        -- Either will do.
        WHERE NOT has_sequence_privilege(to_regclass(s.name), 'USAGE, UPDATE')`,
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
async function missingSettings(database: Database): Promise<string[]> {
  const lines: string[] = [];
  if (database.isPrepared) {
    const [row] = await database.hot(planStatement, {});
    if (row!.mode !== HOT_PLAN_SETTINGS.plan_cache_mode) {
      lines.push(`${SETTINGS_KEPT_OUT} and leaves it out: add ?prepare=false to it`);
    }
  }
  const needed = database.isPrepared ? SETTINGS_LOOKED_AT : { ...SETTINGS, ...SETTINGS_LOOKED_AT };
  const rows = await asked<{ name: string; setting: string; role: string }>(
    database,
    sql`SELECT lower(name) AS name, setting,
               format('%I IN DATABASE %I', session_user, current_database()) AS role
        FROM pg_settings
        WHERE lower(name) = ANY (${textArray(Object.keys(needed))}::text[])`,
  );
  const commands = rows
    .filter(({ name, setting }) => !needed[name]!.suits(setting))
    .map(({ name, role }) => `ALTER ROLE ${role} SET ${name} = '${needed[name]!.value}'`);
  if (commands.length > 0) {
    lines.push(
      `what connections do not set the role must have: ${commands.join('; ')}; then RECONNECT in the pooler, if there is one`,
    );
  }
  return lines;
}

async function asked<Row>(database: Database, question: SQL): Promise<Row[]> {
  return await database.run((db) => select<Row>(db, question));
}

/** @returns what `look` finds, in a line; null where it finds nothing */
export async function inALine(
  look: (database: Database) => Promise<string[]>,
  database: Database,
): Promise<string | null> {
  try {
    const found = await look(database);
    return found.length === 0 ? null : found.join('; ');
  } catch (error) {
    return reasonOf(error);
  }
}
