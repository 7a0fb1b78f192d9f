// How PostgreSQL runs the hot statements: by the same plan for an empty database and for a full one, with no scan in it.
import { randomBytes, randomUUID } from 'node:crypto';
import { sql } from 'drizzle-orm';
import postgres from 'postgres';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createInProcessLocks } from '../../src/backends/in-process/locks.ts';
import {
  type Database,
  type HotStatement,
  openDatabase,
  select,
} from '../../src/backends/postgres/database.ts';
import { compareStatement } from '../../src/backends/postgres/key-reader.ts';
import * as changes from '../../src/backends/postgres/key-set-statements.ts';
import { lockKeys } from '../../src/backends/postgres/key-set-transaction.ts';
import { createKeyStore } from '../../src/backends/postgres/key-store.ts';
import { createMessageStore } from '../../src/backends/postgres/message-store.ts';
import { migrateDatabase } from '../../src/backends/postgres/migrations.ts';
import { HOT_PLAN_SETTINGS } from '../../src/backends/postgres/settings.ts';
import { createBundleClaims } from '../../src/keys/claim-bundle.ts';
import { systemClock } from '../../src/lib/clock.ts';
import { silentLog } from '../../src/lib/log.ts';
import type { ClaimRequest } from '../../src/ports/key-store.ts';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import { newDevice, storeKeySet } from '../contract/key-store.ts';
import { createDatabase, startPostgres } from '../support/engines.ts';

const NOW_MS = Date.UTC(2026, 0, 1);
const EXPIRES_MS = NOW_MS + 30 * 24 * 3_600_000;
const LOW_THRESHOLD = 10;
/** Of a table that a plan expects to fill: one for more takes longer to make than all the rest. */
const HASHED_ROWS_MAX = 10_000;

const ids = (from: number, count: number): number[] => Array.from({ length: count }, (_, i) => from + i);

interface Plan {
  'Node Type': string;
  'Relation Name'?: string;
  'CTE Name'?: string;
  'Index Name'?: string;
  'Index Cond'?: string;
  'TID Cond'?: string;
  'Parent Relationship'?: string;
  Operation?: string;
  'Plan Rows': number;
  'Actual Rows'?: number;
  'Actual Loops'?: number;
  'Shared Hit Blocks'?: number;
  'Shared Read Blocks'?: number;
  Plans?: Plan[];
}

interface Sent {
  text: string;
  values: unknown[];
}

/** A database that notes what it sends. */
function recording(database: Database): Database & { hotSent: Sent[]; othersSent: number } {
  const record = {
    ...database,
    hotSent: [] as Sent[],
    othersSent: 0,
    hot: ((statement, values) => {
      record.hotSent.push({ text: statement.text, values: statement.bind(values) });
      return database.hot(statement, values);
    }) as Database['hot'],
    run: ((action) => {
      record.othersSent += 1;
      return database.run(action);
    }) as Database['run'],
    transaction: ((action) => {
      record.othersSent += 1;
      return database.transaction(action);
    }) as Database['transaction'],
  };
  return record;
}

function nodesOf(plan: Plan): Plan[] {
  return [plan, ...(plan.Plans ?? []).flatMap(nodesOf)];
}

/** A node that reads a table, or writes to one by what it has read. */
const readsTable = (node: Plan): boolean =>
  node['Relation Name'] !== undefined && node['Node Type'] !== 'ModifyTable';

/** Whether a join's side is one row at most: that of a device by its key, or of its used ids. */
const isOneRow = (node: Plan): boolean =>
  (node['Index Name'] === 'devices_user_id_device_id_pk' &&
    /device_id = \$/.test(node['Index Cond'] ?? '')) ||
  (node['Relation Name'] === 'used_prekey_ids' &&
    /identity_canonical = .*kind = /.test(node['Index Cond'] ?? ''));

/** Every way in which a statement could turn slow or lock rows in another order, named. */
function faultsOf(plan: Plan): string[] {
  const faults: string[] = [];
  for (const node of nodesOf(plan)) {
    const name = `${node['Node Type']} on ${node['Relation Name'] ?? node['CTE Name'] ?? '-'}`;
    if (readsTable(node)) {
      const probes = ['Index Scan', 'Index Only Scan'].includes(node['Node Type'])
        ? /\(user_id = /.test(node['Index Cond'] ?? '')
        : node['Node Type'] === 'Tid Scan' && node['TID Cond'] !== undefined;
      if (!probes) faults.push(`${name} reaches the table without an index probe`);
    }
    if (node['Node Type'] === 'Nested Loop') {
      const [outer, inner] = (node.Plans ?? []).filter((child) => child['Parent Relationship'] !== 'SubPlan');
      const probes = nodesOf(inner!).some(
        (child) => child['Index Cond'] !== undefined || child['TID Cond'] !== undefined,
      );
      if (!probes && !isOneRow(inner!) && !isOneRow(outer!)) faults.push(`${name} compares every pair`);
    }
    // It is made whole before the first row comes, also where none does.
    if (/^Hash$|Aggregate/.test(node['Node Type']) && node['Plan Rows'] > HASHED_ROWS_MAX) {
      faults.push(`${name} makes a table for ${node['Plan Rows']} rows`);
    }
    if (node['Node Type'] === 'Merge Join') faults.push(`${name} sorts what it joins`);
  }
  return faults;
}

describe.each([
  { engine: 'the run’s PostgreSQL', open: async () => createDatabase() },
  {
    engine: 'the system’s PostgreSQL, where there is one',
    open: async () => {
      const engine = await startPostgres({ prefer: 'system' });
      return { url: engine.url, drop: () => engine.stop() };
    },
  },
])('the plans of the hot statements ($engine)', ({ open }) => {
  let drop: () => Promise<void>;
  let database: Database;
  let planner: postgres.Sql;
  const empty = new Map<string, Plan>();

  beforeAll(async () => {
    const opened = await open();
    drop = opened.drop;
    const address = { kind: 'url', url: opened.url } as const;
    await migrateDatabase(address);
    database = openDatabase({ address, clock: systemClock, log: silentLog });
    planner = postgres(opened.url, { max: 1, onnotice: () => {}, connection: HOT_PLAN_SETTINGS });
    for (const [name, sent] of await sentByEach()) empty.set(name, await planOf(sent));
    await fill();
  });
  afterAll(async () => {
    await Promise.all([database.close(), planner.end()]);
    await drop();
  });

  /** As the hot connections plan it: once, for values that are not known. */
  async function planOf({ text, values }: Sent, options = 'COSTS ON'): Promise<Plan> {
    const literals = values.map((value) => `'${String(value).replaceAll("'", "''")}'`).join(', ');
    await planner.unsafe(`PREPARE planned AS ${text}`);
    const [row] = await planner.unsafe(
      `EXPLAIN (FORMAT JSON, ${options}) EXECUTE planned ${values.length === 0 ? '' : `(${literals})`}`,
    );
    await planner.unsafe('DEALLOCATE planned');
    return row!['QUERY PLAN'][0].Plan;
  }

  /** What the stores send, by the name of the port's method. */
  async function sentByEach(): Promise<Map<string, Sent>> {
    const record = recording(database);
    const keys = createKeyStore(record);
    const messages = createMessageStore(record);
    const bob = newDevice();
    const reader = { device: bob, fence: 1 };
    const send = () => storeFor(createMessageStore(record), { sender: newDevice() }, bob);
    const sent = new Map<string, Sent>();
    const note = async (name: string, action: () => Promise<unknown>): Promise<void> => {
      record.hotSent.length = 0;
      await action();
      record.hotSent.forEach((statement, i) => {
        sent.set(i === 0 ? name : `${name}, ${i + 1}`, statement);
      });
    };
    await storeKeySet(keys, bob, { lastResortPreKeyId: 1, ec: [1], pq: [1] });
    const how = { nowMs: NOW_MS, lowThreshold: LOW_THRESHOLD, waits: true };
    await note('claim that tells the public parts', () => keys.claim([requestOf(bob)], how));
    // Of all devices of a user nobody knows beforehand which they are: their parts are asked for when the claim has told.
    await note('claim', () => createKeyStore(record).claim([{ ...requestOf(bob), deviceId: null }], how));
    await note('devicesOf', () => keys.devicesOf(bob.userId));
    await note('keys', () => keys.read(bob));
    await note('store', send);
    await note('connect', () => messages.connect(bob));
    await note('serve', () => messages.serve(reader, 1, NOW_MS));
    await note('read', () =>
      messages.read(reader, { inFlight: [7], envelopesMax: 10, bytesMax: 1000, nowMs: NOW_MS }),
    );
    await note('prove', () => messages.prove(bob));
    await note('acknowledge', () => messages.acknowledge(reader, [7]));
    await note('putOff', () => messages.putOff(reader, [{ sequence: 7, reason: 'temporary' }], NOW_MS));
    await note('bounce', () => messages.bounce(bob, [{ sequence: 7, reason: 'EXPIRED' }]));
    const page = (await messages.read(reader, {
      inFlight: [],
      envelopesMax: 9,
      bytesMax: 9,
      nowMs: NOW_MS,
    }))!;
    await messages.bounce(bob, [{ sequence: page.oldestSequence!, reason: 'EXPIRED' }]);
    await note('settleBounces', () =>
      messages.settleBounces(bob, { nowMs: NOW_MS, expiresAtMs: EXPIRES_MS, limit: 10 }),
    );
    await note('inNeedOfALook', () =>
      messages.inNeedOfALook([{ ...reader, keyVersion: 1, lowNoticeVersion: 0, inFlight: 0 }], NOW_MS),
    );
    return sent;
  }

  /** 2,000 devices of 50 keys of each kind, claims of as many, and 10,000 messages, with statistics. */
  async function fill(): Promise<void> {
    await planner.begin(async (tx) => {
      await tx.unsafe(`
        INSERT INTO devices (user_id, device_id, registration_id, identity_key, identity_canonical, signed_prekey_id,
                             key_version, identity_version, ec_available, pq_available)
        SELECT 'full' || u, d, 7, '\\x05', '\\x05', 1, 1, 1, 50, 50
        FROM generate_series(1, 100) u, generate_series(1, 20) d`);
      await tx.unsafe(`
        INSERT INTO signed_prekeys (user_id, device_id, kind, key_id, public_key, signature)
        SELECT user_id, device_id, 0, 1, '\\x05', '\\x00' FROM devices WHERE user_id LIKE 'full%'`);
      await tx.unsafe(`
        INSERT INTO one_time_prekeys (user_id, device_id, kind, key_id, public_key)
        SELECT user_id, device_id, kind, k, '\\x05'
        FROM devices, generate_series(0, 1) kind, generate_series(1, 50) k WHERE user_id LIKE 'full%'`);
      await tx.unsafe(`
        INSERT INTO prekey_claims (user_id, device_id, claimer_user_id, claimer_device_id, claim_id, identity_version,
                                   registration_id, signed_prekey_id, ec_key_id, ec_public_key, claimed_at)
        SELECT user_id, device_id, 'claimer', 1, gen_random_uuid(), 1, 7, 1, 1000 + k, '\\x05', now()
        FROM devices, generate_series(1, 10) k WHERE user_id LIKE 'full%'`);
      // Most in one queue: what is found by reading a queue from its start shows.
      await tx.unsafe(`
        INSERT INTO messages (user_id, device_id, sequence, id, kind, peer_user_id, peer_device_id, message_id, type,
                              content, identity_version, stored_at, expires_at)
        SELECT CASE WHEN m <= 9000 THEN 'full1' ELSE 'full' || (m % 100 + 1) END, 1, nextval('message_sequence'),
               gen_random_uuid(), 0, 'sender', 1, gen_random_uuid(), 3, '\\x00', 1, now(), now() + interval '30 days'
        FROM generate_series(1, 10000) m`);
      await tx.unsafe(`
        INSERT INTO message_receipts (user_id, device_id, kind, peer_user_id, peer_device_id, message_id, sequence,
                                      stored_at)
        SELECT user_id, device_id, kind, peer_user_id, peer_device_id, message_id, sequence, stored_at FROM messages
        WHERE user_id LIKE 'full%'`);
    });
    await planner.unsafe('ANALYZE');
  }

  const statements = [
    ...[
      'claim that tells the public parts',
      'claim',
      'claim, 2',
      'devicesOf',
      'keys',
      'store',
      'connect',
      'serve',
      'read',
      'prove',
      'acknowledge',
      'putOff',
    ],
    ...['bounce', 'settleBounces', 'settleBounces, 2', 'inNeedOfALook'],
  ];

  /** The statements of a change of keys, and of a comparison, by the names of their exports; of those that are two, by the kind of key. */
  const ofChanges = Object.entries({ ...changes, compareStatement }).flatMap(
    ([name, exported]): [string, HotStatement<unknown>][] => {
      if (typeof exported === 'function') return [];
      if ('text' in exported) return [[name, exported]];
      return Object.entries(exported).map(([kind, statement]) => [`${name} ${kind}`, statement]);
    },
  );
  const ofAChange = {
    ...{
      userId: 'full1',
      deviceId: 1,
      kind: 0,
      keyId: 1,
      keyIds: '{1,2}',
      canonicalKey: '\\x05',
      nowMs: NOW_MS,
    },
    ...{
      publicKey: '\\x05',
      publicKeys: '{"\\\\x05",NULL}',
      signature: '\\x05',
      signatures: '{NULL,NULL}',
      fence: 7,
    },
    ...{
      registrationId: 7,
      identityKey: '\\x05',
      identityKeyEd25519: '\\x05',
      signedPreKeyExpiresAtMs: NOW_MS,
    },
    ...{
      ecAvailable: 1,
      pqAvailable: 1,
      ecClaimed: 0,
      pqClaimed: 0,
      offersPq: true,
      keyVersion: 2,
      countVersion: 2,
    },
    ...{ identityVersion: 1, updatedAtMs: NOW_MS, restoredAtMs: NOW_MS, ranLow: false },
    ...{
      ords: '{0}',
      userIds: '{full1}',
      deviceIds: '{1}',
      identities: '{"\\\\x05"}',
      ecIds: '{"{1,2}"}',
      pqIds: '{"{3}"}',
    },
    ...{ sinceMss: `{${NOW_MS}}`, handedOutMaxs: '{10}' },
  };

  it.each(ofChanges)('reach every row of %s, planned as hot, by an index', async (_, statement) => {
    const values = statement.bind(ofAChange);
    expect(values).not.toContain(undefined);
    expect(faultsOf(await planOf({ text: statement.text, values }))).toEqual([]);
  });

  it('are those of a change of keys too, until it ends', async () => {
    const setting = sql`SELECT name, setting FROM pg_settings WHERE name IN ${Object.keys(HOT_PLAN_SETTINGS)} ORDER BY name`;
    const before = await database.transaction((tx) => select(tx, setting));
    await database.transaction(async (tx) => {
      await lockKeys(tx, newDevice());
      const wanted = Object.entries(HOT_PLAN_SETTINGS).sort();
      expect(await select(tx, setting)).toEqual(wanted.map(([name, value]) => ({ name, setting: value })));
    });
    expect(await database.transaction((tx) => select(tx, setting))).toEqual(before);
    expect(before).not.toContainEqual({ name: 'enable_seqscan', setting: 'off' });
  });

  it('are known here for every hot statement', () => {
    expect([...empty.keys()]).toEqual(statements);
  });

  it.each(statements)(
    'reach every row of %s by an index, in an empty database and in a full one',
    async (name) => {
      expect(faultsOf(empty.get(name)!)).toEqual([]);
      expect(faultsOf(await planOf((await sentByEach()).get(name)!))).toEqual([]);
    },
  );

  it('take one-time prekeys by the primary key, in the order of upload, and delete them by their place', async () => {
    for (const plan of [empty.get('claim')!, await planOf((await sentByEach()).get('claim')!)]) {
      const pools = nodesOf(plan).filter(
        (node) => readsTable(node) && node['Relation Name'] === 'one_time_prekeys',
      );
      const byIndex = pools.filter((node) => node['Node Type'] !== 'Tid Scan');
      expect(byIndex.map((node) => [node['Node Type'], node['Index Name']])).toEqual(
        // Of each kind: for one request of a device, and for several.
        Array.from({ length: 4 }, () => [
          'Index Scan',
          'one_time_prekeys_user_id_device_id_kind_sequence_pk',
        ]),
      );
      for (const pool of byIndex) {
        expect(pool['Index Cond']).toMatch(/user_id = .* AND \(device_id = .* AND \(kind = /);
      }
      // An order that the index has needs no sort of the pool.
      const sorted = nodesOf(plan)
        .filter((node) => node['Node Type'] === 'Sort')
        .flatMap(nodesOf);
      expect(sorted.some((node) => node['Relation Name'] === 'one_time_prekeys')).toBe(false);
    }
  });

  it('immunity 11: touch as many rows for a claim of a full pool as of a small one', async () => {
    const touched: Record<string, number>[] = [];
    for (const poolSize of [20, 2000]) {
      const keys = createKeyStore(database);
      const device = newDevice();
      await storeKeySet(keys, device, { lastResortPreKeyId: 1, ec: ids(1, poolSize), pq: ids(1, 20) });
      const record = recording(database);
      await createKeyStore(record).claim([requestOf(device)], {
        nowMs: NOW_MS,
        lowThreshold: LOW_THRESHOLD,
        waits: true,
      });
      const again = { ...record.hotSent[0]!, values: [...record.hotSent[0]!.values] };
      // Another claim, not a repetition.
      const claimId = again.values.findIndex((value) => /^\{"[0-9a-f]{8}-/.test(String(value)));
      again.values[claimId] = `{"${randomUUID()}"}`;
      const plan = await planOf(again, 'ANALYZE, TIMING OFF, COSTS OFF');
      const rows: Record<string, number> = {};
      for (const node of nodesOf(plan).filter(readsTable)) {
        const name = `${node['Node Type']} on ${node['Relation Name']} by ${node['Index Name']}`;
        rows[name] = (rows[name] ?? 0) + node['Actual Rows']! * node['Actual Loops']!;
      }
      touched.push(rows);
    }
    expect(touched[1]).toEqual(touched[0]);
    const [[, pooled]] = Object.entries(touched[1]!).filter(([name]) =>
      name.includes('one_time_prekeys_user'),
    ) as [[string, number]];
    // One of each kind.
    expect(pooled).toBe(2);
  });

  it('fetch no ciphertext that the page has no room for', async () => {
    const record = recording(database);
    const messages = createMessageStore(record);
    const [sender, device] = [newDevice(), newDevice()];
    await storeKeySet(createKeyStore(database), device, { lastResortPreKeyId: 1, ec: [], pq: [] });
    const large = randomBytes(90 * 1024).toString('base64');
    for (let i = 0; i < 40; i++) await storeFor(messages, { sender, content: large }, device);
    const { fence } = await messages.connect(device);
    const [proof] = [(await messages.prove(device))!];
    await messages.serve({ device, fence }, proof.keyVersion, NOW_MS);
    record.hotSent.length = 0;
    const page = await messages.read(
      { device, fence },
      { inFlight: [], envelopesMax: 40, bytesMax: 200 * 1024, nowMs: NOW_MS },
    );
    expect(page!.envelopes).toHaveLength(2);
    const plan = await planOf(record.hotSent[0]!, 'ANALYZE, BUFFERS, TIMING OFF, COSTS OFF');
    // A block is 8 KiB: two messages are 24 of them, forty would be 460.
    expect(plan['Shared Hit Blocks']! + plan['Shared Read Blocks']!).toBeLessThan(150);
  });

  it('probe for the rows of a bounce and a failure, however long the queue is', async () => {
    const record = recording(database);
    const messages = createMessageStore(record);
    const device = { userId: 'full1', deviceId: 1 };
    const [proof, { fence }] = [(await messages.prove(device))!, await messages.connect(device)];
    await messages.serve({ device, fence }, proof.keyVersion, NOW_MS);
    const page = { inFlight: [], envelopesMax: 2, bytesMax: 1000, nowMs: NOW_MS };
    const { envelopes } = (await messages.read({ device, fence }, page))!;
    record.hotSent.length = 0;
    await messages.putOff(
      { device, fence },
      envelopes.map(({ sequence }) => ({ sequence, reason: 'temporary' as const })),
      NOW_MS,
    );
    await messages.bounce(device, [{ sequence: 1, reason: 'EXPIRED' }]);
    for (const sent of record.hotSent) {
      const rows = nodesOf(await planOf(sent, 'ANALYZE, TIMING OFF, COSTS OFF'))
        .filter((node) => readsTable(node) && node['Relation Name'] === 'messages')
        .map((node) => node['Actual Rows']! * node['Actual Loops']!);
      expect(Math.max(...rows)).toBeLessThanOrEqual(2);
    }
  });

  async function user(deviceCount: number): Promise<DeviceAddress[]> {
    const { userId } = newDevice();
    const devices = ids(1, deviceCount).map((deviceId) => ({ userId, deviceId }));
    const keys = createKeyStore(database);
    for (const device of devices)
      await storeKeySet(keys, device, { lastResortPreKeyId: 1, ec: [1], pq: [1] });
    return devices;
  }

  function claimsOver(record: Database) {
    return createBundleClaims({
      store: createKeyStore(record),
      locks: createInProcessLocks({ clock: systemClock }),
      clock: systemClock,
      lowThreshold: LOW_THRESHOLD,
      onRanLow: () => {},
    });
  }

  /** Of each statement, how many its values list. */
  const listedIn = (sent: Sent[]) =>
    sent.map(({ values }) => String(values.find((value) => String(value).startsWith('{'))).split(',').length);

  describe('what waits goes in one statement, up to what one should hold', () => {
    const atOnce = <Result>(count: number, ask: (index: number) => Promise<Result>) =>
      Promise.all(Array.from({ length: count }, (_, index) => ask(index)));

    it('of claims five hundred, and a quarter of that where each is of all devices of a user', async () => {
      const [device] = await user(2);
      const { userId } = device!;
      for (const [deviceId, sizes] of [
        [1, [512, 88]],
        [undefined, [128, 128, 128, 128, 88]],
      ] as const) {
        const record = recording(database);
        const claims = claimsOver(record);
        const claimed = await atOnce(600, () =>
          claims.claim(newDevice(), { claimId: randomUUID(), userId, deviceId }),
        );
        expect(claimed.every(({ devices }) => devices.length === (deviceId === undefined ? 2 : 1))).toBe(
          true,
        );
        const claimsSent = record.hotSent.filter(({ text }) => text.includes('prekey_claims'));
        expect(listedIn(claimsSent)).toEqual(sizes);
      }
    });

    it('of messages five hundred, and fewer where they are large or for many devices', async () => {
      const [device] = await user(1);
      const many = await user(100);
      const large = randomBytes(90 * 1024).toString('base64');
      for (const { count, to, content, sizes } of [
        { count: 600, to: [device!], content: 'eA==', sizes: [512, 88] },
        { count: 15, to: [device!], content: large, sizes: [11, 4] },
        { count: 60, to: many, content: 'eA==', sizes: [40, 20] },
      ]) {
        const record = recording(database);
        const messages = createMessageStore(record);
        await atOnce(count, () => storeFor(messages, { sender: newDevice(), content }, ...to));
        expect(listedIn(record.hotSent)).toEqual(sizes);
      }
    });
  });

  describe('immunity 12: the number of statements is the same for 1 and for 100 devices', () => {
    it('of a user whose bundles are claimed', async () => {
      const counts: [number, number][] = [];
      for (const deviceCount of [1, 100]) {
        const [device] = await user(deviceCount);
        const record = recording(database);
        const { devices } = await claimsOver(record).claim(newDevice(), {
          claimId: randomUUID(),
          userId: device!.userId,
        });
        expect(devices).toHaveLength(deviceCount);
        expect(devices.every(({ oneTimePreKey }) => oneTimePreKey !== null)).toBe(true);
        counts.push([record.hotSent.length, record.othersSent]);
      }
      // The claim, and the parts of the bundles that no cache holds yet.
      expect(counts).toEqual([
        [2, 0],
        [2, 0],
      ]);
    });

    it('of a user who is sent a message', async () => {
      const counts: [number, number][] = [];
      for (const deviceCount of [1, 100]) {
        const devices = await user(deviceCount);
        const record = recording(database);
        const result = await storeFor(createMessageStore(record), { sender: newDevice() }, ...devices);
        expect(result?.accepted).toHaveLength(deviceCount);
        counts.push([record.hotSent.length, record.othersSent]);
      }
      expect(counts).toEqual([
        [1, 0],
        [1, 0],
      ]);
    });
  });
});

function requestOf({ userId, deviceId }: DeviceAddress): ClaimRequest {
  return { claimer: newDevice(), claimId: randomUUID(), userId, deviceId };
}

function storeFor(
  messages: ReturnType<typeof createMessageStore>,
  { sender, content = 'eA==' }: { sender: DeviceAddress; content?: string },
  ...recipients: DeviceAddress[]
) {
  return messages.store({
    sender,
    messageId: randomUUID(),
    recipientUserId: recipients[0]!.userId,
    messages: recipients.map(({ deviceId }) => ({
      deviceId,
      registrationId: 7,
      type: 3,
      content,
    })),
    sendAnyway: false,
    nowMs: NOW_MS,
    expiresAtMs: EXPIRES_MS,
    queueMax: 10_000,
  });
}
