/** Whether the schema is the one that this version was written for. */
import { readFile } from 'node:fs/promises';
import { sql } from 'drizzle-orm';
import { codeOf, type Database } from './database.ts';

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
  const newest = await newestApplied(database).catch((error: unknown) => {
    if (NOT_THERE.includes(codeOf(error) ?? '')) return 0;
    throw error;
  });
  return (await known).filter((when) => when > newest).length;
}

async function newestApplied(database: Database): Promise<number> {
  const [row] = await database.run(
    async (db) =>
      (await db.execute(sql`
        SELECT coalesce(max(created_at), 0)::float8 AS newest
        FROM drizzle.__drizzle_migrations`)) as unknown as { newest: number }[],
  );
  return row!.newest;
}
