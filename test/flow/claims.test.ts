// Claims through whole gateways: processes of their own over one PostgreSQL and one Redis, as in production.
import { generateKeyPairSync, randomUUID, sign } from 'node:crypto';
import { connect as connectTcp, createServer, type Server, type Socket } from 'node:net';
import { Redis } from 'ioredis';
import postgres from 'postgres';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openDatabase } from '../../src/backends/postgres/database.ts';
import { createKeyStore } from '../../src/backends/postgres/key-store.ts';
import { sweepKeys } from '../../src/keys/retention.ts';
import { systemClock } from '../../src/lib/clock.ts';
import { silentLog } from '../../src/lib/log.ts';
import type { RequestData, RequestInput } from '../../src/protocol/events.ts';
import { addressKey, type DeviceAddress } from '../../src/protocol/ids.ts';
import type { DeviceBundle } from '../../src/protocol/keys.ts';
import { createDatabase, type Engine, startRedis } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { type Client, connectClient, enrol, open, startGateway, tokenFor } from '../support/gateway.ts';
import { type GatewayProcess, startGatewayProcess } from '../support/gateway-process.ts';
import { brokenKeyInvariants } from '../support/key-invariants.ts';

type Upload = RequestInput<'uploadKeys'>;

const DAY_MS = 24 * 3_600_000;
const base64 = (bytes: Uint8Array): string => Buffer.from(bytes).toString('base64');
const ids = (from: number, count: number): number[] => Array.from({ length: count }, (_, i) => from + i);
const curveKey = (): Buffer =>
  generateKeyPairSync('x25519').publicKey.export({ type: 'spki', format: 'der' }).subarray(-32);

/** One set of keys for all devices that need no real client: only their ids tell them apart here. */
const signing = generateKeyPairSync('ed25519');
const identityKey = base64(curveKey());
const identityKeyEd25519 = base64(signing.publicKey.export({ type: 'spki', format: 'der' }).subarray(-32));
const publicKeys = ids(0, 100).map(() => base64(curveKey()));
const signedPublicKey = curveKey();

function oneTimePreKeys(keyIds: readonly number[]) {
  return keyIds.map((keyId, i) => ({ keyId, publicKey: publicKeys[i % publicKeys.length]! }));
}

function uploadOf(keyIds: readonly number[]): Upload {
  return {
    registrationId: 7,
    identityKey,
    identityKeyEd25519,
    signedPreKey: {
      keyId: 1,
      publicKey: base64(signedPublicKey),
      signature: base64(sign(null, signedPublicKey, signing.privateKey)),
    },
    oneTimePreKeys: oneTimePreKeys(keyIds),
  };
}

let users = 0;
const newDevice = (name: string, deviceId = 1): DeviceAddress => ({ userId: `${name}-${++users}`, deviceId });

let redis: Engine;
let database: Awaited<ReturnType<typeof createDatabase>>;
let gateways: GatewayProcess[];
beforeAll(async () => {
  [redis, database] = await Promise.all([startRedis(), createDatabase()]);
  gateways = await Promise.all([startNode(), startNode()]);
});
afterAll(async () => {
  await Promise.all(gateways.map((gateway) => gateway.stop()));
  await Promise.all([redis.stop(), database.drop()]);
});

const startNode = () => startGatewayProcess({ databaseUrl: database.url, redisUrl: redis.url });
const nodeOf = (i: number, nodes = gateways): GatewayProcess => nodes[i % nodes.length]!;

/** A device with that many keys under ids from 1. */
async function withKeys(keyIds: readonly number[], device = newDevice('target')): Promise<DeviceAddress> {
  const client = await gateways[0]!.connect(device);
  await client.call('uploadKeys', uploadOf(keyIds.slice(0, 100)));
  for (let at = 100; at < keyIds.length; at += 100) {
    await client.call('addPreKeys', { oneTimePreKeys: oneTimePreKeys(keyIds.slice(at, at + 100)) });
  }
  client.close();
  return device;
}

/** Sockets of as many devices, on the nodes in turn. */
async function claimersOn(nodes: readonly GatewayProcess[], count: number): Promise<Client[]> {
  return await Promise.all(ids(0, count).map((i) => nodeOf(i, [...nodes]).connect(newDevice('claimer'))));
}

async function bundleOf(
  client: Client,
  target: DeviceAddress,
  claimId = randomUUID(),
): Promise<DeviceBundle> {
  const { devices } = await client.call('requestBundle', { claimId, ...target });
  expect(devices).toHaveLength(1);
  return devices[0]!;
}

async function poolOf(target: DeviceAddress): Promise<RequestData<'keyStatus'>> {
  const response = await fetch(`${gateways[0]!.url}/signal/status/minimal`, {
    headers: { authorization: `Bearer ${await tokenFor(target)}` },
  });
  return (await response.json()) as RequestData<'keyStatus'>;
}

async function httpBundle(
  node: GatewayProcess,
  claimer: DeviceAddress,
  target: DeviceAddress,
  claimId: string,
): Promise<{ keyBundle: { oneTimePreKeys: { keyId: number }[] } }> {
  const response = await fetch(`${node.url}/api/keys/${target.userId}?deviceId=${target.deviceId}`, {
    headers: { authorization: `Bearer ${await tokenFor(claimer)}`, 'idempotency-key': claimId },
  });
  expect(response.status).toBe(200);
  return (await response.json()) as never;
}

/** Asserts that of these bundles of one device `keyCount` have a key of their own, and the others say why not. */
function expectExact(bundles: readonly DeviceBundle[], keyCount: number): void {
  const handedOut = bundles.flatMap((bundle) => bundle.oneTimePreKey?.keyId ?? []);
  expect(new Set(handedOut).size).toBe(handedOut.length);
  expect(handedOut).toHaveLength(keyCount);
  const without = bundles.filter((bundle) => bundle.oneTimePreKey === null);
  expect(without.map((bundle) => bundle.oneTimePreKeyAbsent)).toEqual(without.map(() => 'noneLeft'));
}

function shuffled<Item>(items: readonly Item[]): Item[] {
  return items
    .map((item) => ({ item, at: Math.random() }))
    .sort((a, b) => a.at - b.at)
    .map(({ item }) => item);
}

describe('claims over several gateways', () => {
  it('give 60 keys to 100 claimers: 60 of them get one each, 40 a bundle without, and none an error', async () => {
    const target = await withKeys(ids(1, 60));
    const claimers = await claimersOn(gateways, 100);
    expectExact(await Promise.all(claimers.map((client) => bundleOf(client, target))), 60);
    expect((await poolOf(target)).preKeyCount).toBe(0);
    for (const client of claimers) client.close();
  });

  it('immunity 17: hand out no key twice from three gateways', async () => {
    const third = await startNode();
    try {
      const target = await withKeys(ids(1, 200));
      const claimers = await claimersOn([...gateways, third], 30);
      const bundles = await Promise.all(
        claimers.map(async (client) => {
          const mine: DeviceBundle[] = [];
          for (const _ of ids(0, 8)) mine.push(await bundleOf(client, target));
          return mine;
        }),
      );
      expectExact(bundles.flat(), 200);
      for (const client of claimers) client.close();
    } finally {
      await third.stop();
    }
  });

  it('immunity 23, immunity 24: deny none while keys are there, and hand out none twice, in many rounds', async () => {
    const claimers = await claimersOn(gateways, 40);
    for (const _ of ids(0, 15)) {
      const target = await withKeys(ids(1, 100));
      expectExact(await Promise.all(claimers.map((client) => bundleOf(client, target))), 40);
      expect((await poolOf(target)).preKeyCount).toBe(60);
    }
    for (const client of claimers) client.close();
  });

  it('serve 24 bulk claimers of 200 devices in random order, without deadlock, error or duplicate', async () => {
    const targets = ids(0, 10).map(() => newDevice('bulk').userId);
    for (const userId of targets) {
      await Promise.all(ids(1, 20).map((deviceId) => withKeys(ids(1, 20), { userId, deviceId })));
    }
    const claimers = await claimersOn(gateways, 24);
    const answers = await Promise.all(
      claimers.flatMap((client) =>
        shuffled(targets).map((userId) => client.call('requestBundle', { claimId: randomUUID(), userId })),
      ),
    );
    for (const userId of targets) {
      const devices = answers
        .filter((answer) => answer.userId === userId)
        .flatMap((answer) => answer.devices);
      for (const deviceId of ids(1, 20)) {
        const bundles = devices.filter((bundle) => bundle.deviceId === deviceId);
        expect(bundles).toHaveLength(24);
        expectExact(bundles, 20);
      }
    }
    for (const client of claimers) client.close();
  });

  it('are served also where a device’s lock stays held, as by a node that is gone', async () => {
    const target = await withKeys(ids(1, 2));
    const claimers = await claimersOn(gateways, 2);
    const admin = new Redis(redis.url);
    const lock = `keygate:lock:{${addressKey(target)}}`;
    await admin.set(lock, 'of a node that is gone');
    expectExact(await Promise.all(claimers.map((client) => bundleOf(client, target))), 2);
    expect(await admin.get(lock)).toBe('of a node that is gone');
    admin.disconnect();
    for (const client of claimers) client.close();
  });

  it('stay exact while Redis is killed in the middle, and after it came back empty', async () => {
    const target = await withKeys(ids(1, 300));
    const claimers = await claimersOn(gateways, 40);
    let answered = 0;
    let killed: Promise<void> | undefined;
    let restarted: Promise<void> | undefined;
    const bundles = await Promise.all(
      claimers.map(async (client) => {
        const mine: DeviceBundle[] = [];
        for (const _ of ids(0, 10)) {
          mine.push(await bundleOf(client, target));
          answered += 1;
          if (answered > 80) killed ??= redis.kill('SIGKILL');
          if (answered > 240) restarted ??= killed!.then(() => redis.restart());
        }
        return mine;
      }),
    );
    await restarted;
    expectExact(bundles.flat(), 300);
    const other = await withKeys(ids(1, 30));
    expectExact(await Promise.all(claimers.map((client) => bundleOf(client, other))), 30);
    for (const client of claimers) client.close();
  });

  it('leave counters, pools and records that agree', async () => {
    expect(await brokenKeyInvariants(database.url)).toEqual([]);
  });
});

describe('a repeated claim', () => {
  it('costs one key and gets one answer, asked 20 times at once by socket and by HTTP on two nodes', async () => {
    const target = await withKeys(ids(1, 60));
    const claimer = newDevice('claimer');
    const socket = await gateways[1]!.connect(claimer);
    const claimId = randomUUID();
    const [bySocket, byHttp] = await Promise.all([
      Promise.all(ids(0, 8).map(() => bundleOf(socket, target, claimId))),
      Promise.all(ids(0, 12).map((i) => httpBundle(nodeOf(i), claimer, target, claimId))),
    ]);
    for (const bundle of bySocket) expect(bundle).toEqual(bySocket[0]);
    for (const { keyBundle } of byHttp) {
      expect(keyBundle).toEqual(byHttp[0]!.keyBundle);
      expect(keyBundle.oneTimePreKeys).toEqual([bySocket[0]!.oneTimePreKey]);
    }
    expect((await poolOf(target)).preKeyCount).toBe(59);
    socket.close();
  });

  it('costs one key and gets one answer, asked by 20 sockets of the device that displace one another', async () => {
    const target = await withKeys(ids(1, 60));
    const claimer = newDevice('claimer');
    const token = await tokenFor(claimer);
    const claimId = randomUUID();
    const answers = await Promise.all(
      ids(0, 20).map(async (i) => {
        const client = await connectClient(nodeOf(i).url, token).catch(() => null);
        // A displaced socket is cut, before or after its claim: what it was told counts, if anything.
        const reply = await Promise.race([
          client?.ask('requestBundle', { claimId, ...target }).catch(() => null),
          client?.disconnected.then(() => null),
        ]);
        client?.close();
        return reply ?? null;
      }),
    );
    const last = await gateways[0]!.connect(claimer);
    const bundle = await bundleOf(last, target, claimId);
    const told = answers.filter((reply) => reply !== null);
    expect(told.length).toBeGreaterThan(0);
    for (const reply of told) {
      expect(reply).toEqual({ ok: true, data: { userId: target.userId, devices: [bundle] } });
    }
    expect((await poolOf(target)).preKeyCount).toBe(59);
    last.close();
  });

  it('costs one key for every device, asked for all devices and for single ones at once', async () => {
    const { userId } = newDevice('many');
    for (const deviceId of [1, 2, 3]) await withKeys(ids(1, 10), { userId, deviceId });
    const claimer = newDevice('claimer');
    const socket = await gateways[0]!.connect(claimer);
    const claimId = randomUUID();
    const [whole, single, again] = await Promise.all([
      socket.call('requestBundle', { claimId, userId }),
      socket.call('requestBundle', { claimId, userId, deviceId: 2 }),
      httpBundle(gateways[1]!, claimer, { userId, deviceId: 3 }, claimId),
    ]);
    expect(single.devices).toEqual([whole.devices[1]]);
    expect(again.keyBundle.oneTimePreKeys).toEqual([whole.devices[2]!.oneTimePreKey]);
    for (const deviceId of [1, 2, 3]) expect((await poolOf({ userId, deviceId })).preKeyCount).toBe(9);
    socket.close();
  });

  it('immunity 14: after a cut between commit and answer gets the bundle that was committed', async () => {
    const target = await withKeys(ids(1, 5));
    const claimer = newDevice('claimer');
    const proxy = await startDeafProxy(new URL(gateways[0]!.url));
    const client = await connectClient(proxy.url, await tokenFor(claimer));
    const claimId = randomUUID();
    proxy.holdAnswers();
    const unanswered = client
      .ask('requestBundle', { claimId, ...target })
      .catch((error: Error) => error.message);
    await eventually(async () => (await poolOf(target)).preKeyCount === 4, { that: 'the claim committed' });
    await proxy.close();
    expect(await unanswered).toMatch(/disconnected/);

    const other = await bundleOf(await gateways[1]!.connect(newDevice('claimer')), target);
    expect(other.oneTimePreKey?.keyId).toBe(2);
    const back = await gateways[1]!.connect(claimer);
    const bundle = await bundleOf(back, target, claimId);
    expect(bundle.oneTimePreKey?.keyId).toBe(1);
    expect(await bundleOf(back, target, claimId)).toEqual(bundle);
    expect((await poolOf(target)).preKeyCount).toBe(3);
    back.close();
  });

  it('gets its first answer from a gateway that was killed and started again', async () => {
    const target = await withKeys(ids(1, 5));
    const claimer = newDevice('claimer');
    const claimId = randomUUID();
    const before = await bundleOf(await gateways[1]!.connect(claimer), target, claimId);
    await gateways[1]!.kill('SIGKILL');
    await gateways[1]!.restart();
    expect(await bundleOf(await gateways[1]!.connect(claimer), target, claimId)).toEqual(before);
    expect((await poolOf(target)).preKeyCount).toBe(4);
  });
});

describe('pools', () => {
  it('immunity 6: are handed out in the order of upload, whatever the ids', async () => {
    const target = await withKeys([50, 7, 4_294_967_295, 3]);
    const owner = await gateways[0]!.connect(target);
    await owner.call('addPreKeys', { oneTimePreKeys: oneTimePreKeys([0, 1]) });
    const claimer = await gateways[1]!.connect(newDevice('claimer'));
    const order: (number | undefined)[] = [];
    for (const _ of ids(0, 7)) order.push((await bundleOf(claimer, target)).oneTimePreKey?.keyId);
    expect(order).toEqual([50, 7, 4_294_967_295, 3, 0, 1, undefined]);
  });

  it('immunity 8: say 0 when the last key is claimed', async () => {
    const owner = await enrol(gateways[0]!, newDevice('owner'), { oneTimePreKeys: 11, pqOneTimePreKeys: 0 });
    await open(owner);
    const claimer = await gateways[1]!.connect(newDevice('claimer'));
    const notice = owner.client.next('preKeysLow');
    for (const _ of ids(0, 2)) await bundleOf(claimer, owner.address);
    expect(await notice).toMatchObject({ availableCount: 9, threshold: 10 });
    for (const _ of ids(0, 9)) await bundleOf(claimer, owner.address);
    expect(await owner.client.next('preKeysLow')).toMatchObject({ availableCount: 0 });
  });

  it('immunity 28: say so once per crossing, also when uploads fail in between', async () => {
    const owner = await enrol(gateways[0]!, newDevice('owner'), { oneTimePreKeys: 12, pqOneTimePreKeys: 0 });
    await open(owner);
    const claimer = await gateways[1]!.connect(newDevice('claimer'));
    const claimed: number[] = [];
    const claim = async () => claimed.push((await bundleOf(claimer, owner.address)).oneTimePreKey!.keyId);
    const counts: number[] = [];
    const notice = async () => counts.push((await owner.client.next('preKeysLow')).availableCount);

    for (const _ of ids(0, 3)) await claim();
    await notice();
    // Below the threshold all the time: nothing is crossed.
    for (const _ of ids(0, 4)) await claim();
    const taken = owner.device.morePreKeys(1).oneTimePreKeys!.map((key) => ({ ...key, keyId: claimed[0]! }));
    const verdict = await owner.client.call('addPreKeys', { oneTimePreKeys: taken });
    expect(verdict.oneTimePreKeys).toEqual({
      stored: 0,
      unchanged: 0,
      conflicts: [{ keyId: claimed[0], reason: 'alreadyClaimed' }],
    });
    for (const _ of ids(0, 5)) await claim();
    await notice();
    // Filled over the threshold, and falls again: a crossing of its own.
    await owner.client.call('addPreKeys', owner.device.morePreKeys(10));
    await claim();
    await notice();
    expect(counts).toEqual([9, 0, 9]);
    expect(owner.client.waiting('preKeysLow')).toBe(0);
  });

  it('immunity 9: carry a version with every count, by which an older notice that comes late is known', async () => {
    const owner = await enrol(gateways[0]!, newDevice('owner'), { oneTimePreKeys: 10, pqOneTimePreKeys: 0 });
    await open(owner);
    const claimer = await gateways[1]!.connect(newDevice('claimer'));
    const before = await owner.client.call('checkPreKeys');
    await bundleOf(claimer, owner.address);
    const notice = await owner.client.next('preKeysLow');
    const added = await owner.client.call('addPreKeys', owner.device.morePreKeys(5));
    const after = await owner.client.call('checkPreKeys');
    const versions = [before, notice, added, after].map(({ countVersion }) => countVersion);
    expect(versions).toEqual([...versions].sort((a, b) => a - b));
    expect(notice.countVersion).toBeGreaterThan(before.countVersion);
    expect(added.countVersion).toBeGreaterThan(notice.countVersion);
    expect([notice.availableCount, after.availableCount]).toEqual([9, 14]);
    expect(after.countVersion).toBe(added.countVersion);
  });

  it('immunity 10: keep what became of the last-resort key when it is uploaded again', async () => {
    const owner = await enrol(gateways[0]!, newDevice('owner'), { oneTimePreKeys: 1, pqOneTimePreKeys: 1 });
    const claimer = await gateways[1]!.connect(newDevice('claimer'));
    await bundleOf(claimer, owner.address);
    const claimId = randomUUID();
    const used = await bundleOf(claimer, owner.address, claimId);
    expect(used).toMatchObject({ oneTimePreKey: null, pqPreKey: { lastResort: true } });
    const status = await owner.client.call('keyStatus');
    const upload = owner.device.uploadInput({ oneTimePreKeys: 0, pqOneTimePreKeys: 0 });
    expect(await owner.client.call('uploadKeys', upload)).toMatchObject({ keyVersion: status.keyVersion });
    expect(await owner.client.call('keyStatus')).toEqual(status);
    expect(await bundleOf(claimer, owner.address, claimId)).toEqual(used);
    // A replaced one stays replaced, whoever uploads it again.
    await owner.client.call('rotateSignedPreKey', { pqLastResortPreKey: owner.device.newPqLastResort() });
    expect((await owner.client.refusal('uploadKeys', upload)).code).toBe('PREKEY_CONFLICT');
  });

  it('immunity 11: hold no more than their bound, which is said per key, and give what they hold', async () => {
    const gateway = await startGateway({ env: { PREKEY_POOL_MAX: '50' } });
    const target = newDevice('target');
    const owner = await gateway.connect(target);
    const first = await owner.call('uploadKeys', uploadOf(ids(1, 60)));
    expect(first).toMatchObject({ availableCount: 50, oneTimePreKeys: { stored: 50, unchanged: 0 } });
    expect(first.oneTimePreKeys.conflicts).toEqual(
      ids(51, 10).map((keyId) => ({ keyId, reason: 'poolFull' })),
    );
    const claimer = await gateway.connect(newDevice('claimer'));
    expect((await bundleOf(claimer, target)).oneTimePreKey?.keyId).toBe(1);
    const second = await owner.call('addPreKeys', { oneTimePreKeys: oneTimePreKeys([51, 52]) });
    expect(second.oneTimePreKeys).toMatchObject({
      stored: 1,
      conflicts: [{ keyId: 52, reason: 'poolFull' }],
    });
    await gateway.stop();
  });

  it('immunity 18: may be empty: the bundle comes without, and the device stays', async () => {
    const target = await withKeys([]);
    const claimer = await gateways[1]!.connect(newDevice('claimer'));
    for (const _ of ids(0, 3)) {
      expect(await bundleOf(claimer, target)).toMatchObject({
        deviceId: 1,
        signedPreKey: { keyId: 1 },
        oneTimePreKey: null,
        oneTimePreKeyAbsent: 'noneLeft',
        pqPreKey: null,
      });
    }
    expect((await claimer.call('listDevices', { userId: target.userId })).devices).toEqual([
      { deviceId: 1, registrationId: 7 },
    ]);
    expect(await poolOf(target)).toMatchObject({ identityKey, signedPreKeyId: 1, preKeyCount: 0 });
  });
});

describe('claims beside changes of the keys', () => {
  it('immunity 21: get a bundle or a code while the device resets, and nothing of the old keys remains', async () => {
    const target = await withKeys(ids(1, 100));
    const owner = await gateways[0]!.connect(target);
    const [witness, ...claimers] = await claimersOn(gateways, 17);
    const rounds = 12;
    let resetting = true;
    const replies = claimers.map(async (client) => {
      const mine = [];
      while (resetting) mine.push(await client.ask('requestBundle', { claimId: randomUUID(), ...target }));
      return mine;
    });
    const bundles: DeviceBundle[] = [];
    for (const round of ids(0, rounds)) {
      await owner.call('resetKeys');
      // Ids that were handed out never come back under this identity: each round has its own.
      await owner.call('uploadKeys', uploadOf(ids(1000 * (round + 1), 50)));
      // However slow the others are, one claim falls between this upload and the next reset.
      bundles.push(await bundleOf(witness!, target));
    }
    await owner.call('resetKeys');
    resetting = false;
    for (const reply of (await Promise.all(replies)).flat()) {
      if (reply.ok) bundles.push(...reply.data.devices);
      else expect(['USER_NOT_FOUND', 'DEVICE_NOT_FOUND', 'UNAVAILABLE']).toContain(reply.error.code);
    }
    const keyIds = bundles.flatMap((bundle) => bundle.oneTimePreKey?.keyId ?? []);
    expect(new Set(keyIds).size).toBe(keyIds.length);
    expect(await poolOf(target)).toMatchObject({ identityKey: null, signedPreKeyId: null, preKeyCount: 0 });
    expect(await brokenKeyInvariants(database.url)).toEqual([]);
    for (const client of [owner, witness!, ...claimers]) client.close();
  });

  it('wait for a device whose row is held, and for no other', async () => {
    const [held, free] = [await withKeys(ids(1, 9)), await withKeys(ids(1, 9))];
    const claimers = await claimersOn(gateways, 8);
    const sql = postgres(database.url, { max: 1, onnotice: () => {} });
    const answered: string[] = [];
    const claim = async (client: Client, target: DeviceAddress) => {
      const bundle = await bundleOf(client, target);
      answered.push(target.userId);
      return bundle;
    };
    let waiting: Promise<DeviceBundle[]> | undefined;
    await sql.begin(async (tx) => {
      await tx`SELECT 1 FROM devices WHERE user_id = ${held.userId} FOR UPDATE`;
      waiting = Promise.all(claimers.map((client) => claim(client, held)));
      // One after the other on each node, so that they come in batches after those that wait.
      for (const client of claimers) await claim(client, free);
      expect(answered).toEqual(claimers.map(() => free.userId));
    });
    expectExact(await waiting!, 8);
    await sql.end();
    for (const client of claimers) client.close();
  });

  it('wait for a device whose row is held, and for no other that was held as well', async () => {
    const [held, released] = [await withKeys(ids(1, 9)), await withKeys(ids(1, 9))];
    const claimers = await claimersOn(gateways.slice(0, 1), 8);
    const sql = postgres(database.url, { max: 3, onnotice: () => {} });
    const release = await sql.reserve();
    let stillHeld: Promise<DeviceBundle[]> | undefined;
    await sql.begin(async (tx) => {
      await tx`SELECT 1 FROM devices WHERE user_id = ${held.userId} FOR UPDATE`;
      await release`BEGIN`;
      await release`SELECT 1 FROM devices WHERE user_id = ${released.userId} FOR UPDATE`;
      stillHeld = Promise.all(claimers.map((client) => bundleOf(client, held)));
      const waiting = Promise.all(claimers.map((client) => bundleOf(client, released)));
      await eventually(async () => {
        const rows = await sql`
          SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`;
        expect(rows).toHaveLength(2);
      });
      await release`COMMIT`;
      expectExact(await waiting, 8);
    });
    release.release();
    expectExact(await stillHeld!, 8);
    await sql.end();
    for (const client of claimers) client.close();
  });

  it('immunity 1: between a lost acknowledgement and the upload’s repetition are never undone, nor by the sweep', async () => {
    const target = newDevice('target');
    const proxy = await startDeafProxy(new URL(gateways[0]!.url));
    const cut = await connectClient(proxy.url, await tokenFor(target));
    const upload = uploadOf(ids(1, 3));
    proxy.holdAnswers();
    const unanswered = cut.ask('uploadKeys', upload).catch((error: Error) => error.message);
    await eventually(async () => (await poolOf(target)).preKeyCount === 3, { that: 'the upload committed' });
    await proxy.close();
    expect(await unanswered).toMatch(/disconnected/);

    const claimer = await gateways[1]!.connect(newDevice('claimer'));
    expect((await bundleOf(claimer, target)).oneTimePreKey?.keyId).toBe(1);
    const owner = await gateways[0]!.connect(target);
    expect((await owner.call('uploadKeys', upload)).oneTimePreKeys).toEqual({
      stored: 0,
      unchanged: 2,
      conflicts: [{ keyId: 1, reason: 'alreadyClaimed' }],
    });

    const store = openDatabase({
      address: { kind: 'url', url: database.url },
      clock: systemClock,
      log: silentLog,
    });
    const later = { ...systemClock, nowMs: () => systemClock.nowMs() + 31 * DAY_MS };
    const swept = await sweepKeys({
      store: createKeyStore(store),
      clock: later,
      claimedPreKeyRetentionMs: 30 * DAY_MS,
    });
    await store.close();
    expect(swept).toBeGreaterThan(0);
    expect((await owner.call('uploadKeys', upload)).oneTimePreKeys.conflicts).toEqual([
      { keyId: 1, reason: 'alreadyClaimed' },
    ]);
    const rest: (number | undefined)[] = [];
    for (const _ of ids(0, 3)) rest.push((await bundleOf(claimer, target)).oneTimePreKey?.keyId);
    expect(rest).toEqual([2, 3, undefined]);
  });

  it('immunity 5: 20 identical uploads at once, by socket and by HTTP, store one set and no error comes', async () => {
    const target = newDevice('target');
    const upload = uploadOf(ids(1, 40));
    const owner = await gateways[0]!.connect(target);
    const { identityKey: identityPubKey, ...rest } = upload;
    const token = await tokenFor(target);
    const [bySocket, byHttp] = await Promise.all([
      Promise.all(ids(0, 10).map(() => owner.call('uploadKeys', upload))),
      Promise.all(
        ids(0, 10).map(async (i) => {
          const response = await fetch(`${nodeOf(i).url}/api/keys/upload`, {
            method: 'POST',
            headers: { authorization: `Bearer ${token}`, 'content-type': 'application/json' },
            body: JSON.stringify({ keyBundle: { ...rest, identityPubKey } }),
          });
          expect(response.status).toBe(200);
          return (await response.json()) as RequestData<'uploadKeys'>;
        }),
      ),
    ]);
    const all = [...bySocket, ...byHttp];
    expect(all.map((one) => one.keyVersion)).toEqual(all.map(() => 1));
    expect(all.map((one) => one.oneTimePreKeys.stored).sort((a, b) => b - a)).toEqual([
      40,
      ...ids(0, 19).map(() => 0),
    ]);
    expect(all.flatMap((one) => one.oneTimePreKeys.conflicts)).toEqual([]);
    expect((await poolOf(target)).preKeyCount).toBe(40);
  });

  it('leave counters, pools and records that agree', async () => {
    expect(await brokenKeyInvariants(database.url)).toEqual([]);
    for (const gateway of gateways) expect(await gateway.output()).not.toMatch(/"level":"?(error|50)/);
  });
});

/** Passes everything on, until it is told to keep what the server says to itself. */
async function startDeafProxy(
  target: URL,
): Promise<{ url: string; holdAnswers(): void; close(): Promise<void> }> {
  let holding = false;
  const sockets = new Set<Socket>();
  const server: Server = createServer((client) => {
    const upstream = connectTcp(Number(target.port), target.hostname);
    client.pipe(upstream);
    upstream.on('data', (bytes) => {
      if (!holding) client.write(bytes);
    });
    for (const [socket, other] of [
      [client, upstream],
      [upstream, client],
    ] as const) {
      sockets.add(socket);
      socket.on('error', () => {});
      socket.on('close', () => other.destroy());
    }
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const address = server.address();
  return {
    url: `http://127.0.0.1:${typeof address === 'object' && address !== null ? address.port : 0}`,
    holdAnswers() {
      holding = true;
    },
    async close() {
      for (const socket of sockets) socket.destroy();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}
