// What keeps a PostgreSQL that can be reached from serving.
import { sql } from 'drizzle-orm';
import postgres from 'postgres';
import { expect, it } from 'vitest';
import { openDatabase } from '../../src/backends/postgres/database.ts';
import { troublesOfPostgres } from '../../src/backends/postgres/examine.ts';
import { systemClock } from '../../src/lib/clock.ts';
import { silentLog } from '../../src/lib/log.ts';
import { startPostgres } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { undoAfterEach } from '../support/flow.ts';

const undo = undoAfterEach();

it('is a synchronous standby that is gone: commits wait for it, and reads do not', async () => {
  const engine = await startPostgres();
  undo.push(() => engine.stop());
  const admin = postgres(engine.url, { max: 1, onnotice: () => {} });
  undo.push(() => admin.end());
  const address = { kind: 'url', url: engine.url } as const;
  const database = openDatabase({ address, clock: systemClock, log: silentLog });
  undo.push(() => database.close());
  await database.run((db) => db.execute(sql`CREATE TABLE committed (id int)`));
  expect(await troublesOfPostgres(database)).toEqual([]);

  await admin`ALTER SYSTEM SET synchronous_standby_names = 'gone'`;
  await admin`SELECT pg_reload_conf()`;
  await eventually(async () =>
    expect(await admin`SHOW synchronous_standby_names`).toEqual([{ synchronous_standby_names: 'gone' }]),
  );
  const committing = database.run((db) => db.execute(sql`INSERT INTO committed VALUES (1)`));
  await eventually(async () =>
    expect(await troublesOfPostgres(database)).toEqual([
      'commits wait for a synchronous standby: bring it back, or take it out of synchronous_standby_names',
    ]),
  );
  await admin`ALTER SYSTEM RESET synchronous_standby_names`;
  await admin`SELECT pg_reload_conf()`;
  await committing;
  expect(await troublesOfPostgres(database)).toEqual([]);
});
