/** PgBouncer between gateways and PostgreSQL: exact where it is set up for them, and refused in a sentence where not. */
import { randomBytes, randomUUID } from 'node:crypto';
import postgres from 'postgres';
import { beforeEach, describe, expect, it } from 'vitest';
import { HOT_PLAN_SETTINGS, SETTINGS } from '../../src/backends/postgres/settings.ts';
import { keygate } from '../support/command-line.ts';
import { createDatabase } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { undoAfterEach } from '../support/flow.ts';
import { contents, enrol, open, send, startGateway, TEST_SECRET } from '../support/gateway.ts';
import { startPooler } from '../support/pooler.ts';

const NOTHING_SET = '?prepare=false';
/** What PgBouncer refuses until somebody tells it to look away. */
const LEFT_OUT = Object.keys({ ...SETTINGS, ...HOT_PLAN_SETTINGS });
const SESSION_ENDS_WITHIN_MS = 10_000;
const undo = undoAfterEach();
/** The database's own URL, of a role that owns it. */
let url: string;
let admin: postgres.Sql;

beforeEach(async () => {
  const database = await createDatabase();
  undo.push(() => database.drop());
  admin = postgres(database.url, { max: 1, onnotice: () => {} });
  const role = `pooled_${randomBytes(6).toString('hex')}`;
  await admin.unsafe(`CREATE ROLE ${role} LOGIN; ALTER DATABASE ${admin.options.database} OWNER TO ${role}`);
  undo.push(async () => {
    await admin.unsafe(`REASSIGN OWNED BY ${role} TO CURRENT_USER; DROP OWNED BY ${role}; DROP ROLE ${role}`);
    await admin.end();
  });
  url = Object.assign(new URL(database.url), { username: role }).href;
});

async function pooled(settings: Record<string, string> = {}): Promise<string> {
  const pooler = await startPooler(url, settings);
  undo.push(() => pooler.stop());
  return pooler.url;
}

async function gatewayAt(databaseUrl: string) {
  const gateway = await startGateway({ databaseUrl });
  undo.push(() => gateway.stop());
  return gateway;
}

const refusalOf = (databaseUrl: string): Promise<string> =>
  gatewayAt(databaseUrl).then(
    () => 'it started',
    (error: Error) => error.message,
  );

const doctor = (databaseUrl: string) =>
  keygate(['doctor'], { DATABASE_URL: databaseUrl, JWT_SECRET: TEST_SECRET });

/** What a gateway asks for, as it asks for it. */
async function setUpRole(databaseUrl: string): Promise<void> {
  const commands = (await refusalOf(databaseUrl)).match(/ALTER ROLE [^;]+/g) ?? [];
  expect(commands.map((command) => command.replace(/.* SET (\w+) .*/, '$1')).sort()).toEqual([
    'idle_in_transaction_session_timeout',
    'statement_timeout',
  ]);
  for (const command of commands) await admin.unsafe(command);
  await endSessions();
}

/** Sessions that PgBouncer has opened keep what their role had. It may hand out one that is told to end, until it has. */
async function endSessions(): Promise<void> {
  await admin`SELECT pg_terminate_backend(pid, ${SESSION_ENDS_WITHIN_MS}) FROM pg_stat_activity
              WHERE datname = current_database() AND pid <> pg_backend_pid()`;
}

describe('in transaction mode, where nothing is prepared', () => {
  it('keys are claimed once, and messages arrive in their order, over two sessions', async () => {
    const through = (await pooled()) + NOTHING_SET;
    await setUpRole(through);
    const gateways = [await gatewayAt(through), await gatewayAt(through)];
    const bob = await enrol(gateways[0]!, { userId: 'bob', deviceId: 1 }, { oneTimePreKeys: 30 });
    await open(bob);
    const others = await Promise.all(
      Array.from({ length: 8 }, (_, nth) =>
        enrol(gateways[nth % 2]!, { userId: `other-${nth}`, deviceId: 1 }, { oneTimePreKeys: 1 }),
      ),
    );
    const bundles = await Promise.all(
      Array.from({ length: 40 }, (_, nth) =>
        others[nth % 8]!.client.call('requestBundle', { claimId: randomUUID(), userId: 'bob' }),
      ),
    );
    const keyIds = bundles.map(({ devices }) => devices[0]!.oneTimePreKey?.keyId);
    const spent = keyIds.filter((keyId) => keyId !== undefined);
    expect({ spent: new Set(spent).size, none: keyIds.length - spent.length }).toEqual({
      spent: 30,
      none: 10,
    });

    const texts = Array.from({ length: 20 }, (_, nth) => `message ${nth}`);
    for (const text of texts) await send(others[0]!.client, bob, text);
    await eventually(() => expect(contents(bob.client)).toEqual(texts));
  });

  it('a role that lacks what nobody sets for it is refused with what to do, and the doctor says the same', async () => {
    const through = (await pooled()) + NOTHING_SET;
    await setUpRole(through);
    const role = new URL(url).username;
    await admin.unsafe(`ALTER ROLE ${role} SET bytea_output = 'escape'`);
    await admin.unsafe(`ALTER ROLE ${role} SET synchronous_commit = 'off'`);
    await endSessions();
    const refusal = await refusalOf(through);
    expect(refusal).toMatch(
      /^what connections do not set the role must have: .*; then RECONNECT in the pooler, if there is one$/,
    );
    expect(refusal.match(/SET \w+ = '\w+'/g)?.sort()).toEqual([
      "SET bytea_output = 'hex'",
      "SET synchronous_commit = 'on'",
    ]);
    const { code, stdout } = await doctor(through);
    expect({ code, says: stdout.includes(refusal) }).toEqual({ code: 1, says: true });
  });
});

it('a parameter of DATABASE_URL that the pooler does not take is named, with where it belongs', async () => {
  expect(await refusalOf(`${await pooled()}${NOTHING_SET}&search_path=public`)).toMatch(
    /unsupported startup parameter: search_path\): take the parameter out of it, and give it to the role$/,
  );
});

describe('where statements would be prepared', () => {
  it('is refused for a pooler that takes no settings', async () => {
    const through = await pooled();
    const advice =
      /^what a connection sets does not reach PostgreSQL: a pooler answers at DATABASE_URL \(unsupported startup parameter.*\): add \?prepare=false to it$/;
    expect(await refusalOf(through)).toMatch(advice);
    expect((await doctor(through)).stdout).toContain('add ?prepare=false to it');
  });

  it('is refused for one that leaves them out', async () => {
    const through = await pooled({ ignore_startup_parameters: LEFT_OUT.join(',') });
    expect(await refusalOf(through)).toBe(
      'what a connection sets does not reach PostgreSQL: a pooler answers at DATABASE_URL and leaves it out: add ?prepare=false to it',
    );
  });
});
