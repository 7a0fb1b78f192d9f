/** The connections of one node: those of Drizzle and those of the hot statements, opened when they are first needed. */
import { drizzle, type PostgresJsDatabase } from 'drizzle-orm/postgres-js';
import type postgres from 'postgres';
import { connect, isPrepared, type PostgresAddress } from './connect.ts';
import { HOT_PLAN_SETTINGS, SETTINGS } from './settings.ts';

export type PoolName = 'client' | 'hot';

export interface Pools extends Record<PoolName, Pool> {
  /** Over `client`. It changes how its client parses dates: the hot statements have one of their own. */
  drizzle: PostgresJsDatabase;
  prepare: boolean;
}

export interface Pool {
  readonly sql: postgres.Sql;
  userCount: number;
  /** Called when the last user is gone; null while there may be more. */
  end: (() => void) | null;
}

export const CLIENT_CONNECTIONS = 6;
export const HOT_CONNECTIONS = 6;

export function openPools(address: PostgresAddress): Pools {
  return { ...openClient(address), ...openHot(address), prepare: isPrepared(address) };
}

export function openClient(address: PostgresAddress): Pick<Pools, 'client' | 'drizzle'> {
  const client = openPool(address, { max: CLIENT_CONNECTIONS, settings: {} });
  return { client, drizzle: drizzle(client.sql) };
}

export function openHot(address: PostgresAddress): Pick<Pools, 'hot'> {
  return { hot: openPool(address, { max: HOT_CONNECTIONS, settings: HOT_PLAN_SETTINGS }) };
}

function openPool(
  address: PostgresAddress,
  { max, settings }: { max: number; settings: Readonly<Record<string, string>> },
): Pool {
  const prepare = isPrepared(address);
  const always = Object.fromEntries(Object.entries(SETTINGS).map(([name, { value }]) => [name, value]));
  const sql = connect(address, { max, prepare, connection: prepare ? { ...always, ...settings } : {} });
  return { sql, userCount: 0, end: null };
}

export function enter(pool: Pool): void {
  pool.userCount += 1;
}

export function leave(pool: Pool): void {
  pool.userCount -= 1;
  tellOfLastUser(pool);
}

/**
 * No sooner: for what waits in a pool that ends, the driver would open connections anew, and keep them.
 *
 * @returns when it has ended
 */
export async function endWithLastUser(pool: Pool): Promise<void> {
  await new Promise<void>((resolve) => {
    pool.end = resolve;
    tellOfLastUser(pool);
  });
  // A query that was given up may hang on it still.
  await pool.sql.end({ timeout: 0 });
}

function tellOfLastUser({ userCount, end }: Pool): void {
  if (userCount === 0) end?.();
}

export async function endPools({ client, hot }: Pools, timeoutS: number): Promise<void> {
  await Promise.allSettled([client, hot].map(({ sql }) => sql.end({ timeout: timeoutS })));
}
