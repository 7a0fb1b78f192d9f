// Statements that are sent together in one transaction, of which one fails.
import { sql } from 'drizzle-orm';
import { afterAll, beforeAll, expect, it } from 'vitest';
import {
  type Database,
  hotStatement,
  openDatabase,
  prepared,
  type Transaction,
} from '../../src/backends/postgres/database.ts';
import { systemClock } from '../../src/lib/clock.ts';
import { silentLog } from '../../src/lib/log.ts';
import { reasonOf } from '../../src/lib/reason.ts';
import { together } from '../../src/lib/together.ts';
import { createDatabase } from '../support/engines.ts';

const note = hotStatement(sql`INSERT INTO notes VALUES (${sql.placeholder('text')})`);
const divide = hotStatement(sql`SELECT 1 / ${sql.placeholder('by')}::int4`);
const read = hotStatement<{ text: string }>(sql`SELECT text FROM notes`);

let database: Database;
let drop: () => Promise<void>;
beforeAll(async () => {
  const created = await createDatabase();
  drop = created.drop;
  database = openDatabase({
    address: { kind: 'url', url: created.url },
    clock: systemClock,
    log: silentLog,
  });
  await database.run((db) => db.execute(sql`CREATE TABLE notes (text text)`));
});
afterAll(async () => {
  await database.close();
  await drop();
});

it('all fail with the reason of the first, however deep the others lie', async () => {
  const nested = async (tx: Transaction) => {
    await together([prepared(tx, divide, { by: 0 }), prepared(tx, note, { text: 'with it' })]);
  };
  const failed = database.transaction((tx) =>
    together([nested(tx), prepared(tx, note, { text: 'behind it' })]),
  );
  expect(reasonOf(await failed.catch((error: unknown) => error))).toContain('division by zero');
  expect(await database.run((db) => prepared(db, read, {}))).toEqual([]);
});

it('nothing that one of them goes on to ask is done when the transaction has ended', async () => {
  let late: Promise<unknown> | undefined;
  const goesOn = async (tx: Transaction, ended: Promise<unknown>) => {
    await ended;
    await prepared(tx, note, { text: 'too late' });
  };
  let end!: () => void;
  const ended = new Promise<void>((resolve) => {
    end = resolve;
  });
  const failed = database.transaction(async (tx) => {
    // As `Promise.all` would leave it behind.
    late = goesOn(tx, ended);
    await prepared(tx, divide, { by: 0 });
  });
  expect(reasonOf(await failed.catch((error: unknown) => error))).toContain('division by zero');
  end();
  await expect(late).rejects.toThrow('a statement of a transaction that has ended');
  expect(await database.run((db) => prepared(db, read, {}))).toEqual([]);
});
