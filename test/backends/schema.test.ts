/**
 * What every PostgreSQL needs of the schema, and a distributed one: no index depends on an order of letters; every row
 * belongs to one user, and so does every rule about rows.
 */
import postgres from 'postgres';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { migrateDatabase } from '../../src/backends/postgres/migrations.ts';
import { createDatabase } from '../support/engines.ts';

/** Small and the same on every shard: a reference table of a distributed PostgreSQL. */
const REFERENCE_TABLES = ['shared_secrets'];

let database: Awaited<ReturnType<typeof createDatabase>>;
let sql: postgres.Sql;
beforeAll(async () => {
  database = await createDatabase();
  await migrateDatabase({ kind: 'url', url: database.url });
  sql = postgres(database.url, { max: 1, onnotice: () => {} });
});
afterAll(async () => {
  await sql?.end();
  await database?.drop();
});

describe('the schema can be sharded by user id', () => {
  it('every table but the reference tables has a user id that is never null', async () => {
    const rows = await sql<{ table: string; nullable: string | null }[]>`
      SELECT t.table_name AS "table", c.is_nullable AS nullable
      FROM information_schema.tables t
      LEFT JOIN information_schema.columns c
        ON c.table_schema = t.table_schema AND c.table_name = t.table_name AND c.column_name = 'user_id'
      WHERE t.table_schema = 'public' AND t.table_type = 'BASE TABLE'`;
    expect(rows.length).toBeGreaterThan(5);
    const without = rows.filter((row) => row.nullable !== 'NO').map((row) => row.table);
    expect(without.sort()).toEqual(REFERENCE_TABLES);
  });

  it('every primary key and unique index begins with it, so that a shard can hold it alone', async () => {
    const rows = await sql<{ index: string; table: string; first: string }[]>`
      SELECT i.indexrelid::regclass::text AS "index", i.indrelid::regclass::text AS "table", a.attname AS first
      FROM pg_index i
      JOIN pg_class c ON c.oid = i.indrelid AND c.relnamespace = 'public'::regnamespace
      JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
      WHERE i.indisunique`;
    const others = rows.filter((row) => row.first !== 'user_id' && !REFERENCE_TABLES.includes(row.table));
    expect(others).toEqual([]);
  });

  it('no row points at another table: nothing has to be on the same shard but what is of one user', async () => {
    expect(await sql`SELECT conname FROM pg_constraint WHERE contype = 'f'`).toHaveLength(0);
  });
});

it('every index compares text by its bytes, whatever the order of letters of the database', async () => {
  const columns = await sql<{ index: string; collation: string }[]>`
    SELECT i.indexrelid::regclass::text AS "index", l.collname AS "collation"
    FROM pg_index i
    JOIN pg_class c ON c.oid = i.indrelid AND c.relnamespace = 'public'::regnamespace
    CROSS JOIN unnest(i.indcollation) AS k (oid)
    JOIN pg_collation l ON l.oid = k.oid`;
  expect(columns.length).toBeGreaterThan(10);
  expect(columns.filter(({ collation }) => collation !== 'C')).toEqual([]);
});
