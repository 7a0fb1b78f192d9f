/** An upgrade without downtime: nodes of the version before go on beside new ones, on the schema of the new ones. */
import { randomBytes, randomUUID } from 'node:crypto';
import { cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { drizzle } from 'drizzle-orm/postgres-js';
import { migrate } from 'drizzle-orm/postgres-js/migrator';
import postgres from 'postgres';
import { describe, expect, it } from 'vitest';
import { openDatabase } from '../../src/backends/postgres/database.ts';
import { createKeyStore } from '../../src/backends/postgres/key-store.ts';
import { createMessageStore } from '../../src/backends/postgres/message-store.ts';
import { migrateDatabase, missingMigrations } from '../../src/backends/postgres/migrations.ts';
import { systemClock } from '../../src/lib/clock.ts';
import { silentLog } from '../../src/lib/log.ts';
import { reasonOf } from '../../src/lib/reason.ts';
import { GatewayError } from '../../src/protocol/errors.ts';
import { createDatabase } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { undoAfterEach } from '../support/flow.ts';
import { contents, enrol, open, send, startGateway } from '../support/gateway.ts';
import { SignalDevice } from '../support/libsignal-device.ts';

const undo = undoAfterEach();
const ALICE = { userId: 'alice', deviceId: 1 };
const OLD = { userId: 'of-the-old-node', deviceId: 1 };

interface Journal {
  entries: { idx: number; tag: string; when: number }[];
}

interface Snapshot {
  tables: Record<
    string,
    {
      name: string;
      columns: Record<string, { type: string; notNull: boolean; default?: unknown; identity?: unknown }>;
    }
  >;
}

const journal = JSON.parse(await readFile('drizzle/meta/_journal.json', 'utf8')) as Journal;
const snapshots = await Promise.all(
  journal.entries.map(
    async ({ idx }) =>
      JSON.parse(
        await readFile(`drizzle/meta/${String(idx).padStart(4, '0')}_snapshot.json`, 'utf8'),
      ) as Snapshot,
  ),
);

async function emptyDatabase(): Promise<string> {
  const { url, drop } = await createDatabase();
  undo.push(drop);
  return url;
}

/** The schema as it was before a migration, by default before the newest. */
async function migrateBefore(databaseUrl: string, tag = journal.entries.at(-1)!.tag): Promise<void> {
  const folder = await mkdtemp(join(tmpdir(), 'keygate-migrations-'));
  await cp('drizzle', folder, { recursive: true });
  const at = journal.entries.findIndex((entry) => entry.tag === tag);
  const before: Journal = { ...journal, entries: journal.entries.slice(0, at) };
  await writeFile(join(folder, 'meta/_journal.json'), JSON.stringify(before));
  const sql = postgres(databaseUrl, { max: 1, onnotice: () => {} });
  await migrate(drizzle(sql), { migrationsFolder: folder });
  await sql.end();
  await rm(folder, { recursive: true });
}

describe('migrations', () => {
  it('only add: what a statement of the version before names stays as it was', () => {
    expect(snapshots.length).toBeGreaterThan(2);
    for (const [index, before] of snapshots.slice(0, -1).entries()) {
      const after = snapshots[index + 1]!;
      for (const [name, table] of Object.entries(before.tables)) {
        const now = after.tables[name];
        expect(Object.keys(after.tables)).toContain(name);
        for (const [column, { type }] of Object.entries(table.columns)) {
          // A collation changes no value. What it does to prepared statements, 0008's own test below has.
          expect(now!.columns[column]!.type.replace(' COLLATE "C"', ''), `${name}.${column}`).toBe(
            type.replace(' COLLATE "C"', ''),
          );
        }
        for (const [column, { notNull, default: byDefault, identity }] of Object.entries(now!.columns)) {
          const isFilled = !notNull || byDefault !== undefined || identity !== undefined;
          // What an insert of the version before leaves out has a value all the same.
          if (table.columns[column]?.notNull !== true) expect(isFilled, `${name}.${column}`).toBe(true);
        }
      }
    }
  });

  it('are applied once, by however many nodes at once', async () => {
    const url = await emptyDatabase();
    await Promise.all(Array.from({ length: 5 }, () => migrateDatabase({ kind: 'url', url })));
    const sql = postgres(url, { max: 1 });
    const applied = await sql`SELECT created_at::float8 AS at FROM drizzle.__drizzle_migrations ORDER BY id`;
    expect(applied.map(({ at }) => at)).toEqual(journal.entries.map(({ when }) => when));
    await sql.end();
  });

  it('do not wait for ever for a node that has stopped in the midst of them, and change nothing then', async () => {
    const url = await emptyDatabase();
    await migrateBefore(url, '0006_idle_devices');
    const sql = postgres(url, { max: 2, onnotice: () => {} });
    await sql.begin(async (tx) => {
      await tx`LOCK TABLE devices IN ACCESS SHARE MODE`;
      await expect(migrateDatabase({ kind: 'url', url }, { waitMaxMs: 100 })).rejects.toThrow(
        'could not be brought up to date within 1 s: another node is migrating, or something holds a table',
      );
    });
    const [{ count } = { count: 0 }] = await sql<{ count: number }[]>`
      SELECT count(*)::int4 AS count FROM drizzle.__drizzle_migrations`;
    expect(count).toBe(6);
    // As behind a pooler: nothing is prepared, and nothing is left of a session's.
    await migrateDatabase({ kind: 'url', url: `${url}?prepare=false` });
    // Other tests' databases lie on the same server.
    const left = await sql`
      SELECT 1 FROM pg_locks
      WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`;
    expect(left).toHaveLength(0);
    await sql.end();
  });

  it('say that PostgreSQL is read-only where it is, as a standby', async () => {
    const url = await emptyDatabase();
    const sql = postgres(url, { max: 1, onnotice: () => {} });
    await sql.unsafe(
      `ALTER DATABASE ${new URL(url).pathname.slice(1)} SET default_transaction_read_only = on`,
    );
    await expect(migrateDatabase({ kind: 'url', url })).rejects.toThrow('PostgreSQL is read-only');
    await sql.end();
  });

  it('need no right to change the schema where none is missing, and say who must run them where one is', async () => {
    const url = await emptyDatabase();
    const sql = postgres(url, { max: 1, onnotice: () => {} });
    const role = `server_${randomBytes(6).toString('hex')}`;
    await sql.unsafe(`CREATE ROLE ${role} LOGIN`);
    undo.push(async () => {
      await sql.unsafe(`DROP OWNED BY ${role}; DROP ROLE ${role}`);
      await sql.end();
    });
    const databaseUrl = Object.assign(new URL(url), { username: role }).href;
    await expect(migrateDatabase({ kind: 'url', url: databaseUrl })).rejects.toThrow(
      /this role may not bring the schema up to date, or not see that it is \(permission denied .*\): run keygate migrate/,
    );
    await migrateDatabase({ kind: 'url', url });
    for (const right of [
      'SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public',
      'USAGE ON ALL SEQUENCES IN SCHEMA public',
      'USAGE ON SCHEMA drizzle',
      'SELECT ON ALL TABLES IN SCHEMA drizzle',
    ])
      await sql.unsafe(`GRANT ${right} TO ${role}`);

    // What the role still lacks, it is told at the start and not by every request.
    await sql.unsafe(
      `REVOKE INSERT, DELETE ON messages FROM ${role}; REVOKE USAGE ON SEQUENCE connection_fence FROM ${role}`,
    );
    await expect(startGateway({ databaseUrl })).rejects.toThrow(
      'this role has not been granted INSERT on messages, DELETE on messages, USAGE on connection_fence',
    );
    await sql.unsafe(
      `GRANT INSERT, DELETE ON messages TO ${role}; GRANT USAGE ON SEQUENCE connection_fence TO ${role}`,
    );
    await sql.unsafe(`ALTER ROLE ${role} SET search_path = elsewhere`);
    await expect(startGateway({ databaseUrl })).rejects.toThrow(
      'this role sees no tables or sequences of Keygate: its search_path leaves out their schema',
    );
    await sql.unsafe(`ALTER ROLE ${role} RESET search_path`);
    // What a connection can't set, since only PostgreSQL 17 and later know it.
    const [late] = await sql`SELECT 1 FROM pg_settings WHERE name = 'transaction_timeout'`;
    if (late !== undefined) {
      await sql.unsafe(`ALTER ROLE ${role} SET transaction_timeout = '2s'`);
      await expect(startGateway({ databaseUrl })).rejects.toThrow(
        new RegExp(`ALTER ROLE ${role} IN DATABASE \\w+ SET transaction_timeout = '0'`),
      );
      await sql.unsafe(`ALTER ROLE ${role} RESET transaction_timeout`);
    }
    // Rights in bulk are rights.
    await sql.unsafe(
      `REVOKE USAGE ON SEQUENCE connection_fence FROM ${role}; GRANT UPDATE ON SEQUENCE connection_fence TO ${role}`,
    );

    const gateway = await startGateway({ databaseUrl });
    undo.push(() => gateway.stop());
    const [alice, bob] = [await enrol(gateway, ALICE), await enrol(gateway, { userId: 'bob', deviceId: 1 })];
    await open(alice);
    await bob.client.call('requestBundle', { claimId: randomUUID(), userId: 'alice' });
    await send(bob.client, alice, 'hello');
    await eventually(() => expect(contents(alice.client)).toEqual(['hello']));
    await alice.client.call('resetKeys');

    // To a gateway that runs it is no reason to send its clients elsewhere.
    await sql.unsafe(`REVOKE DELETE ON messages FROM ${role}`);
    const ready = await fetch(`${gateway.adminUrl}/readyz`);
    expect({ status: ready.status, body: await ready.json() }).toMatchObject({
      status: 200,
      body: {
        status: 'degraded',
        parts: { postgres: 'ok', postgresSetup: 'this role has not been granted DELETE on messages' },
      },
    });
  });

  it('take longer than any other statement of their role may', async () => {
    const url = await emptyDatabase();
    const sql = postgres(url, { max: 2, onnotice: () => {} });
    // Both of its connections are from before.
    await Promise.all([sql`SELECT 1`, sql`SELECT 1`]);
    const timeouts = await sql<{ name: string }[]>`
      SELECT name FROM pg_settings WHERE name IN ('statement_timeout', 'transaction_timeout')`;
    for (const { name } of timeouts) {
      await sql.unsafe(`ALTER DATABASE ${sql.options.database} SET ${name} = '1s'`);
    }
    let migrating: Promise<void> | undefined;
    await sql.begin(async (tx) => {
      await tx`SELECT pg_advisory_xact_lock(7217903411)`;
      migrating = migrateDatabase({ kind: 'url', url });
      const hasOutlivedThem = async (): Promise<boolean> =>
        (
          await sql`SELECT 1 FROM pg_stat_activity
                    WHERE datname = current_database() AND application_name = 'keygate migrate'
                      AND wait_event_type = 'Lock' AND clock_timestamp() - xact_start > interval '1.2 seconds'`
        ).length > 0;
      await Promise.race([migrating, eventually(hasOutlivedThem)]);
    });
    await migrating;
    await sql.end();
  });

  it('stand in nobody’s way while a table is held, and are applied when it is free', async () => {
    const url = await emptyDatabase();
    await migrateBefore(url, '0006_idle_devices');
    const sql = postgres(url, { max: 2, onnotice: () => {} });
    const waiting = async (): Promise<number> =>
      (
        await sql`SELECT 1 FROM pg_stat_activity
                  WHERE datname = current_database() AND wait_event_type = 'Lock'`
      ).length;
    let migrating: Promise<void> | undefined;
    await sql.begin(async (tx) => {
      await tx`LOCK TABLE devices IN ACCESS SHARE MODE`;
      migrating = migrateDatabase({ kind: 'url', url }, { pauseMs: 500 });
      await eventually(async () => expect(await waiting()).toBe(1));
      // It gives up its place, so that whoever waits behind it goes on.
      await eventually(async () => expect(await waiting()).toBe(0));
    });
    await migrating;
    const applied = await sql`SELECT created_at::float8 AS at FROM drizzle.__drizzle_migrations ORDER BY id`;
    expect(applied.map(({ at }) => at)).toEqual(journal.entries.map(({ when }) => when));
    await sql.end();
  });

  it('leave no statement behind that a running gateway has prepared: each gets its own rows, or is asked again', async () => {
    const url = await emptyDatabase();
    await migrateBefore(url, '0008_text_in_byte_order');
    const sql = postgres(url, { max: 1, onnotice: () => {} });
    undo.push(() => sql.end());
    await sql`
      INSERT INTO devices (user_id, device_id, registration_id, identity_key, key_version, fence, revoked_at)
      SELECT 'of-' || n, 1, 7, '\\x01', n, n, now() FROM generate_series(1, 20) n`;
    const database = openDatabase({ address: { kind: 'url', url }, clock: systemClock, log: silentLog });
    undo.push(() => database.close());
    const store = createMessageStore(database);
    const ask = async (n: number): Promise<unknown> => {
      const device = { userId: `of-${n}`, deviceId: 1 };
      const page = { nowMs: systemClock.nowMs(), inFlight: [], envelopesMax: 10, bytesMax: 1_000 };
      const [proof, read, revoked] = await Promise.all([
        store.prove(device),
        store.read({ device, fence: n }, page),
        store.revokedSince(0, 100),
      ]);
      return [proof!.keyVersion, read!.proof.keyVersion, read!.envelopes, revoked.length];
    };
    // On every connection of the pool.
    const askAll = () => Promise.all(Array.from({ length: 20 }, (_, nth) => ask(nth + 1)));
    const right = Array.from({ length: 20 }, (_, nth) => [nth + 1, nth + 1, [], 20]);
    expect(await askAll()).toEqual(right);
    await migrateDatabase({ kind: 'url', url });
    await eventually(async () => {
      const answers = await askAll().catch((error: unknown) => {
        if (error instanceof GatewayError && error.code === 'UNAVAILABLE') return null;
        throw error;
      });
      if (answers !== null) expect(answers).toEqual(right);
      return answers !== null;
    });
  });

  it('change nothing where the role may not end the connections of running gateways, and say so', async () => {
    const url = await emptyDatabase();
    const sql = postgres(url, { max: 1, onnotice: () => {} });
    const role = `owner_${randomBytes(6).toString('hex')}`;
    await sql.unsafe(`CREATE ROLE ${role} LOGIN`);
    undo.push(async () => {
      await sql.unsafe(`REASSIGN OWNED BY ${role} TO CURRENT_USER; DROP OWNED BY ${role}; DROP ROLE ${role}`);
      await sql.end();
    });
    await sql.unsafe(`ALTER DATABASE ${sql.options.database} OWNER TO ${role}`);
    const ownerUrl = Object.assign(new URL(url), { username: role }).href;
    await migrateBefore(ownerUrl, '0008_text_in_byte_order');
    // A gateway of a role that this one may do nothing to.
    const database = openDatabase({ address: { kind: 'url', url }, clock: systemClock, log: silentLog });
    await createMessageStore(database).prove(ALICE);
    const migrating = (): Promise<void> => migrateDatabase({ kind: 'url', url: ownerUrl });
    const refusal = await migrating().then(() => '', reasonOf);
    expect(refusal).toContain('gateways are running whose connections this role may not end');
    expect(await missingMigrations(database)).toBe(1);
    await database.close();
    await eventually(() =>
      migrating().then(
        () => true,
        () => false,
      ),
    );
  });

  it('count the devices that are there as used at the upgrade: when they were served last is unknown', async () => {
    const url = await emptyDatabase();
    await migrateBefore(url, '0006_idle_devices');
    const sql = postgres(url, { max: 1, onnotice: () => {} });
    await sql`
      INSERT INTO devices (user_id, device_id, registration_id, identity_key, updated_at)
      VALUES ('of-old', 1, 7, '\\x01', now() - interval '3 years')`;
    await migrateDatabase({ kind: 'url', url });
    const database = openDatabase({ address: { kind: 'url', url }, clock: systemClock, log: silentLog });
    undo.push(() => database.close());
    const idle = async () => {
      const idleBeforeMs = systemClock.nowMs() - 86_400_000;
      return (await createKeyStore(database).findIdle({ idleBeforeMs, after: null, limit: 10 })).idle;
    };
    expect(await idle()).toEqual([]);
    await sql`UPDATE devices SET served_at = served_at - interval '2 days'`;
    expect(await idle()).toEqual([{ userId: 'of-old', deviceId: 1 }]);
    // One that comes later starts with its upload.
    await sql`INSERT INTO devices (user_id, device_id) VALUES ('of-new', 1)`;
    expect(await sql`SELECT served_at FROM devices WHERE user_id = 'of-new'`).toEqual([{ served_at: null }]);
    await sql.end();
  });
});

it('a node of the version before goes on beside two new ones, and they serve what it stores', async () => {
  const databaseUrl = await emptyDatabase();
  await migrateBefore(databaseUrl);

  // The old node: its statements name the columns of its schema, and are prepared before the others come.
  const old = postgres(databaseUrl, { max: 1, onnotice: () => {} });
  undo.push(() => old.end());
  const device = new SignalDevice(OLD);
  const keys = device.uploadInput({ oneTimePreKeys: 3, pqOneTimePreKeys: 0 });
  const bytes = (base64: string): Buffer => Buffer.from(base64, 'base64');
  const identity = bytes(keys.identityKey);
  const register = async (deviceId: number): Promise<void> => {
    await old`
      INSERT INTO devices (user_id, device_id, registration_id, identity_key, identity_canonical, signed_prekey_id,
                           key_version, identity_version, ec_available)
      VALUES (${OLD.userId}, ${deviceId}, ${keys.registrationId}, ${identity}, ${identity.subarray(1)},
              ${keys.signedPreKey.keyId}, 1, 1, 3)`;
    await old`
      INSERT INTO signed_prekeys (user_id, device_id, kind, key_id, public_key, signature)
      VALUES (${OLD.userId}, ${deviceId}, 0, ${keys.signedPreKey.keyId}, ${bytes(keys.signedPreKey.publicKey)},
              ${bytes(keys.signedPreKey.signature)})`;
    for (const { keyId, publicKey } of keys.oneTimePreKeys) {
      await old`
        INSERT INTO one_time_prekeys (user_id, device_id, kind, key_id, public_key)
        VALUES (${OLD.userId}, ${deviceId}, 0, ${keyId}, ${bytes(publicKey)})`;
    }
  };
  await register(1);

  const [first, second] = await Promise.all([startGateway({ databaseUrl }), startGateway({ databaseUrl })]);
  undo.push(
    () => first.stop(),
    () => second.stop(),
  );
  const { status, parts } = (await (await fetch(`${first.adminUrl}/readyz`)).json()) as {
    status: string;
    parts: Record<string, string>;
  };
  expect({ status, migrations: parts.migrations }).toEqual({ status: 'ready', migrations: 'ok' });

  // Both write on, each seen by the other.
  await register(2);
  const alice = await enrol(second, ALICE);
  const { devices } = await alice.client.call('requestBundle', {
    claimId: '00000000-0000-4000-8000-000000000001',
    userId: OLD.userId,
  });
  expect(devices.map(({ deviceId, oneTimePreKey }) => [deviceId, oneTimePreKey?.keyId])).toEqual([
    [1, 1],
    [2, 1],
  ]);
  const rows =
    await old`SELECT device_id, ec_available FROM devices WHERE user_id = ${OLD.userId} ORDER BY device_id`;
  expect(rows).toEqual([
    { device_id: 1, ec_available: 2 },
    { device_id: 2, ec_available: 2 },
  ]);
  await old`
    INSERT INTO messages (user_id, device_id, sequence, id, kind, peer_user_id, peer_device_id, message_id, type, content,
                          identity_version, stored_at, expires_at)
    VALUES ('alice', 1, nextval('message_sequence'), gen_random_uuid(), 0, ${OLD.userId}, 1, gen_random_uuid(), 1,
            ${Buffer.from('from the old node')}, 1, now(), now() + interval '1 day')`;
  const { validation } = await alice.client.call('validateKeys', alice.device.validateInput());
  await alice.client.call('clientReady', { validation: validation! });
  await alice.client.next('queueEmpty');
  expect(alice.client.envelopes).toMatchObject([
    { content: Buffer.from('from the old node').toString('base64') },
  ]);
  const bob = await enrol(first, { userId: 'bob', deviceId: 1 });
  await send(alice.client, bob, 'between new ones');
});
