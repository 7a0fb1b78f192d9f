/** The operators' commands, as they are run, on a store that a gateway serves at the same time. */
import { existsSync, readFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer } from 'node:http';
import { type AddressInfo, createServer as createTcpServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import postgres from 'postgres';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { environment } from '../src/config/environment.ts';
import { operatorCommands } from '../src/operate.ts';
import { keygate } from './support/command-line.ts';
import { createDatabase, redisUrl } from './support/engines.ts';
import { stopMoving } from './support/flow.ts';
import { enrol, open, send, startGateway, TEST_SECRET, type TestGateway } from './support/gateway.ts';
import { startGatewayProcess } from './support/gateway-process.ts';
import { createManualClock } from './support/manual-clock.ts';

const ALICE = { userId: 'alice', deviceId: 1 };
const BOB = { userId: 'bob', deviceId: 1 };
const DAY_MS = 86_400_000;
const migrationCount = JSON.parse(readFileSync('drizzle/meta/_journal.json', 'utf8')).entries
  .length as number;
const clock = createManualClock();
let gateway: TestGateway;
let env: NodeJS.ProcessEnv;

beforeAll(async () => {
  // Its clock stands still: what is due is left to the command to sweep.
  gateway = await startGateway({ clock });
  env = { DATABASE_URL: gateway.databaseUrl, JWT_SECRET: TEST_SECRET };
  const alice = await enrol(gateway, ALICE);
  const bob = await enrol(gateway, BOB);
  await open(alice);
  for (let index = 0; index < 3; index++) {
    await alice.client.call('requestBundle', {
      claimId: `00000000-0000-4000-8000-00000000000${index}`,
      ...BOB,
    });
  }
  await send(alice.client, bob, 'waits');
  await bob.client.call('rotateSignedPreKey', { signedPreKey: bob.device.newSignedPreKey() });
  // What comes back to her stays in the store.
  alice.client.close();
});
afterAll(() => stopMoving(gateway, clock));

async function json(args: string[], more: NodeJS.ProcessEnv = {}): Promise<Record<string, unknown>> {
  const { code, stdout, stderr } = await keygate([...args, '--json'], { ...env, ...more });
  expect({ args, code, stderr }).toEqual({ args, code: 0, stderr: '' });
  return JSON.parse(stdout);
}

it('tells how each is used, and that each speaks JSON too', () => {
  for (const [name, { help, options, summary }] of Object.entries(operatorCommands)) {
    expect(help).toMatch(new RegExp(`^Usage: keygate ${name} `));
    expect(summary).not.toBe('');
    for (const option of Object.keys(options)) expect(help, name).toContain(`--${option}`);
    expect(Object.keys(options)).toContain('json');
  }
});

describe('keygate stats', () => {
  it('counts the whole store', async () => {
    expect(await json(['stats'])).toEqual({
      deviceCount: 2,
      deviceWithKeysCount: 2,
      ec: { total: 20, available: 17, consumed: 3 },
      pq: { total: 10, available: 7, consumed: 3 },
      pendingCount: 1,
    });
    const { stdout } = await keygate(['stats'], env);
    expect(stdout).toContain('one-time prekeys    20 in all, 17 available, 3 consumed');
  });

  it('counts one device, and tells what is known of its gate', async () => {
    expect(await json(['stats', '--user', 'bob', '--device', '1'])).toMatchObject({
      userId: 'bob',
      ec: { total: 10, available: 7, consumed: 3 },
      pendingCount: 1,
      keyVersion: 2,
      gate: 'never opened',
      lastUpdated: expect.stringMatching(/^20\d\d-/),
    });
    const alice = await json(['stats', '--user', 'alice', '--device', '1']);
    expect(alice.gate).toMatch(/^last found open 20\d\d-\S+Z$/);
    expect(await keygate(['stats', '--user', 'nobody', '--device', '1'], env)).toEqual({
      code: 1,
      stdout: '',
      stderr: 'keygate: nobody.1 is unknown: it has never uploaded keys\n',
    });
    expect((await keygate(['stats', '--user', 'bob'], env)).code).toBe(2);
  });
});

describe('keygate sweep', () => {
  it('counts with --dry-run what is due, and changes nothing; then it is swept, and ids stay used', async () => {
    const sql = postgres(gateway.databaseUrl, { max: 1, onnotice: () => {} });
    const longAgo = new Date(Date.now() - 40 * DAY_MS);
    await sql`UPDATE prekey_claims SET claimed_at = ${longAgo}`;
    await sql`UPDATE signed_prekeys SET replaced_at = ${longAgo} WHERE replaced_at IS NOT NULL`;
    await sql`UPDATE messages SET expires_at = ${longAgo}`;
    const due = {
      claimCount: 3,
      signedPreKeyCount: 1,
      expiredMessageCount: 1,
      rememberedMessageCount: 0,
      idleDeviceCount: 0,
    };
    expect(await json(['sweep', '--dry-run'])).toEqual(due);
    expect(await json(['sweep', '--dry-run'])).toEqual(due);
    expect(await json(['sweep'])).toEqual({ keyRowCount: 4, messageRowCount: 1, idleDeviceCount: 0 });
    expect(await json(['sweep', '--dry-run'])).toMatchObject({ claimCount: 0, expiredMessageCount: 0 });
    expect((await sql`SELECT 1 FROM prekey_claims`).length).toBe(0);
    expect(await sql`SELECT ids::text FROM used_prekey_ids WHERE NOT signed ORDER BY kind`).toMatchObject([
      { ids: '{[1,4)}' },
      { ids: expect.stringMatching(/^\{\[\d,\d\)\}$/) },
    ]);
    expect(await sql`SELECT bounce_reason FROM messages`).toEqual([{ bounce_reason: 'EXPIRED' }]);
    await sql.end();
  });

  const idler = { userId: 'idler', deviceId: 1 };
  const idleCount = async (args: readonly string[], days: string): Promise<unknown> =>
    (await json(['sweep', ...args], { IDLE_DEVICE_RETENTION_DAYS: days })).idleDeviceCount;

  it('counts idle devices where it is told after which time they are', async () => {
    await enrol(gateway, idler);
    const sql = postgres(gateway.databaseUrl, { max: 1, onnotice: () => {} });
    const longAgo = new Date(Date.now() - 40 * DAY_MS);
    await sql`UPDATE devices SET updated_at = ${longAgo} WHERE user_id = ${idler.userId}`;
    await sql.end();
    for (const [days, count] of Object.entries({ 0: 0, 41: 0, 39: 1 })) {
      expect(await idleCount(['--dry-run'], days), `${days} days`).toBe(count);
    }
    expect(await json(['sweep'])).toMatchObject({ idleDeviceCount: 0 });
  });

  it('takes the keys of those that it counted, and of no others', async () => {
    expect(await idleCount([], '39')).toBe(1);
    expect(await idleCount(['--dry-run'], '39')).toBe(0);
    expect(await json(['stats', '--user', 'idler', '--device', '1'])).toMatchObject({ hasKeys: false });
    expect(await json(['stats', '--user', 'alice', '--device', '1'])).toMatchObject({ hasKeys: true });
  });
});

describe('keygate doctor', () => {
  it('finds everything good', async () => {
    const { good, findings } = await json(['doctor'], { REDIS_URL: redisUrl() });
    expect(good).toBe(true);
    expect(findings).toHaveLength(5);
    const { stdout } = await keygate(['doctor'], env);
    expect(stdout).toContain('good  postgres  the schema is in step\n');
    expect(stdout).toContain('good  redis     not configured: one node\n');
  });

  it('makes no embedded store, and leaves one alone that a gateway runs on', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'keygate-doctor-'));
    const at = join(folder, 'data');
    const { code, stdout } = await keygate(['doctor'], { DATA_DIR: at });
    expect({ code, stdout }).toEqual({
      code: 0,
      stdout: expect.stringContaining('the first start makes it'),
    });
    expect(existsSync(join(at, 'postgres'))).toBe(false);
    const running = await startGatewayProcess({ dataDir: at });
    const beside = await keygate(['doctor'], { DATA_DIR: at });
    expect(beside).toMatchObject({ code: 0, stdout: expect.stringContaining('a gateway runs on it') });
    await running.stop();
    await rm(folder, { recursive: true, force: true });
  });

  it('names every fault at once, and ends with 1', async () => {
    const empty = await createDatabase();
    const keySet = createServer((_, response) => response.writeHead(404).end());
    await new Promise<void>((resolve) => keySet.listen(0, '127.0.0.1', resolve));
    const { port } = keySet.address() as AddressInfo;
    const { code, stdout } = await keygate(['doctor', '--json'], {
      DATABASE_URL: empty.url,
      REDIS_URL: 'redis://127.0.0.1:1',
      JWT_JWKS_URL: `http://127.0.0.1:${port}/keys`,
    });
    expect(code).toBe(1);
    const { good, findings } = JSON.parse(stdout) as { good: boolean; findings: { good: boolean }[] };
    expect({ good, faults: findings.filter((finding) => !finding.good) }).toEqual({
      good: false,
      faults: [
        {
          what: 'postgres',
          good: false,
          found: `${migrationCount} migrations are missing: run keygate migrate`,
        },
        { what: 'redis', good: false, found: 'no connection to Redis: connect ECONNREFUSED 127.0.0.1:1' },
        { what: 'tokens', good: false, found: 'JWT_JWKS_URL answers 404 with 0 keys' },
      ],
    });
    const { code: refused, stderr } = await keygate(['stats'], { ...env, DATABASE_URL: empty.url });
    expect(refused).toBe(1);
    expect(stderr).toContain(`the schema is ${migrationCount} migrations behind: run keygate migrate`);
    keySet.close();
    await empty.drop();
  });

  it('tells of a key server that hangs up', async () => {
    const keySet = createTcpServer((socket) => socket.end());
    await new Promise<void>((resolve) => keySet.listen(0, '127.0.0.1', resolve));
    const { port } = keySet.address() as AddressInfo;
    const { code, stdout } = await keygate(['doctor'], {
      ...env,
      JWT_SECRET: '',
      JWT_JWKS_URL: `http://127.0.0.1:${port}/keys`,
    });
    expect({ code, stdout }).toMatchObject({
      code: 1,
      stdout: expect.stringContaining('BAD   tokens'),
    });
    keySet.close();
  });
});

it('works on the store without a key to verify tokens by', async () => {
  const { JWT_SECRET, ...others } = env;
  const keyless = { ...others, JWT_ALGORITHMS: 'ES256' };
  const device = ['--user', 'nobody', '--device', '1'];
  for (const args of [['migrate'], ['stats'], ['sweep', '--dry-run'], ['revoke', ...device]]) {
    expect(await keygate(args, keyless), args[0]).toMatchObject({ code: 0, stderr: '' });
  }
  expect(await keygate(['check-config'], keyless)).toMatchObject({
    code: 1,
    stderr: expect.stringContaining('one of JWT_SECRET, JWT_PUBLIC_KEY, JWT_JWKS_URL must be set'),
  });
});

it('keygate revoke revokes also where the gateways can’t be told, and says so', async () => {
  const args = ['revoke', '--user', 'lost', '--device', '1'];
  const { code, stdout } = await keygate(args, { ...env, REDIS_URL: new URL('/99', redisUrl()).href });
  expect(code).toBe(0);
  expect(stdout).toMatch(/^device 1 of lost is revoked: /);
  expect(stdout).toContain(
    'could not be told (Redis refuses database 99 of REDIS_URL: ERR DB index is out of range)',
  );
  const sql = postgres(gateway.databaseUrl, { max: 1, onnotice: () => {} });
  expect(
    await sql`SELECT 1 FROM devices WHERE user_id = 'lost' AND device_id = 1 AND revoked_at IS NOT NULL`,
  ).toHaveLength(1);
  await sql.end();
});

/** A process whose clock is behind by so much. */
function behind(ms: number): Record<string, string> {
  return {
    NODE_OPTIONS: `--import=data:text/javascript,globalThis.real=Date.now;Date.now=()=>real()-${ms}`,
  };
}

it('keygate revoke ends every token issued until now, also where this machine’s clock is behind', async () => {
  const before = Date.now();
  const args = ['revoke', '--user', 'behind', '--device', '1', '--json'];
  const { stdout } = await keygate(args, { ...env, ...behind(120_000) });
  expect(Date.parse(JSON.parse(stdout).revokedAt)).toBeGreaterThanOrEqual(before);
});

it.each(['sweep', 'restored'])('keygate %s does nothing by a clock that is wrong', async (command) => {
  const { code, stderr } = await keygate([command], { ...env, ...behind(600_000) });
  expect(code).toBe(1);
  // And by as long as PostgreSQL took to be asked.
  expect(stderr).toMatch(/^keygate: the clock of this machine differs by -60\d s from that of PostgreSQL\n$/);
});

it.each([['stats'], ['sweep'], ['restored'], ['revoke', '--user', 'alice', '--device', '1']])(
  'keygate %s makes no store where there is none: the folder was mistaken',
  async (...args) => {
    const dataDir = join(await mkdtemp(join(tmpdir(), 'keygate-empty-')), 'data');
    const { code, stdout, stderr } = await keygate(args, { DATA_DIR: dataDir });
    expect({ code, stdout }).toEqual({ code: 1, stdout: '' });
    expect(stderr).toContain(
      `there is no store in ${dataDir}: DATA_DIR, or DATABASE_URL, must be that of the gateway`,
    );
    expect(existsSync(dataDir)).toBe(false);
    await rm(join(dataDir, '..'), { recursive: true });
  },
);

it('keygate config-reference lists every variable', async () => {
  const { stdout } = await keygate(['config-reference'], {});
  for (const name of Object.keys(environment.shape)) expect(stdout).toContain(`| \`${name}\` |`);
});
