/** Whether the schema is the one that this version was written for. */
import { readFile } from 'node:fs/promises';
import { sql } from 'drizzle-orm';
import type { Database } from './database.ts';

/** Both from `src` and from `dist`. */
const JOURNAL = new URL('../../../drizzle/meta/_journal.json', import.meta.url);

/** When each migration of this version was written: what drizzle marks an applied one with. */
const known: Promise<number[]> = readFile(JOURNAL, 'utf8').then((text) =>
  (JSON.parse(text) as { entries: { when: number }[] }).entries.map(({ when }) => when),
);
// Whoever asks hears of it.
known.catch(() => {});

/**
 * @returns migrations of this version that are missing; 0 where the schema is in step, or newer: a node of an older
 *   version goes on beside newer ones, since migrations only add
 */
export async function missingMigrations(database: Database): Promise<number> {
  const [row] = await database.run(
    async (db) =>
      (await db.execute(sql`
        SELECT coalesce(max(created_at), 0)::float8 AS newest
        FROM drizzle.__drizzle_migrations`)) as unknown as { newest: number }[],
  );
  return (await known).filter((when) => when > row!.newest).length;
}
