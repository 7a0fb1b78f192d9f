/** A gateway that was restored from a backup hands nothing out again: its owner uploads new one-time prekeys only. */
import { randomUUID } from 'node:crypto';
import postgres from 'postgres';
import { afterEach, beforeEach, expect, it } from 'vitest';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import { keygate } from '../support/command-line.ts';
import { createDatabase, redisUrl } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { startGateway, TEST_SECRET, type TestGateway } from '../support/gateway.ts';
import { startTcpProxy, type TcpProxy } from '../support/tcp-proxy.ts';
import { claimSession, closePhones, enrolPhone, type Phone, POOL_LEVEL } from './phone.ts';

let databases: Awaited<ReturnType<typeof createDatabase>>[];
let gateway: TestGateway;
let proxy: TcpProxy;
let bob: DeviceAddress;
let alice: DeviceAddress;

beforeEach(async () => {
  const run = randomUUID().slice(0, 8);
  bob = { userId: `bob-${run}`, deviceId: 1 };
  alice = { userId: `alice-${run}`, deviceId: 1 };
  databases = [await createDatabase()];
  gateway = await startGateway({ databaseUrl: databases[0]!.url, redisUrl: redisUrl() });
  proxy = await startTcpProxy(gateway.url);
});
afterEach(async () => {
  closePhones();
  await proxy.stop();
  await gateway.stop();
  for (const database of databases) await database.drop();
});

async function filled(phone: Phone): Promise<void> {
  await eventually(async () => {
    expect(phone.client.snapshot()).toMatchObject({ state: 'ready', drainProgress: null });
    const { preKeyCount, pqPreKeyCount } = await phone.client.call('keyStatus', {});
    expect([preKeyCount, pqPreKeyCount]).toEqual([POOL_LEVEL, POOL_LEVEL]);
  });
}

/** Goes on with `next`, behind the same address. */
async function serveFrom(databaseUrl: string): Promise<void> {
  proxy.unplug();
  await gateway.stop();
  gateway = await startGateway({ databaseUrl, redisUrl: redisUrl() });
  proxy.retarget(gateway.url);
  proxy.plugIn();
}

/** @returns the URL of a copy; the gateway goes on with the original */
async function backUp(): Promise<string> {
  const original = new URL(databases[0]!.url);
  await gateway.stop();
  proxy.cut();
  const copy = await createDatabase();
  databases.push(copy);
  const sql = postgres(process.env.TEST_DATABASE_URL!, { max: 1, onnotice: () => {} });
  const name = new URL(copy.url).pathname.slice(1);
  await sql.unsafe(`DROP DATABASE ${name}`);
  await sql.unsafe(`CREATE DATABASE ${name} TEMPLATE ${original.pathname.slice(1)}`);
  await sql.end();
  await serveFrom(original.href);
  return copy.url;
}

it.each([
  ['that is started again', { restarts: true, commanded: false }],
  ['that never went away', { restarts: false, commanded: false }],
  ['that never went away, with `keygate restored`', { restarts: false, commanded: true }],
])('no key twice, for an application %s', async (_, { restarts, commanded }) => {
  const phone = await enrolPhone(proxy.url, bob);
  const friend = await enrolPhone(proxy.url, alice);
  await filled(phone);
  await filled(friend);
  const backup = await backUp();
  await filled(phone);
  await filled(friend);

  // What happens now, the backup does not know: claims, and a refill.
  const claimed = new Set<number>();
  const claim = async (): Promise<void> => {
    const { devices } = await friend.client.call('requestBundle', { claimId: randomUUID(), ...bob });
    const keyId = devices[0]!.oneTimePreKey!.keyId;
    expect(claimed).not.toContain(keyId);
    claimed.add(keyId);
  };
  for (let index = 0; index < 5; index++) await claim();
  await claimSession(friend, bob);
  await eventually(() => expect(phone.client.metrics().preKeysRegenerated).toBeGreaterThan(0));
  // The check waits for its turn after the refill.
  await phone.client.checkKeys();
  const offeredBefore = await phone.keys.oneTimePreKeys.ids();

  if (restarts) phone.close();
  if (commanded) {
    const { code, stderr } = await keygate(['restored'], { DATABASE_URL: backup, JWT_SECRET: TEST_SECRET });
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
  }
  await serveFrom(backup);
  if (restarts) {
    await phone.restart();
    expect(await phone.client.start()).toBe('ready');
  }
  await eventually(async () => {
    await filled(phone);
    expect(Math.max(...(await phone.keys.oneTimePreKeys.ids()))).toBeGreaterThan(Math.max(...offeredBefore));
  });
  // Twice more through the path: what was offered before the restore stays out of the pool.
  for (let round = 0; round < 2; round++) {
    await phone.restart();
    await phone.client.start();
    await filled(phone);
  }
  await eventually(() => expect(friend.client.state).toBe('ready'));
  for (let index = 0; index < POOL_LEVEL; index++) await claim();

  // A session that was begun before the restore still works: the private half was kept.
  await friend.say(bob.userId, 'from before');
  await eventually(() => expect(phone.shown.map((line) => line.split(': ')[1])).toEqual(['from before']));
  expect(phone.client.metrics()).toMatchObject({ decryptionFailures: 0, resets: [] });
});
