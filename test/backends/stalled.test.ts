/** A gateway's process that stands still in the midst of a statement, and what it holds. */
import { sql } from 'drizzle-orm';
import postgres from 'postgres';
import { expect, it } from 'vitest';
import { openDatabase } from '../../src/backends/postgres/database.ts';
import { systemClock } from '../../src/lib/clock.ts';
import { silentLog } from '../../src/lib/log.ts';
import { createDatabase } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { undoAfterEach } from '../support/flow.ts';
import { startTcpProxy } from '../support/tcp-proxy.ts';

const undo = undoAfterEach();

it('does not keep its rows: whoever has waited for them in vain ends its session', async () => {
  const { url, drop } = await createDatabase();
  undo.push(drop);
  const observer = postgres(url, { max: 1, onnotice: () => {} });
  undo.push(() => observer.end());
  await observer`CREATE TABLE held (id int PRIMARY KEY, value int)`;
  await observer`INSERT INTO held VALUES (1, 0)`;

  const link = await startTcpProxy(url, { raw: true });
  undo.push(() => link.stop());
  const through = new URL(url);
  through.port = new URL(link.url).port;
  const frozen = postgres(through.href, {
    max: 1,
    connection: {
      application_name: 'keygate',
      statement_timeout: 8_000,
      idle_in_transaction_session_timeout: 3_000,
    },
  });
  undo.push(() => frozen.end({ timeout: 0 }));
  const session = await frozen.reserve();
  await session`BEGIN`;
  await session`UPDATE held SET value = 1 WHERE id = 1`;
  // The server has read the statement's first half, and its answer to that is never read.
  link.impair({ swallow: 'toClient' });
  session`SELECT ${'the second half'}::text`.catch(() => {});
  const isStalled = async (): Promise<boolean> => {
    const rows = await observer`
      SELECT 1 FROM pg_stat_activity
      WHERE datname = current_database() AND state = 'active' AND wait_event = 'ClientRead'`;
    return rows.length === 1;
  };
  await eventually(isStalled);

  const database = openDatabase({ address: { kind: 'url', url }, clock: systemClock, log: silentLog });
  undo.push(() => database.close());
  const update = () => database.run((db) => db.execute(sql`UPDATE held SET value = 2 WHERE id = 1`));
  await expect(update()).rejects.toMatchObject({ code: 'UNAVAILABLE' });
  await eventually(async () => expect(await isStalled()).toBe(false));
  await update();
  expect(await observer`SELECT value FROM held`).toEqual([{ value: 2 }]);
});
