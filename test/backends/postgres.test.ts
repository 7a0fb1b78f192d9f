// The stores on every PostgreSQL that this machine can start, held to the contracts of their ports.
import { randomBytes, randomUUID } from 'node:crypto';
import { mkdtemp, rm } from 'node:fs/promises';
import { type AddressInfo, createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type SQL, sql } from 'drizzle-orm';
import postgres from 'postgres';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { PostgresAddress } from '../../src/backends/postgres/connect.ts';
import { type Database, hotStatement, openDatabase } from '../../src/backends/postgres/database.ts';
import { startEmbeddedPostgres } from '../../src/backends/postgres/embedded.ts';
import { createKeyStore } from '../../src/backends/postgres/key-store.ts';
import { createMessageStore } from '../../src/backends/postgres/message-store.ts';
import { migrateDatabase } from '../../src/backends/postgres/migrations.ts';
import { systemClock } from '../../src/lib/clock.ts';
import { silentLog } from '../../src/lib/log.ts';
import type { KeyStore } from '../../src/ports/key-store.ts';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import { base64, describeKeyStore, identityOf, newDevice, storeKeySet } from '../contract/key-store.ts';
import { describeMessageStore } from '../contract/message-store.ts';
import { createDatabase, startPostgres } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { createManualClock } from '../support/manual-clock.ts';
import { startTcpProxy } from '../support/tcp-proxy.ts';

interface OpenEngine {
  address: PostgresAddress;
  stop(): Promise<void>;
}

const engines: { started: string; open(): Promise<OpenEngine> }[] = [
  {
    started: 'of the run, by URL',
    async open() {
      const { url, drop } = await createDatabase();
      return { address: { kind: 'url', url }, stop: drop };
    },
  },
  {
    // Where the system has none, it is the npm packages' once more: the version in the name tells.
    started: 'the system’s first, by URL',
    async open() {
      const engine = await startPostgres({ prefer: 'system' });
      return { address: { kind: 'url', url: engine.url }, stop: () => engine.stop() };
    },
  },
  {
    started: 'started by the gateway, by its socket',
    async open() {
      const dataDir = await mkdtemp(join(tmpdir(), 'keygate-contract-'));
      const engine = await startEmbeddedPostgres({ dataDir, log: silentLog });
      return {
        address: { kind: 'socket', ...engine },
        async stop() {
          await engine.stop();
          await rm(dataDir, { recursive: true, force: true });
        },
      };
    },
  },
];

for (const { started, open } of engines) {
  const { address, stop } = await open();
  await migrateDatabase(address);
  const nodes = [openNode(address), openNode(address)] as const;
  const engine = `PostgreSQL ${await nodes[0].version()}, ${started}`;
  afterAll(async () => {
    await Promise.all(nodes.map((node) => node.database.close()));
    await stop();
  });

  describeKeyStore(engine, async () => ({
    keys: createKeyStore(nodes[0].database),
    otherNode: createKeyStore(nodes[1].database),
    isWaitedFor: () =>
      eventually(async () => {
        const waiting = await nodes[1].database.run((db) =>
          db.execute(sql`
            SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`),
        );
        expect(waiting.length).toBeGreaterThan(0);
      }),
    close: async () => {},
  }));

  describeMessageStore(engine, async () => ({
    messages: createMessageStore(nodes[0].database),
    otherNode: createMessageStore(nodes[1].database),
    keys: createKeyStore(nodes[0].database),
    dyingAfterCopy: createMessageStore(
      dyingBefore(/^\s*DELETE FROM "messages"\s+WHERE ctid/, nodes[0].database),
    ),
    close: async () => {},
  }));
}

describe('connections', () => {
  it('that a failover left with a server which takes no changes are replaced', async () => {
    const { url, drop } = await createDatabase();
    const address = { kind: 'url', url } as const;
    await migrateDatabase(address);
    const { database } = openNode(address);
    const change = () => database.run((db) => db.execute(sql`UPDATE devices SET revision = revision`));
    await database.run((db) => db.execute(sql`SET default_transaction_read_only = on`));
    await expect(change()).rejects.toMatchObject({ code: 'UNAVAILABLE' });
    await change();
    await database.close();
    await drop();
  });
});

it('asks an address that ends every connection before it says anything once for each query, and calls it away', async () => {
  let connections = 0;
  const nobody = createServer((socket) => {
    connections += 1;
    socket.end();
  });
  await new Promise<void>((resolve) => nobody.listen(0, '127.0.0.1', resolve));
  const { port } = nobody.address() as AddressInfo;
  const { database } = openNode({ kind: 'url', url: `postgres://postgres@127.0.0.1:${port}/test` });
  for (let asked = 1; asked <= 3; asked++) {
    await expect(database.run((db) => db.execute(sql`SELECT 1`))).rejects.toMatchObject({
      code: 'UNAVAILABLE',
    });
    expect(connections).toBeLessThanOrEqual(asked);
  }
  await database.close();
  nobody.close();
});

it('what may be left undone is left when it takes long, and nobody is alarmed', async () => {
  const { url, drop } = await createDatabase();
  const address = { kind: 'url', url } as const;
  await migrateDatabase(address);
  const warnings: string[] = [];
  const log = { ...silentLog, warn: (_: object, text: string) => void warnings.push(text) };
  const database = openDatabase({ address, clock: systemClock, log });
  const admin = postgres(url, { max: 1, onnotice: () => {} });
  await admin.begin(async (tx) => {
    await tx`LOCK TABLE devices`;
    expect(await database.soon(20, (asked) => asked.execute(sql`SELECT FROM devices`))).toBeNull();
  });
  expect(await database.soon(10_000, async () => 'done')).toBe('done');
  expect(warnings).toEqual([]);
  await admin.end();
  await database.close();
  await drop();
});

describe('where PostgreSQL gives fewer connections than are asked for', () => {
  const statement = hotStatement<{ one: number }>(sql`SELECT 1 AS one`);

  /** Many at once, half of them hot. */
  async function askMany(database: Database): Promise<void> {
    const ask = (nth: number): Promise<unknown> =>
      nth % 2 === 0 ? database.run((db) => db.execute(sql`SELECT 1`)) : database.hot(statement, {});
    await Promise.all(Array.from({ length: 40 }, (_, nth) => ask(nth)));
  }

  /**
   * A database in which one role has so many connections, and a link to it on which bytes take their time.
   *
   * @param options.toEach whether each pool has one from the start
   */
  async function giving(connectionsMax: number, { toEach = true } = {}) {
    const { url, drop } = await createDatabase();
    const admin = postgres(url, { max: 1, onnotice: () => {} });
    const role = `few_${randomBytes(6).toString('hex')}`;
    await admin.unsafe(`CREATE ROLE ${role} LOGIN CONNECTION LIMIT ${connectionsMax}`);
    const link = await startTcpProxy(url, { raw: true });
    // Without it a refusal is there before anybody else asks.
    link.impair({ delayMs: 15 });
    const { port } = new URL(link.url);
    const address = { kind: 'url', url: Object.assign(new URL(url), { username: role, port }).href } as const;
    const clock = createManualClock();
    const warnings: string[] = [];
    const log = { ...silentLog, warn: (_: object, text: string) => void warnings.push(text) };
    const database = openDatabase({ address, clock, log });
    if (toEach) {
      await database.run((db) => db.execute(sql`SELECT 1`));
      await database.hot(statement, {});
    }
    return {
      ...{ database, clock, warnings, admin, role },
      connections: async () => (await admin`SELECT FROM pg_stat_activity WHERE usename = ${role}`).length,
      async stop() {
        await database.close();
        await link.stop();
        await admin.unsafe(`DROP ROLE ${role}`);
        await admin.end();
        await drop();
      },
    };
  }

  it('those serve everybody', async () => {
    const { database, stop } = await giving(3);
    for (let round = 0; round < 5; round++) await askMany(database);
    await stop();
  });

  it.each([
    ['the hot statements', (database: Database) => database.run((db) => db.execute(sql`SELECT 1`))],
    ['all others', (database: Database) => database.hot(statement, {})],
  ])('%s get one also where all were taken before they asked', async (_, take) => {
    const { database, connections, stop } = await giving(3, { toEach: false });
    await Promise.all(Array.from({ length: 3 }, () => take(database)));
    expect(await connections()).toBe(3);
    await askMany(database);
    await stop();
  });

  it('what runs on those that the other kind needs goes on to its end, and what follows leaves it one', async () => {
    const { database, warnings, stop } = await giving(2, { toEach: false });
    let begun = 0;
    const work = (until: () => Promise<unknown>): Promise<unknown> =>
      database.transaction(async (tx) => {
        await tx.execute(sql`SELECT 1`);
        begun += 1;
        await until();
        return await tx.execute(sql`SELECT 2 AS two`);
      });
    const isRoomMade = () => warnings.some((text) => text.includes('gives some up'));
    const first = [work(() => eventually(isRoomMade)), work(() => eventually(isRoomMade))];
    await eventually(() => begun === 2);
    const asked = database.hot(statement, {});
    await eventually(isRoomMade);
    const following = Array.from({ length: 6 }, () => work(() => asked));
    expect(await Promise.all(first)).toEqual([[{ two: 2 }], [{ two: 2 }]]);
    await Promise.all(following);
    await stop();
  });

  it('more are opened when it gives them again', async () => {
    const { database, clock, connections, admin, role, stop } = await giving(3);
    await askMany(database);
    await admin.unsafe(`ALTER ROLE ${role} CONNECTION LIMIT -1`);
    await clock.advance(60_000);
    await askMany(database);
    expect(await connections()).toBe(12);
    await stop();
  });
});

it.each([
  ['25P04', 'terminating connection due to transaction timeout', { code: 'UNAVAILABLE' }],
  [
    '42704',
    'unrecognized configuration parameter "idle_session_timeout"',
    { message: 'PostgreSQL is older than 14, the first that will do' },
  ],
])('%s, %s, is told as what it is', async (code, message, told) => {
  const { url, drop } = await createDatabase();
  const { database } = openNode({ kind: 'url', url });
  const asked = database.run((db) =>
    db.execute(sql.raw(`DO $$ BEGIN RAISE '${message}' USING ERRCODE = '${code}'; END $$`)),
  );
  await expect(asked).rejects.toMatchObject(told);
  await database.close();
  await drop();
});

describe('a queue', () => {
  it('gives what appears late under a number below all that were read', async () => {
    const { url, drop } = await createDatabase();
    const address = { kind: 'url', url } as const;
    await migrateDatabase(address);
    const { database } = openNode(address);
    const messages = createMessageStore(database);
    const device = newDevice();
    await storeKeySet(createKeyStore(database), device, {});
    const { fence } = await messages.connect(device);
    const proof = await messages.prove(device);
    await messages.serve({ device, fence }, proof!.keyVersion, 0);
    // Another's statement took a number, and is not committed yet.
    const [taken] = await database.run((db) =>
      db.execute<{ sequence: number }>(sql`SELECT nextval('message_sequence')::int4 AS sequence`),
    );
    await messages.store({
      sender: newDevice(),
      messageId: randomUUID(),
      recipientUserId: device.userId,
      messages: [{ deviceId: device.deviceId, registrationId: 7, type: 1, content: 'eA==' }],
      sendAnyway: false,
      nowMs: 0,
      expiresAtMs: 1_000,
      queueMax: 10,
    });
    const read = async (inFlight: number[]) => {
      const page = await messages.read(
        { device, fence },
        { inFlight, envelopesMax: 10, bytesMax: 1_000, nowMs: 0 },
      );
      return page!.envelopes.map(({ sequence }) => sequence);
    };
    const [later, ...others] = await read([]);
    expect(others).toEqual([]);
    expect(later).toBeGreaterThan(taken!.sequence);
    await database.run((db) =>
      db.execute(sql`
        INSERT INTO messages (user_id, device_id, sequence, id, kind, peer_user_id, peer_device_id, message_id, type, content,
                              identity_version, stored_at, expires_at)
        SELECT user_id, device_id, ${taken!.sequence}::int8, ${randomUUID()}::uuid, kind, peer_user_id, peer_device_id,
               ${randomUUID()}::uuid, type, content, identity_version, stored_at, expires_at FROM messages`),
    );
    expect(await read([later!])).toEqual([taken!.sequence]);
    await database.close();
    await drop();
  });
});

// Between two statements of one claim no port can step: this database does.
describe('a claim that waits', () => {
  it('leaves out no device that came to be, and is changed, between its lock and its claim', async () => {
    const { url, drop } = await createDatabase();
    const address = { kind: 'url', url } as const;
    await migrateDatabase(address);
    const [here, there] = [openNode(address).database, openNode(address).database];
    const otherNode = createKeyStore(there);
    const { userId } = newDevice();
    const [first, second] = [
      { userId, deviceId: 1 },
      { userId, deviceId: 2 },
    ];
    await storeKeySet(otherNode, first, { ec: [1] });
    const holdsFirst = await held(otherNode, first);
    let holdsSecond = { release: async () => {} };
    let transactions = 0;
    const stepped: Database = {
      ...here,
      transaction: async (action) => {
        transactions += 1;
        await (transactions === 1 ? holdsFirst : holdsSecond).release();
        return await here.transaction(async (tx) => {
          let statements = 0;
          const execute = async (statement: SQL) => {
            const result = await tx.execute(statement);
            statements += 1;
            if (transactions === 1 && statements === 1) {
              await storeKeySet(otherNode, second, { ec: [2] });
              holdsSecond = await held(otherNode, second);
            }
            return result;
          };
          return await action(
            new Proxy(tx, { get: (of, name) => (name === 'execute' ? execute : Reflect.get(of, name)) }),
          );
        });
      },
    };
    const request = { claimer: newDevice(), claimId: randomUUID(), userId, deviceId: null };
    const { bundles } = await createKeyStore(stepped).claim([request], {
      nowMs: 0,
      lowThreshold: 3,
      waits: true,
    });
    expect(transactions).toBe(2);
    expect(bundles.map((list) => list?.map((bundle) => bundle.oneTimePreKey?.keyId))).toEqual([[1, 2]]);
    await Promise.all([here.close(), there.close()]);
    await drop();
  });
});

describe('a claim of an identity that is replaced before its public parts are read', () => {
  it('gives nothing of the device, whose new signed prekey has the same id', async () => {
    const { url, drop } = await createDatabase();
    const address = { kind: 'url', url } as const;
    await migrateDatabase(address);
    const { database } = openNode(address);
    const otherNode = createKeyStore(database);
    const device = newDevice();
    await storeKeySet(otherNode, device, { identity: identityOf('A'), ec: [1] });
    let statements = 0;
    const stepped: Database = {
      ...database,
      async hot(statement, values) {
        statements += 1;
        if (statements === 2) await storeKeySet(otherNode, device, { identity: identityOf('B'), ec: [1] });
        return await database.hot(statement, values);
      },
    };
    const request = { claimer: newDevice(), claimId: randomUUID(), userId: device.userId, deviceId: null };
    const how = { nowMs: 0, lowThreshold: 3, waits: true };
    expect((await createKeyStore(stepped).claim([request], how)).bundles).toEqual([[]]);
    expect(statements).toBe(2);
    const [again] = (await otherNode.claim([request], how)).bundles;
    expect(again).toMatchObject([{ identity: { identityKey: base64(identityOf('B').identityKey) } }]);
    await database.close();
    await drop();
  });
});

describe('the store of one process', () => {
  let database: Database;
  let drop: () => Promise<void>;
  beforeAll(async () => {
    const created = await createDatabase();
    drop = created.drop;
    const address = { kind: 'url', url: created.url } as const;
    await migrateDatabase(address);
    database = openNode(address).database;
  });
  afterAll(async () => {
    await database.close();
    await drop();
  });

  it('changes a device by one transaction at a time, and others beside it', async () => {
    let underWay = 0;
    let most = 0;
    const counting: Database = {
      ...database,
      async transaction(action) {
        underWay += 1;
        most = Math.max(most, underWay);
        try {
          return await database.transaction(action);
        } finally {
          underWay -= 1;
        }
      },
    };
    const keys = createKeyStore(counting);
    const device = newDevice();
    await Promise.allSettled(
      Array.from({ length: 10 }, async (_, i) => {
        await keys.change(device, async () => {
          if (i === 3) throw new Error('no');
        });
        // While those that came before it are not through.
        await keys.change(device, async () => {});
      }),
    );
    expect(most).toBe(1);
    const holds = await held(keys, device);
    await storeKeySet(keys, newDevice(), {});
    await holds.release();
  });

  it('refuses a change that has waited for its turn until its caller may have given up, and never does it', async () => {
    const clock = createManualClock();
    const keys = createKeyStore(database, { clock });
    const device = newDevice();
    const holds = await held(keys, device);
    let isCarriedOut = false;
    const late = keys.change(device, async () => {
      isCarriedOut = true;
    });
    const refused = expect(late).rejects.toMatchObject({ code: 'UNAVAILABLE', retryAfterMs: 1_000 });
    await clock.advance(4_999);
    const lastInTime = keys.change(device, async () => 'done');
    await clock.advance(1);
    await refused;
    await holds.release();
    expect(await lastInTime).toBe('done');
    expect(isCarriedOut).toBe(false);
    expect(clock.timerCount()).toBe(0);
  });

  it('answers with what a restored backup holds, although the numbers are the same again', async () => {
    const keys = createKeyStore(database);
    const device = newDevice();
    const claimed = async () => {
      const { bundles } = await keys.claim([{ claimer: newDevice(), claimId: randomUUID(), ...device }], {
        nowMs: 0,
        lowThreshold: 3,
        waits: true,
      });
      return bundles[0]![0]!.identity.identityKey;
    };
    await storeKeySet(keys, device, { identity: identityOf('A') });
    expect(await claimed()).toBe(base64(identityOf('A').identityKey));
    // A backup of before the upload.
    for (const table of ['devices', 'signed_prekeys', 'prekey_claims']) {
      await database.run((db) => db.execute(sql`DELETE FROM ${sql.identifier(table)}`));
    }
    await storeKeySet(keys, device, { identity: identityOf('B') });
    expect(await claimed()).toBe(base64(identityOf('B').identityKey));
  });

  it('sweeps what can be swept where something else fails, and then throws that', async () => {
    const failure = new Error('no');
    let upkeeps = 0;
    const failing: Database = {
      ...database,
      async upkeep(action) {
        upkeeps += 1;
        if (upkeeps === 1) throw failure;
        return await database.upkeep(action);
      },
    };
    const sweep = { nowMs: 0, forgetBeforeMs: 0, limit: 100 };
    await expect(createMessageStore(failing).sweep(sweep)).rejects.toBe(failure);
    expect(upkeeps).toBeGreaterThan(1);
  });

  it('lets a claim that began before the retention sweep see that claims were folded', async () => {
    const keys = createKeyStore(database);
    const device = newDevice();
    await storeKeySet(keys, device, { ec: [1] });
    await keys.claim([{ claimer: newDevice(), claimId: randomUUID(), ...device }], {
      nowMs: 0,
      lowThreshold: 3,
      waits: true,
    });
    const revision = async () => {
      const [row] = await database.run((db) =>
        db.execute<{ revision: number }>(sql`SELECT revision FROM devices WHERE user_id = ${device.userId}`),
      );
      return row!.revision;
    };
    const before = await revision();
    await keys.sweep({ claimedBeforeMs: 1, replacedBeforeMs: 1, limit: 100 });
    expect(await revision()).toBe(before + 1);
  });
});

/** Holds a device's row until it is released. */
async function held(store: KeyStore, device: DeviceAddress): Promise<{ release(): Promise<void> }> {
  let release = () => {};
  const released = new Promise<void>((resolve) => {
    release = resolve;
  });
  return await new Promise((resolve, reject) => {
    const change = store.change(device, async () => {
      resolve({
        async release() {
          release();
          await change;
        },
      });
      await released;
    });
    change.catch(reject);
  });
}

/** A database whose process dies before a statement like this one reaches it. */
function dyingBefore(statementLike: RegExp, database: Database): Database {
  return {
    ...database,
    hot: async (statement, values) => {
      if (statementLike.test(statement.text)) throw new Error('died');
      return await database.hot(statement, values);
    },
  };
}

function openNode(address: PostgresAddress) {
  const database = openDatabase({ address, clock: systemClock, log: silentLog });
  return {
    database,
    async version(): Promise<string> {
      const [row] = await database.run((db) =>
        db.execute<{ server_version: string }>(sql`SHOW server_version`),
      );
      return row!.server_version.split(' ')[0]!;
    },
  };
}
