/** A backup is restored between claims, by PostgreSQL's own tools, and `keygate restored` is run. */
import { randomUUID } from 'node:crypto';
import { expect, it } from 'vitest';
import type { RequestInput } from '../../src/protocol/events.ts';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import { type BackedUpPostgres, startBackedUpPostgres } from '../support/backup.ts';
import { keygate } from '../support/command-line.ts';
import { eventually } from '../support/eventually.ts';
import { redisFor, undoAfterEach } from '../support/flow.ts';
import {
  type Client,
  contents,
  enrol,
  open,
  send,
  startGateway,
  TEST_SECRET,
  type TestGateway,
} from '../support/gateway.ts';
import { KeyMaker, signedByEd25519 } from '../support/key-maker.ts';

const undo = undoAfterEach();
const ALICE = { userId: 'alice', deviceId: 1 };
const BOB = { userId: 'bob', deviceId: 1 };

async function store(): Promise<BackedUpPostgres> {
  const postgres = await startBackedUpPostgres();
  undo.push(() => postgres.stop());
  return postgres;
}

async function gatewayOn(databaseUrl: string, redisUrl?: string): Promise<TestGateway> {
  const gateway = await startGateway({
    databaseUrl,
    ...(redisUrl === undefined ? {} : { redisUrl }),
    timing: { sweepPeriodMs: 100 },
  });
  undo.push(() => gateway.stop());
  return gateway;
}

async function runRestored(databaseUrl: string): Promise<{ deviceCount: number; withdrawnCount: number }> {
  const { code, stdout, stderr } = await keygate(['restored', '--json'], {
    DATABASE_URL: databaseUrl,
    JWT_SECRET: TEST_SECRET,
  });
  expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
  return JSON.parse(stdout);
}

/** @returns the ids of the one-time prekeys of both kinds that one claim got */
async function claim(client: Client, of: DeviceAddress): Promise<{ ec: number | null; pq: number | null }> {
  const { devices } = await client.call('requestBundle', { claimId: randomUUID(), ...of });
  const { oneTimePreKey, pqPreKey } = devices[0]!;
  return {
    ec: oneTimePreKey?.keyId ?? null,
    pq: pqPreKey === null || pqPreKey.lastResort ? null : pqPreKey.keyId,
  };
}

it('immunity 7: after a restored backup no key is handed out twice, and owners upload new ids only', async () => {
  const postgres = await store();
  let gateway = await gatewayOn(postgres.url);
  const alice = await enrol(gateway, ALICE);
  const bob = await enrol(gateway, BOB, { oneTimePreKeys: 6, pqOneTimePreKeys: 6 });
  const handedOut = { ec: [] as number[], pq: [] as number[] };
  const claims = async (client: Client, count: number): Promise<void> => {
    for (let index = 0; index < count; index++) {
      const { ec, pq } = await claim(client, BOB);
      if (ec !== null) handedOut.ec.push(ec);
      if (pq !== null) handedOut.pq.push(pq);
    }
  };
  await claims(alice.client, 2);
  await postgres.backUp();

  // What the backup never hears of: claims of keys that it has, an upload, and claims of what was uploaded.
  await claims(alice.client, 4);
  const lostUpload = bob.device.morePreKeys(4, { pqOneTimePreKeys: 4 });
  await bob.client.call('addPreKeys', lostUpload);
  await claims(alice.client, 2);
  const before = await bob.client.call('keyStatus');
  const offered = bob.device.validateInput();
  expect([handedOut.ec.length, handedOut.pq.length]).toEqual([8, 8]);

  await gateway.stop();
  await postgres.restore();
  expect(await runRestored(postgres.url)).toEqual({ deviceCount: 2, withdrawnCount: 4 + 4 + 10 + 5 });
  gateway = await gatewayOn(postgres.url);
  const aliceClient = await gateway.connect(ALICE);
  const bobClient = await gateway.connect(BOB);

  // Nothing is left to be handed out, and the bundle is usable all the same.
  const { devices } = await aliceClient.call('requestBundle', { claimId: randomUUID(), ...BOB });
  expect(devices[0]).toMatchObject({ oneTimePreKey: null, pqPreKey: { lastResort: true } });

  // A client that repeats an upload of before can't bring a used key back, whatever the backup knows of it.
  const repeated = await bobClient.call('addPreKeys', lostUpload);
  expect(repeated.oneTimePreKeys).toMatchObject({ stored: 0, unchanged: 0 });
  expect(new Set(repeated.oneTimePreKeys.conflicts.map(({ reason }) => reason))).toEqual(
    new Set(['alreadyClaimed']),
  );

  // Versions lie beyond all that was seen; the comparison says what happened and takes back what the client holds.
  const found = await bobClient.call('validateKeys', {
    ...offered,
    lastKeyVersion: before.keyVersion,
    lastCountVersion: before.countVersion,
  });
  expect(found.missingKeys).toEqual(['rolledBack']);
  expect(found.keyVersion).toBeGreaterThan(before.keyVersion);
  expect(found.countVersion).toBeGreaterThan(before.countVersion);
  expect([...found.preKeyIdsToDelete].sort()).toEqual([...offered.localPreKeyIds!].sort());
  expect(found.preKeyIdsToUpload).toEqual([]);

  const stored = await bobClient.call('addPreKeys', bob.device.morePreKeys(5, { pqOneTimePreKeys: 5 }));
  expect([stored.oneTimePreKeys.stored, stored.pqOneTimePreKeys.stored]).toEqual([5, 5]);
  const again = await bobClient.call('addPreKeys', lostUpload);
  expect(again.oneTimePreKeys.conflicts).toHaveLength(4);
  await open({ device: bob.device, client: bobClient });

  await claims(aliceClient, 7);
  expect([handedOut.ec.length, handedOut.pq.length]).toEqual([13, 13]);
  expect(new Set(handedOut.ec).size).toBe(13);
  expect(new Set(handedOut.pq).size).toBe(13);
});

it('immunity 7: the same backup restored twice repeats no version, and no client is locked out', async () => {
  const postgres = await store();
  let gateway = await gatewayOn(postgres.url);
  const bob = await enrol(gateway, BOB);
  await gateway.stop();
  await postgres.backUp();
  const seen: number[] = [];
  const restoreAndCompare = async (): Promise<void> => {
    gateway = await gatewayOn(postgres.url);
    const client = await gateway.connect(BOB);
    const versions = { lastKeyVersion: seen.at(-1) ?? 0, lastCountVersion: seen.at(-1) ?? 0 };
    const found = await client.call('validateKeys', { ...bob.device.validateInput(), ...versions });
    expect(found.missingKeys).toContain('rolledBack');
    seen.push(found.keyVersion, found.countVersion);
    await gateway.stop();
  };
  for (let round = 0; round < 2; round++) {
    await postgres.restore();
    await runRestored(postgres.url);
    await restoreAndCompare();
  }
  expect(seen).toEqual([...seen].sort((a, b) => a - b));
  // A third time, and nobody ran the command: the client still finds out by its own versions.
  await postgres.restore();
  await restoreAndCompare();
});

it('immunity 7: open gates close as serverRestored on every node, and connections go on above old numbers', async () => {
  const postgres = await store();
  const redis = await redisFor(undo);
  const first = await gatewayOn(postgres.url, redis.url);
  const second = await gatewayOn(postgres.url, redis.url);
  const bob = await enrol(first, BOB);
  const alice = await enrol(second, ALICE);
  await open(bob);
  await open(alice);
  await postgres.backUp();
  // Numbers that the backup does not know: Redis keeps the lease under the last of them.
  for (let index = 0; index < 5; index++) {
    bob.client = await first.connect(BOB);
    await bob.client.call('keyStatus');
  }
  await open(bob);

  await postgres.restore();
  await runRestored(postgres.url);
  for (const { client, device } of [bob, alice]) {
    const closed = await client.next('gateClosed');
    expect(closed.reason).toBe('serverRestored');
    expect(await client.refusal('clientReady')).toMatchObject({ code: 'KEYS_NOT_VALIDATED' });
    expect(await client.call('validateKeys', device.validateInput())).toMatchObject({
      keysValid: false,
      missingKeys: ['rolledBack'],
    });
  }

  // On the other node, over the lease of the old one: the newer connection is the one that is served.
  const newer = await second.connect(BOB);
  await bob.client.next('displaced');
  await open({ device: bob.device, client: newer });
  await send(alice.client, bob, 'after the restore');
  await eventually(() => expect(contents(newer)).toEqual(['after the restore']));
  expect(newer.waiting('displaced')).toBe(0);
});

type KeySet = RequestInput<'uploadKeys'>;

/** Two key sets that follow on a first one, and differ from each other in nothing else. */
const DIFFERENCES: Record<string, (first: KeySet, keys: KeyMaker) => [KeySet, KeySet]> = {
  'the registration id': (first) => [
    { ...first, registrationId: 5 },
    { ...first, registrationId: 6 },
  ],
  'the identity key': (first) => {
    const [one, other] = [new KeyMaker(), new KeyMaker()].map((keys) => ({
      ...first,
      identityKey: keys.identityKey(),
      signedPreKey: keys.signedAgain(first.signedPreKey),
      pqLastResortPreKey: keys.signedAgain(first.pqLastResortPreKey!),
    }));
    return [one!, other!];
  },
  'its Ed25519 key': ({ pqLastResortPreKey: _, ...first }) => [
    signedByEd25519(first),
    signedByEd25519(first),
  ],
  'the signed prekey': (first, keys) => [
    { ...first, signedPreKey: keys.signed(2) },
    { ...first, signedPreKey: keys.signed(2) },
  ],
  'the signed prekey’s id': (first, keys) => {
    const { publicKey } = keys.signed(2);
    return [
      { ...first, signedPreKey: keys.signedAgain({ keyId: 2, publicKey }) },
      { ...first, signedPreKey: keys.signedAgain({ keyId: 3, publicKey }) },
    ];
  },
  'the last-resort prekey': (first, keys) => [
    { ...first, pqLastResortPreKey: keys.pq(2) },
    { ...first, pqLastResortPreKey: keys.pq(2) },
  ],
};

it('immunity 7: a validation of before opens no gate to other keys under the same version, whatever differs', async () => {
  const postgres = await store();
  let gateway = await gatewayOn(postgres.url);
  const cases = Object.entries(DIFFERENCES).map(([difference, make], index) => {
    const keys = new KeyMaker();
    const first = keys.keySet({ pqLastResortPreKey: keys.pq(1) });
    const [lost, present] = make(first, keys);
    return { difference, address: { userId: `user-${index}`, deviceId: 1 }, first, lost, present };
  });
  const uploaded = async (address: DeviceAddress, keySet: KeySet) => {
    const client = await gateway.connect(address);
    const { keyVersion } = await client.call('uploadKeys', { ...keySet, replaceIdentity: true });
    const validate = () =>
      client.call('validateKeys', {
        localIdentityKey: keySet.identityKey,
        localSignedPreKeyId: keySet.signedPreKey.keyId,
      });
    return { client, keyVersion, validate };
  };
  // The secret that validations are sealed with is in the backup as well.
  for (const { address, first } of cases) await (await uploaded(address, first)).validate();
  await postgres.backUp();
  const before = new Map<string, { keyVersion: number; validation: string }>();
  for (const { difference, address, lost } of cases) {
    const { keyVersion, validate } = await uploaded(address, lost);
    before.set(difference, { keyVersion, validation: (await validate()).validation! });
  }
  await gateway.stop();

  await postgres.restore();
  gateway = await gatewayOn(postgres.url);
  for (const { difference, address, present } of cases) {
    const { client, keyVersion, validate } = await uploaded(address, present);
    const old = before.get(difference)!;
    expect(keyVersion, difference).toBe(old.keyVersion);
    expect(await client.refusal('clientReady', { validation: old.validation }), difference).toMatchObject({
      code: 'KEYS_OUT_OF_SYNC',
    });
    const { validation } = await validate();
    expect(await client.call('clientReady', { validation: validation! })).toMatchObject({ keyVersion });
  }
});
