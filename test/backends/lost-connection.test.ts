/** What whoever runs the gateway is told where the way to PostgreSQL breaks. */
import { type AddressInfo, createServer } from 'node:net';
import { sql } from 'drizzle-orm';
import postgres from 'postgres';
import { expect, it } from 'vitest';
import { openDatabase } from '../../src/backends/postgres/database.ts';
import { faultOf } from '../../src/command.ts';
import { systemClock } from '../../src/lib/clock.ts';
import { type Log, silentLog } from '../../src/lib/log.ts';
import { createDatabase } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { undoAfterEach } from '../support/flow.ts';
import { startTcpProxy } from '../support/tcp-proxy.ts';

const undo = undoAfterEach();

/** A database that is reached over a link, and what is logged of it. */
async function openLinked() {
  const { url, drop } = await createDatabase();
  undo.push(drop);
  const link = await startTcpProxy(url, { raw: true });
  undo.push(() => link.stop());
  const through = new URL(url);
  through.port = new URL(link.url).port;
  return { url, link, ...openLogged(through.href), place: `127.0.0.1:${through.port}` };
}

function openLogged(url: string) {
  const reasons: unknown[] = [];
  const log: Log = { ...silentLog, warn: ({ reason }) => reasons.push(reason) };
  const database = openDatabase({ address: { kind: 'url', url }, clock: systemClock, log });
  undo.push(() => database.close());
  return { database, reasons };
}

it('a connection that is cut in the midst of a query is named as one', async () => {
  const { url, link, database, reasons, place } = await openLinked();
  const observer = postgres(url, { max: 1, onnotice: () => {} });
  undo.push(() => observer.end());
  await observer`CREATE TABLE held (id int)`;
  await observer`BEGIN`;
  await observer`LOCK TABLE held`;
  const waiting = database.run((db) => db.execute(sql`SELECT 1 FROM held`)).catch(faultOf);
  const other = postgres(url, { max: 1 });
  undo.push(() => other.end());
  await eventually(async () => {
    const found = await other`SELECT 1 FROM pg_stat_activity
                              WHERE datname = current_database() AND wait_event_type = 'Lock'`;
    expect(found).toHaveLength(1);
  });
  link.cut();
  const fault = `PostgreSQL, or what lies before it, ended the connection: write CONNECTION_CLOSED ${place}`;
  expect(await waiting).toBe(fault);
  expect(reasons).toEqual([fault]);
});

it('an address that resets connections, as a proxy before nobody, is named as PostgreSQL’s', async () => {
  const server = createServer((socket) => socket.once('data', () => socket.resetAndDestroy()));
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  undo.push(() => new Promise((resolve) => server.close(resolve)));
  const { port } = server.address() as AddressInfo;
  const { database, reasons } = openLogged(`postgres://127.0.0.1:${port}/test`);
  const fault = 'PostgreSQL, or what lies before it, ended the connection: read ECONNRESET';
  expect(await database.run((db) => db.execute(sql`SELECT 1`)).catch(faultOf)).toBe(fault);
  expect(reasons).toEqual([fault]);
});

it('an address that takes connections and says nothing is named as such', async () => {
  const { link, database, reasons, place } = await openLinked();
  link.impair({ swallow: 'toClient' });
  const fault = `PostgreSQL did not take a connection in time: write CONNECT_TIMEOUT ${place}`;
  expect(await database.run((db) => db.execute(sql`SELECT 1`)).catch(faultOf)).toBe(fault);
  expect(reasons).toEqual([fault]);
});
