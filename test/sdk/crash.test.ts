/**
 * The application ends at every single change of its disk, in the midst of whatever the kit does with keys. Started
 * again on what the disk holds by then, it comes to an open gate with keys that are its own; nothing that was sent is
 * lost, nothing is shown twice, and no one-time prekey is handed out twice; nor where the gateway was put back to a
 * backup meanwhile, but for what waited there.
 */
import { randomUUID } from 'node:crypto';
import postgres from 'postgres';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Operator, openOperator } from '../../src/compose/operator.ts';
import { parseStoreConfig } from '../../src/config.ts';
import { versionAfterRestore } from '../../src/keys/restored.ts';
import type { DeviceBundle } from '../../src/protocol/keys.ts';
import { KeygateError } from '../../src/sdk/index.ts';
import { redisUrl } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { startGateway, type TestGateway } from '../support/gateway.ts';
import { closePhones, enrolPhone, installPhone, oneTimePreKeysIn, type Phone, POOL_LEVEL } from './phone.ts';

const RUNS_AT_ONCE = 4;
const TIME = { timeout: 120_000 };

let gateway: TestGateway;
/** Who writes to all of them. */
let friend: Phone;
let store: postgres.Sql;
let operator: Operator;

beforeAll(async () => {
  gateway = await startGateway({ redisUrl: redisUrl() });
  store = postgres(gateway.databaseUrl, { max: 4 });
  operator = await openOperator(parseStoreConfig({ DATABASE_URL: gateway.databaseUrl }), { migrates: false });
  friend = await enrolPhone(gateway.url, { userId: 'friend', deviceId: 1 });
});
afterAll(async () => {
  closePhones();
  await store.end();
  await operator.close();
  await gateway.stop();
});

/** One life of a phone, and what was sent to it. */
interface World {
  phone: Phone;
  sent: { text: string; messageId: string }[];
  /** Everything that was ever handed out: identity key, kind and id. */
  claimed: Set<string>;
}

interface Undertaking {
  /** How things stand before it; the phone's application runs where this leaves it running. */
  prepare(world: World): Promise<void>;
  /** What the application does, and may be ended in. */
  act(world: World): Promise<void>;
  /** Whether it puts another identity in the place of the one before. */
  replacesIdentity: boolean;
}

const undertakings: Record<string, Undertaking> = {
  'the first set-up': {
    prepare: async () => {},
    async act({ phone }) {
      await phone.client.start();
      await phone.client.setUp();
    },
    replacesIdentity: true,
  },
  'a refill beside claims': {
    prepare: enrolled,
    async act(world) {
      for (let count = 0; count < 3; count++) await talk(world, { claims: true });
    },
    replacesIdentity: false,
  },
  'a return to what came meanwhile': {
    async prepare(world) {
      await enrolled(world);
      world.phone.close();
      for (let count = 0; count < 4; count++) await talk(world, { claims: true });
    },
    act: comeBack,
    replacesIdentity: false,
  },
  'a rotation of what the gateway does not have': {
    async prepare(world) {
      await enrolled(world);
      world.phone.close();
      await world.phone.keys.signedPreKey.generate(500);
      await world.phone.keys.pqLastResortPreKey.generate(501);
    },
    act: comeBack,
    replacesIdentity: false,
  },
  'a replacement of prekeys that can’t be read': {
    async prepare(world) {
      await enrolled(world);
      world.phone.close();
      // Those that are handed out last: what is claimed before they are withdrawn is lost, whatever the kit does.
      for (const ec of (await world.phone.keys.oneTimePreKeys.ids()).slice(-2)) {
        world.phone.disk.damage(`preKey/${ec}`);
      }
      world.phone.disk.damage(`pqPreKey/${(await world.phone.keys.pqOneTimePreKeys.ids()).at(-1)}`);
    },
    act: comeBack,
    replacesIdentity: false,
  },
  'an upload to a gateway that has lost the keys': {
    async prepare(world) {
      await enrolled(world);
      world.phone.close();
      await loseKeys(world);
    },
    act: comeBack,
    replacesIdentity: false,
  },
  'a replacement of all prekeys, because the gateway is behind': {
    async prepare(world) {
      await enrolled(world);
      world.phone.close();
      const storage = world.phone.disk.kitStorage();
      const memory = (await storage.load())!;
      await storage.save({ ...memory, lastCountVersion: memory.lastCountVersion + 1 });
    },
    act: comeBack,
    replacesIdentity: false,
  },
  'a reset by the user': {
    prepare: enrolled,
    async act({ phone }) {
      await phone.client.reset('the user asked for it');
      await phone.client.setUp();
    },
    replacesIdentity: true,
  },
  'a reset because nothing can be read': {
    async prepare(world) {
      await enrolled(world);
      world.phone.close();
      world.phone.disk.changeLocalKey();
    },
    async act({ phone }) {
      await phone.restart();
      await phone.client.start();
      await phone.client.setUp();
    },
    replacesIdentity: true,
  },
};

async function enrolled({ phone }: World): Promise<void> {
  await phone.client.start();
  await phone.client.setUp();
  await eventually(() => isFilled(phone));
}

/** The gateway has no keys of the phone any more. */
async function loseKeys({ phone }: World): Promise<void> {
  const elsewhere = await gateway.connect(phone.address);
  await elsewhere.call('resetKeys', {});
  elsewhere.close();
}

const TABLES = [
  ...['devices', 'signed_prekeys', 'one_time_prekeys', 'prekey_claims', 'used_prekey_ids'],
  ...['messages', 'message_receipts'],
];

/** @returns puts the store back to what it knows of the phone now, as a backup does, and says so, as an operator does */
async function backUp({ phone, sent }: World): Promise<() => Promise<void>> {
  const { userId } = phone.address;
  const name = (table: string): string => `${userId} ${table}`;
  for (const table of TABLES) {
    await store`CREATE TABLE ${store(name(table))} AS SELECT * FROM ${store(table)} WHERE user_id = ${userId}`;
  }
  return async () => {
    let isKnown = false;
    for (const table of TABLES) {
      await store`DELETE FROM ${store(table)} WHERE user_id = ${userId}`;
      const { count } =
        await store`INSERT INTO ${store(table)} OVERRIDING SYSTEM VALUE SELECT * FROM ${store(name(table))}`;
      isKnown ||= table === 'devices' && count > 0;
    }
    if (isKnown) await withdrawPools(phone);
    // What waited is gone.
    sent.length = 0;
  };
}

/** What `keygate restored` does, for this device alone. */
async function withdrawPools({ address }: Phone): Promise<void> {
  const restoredAtMs = Date.now();
  const { devices } = await operator.maintenance.withdrawAfterRestore({
    after: { userId: address.userId, deviceId: 0 },
    restoredAtMs,
    versionMin: versionAfterRestore(restoredAtMs),
    devicesMax: 1,
    keysMax: 1_000,
  });
  expect(devices).toEqual([address]);
}

async function comeBack({ phone }: World): Promise<void> {
  await phone.restart();
  await phone.client.start();
}

/** Everything that waited is handed over, the pools are full, and the kit has nothing more to do. */
async function isFilled({ client }: Phone): Promise<true> {
  expect(client.snapshot()).toMatchObject({ state: 'ready', drainProgress: null, keyProgress: null });
  const { preKeyCount, pqPreKeyCount } = await client.call('keyStatus', {});
  expect([preKeyCount, pqPreKeyCount]).toEqual([POOL_LEVEL, POOL_LEVEL]);
  // It waits for its turn after the refill.
  expect(await client.checkKeys()).toEqual({
    needsSetup: false,
    missingKeys: [],
    reason: null,
    offline: false,
  });
  return true;
}

/** The friend writes, as an application does: begins anew where it must, or where `claims` says so. */
async function talk(world: World, { claims }: { claims: boolean }): Promise<void> {
  const { phone } = world;
  const text = randomUUID();
  if (claims) friend.keys.forgetSession(phone.address);
  for (;;) {
    try {
      if (!friend.keys.hasSession(phone.address)) await begin(world);
      const messageId = await friend.say(phone.address.userId, text);
      world.sent.push({ text, messageId });
      return;
    } catch (error) {
      if (!(error instanceof KeygateError) || error.code !== 'DEVICES_MISMATCHED') throw error;
      friend.keys.forgetSession(phone.address);
    }
  }
}

async function begin(world: World): Promise<void> {
  const { userId } = world.phone.address;
  await friend.keys.establish({ ...(await claim(world)), userId });
}

async function claimAll(world: World): Promise<void> {
  for (let count = 0; count < POOL_LEVEL; count++) await claim(world);
}

async function claim({ phone, claimed }: World): Promise<DeviceBundle> {
  const { devices } = await friend.client.call('requestBundle', { claimId: randomUUID(), ...phone.address });
  const bundle = devices[0]!;
  for (const preKey of oneTimePreKeysIn(bundle)) {
    // A one-time prekey is handed out at most once.
    expect(claimed).not.toContain(preKey);
    claimed.add(preKey);
  }
  return bundle;
}

/**
 * @param changes how many changes of its disk the application makes before it ends in the next; null for all of them
 * @param restores whether the gateway is put back to a backup of before, until it is started again
 * @returns how many it made
 */
async function live(
  { prepare, act, replacesIdentity }: Undertaking,
  { changes, restores }: { changes: number | null; restores: boolean },
): Promise<number> {
  const phone = await installPhone(gateway.url, { userId: `phone-${randomUUID()}`, deviceId: 1 });
  const world: World = { phone, sent: [], claimed: new Set() };
  await prepare(world);
  const identityBefore = replacesIdentity ? null : await phone.keys.identity();

  const restore = restores ? await backUp(world) : null;
  let made = 0;
  let hasEnded = false;
  phone.beforeChange = () => {
    hasEnded ||= made === changes;
    if (hasEnded) {
      phone.client.close();
      throw new Error('the application is gone');
    }
    made += 1;
  };
  await act(world).catch((error: unknown) => {
    if (!hasEnded) throw error;
  });
  await eventually(async () => hasEnded || (await isFilled(phone)));
  phone.beforeChange = () => {};
  phone.close();

  const { devices } = await friend.client.call('listDevices', { userId: phone.address.userId }).catch(nobody);
  if (devices.length > 0) {
    await talk(world, { claims: true });
    if (restore !== null) {
      await claimAll(world);
      await restore();
    }
  }
  await phone.restart();
  if ((await phone.client.start()) === 'needsSetup') {
    expect(replacesIdentity).toBe(true);
    await phone.client.setUp();
  }
  await eventually(() => isFilled(phone));
  await talk(world, { claims: false });
  await talk(world, { claims: true });
  await eventually(() => {
    const shown = phone.shown.map((line) => line.slice(line.indexOf(': ') + 2));
    const bounced = friend.bounces.map(({ messageId }) => messageId);
    for (const { text, messageId } of world.sent) {
      const times = shown.filter((line) => line === text).length;
      expect(times + bounced.filter((id) => id === messageId).length).toBe(1);
    }
  });
  const bounces = friend.bounces.filter(({ recipient }) => recipient.userId === phone.address.userId);
  const mayBounce = replacesIdentity ? ['RECIPIENT_IDENTITY_CHANGED', 'RECIPIENT_KEYS_RESET'] : [];
  for (const { reason } of bounces) expect(mayBounce).toContain(reason);
  if (!replacesIdentity) expect(await phone.keys.identity()).toEqual(identityBefore);
  expect(phone.client.metrics().decryptionFailures).toBe(0);
  await poolsAgree(phone);
  // A gateway that still has the keys gives none twice, whatever is uploaded.
  if (restore !== null) await claimAll(world);
  phone.close();
  return made;
}

function nobody(error: unknown): { devices: [] } {
  if (error instanceof KeygateError && error.code === 'USER_NOT_FOUND') return { devices: [] };
  throw error;
}

/** What the gateway offers the device holds; what the device holds and does not know to be given out, it offers. */
async function poolsAgree({ keys, client, disk }: Phone): Promise<void> {
  const { offered } = (await disk.kitStorage().load())!;
  const found = await client.call('validateKeys', {
    localIdentityKey: (await keys.identity())!.identityKey,
    localSignedPreKeyId: (await keys.signedPreKey.read())!.keyId,
    localPqLastResortPreKeyId: (await keys.pqLastResortPreKey.read())!.keyId,
    localPreKeyIds: (await keys.oneTimePreKeys.ids()).filter((id) => offered.ec[id] == null),
    localPqPreKeyIds: (await keys.pqOneTimePreKeys.ids()).filter((id) => offered.pq[id] == null),
  });
  expect(found).toMatchObject({
    keysValid: true,
    ...{ preKeyIdsNotHeld: [], pqPreKeyIdsNotHeld: [] },
    ...{ preKeyIdsToUpload: [], pqPreKeyIdsToUpload: [] },
  });
}

/** A life for each change that the undertaking makes. */
async function liveAll(undertaking: Undertaking, { restores }: { restores: boolean }): Promise<void> {
  const changes = await live(undertaking, { changes: null, restores });
  expect(changes).toBeGreaterThan(0);
  let next = 0;
  const inTurn = async (): Promise<void> => {
    while (next < changes) {
      const made = next++;
      await live(undertaking, { changes: made, restores }).catch((error: unknown) => {
        throw new Error(`where it ends in change ${made} of ${changes}`, { cause: error });
      });
    }
  };
  await Promise.all(Array.from({ length: RUNS_AT_ONCE }, inTurn));
}

describe('an application that ends in the midst of', () => {
  it.each(Object.entries(undertakings))('%s', TIME, async (_, undertaking) => {
    await liveAll(undertaking, { restores: false });
  });

  it.each([
    'the first set-up',
    'a refill beside claims',
    'a replacement of all prekeys, because the gateway is behind',
  ])('%s, and whose gateway goes back to before it meanwhile', TIME, async (name) => {
    await liveAll(undertakings[name]!, { restores: true });
  });
});
