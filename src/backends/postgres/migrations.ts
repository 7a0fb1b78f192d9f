/** The schema: brought up to date, and whether it is the one that this version was written for. */
import { readFile } from 'node:fs/promises';
import { setTimeout as pause } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { type SQL, sql } from 'drizzle-orm';
import { PgDialect } from 'drizzle-orm/pg-core';
import { drizzle } from 'drizzle-orm/postgres-js';
import { migrate } from 'drizzle-orm/postgres-js/migrator';
import { systemClock } from '../../lib/clock.ts';
import { reasonOf } from '../../lib/reason.ts';
import { connect, isPrepared, type PostgresAddress } from './connect.ts';
import { type Database, type Queryable, select, type Transaction } from './database.ts';
import { READ_ONLY } from './examine.ts';
import { codeOf, explained, READ_ONLY_TRANSACTION } from './faults.ts';
import { NEVER_IDLE, NEVER_LATE } from './settings.ts';

/** Both from `src` and from `dist`. */
const MIGRATIONS_FOLDER = fileURLToPath(new URL('../../../drizzle', import.meta.url));
/** Any number that all nodes share. */
const MIGRATION_LOCK = 7_217_903_411;
const WAIT_MAX_MS = 60_000;
const PAUSE_MS = 5_000;
/** Longer, and the requests of all nodes that wait behind it would be given up. */
const TABLE_WAIT_MAX_MS = 2_000;
const LOCK_TIMED_OUT = '55P03';
const DEADLOCKED = '40P01';
const NOT_ALLOWED = '42501';
/** A node that stands still in the midst of it holds up the others no longer. */
const IDLE_MAX_MS = 30_000;
const dialect = new PgDialect();

/**
 * Brings the schema up to date, by all migrations that are missing or by none. Safe from several nodes at once: they wait
 * for each other. Where none is missing, nothing is asked for that only the schema's owner may do.
 *
 * @param options.waitMaxMs how long to wait for another node that migrates, or for whoever holds a table
 * @param options.pauseMs between two tries to have a table
 * @returns once every migration of this version is applied
 * @throws Error where it has waited for so long, or may not change the schema; nothing has changed then
 */
export async function migrateDatabase(
  address: PostgresAddress,
  { waitMaxMs = WAIT_MAX_MS, pauseMs = PAUSE_MS }: { waitMaxMs?: number; pauseMs?: number } = {},
): Promise<void> {
  const deadlineMs = systemClock.nowMs() + waitMaxMs;
  const prepare = isPrepared(address);
  const client = connect(address, {
    max: 1,
    prepare,
    // By another name than a gateway's connections: a migration may end those.
    connection: { application_name: 'keygate migrate', ...(prepare ? { ...NEVER_IDLE, ...NEVER_LATE } : {}) },
  });
  try {
    const db = drizzle(client);
    for (;;) {
      const leftMs = Math.max(1, deadlineMs - systemClock.nowMs());
      try {
        if (await isInStep(db)) return;
        await db.transaction((tx) => migrateWithin(tx, leftMs), {
          isolationLevel: 'read committed',
        });
        return;
      } catch (error) {
        if (codeOf(error) === READ_ONLY_TRANSACTION) throw new Error(READ_ONLY, { cause: error });
        if (codeOf(error) === NOT_ALLOWED) {
          throw new Error(
            `this role may not bring the schema up to date, or not see that it is (${reasonOf(error)}): run keygate migrate with the DATABASE_URL of one that may, and let this one read schema drizzle`,
            { cause: error },
          );
        }
        if (![LOCK_TIMED_OUT, DEADLOCKED].includes(codeOf(error) ?? '')) throw explained(error);
        if (systemClock.nowMs() + pauseMs >= deadlineMs) {
          throw new Error(
            `the schema could not be brought up to date within ${Math.ceil(waitMaxMs / 1000)} s: another node is migrating, or something holds a table`,
            { cause: error },
          );
        }
        await pause(pauseMs);
      }
    }
  } finally {
    await client.end({ timeout: 5 });
  }
}

/** @throws Error where PostgreSQL is read-only: it could serve nothing */
async function isInStep(db: Queryable): Promise<boolean> {
  if ((await missingOf(db)) > 0) return false;
  const [row] = await select<{ is_read_only: boolean }>(
    db,
    sql`SELECT current_setting('transaction_read_only') = 'on' AS is_read_only`,
  );
  if (row!.is_read_only) throw new Error(READ_ONLY);
  return true;
}

/**
 * In one transaction, the lock with it: behind a pooler the next statement of a session may be another's. Everybody who
 * wants a table waits behind one who waits to change it, so that this one does so for a moment at a time.
 */
async function migrateWithin(tx: Transaction, waitMaxMs: number): Promise<void> {
  await tx.execute(sql.raw(`SET LOCAL lock_timeout = ${waitMaxMs}`));
  // What the role has for a gateway's statements: an index may take minutes to build. The second came with PostgreSQL 17.
  await tx.execute(sql`
    SELECT set_config(name, '0', true) FROM pg_settings WHERE name IN ('statement_timeout', 'transaction_timeout')`);
  await tx.execute(sql.raw(`SET LOCAL idle_in_transaction_session_timeout = ${IDLE_MAX_MS}`));
  await tx.execute(sql`SELECT pg_advisory_xact_lock(${MIGRATION_LOCK})`);
  await tx.execute(sql.raw(`SET LOCAL lock_timeout = ${Math.min(waitMaxMs, TABLE_WAIT_MAX_MS)}`));
  // The library begins a transaction of its own, which within another is a savepoint: its session can't, the
  // transaction can.
  const session = {
    execute: (query: SQL) => tx.execute(query),
    all: (query: SQL) => tx.execute(query),
    transaction: (action: (inner: Transaction) => Promise<void>) => tx.transaction(action),
  };
  await migrate({ dialect, session } as never, { migrationsFolder: MIGRATIONS_FOLDER });
}

/** Both from `src` and from `dist`. */
const JOURNAL = new URL('../../../drizzle/meta/_journal.json', import.meta.url);

/** When each migration of this version was written: what drizzle marks an applied one with. */
const known: Promise<number[]> = readFile(JOURNAL, 'utf8').then((text) =>
  (JSON.parse(text) as { entries: { when: number }[] }).entries.map(({ when }) => when),
);
// Whoever asks hears of it.
known.catch(() => {});

/** No such schema, no such table. */
const NOT_THERE = ['3F000', '42P01'];

/**
 * @returns migrations of this version that are missing, all of them where there is no schema; 0 where the schema is in step, or newer: a node of an older
 *   version goes on beside newer ones, since migrations only add
 */
export async function missingMigrations(database: Database): Promise<number> {
  return await database.run(missingOf);
}

async function missingOf(db: Queryable): Promise<number> {
  const newest = await newestApplied(db).catch((error: unknown) => {
    if (NOT_THERE.includes(codeOf(error) ?? '')) return 0;
    throw error;
  });
  return (await known).filter((when) => when > newest).length;
}

async function newestApplied(db: Queryable): Promise<number> {
  const [row] = await select<{ newest: number }>(
    db,
    sql`SELECT coalesce(max(created_at), 0)::float8 AS newest FROM drizzle.__drizzle_migrations`,
  );
  return row!.newest;
}
