/** The configured PostgreSQL: opened, brought up to date, and asked whether it can be served from. */

import type { PostgresAddress } from '../backends/postgres/connect.ts';
import { type Database, openDatabase } from '../backends/postgres/database.ts';
import { startEmbeddedPostgres } from '../backends/postgres/embedded.ts';
import { examinePostgres, shortcomingsOfPostgres, troublesOfPostgres } from '../backends/postgres/examine.ts';
import { isDriverWriteFault } from '../backends/postgres/faults.ts';
import { migrateDatabase as migrate } from '../backends/postgres/migrations.ts';
import type { StoreConfig } from '../config.ts';
import { type Clock, systemClock } from '../lib/clock.ts';
import { type Log, silentLog } from '../lib/log.ts';
import type { Undo } from '../lib/undo.ts';
import { surviveFaults } from '../uncaught.ts';

/** Tokens and validations bear less; no retention time is so short that it would matter. */
const SWEEP_CLOCK_DIFFERENCE_MAX_MS = 5 * 60_000;

/** Where the store is; an embedded one is started first, and ended by `undo`. */
export async function openStore(
  { store }: StoreConfig,
  { log, undo }: { log: Log; undo: Undo },
): Promise<PostgresAddress> {
  if (store.kind === 'url') return { kind: 'url', url: store.url };
  const postgres = await startEmbeddedPostgres({ dataDir: store.dataDir, log });
  undo.push(() => postgres.stop());
  let stopping = false;
  undo.push(() => {
    stopping = true;
  });
  postgres.onExit((reason) => {
    // Nothing can be served without the store, and only a new start brings it back.
    if (!stopping) throw new Error(`the embedded PostgreSQL ended: ${reason}`);
  });
  return { kind: 'socket', ...postgres };
}

/** The pools of a store, until `undo`; a fault of their driver that nobody can catch ends no process meanwhile. */
export function openPools(address: PostgresAddress, { log, undo }: { log: Log; undo: Undo }): Database {
  const database = openDatabase({ address, clock: systemClock, log });
  // Until the pools are closed, which is undone before it.
  undo.push(
    surviveFaults((error) => {
      if (!isDriverWriteFault(error)) return false;
      database.recycle('the driver wrote to a connection that is gone');
      return true;
    }),
  );
  undo.push(() => database.close());
  return database;
}

/** Brings the schema of the configured store up to date, starting the embedded one for it. */
export async function migrateDatabase({ store }: StoreConfig): Promise<void> {
  if (store.kind === 'url') return await migrate({ kind: 'url', url: store.url });
  const postgres = await startEmbeddedPostgres({ dataDir: store.dataDir, log: silentLog });
  try {
    await migrate({ kind: 'socket', ...postgres });
  } finally {
    await postgres.stop();
  }
}

/** What keeps a gateway from serving from it, each in a line. */
export async function faultsOf(database: Database): Promise<string[]> {
  return [...(await troublesOfPostgres(database)), ...(await shortcomingsOfPostgres(database))];
}

/**
 * A clock that has leapt would end in a minute what was to last for weeks: messages, claims, the keys of idle devices.
 *
 * @returns how far it is ahead of PostgreSQL's, in ms; null where that is little enough for a sweep
 */
export async function leapOf(clock: Clock, database: Database): Promise<number | null> {
  const aheadMs = clock.nowMs() - (await examinePostgres(database)).nowMs;
  return Math.abs(aheadMs) <= SWEEP_CLOCK_DIFFERENCE_MAX_MS ? null : aheadMs;
}
