/** More connections than a node may have: those that it has are served on, and it can still reach whatever it needs. */
import { once } from 'node:events';
import { Agent, createServer, get } from 'node:http';
import { type AddressInfo, connect as connectTcp } from 'node:net';
import postgres from 'postgres';
import { expect, it, vi } from 'vitest';
import { boundConnections, connectionsMax } from '../../src/gateway/bound-connections.ts';
import { silentLog } from '../../src/lib/log.ts';
import { openFilesMax } from '../../src/lib/open-files.ts';
import { createDatabase } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { gatewayFor, someone, undoAfterEach } from '../support/flow.ts';
import { startGatewayProcess } from '../support/gateway-process.ts';
import { createManualClock } from '../support/manual-clock.ts';

const undo = undoAfterEach();

/** Connections that say nothing. */
async function crowdAt(url: string, count: number) {
  const { hostname, port } = new URL(url);
  let closedCount = 0;
  const sockets = Array.from({ length: count }, () => {
    const socket = connectTcp(Number(port), hostname);
    socket.on('error', () => {});
    socket.on('close', () => {
      closedCount += 1;
    });
    return socket.resume();
  });
  const release = (): void => {
    for (const socket of sockets) socket.destroy();
  };
  undo.push(release);
  return { sockets, closedCount: () => closedCount, release };
}

it('leaves a process the file descriptors that it needs for its store and its health page', async () => {
  const database = await createDatabase();
  undo.push(() => database.drop());
  const through = ['sh', '-c', 'ulimit -n 300 && exec "$@"', 'sh'];
  const gateway = await startGatewayProcess(
    { databaseUrl: database.url },
    { LOG_LEVEL: 'warn' },
    { through },
  );
  undo.push(() => gateway.stop());
  const client = await gateway.connect(someone());
  const crowd = await crowdAt(gateway.url, 400);
  // Of the 300, two thirds are kept for all else, where 256 would be too many.
  await eventually(() => crowd.closedCount() >= 400 - 100 + 1, {
    that: 'what is beyond the bound being closed',
  });

  expect((await fetch(`${gateway.adminUrl}/readyz`)).status).toBe(200);
  const metrics = await (await fetch(`${gateway.adminUrl}/metrics`)).text();
  expect(metrics).toMatch(/keygate_limits_hit_total\{limit="connections"\} \d{3}/);
  // Once, however many there are.
  expect((await gateway.output()).match(/"connectionsMax":100/g)).toHaveLength(1);

  const admin = postgres(database.url, { max: 1 });
  // Of other databases there are other tests' gateways.
  await admin`SELECT pg_terminate_backend(pid) FROM pg_stat_activity
              WHERE datname = current_database() AND application_name = 'keygate'`;
  await admin.end();
  await eventually(async () => (await client.ask('keyStatus', {})).ok, {
    that: 'the store being reached again',
  });

  crowd.release();
  await eventually(
    async () => {
      const another = await gateway.connect(someone()).catch(() => null);
      return (await another?.ask('keyStatus', {}))?.ok ?? false;
    },
    { that: 'another connection being taken' },
  );
});

it('takes back the places of HTTP connections that are kept for a next request', async () => {
  const at = await gatewayFor(undo, { env: { LIMIT_CONNECTIONS: '4' } });
  const agent = new Agent({ keepAlive: true });
  undo.push(() => agent.destroy());
  const { hostname, port } = new URL(at.url);
  const asked = Array.from(
    { length: 4 },
    () =>
      new Promise<void>((resolve, reject) => {
        const request = get({ hostname, port, agent, path: '/api/keys/stats' }, (response) => {
          response.on('end', resolve).resume();
        });
        request.on('error', reject);
      }),
  );
  await Promise.all(asked);
  await eventually(async () => (await at.connect(someone()).catch(() => null)) !== null, {
    that: 'a place for a device',
  });
});

it('keeps the page of health for those who ask for it, whatever crowd there is', async () => {
  const at = await gatewayFor(undo);
  const crowd = await crowdAt(at.adminUrl, 150);
  await eventually(() => crowd.closedCount() >= 150 - 128, { that: 'what is beyond the bound being closed' });
  // Those that came last, at once; the first are cut later, for their silence.
  expect(crowd.sockets.slice(0, 100).filter(({ closed }) => closed)).toEqual([]);
  // Not `fetch`: the first of a process waits for ever where its connection ends while the parser is being loaded.
  const isAlive = () =>
    new Promise<boolean>((resolve) => {
      const request = get(`${at.adminUrl}/livez`, { agent: false }, (response) => {
        resolve(response.resume().statusCode === 200);
      });
      request.on('error', () => resolve(false));
    });
  await eventually(isAlive, { that: 'those who say nothing being cut' });
});

it('holds no more connections than it is told to', async () => {
  const at = await gatewayFor(undo, { env: { LIMIT_CONNECTIONS: '2' } });
  const first = await at.connect(someone());
  const second = await at.connect(someone());
  const crowd = await crowdAt(at.url, 3);
  await eventually(() => crowd.closedCount() === 3, { that: 'all others being closed' });
  await second.call('keyStatus');
  first.close();
  await eventually(async () => (await at.connect(someone()).catch(() => null)) !== null, {
    that: 'room being made',
  });
});

it('makes room at most once in a second, and reports at most once in a minute, while others are dropped', async () => {
  const clock = createManualClock();
  const server = createServer();
  const lines: string[] = [];
  let hits = 0;
  boundConnections(server, {
    max: 1,
    clock,
    log: { ...silentLog, warn: (_, message) => lines.push(message) },
    observer: {
      limitHit() {
        hits += 1;
      },
    },
  });
  const clearings = vi.spyOn(server, 'closeIdleConnections');
  await once(server.listen(0, '127.0.0.1'), 'listening');
  undo.push(() => void server.close());
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  const held = once(server, 'connection');
  const { sockets } = await crowdAt(url, 1);
  const [connection] = await held;
  // In the middle of a request: since Node 26 a connection that has sent nothing makes room as well.
  sockets[0]!.write('GET / HTTP/1.1\r\n');
  await eventually(() => connection.bytesRead > 0, { that: 'half a request being read' });
  const drop = async (): Promise<void> => {
    const dropped = once(server, 'drop');
    await crowdAt(url, 1);
    await dropped;
  };

  await drop();
  await clock.advance(999);
  await drop();
  expect([hits, clearings.mock.calls.length, lines.length]).toEqual([2, 1, 1]);
  await clock.advance(1);
  await drop();
  expect([hits, clearings.mock.calls.length, lines.length]).toEqual([3, 2, 1]);
  await clock.advance(58_999);
  await drop();
  expect([hits, clearings.mock.calls.length, lines.length]).toEqual([4, 3, 1]);
  await clock.advance(1);
  await drop();
  expect([hits, lines.length]).toEqual([5, 2]);
});

it.each([
  ['not bounded', 0, null, null],
  ['bounded by the operator', 5_000, null, 5_000],
  ['bounded by the operator below what the system allows', 5_000, 65_536, 5_000],
  ['bounded by the system', 100_000, 65_536, 65_280],
  ['bounded by a system that allows little', 0, 64, 21],
])('where it is %s', (_, configured, openFiles, expected) => {
  expect(connectionsMax(configured, openFiles)).toBe(expected);
});

it('knows how many files its process may have open', () => {
  expect(openFilesMax()).toBeGreaterThan(0);
});
