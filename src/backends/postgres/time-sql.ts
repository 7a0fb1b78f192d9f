/** Moments on their way into SQL and out of it: the stores count in milliseconds, PostgreSQL in moments. */
import { type SQL, sql } from 'drizzle-orm';

/** A moment of the epoch, given in milliseconds: a number, or the placeholder that stands for one. */
export function momentOf(ms: unknown): SQL {
  return sql`to_timestamp(${ms}::float8 / 1000)`;
}

/** The milliseconds of a moment; null of null. */
export function msOf(expression: string): SQL {
  return sql.raw(`(extract(epoch FROM ${expression}) * 1000)::float8`);
}
