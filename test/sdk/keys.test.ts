/** Keys through the kit: set-up, checks, the one reset, and what is mended on the way to an open gate. */
import { randomUUID } from 'node:crypto';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { systemClock } from '../../src/lib/clock.ts';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import type { KitMemory } from '../../src/sdk/storage.ts';
import { redisUrl } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { startGateway, type TestGateway, tokenFor } from '../support/gateway.ts';
import { SignalDevice } from '../support/libsignal-device.ts';
import { LibsignalKeys } from '../support/sdk-keys.ts';
import { startTcpProxy, type TcpProxy } from '../support/tcp-proxy.ts';
import {
  claimSession,
  closePhones,
  enrolPhone,
  hurriedClock,
  installPhone,
  type Phone,
  POOL_LEVEL,
} from './phone.ts';

let gateway: TestGateway;
let proxy: TcpProxy;
let bob: DeviceAddress;
let alice: DeviceAddress;

beforeAll(async () => {
  gateway = await startGateway({ redisUrl: redisUrl() });
  proxy = await startTcpProxy(gateway.url);
});
afterAll(async () => {
  await proxy.stop();
  await gateway.stop();
});
beforeEach(() => {
  const run = randomUUID().slice(0, 8);
  bob = { userId: `bob-${run}`, deviceId: 1 };
  alice = { userId: `alice-${run}`, deviceId: 1 };
});
afterEach(() => {
  proxy.plugIn();
  closePhones();
});

function status(phone: Phone) {
  return phone.client.call('keyStatus', {});
}

/** Filled up to its level, and nothing more under way. */
async function filled(phone: Phone): Promise<void> {
  await eventually(async () => {
    const { preKeyCount, pqPreKeyCount } = await status(phone);
    expect([preKeyCount, pqPreKeyCount]).toEqual([POOL_LEVEL, POOL_LEVEL]);
    expect(phone.client.snapshot().keyProgress).toBeNull();
  });
}

/** Claims so many of Bob's EC one-time prekeys. */
async function claimedIds(count: number): Promise<number[]> {
  const claimer = await gateway.connect(alice);
  const ids: number[] = [];
  for (let index = 0; index < count; index++) {
    const { devices } = await claimer.call('requestBundle', { claimId: randomUUID(), ...bob });
    ids.push(devices[0]!.oneTimePreKey!.keyId);
  }
  claimer.close();
  return ids;
}

/** By the door without a socket, which does not displace the phone. */
async function post(path: string, body: unknown): Promise<void> {
  const response = await fetch(new URL(path, gateway.url), {
    method: 'POST',
    headers: { authorization: `Bearer ${await gateway.token(bob)}`, 'content-type': 'application/json' },
    body: JSON.stringify(body),
  });
  expect(await response.json()).toMatchObject({ success: true });
}

/** The signed prekey changes, here and on the gateway, behind the kit's back. */
async function rotateElsewhere(phone: Phone): Promise<void> {
  const { identityKey, registrationId } = (await phone.keys.identity())!;
  await phone.keys.signedPreKey.generate(777);
  const signedPreKey = await phone.keys.signedPreKey.read();
  await post('/api/keys/upload', {
    keyBundle: { registrationId, identityPubKey: identityKey, signedPreKey, oneTimePreKeys: [] },
  });
}

describe('a fresh install', () => {
  it('needs setting up, resets nothing, and is ready after `setUp` with every kind of key uploaded', async () => {
    const phone = await installPhone(gateway.url, bob);
    expect(await phone.client.start()).toBe('needsSetup');
    expect(phone.client.state).toBe('needsSetup');
    expect(await phone.client.checkKeys()).toEqual({
      needsSetup: true,
      missingKeys: ['identity'],
      reason: 'this device has no keys yet',
      offline: false,
    });

    const progress: unknown[] = [];
    phone.client.subscribe(({ keyProgress }) => keyProgress && progress.push(keyProgress));
    expect(await phone.client.setUp()).toBe('ready');
    await filled(phone);
    expect(await status(phone)).toMatchObject({
      identityKey: (await phone.keys.identity())?.identityKey,
      signedPreKeyId: (await phone.keys.signedPreKey.read())?.keyId,
      pqLastResortPreKeyId: (await phone.keys.pqLastResortPreKey.read())?.keyId,
    });
    expect(progress).toContainEqual({ made: 0, wanted: POOL_LEVEL });
    expect(phone.client.metrics()).toMatchObject({ identityRegenerations: 1, resets: [] });
  });

  it('has on its disk which ids are taken before a key is made under one of them', async () => {
    const phone = await installPhone(gateway.url, bob);
    await phone.client.start();
    const made: { id: number; nextKeyId: number | undefined }[] = [];
    const note = async (ids: readonly number[]): Promise<void> => {
      const nextKeyId = (await phone.disk.kitStorage().load())?.nextKeyId;
      for (const id of ids) made.push({ id, nextKeyId });
    };
    for (const slot of [phone.keys.signedPreKey, phone.keys.pqLastResortPreKey]) {
      const { generate } = slot;
      slot.generate = (id) => note([id]).then(() => generate(id));
    }
    for (const pool of [phone.keys.oneTimePreKeys, phone.keys.pqOneTimePreKeys]) {
      const { generate } = pool;
      pool.generate = (ids) => note(ids).then(() => generate(ids));
    }
    expect(await phone.client.setUp()).toBe('ready');
    expect(made).toHaveLength(2 + 2 * POOL_LEVEL);
    expect(made.filter(({ id, nextKeyId = 0 }) => nextKeyId <= id)).toEqual([]);
  });

  it('takes the place of an older install of the device, whose messages bounce', async () => {
    const old = await enrolPhone(gateway.url, bob);
    const friend = await enrolPhone(gateway.url, alice);
    old.close();
    await friend.say(bob.userId, 'for the old phone');

    const phone = await enrolPhone(gateway.url, bob);
    expect((await status(phone)).identityKey).toBe((await phone.keys.identity())?.identityKey);
    await eventually(() => expect(friend.bounces).toHaveLength(1));
    expect(friend.bounces[0]).toMatchObject({ reason: 'RECIPIENT_IDENTITY_CHANGED', recipient: bob });
  });

  it('goes on where a crash ended it between making keys and uploading them', async () => {
    const phone = await installPhone(proxy.url, bob);
    await phone.client.start();
    const { createIdentity } = phone.keys;
    phone.keys.createIdentity = async () => {
      await createIdentity.call(phone.keys);
      proxy.unplug();
    };
    void phone.client.setUp().catch(() => {});
    await eventually(async () => expect(await phone.keys.pqOneTimePreKeys.ids()).toHaveLength(POOL_LEVEL));
    const made = await phone.keys.identity();

    await phone.restart();
    proxy.plugIn();
    expect(await phone.client.start()).toBe('ready');
    await filled(phone);
    expect((await status(phone)).identityKey).toBe(made?.identityKey);
    expect(phone.client.metrics()).toMatchObject({ identityRegenerations: 0, resets: [] });
  });

  it('begins without what an earlier identity has left, which lost its key alone', async () => {
    const phone = await installPhone(gateway.url, bob);
    const { keys } = phone;
    await keys.createIdentity();
    const left = [500, 501];
    await keys.oneTimePreKeys.generate(left);
    await keys.pqOneTimePreKeys.generate(left);
    phone.disk.remove('identity');
    expect(await phone.client.start()).toBe('needsSetup');
    expect(await phone.client.setUp()).toBe('ready');
    await filled(phone);
    for (const pool of [keys.oneTimePreKeys, keys.pqOneTimePreKeys]) {
      const ids = await pool.ids();
      expect(ids).toHaveLength(POOL_LEVEL);
      expect(ids.filter((id) => left.includes(id))).toEqual([]);
    }
  });

  it.each([
    ['is asked for again', { restarts: false }],
    ['is asked for again by the application that was started anew', { restarts: true }],
  ])(
    'keeps the keys that a failed set-up made in place of an older install’s, when it %s',
    async (_, when) => {
      const old = await enrolPhone(gateway.url, bob);
      old.close();
      const phone = await installPhone(gateway.url, bob);
      expect(await phone.client.start()).toBe('needsSetup');
      const { oneTimePreKeys } = phone.keys;
      const read = oneTimePreKeys.read.bind(oneTimePreKeys);
      oneTimePreKeys.read = async () => {
        oneTimePreKeys.read = read;
        throw new Error('the disk is busy');
      };
      await expect(phone.client.setUp()).rejects.toThrow('the disk is busy');
      expect(phone.client.state).toBe('needsSetup');
      const made = await phone.keys.identity();

      if (when.restarts) await phone.restart();
      expect(await phone.client.setUp()).toBe('ready');
      await filled(phone);
      expect((await status(phone)).identityKey).toBe(made?.identityKey);
      expect(phone.client.metrics().resets).toEqual([]);
      // What is claimed now can be decrypted.
      const friend = await enrolPhone(gateway.url, alice);
      await friend.say(bob.userId, 'to the new phone');
      await eventually(() => expect(phone.shown).toEqual([`${alice.userId}.1: to the new phone`]));
    },
  );

  it('is set up once, however many ask at once', async () => {
    const phone = await installPhone(gateway.url, bob);
    const ends = await Promise.all([
      phone.client.setUp(),
      phone.client.setUp(),
      phone.client.start(),
      phone.client.setUp(),
    ]);
    expect(new Set(ends)).toContain('ready');
    expect(phone.client.metrics().identityRegenerations).toBe(1);
    expect((await status(phone)).keyVersion).toBe(1);
  });
});

describe('a returning user', () => {
  it('is ready with the keys that it has, and changes none', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    await filled(phone);
    const before = await status(phone);

    await phone.restart();
    expect(await phone.client.start()).toBe('ready');
    await eventually(() => expect(phone.client.snapshot().drainProgress).toBeNull());
    expect(await phone.client.checkKeys()).toEqual({
      needsSetup: false,
      missingKeys: [],
      reason: null,
      offline: false,
    });
    expect(await status(phone)).toEqual(before);
    expect(phone.client.metrics()).toEqual({
      identityRegenerations: 0,
      signedPreKeyRotations: 0,
      preKeysRegenerated: 0,
      decryptionFailures: 0,
      resets: [],
      reconnects: 0,
      duplicatesDropped: 0,
    });
  });

  it('checks, then syncs, and only then is ready', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    await phone.restart();
    const states = [phone.client.state as string];
    phone.client.subscribe(({ state }) => state !== states.at(-1) && states.push(state));
    await phone.client.start();
    await eventually(() => expect(states.at(-1)).toBe('ready'));
    expect(states).toEqual(['connecting', 'checkingKeys', 'syncingKeys', 'ready']);
  });

  it('goes straight to the open gate after a reconnection when its keys have not changed', async () => {
    const phone = await enrolPhone(proxy.url, bob);
    await filled(phone);
    const states: string[] = [];
    phone.client.subscribe(({ state }) => state !== states.at(-1) && states.push(state));
    proxy.cut();
    await eventually(() => expect(states.at(-1)).toBe('ready'));
    expect(states).toEqual(['offline', 'connecting', 'ready']);
    expect(phone.client.metrics().reconnects).toBe(1);
  });

  it('validates anew after a reconnection when its keys have changed', async () => {
    const phone = await enrolPhone(proxy.url, bob);
    const states: string[] = [];
    phone.client.subscribe(({ state }) => state !== states.at(-1) && states.push(state));
    proxy.unplug();
    const elsewhere = await gateway.connect(bob);
    await phone.keys.signedPreKey.generate(999);
    await elsewhere.call('rotateSignedPreKey', { signedPreKey: (await phone.keys.signedPreKey.read())! });
    elsewhere.close();
    proxy.plugIn();
    await eventually(() => expect(states.at(-1)).toBe('ready'));
    expect(states).toContain('syncingKeys');
    expect(phone.client.metrics().signedPreKeyRotations).toBe(0);
  });

  it('joins the path that runs, and runs the same path when the gate closes', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    await phone.restart();
    expect(await Promise.all([phone.client.start(), phone.client.start(), phone.client.start()])).toEqual([
      'ready',
      'ready',
      'ready',
    ]);
    const states: string[] = [];
    phone.client.subscribe(({ state }) => state !== states.at(-1) && states.push(state));
    const closed = new Promise((resolve) => phone.client.on('gateClosed', resolve));
    await rotateElsewhere(phone);
    expect(await closed).toMatchObject({ reason: 'keysRotated' });
    await eventually(() => expect(states.join(' ')).toMatch(/checkingKeys syncingKeys ready$/));
  });
});

describe('keys that change while the path is gone', () => {
  it('between the validation and `clientReady` send it through once more', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    const storage = phone.disk.kitStorage();
    let validations = 0;
    await phone.restart({
      storage: {
        load: storage.load,
        async save(memory) {
          await storage.save(memory);
          // What the kit writes down while it syncs is what a validation taught it.
          if (phone.client.state === 'syncingKeys' && validations++ === 0) await rotateElsewhere(phone);
        },
      },
    });
    expect(await phone.client.start()).toBe('ready');
    expect(validations).toBeGreaterThan(1);
    expect((await status(phone)).signedPreKeyId).toBe(777);
    expect(phone.client.metrics()).toMatchObject({ resets: [], signedPreKeyRotations: 0 });
  });
});

describe('a signed prekey that is old', () => {
  it('is rotated through the open gate, which stays open', async () => {
    let offsetMs = 0;
    const other = await startGateway({
      clock: { ...systemClock, nowMs: () => systemClock.nowMs() + offsetMs },
      env: { SIGNED_PREKEY_ROTATION_HOURS: '24' },
    });
    const getToken = () => tokenFor(bob, { ttlMs: 7 * 86_400_000 });
    const phone = await enrolPhone(other.url, bob, { getToken });
    const before = await status(phone);
    offsetMs = 2 * 86_400_000;
    await phone.restart();
    let closings = 0;
    phone.client.on('gateClosed', () => {
      closings += 1;
    });
    expect(await phone.client.start()).toBe('ready');
    const after = await status(phone);
    expect(after.keyVersion).toBe(before.keyVersion + 1);
    expect(after.signedPreKeyId).toBeGreaterThan(before.signedPreKeyId!);
    expect(after.pqLastResortPreKeyId).toBeGreaterThan(before.pqLastResortPreKeyId!);
    expect(phone.client.metrics()).toMatchObject({ signedPreKeyRotations: 1, resets: [] });
    expect([phone.client.state, closings]).toEqual(['ready', 0]);
    phone.close();
    await other.stop();
  });
});

describe('a crypto library without post-quantum prekeys', () => {
  it('leaves them out', async () => {
    const phone = await installPhone(gateway.url, bob);
    const keys = new LibsignalKeys(phone.disk, bob);
    await phone.restart({
      keys: {
        identity: () => keys.identity(),
        createIdentity: () => keys.createIdentity(),
        reset: () => keys.reset(),
        signedPreKey: keys.signedPreKey,
        oneTimePreKeys: keys.oneTimePreKeys,
      },
    });
    await phone.client.start();
    expect(await phone.client.setUp()).toBe('ready');
    await eventually(() => expect(phone.client.snapshot().drainProgress).toBeNull());
    expect(await phone.client.checkKeys()).toMatchObject({ needsSetup: false, missingKeys: [] });
    expect(await status(phone)).toMatchObject({
      preKeyCount: POOL_LEVEL,
      pqPreKeyCount: 0,
      pqLastResortPreKeyId: null,
    });
    expect(await keys.pqOneTimePreKeys.ids()).toEqual([]);
  });
});

describe('keys that can’t be read for a moment', () => {
  it('are looked at again, and cost the device nothing', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    const before = await status(phone);
    await phone.restart();
    const { keys } = phone;
    let failures = 0;
    const identity = keys.identity.bind(keys);
    keys.identity = async () => {
      if (failures++ < 2) throw new Error('the database is locked');
      return await identity();
    };
    expect(await phone.client.start()).toBe('ready');
    expect(failures).toBeGreaterThan(2);
    expect(phone.client.metrics().resets).toEqual([]);
    expect(await status(phone)).toMatchObject({
      identityKey: before.identityKey,
      keyVersion: before.keyVersion,
    });
  });
});

describe('a changed local encryption key', () => {
  it('is found by `checkKeys` and leads to exactly one reset, here and on the gateway', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    const before = await status(phone);
    await phone.restart();
    phone.disk.changeLocalKey();
    const verdicts = await Promise.all([phone.client.checkKeys(), phone.client.checkKeys()]);
    expect(verdicts).toEqual(
      Array(2).fill({
        needsSetup: true,
        missingKeys: ['identity'],
        reason: 'the identity key can’t be read',
        offline: false,
      }),
    );
    expect(phone.client.metrics().resets).toMatchObject([{ reason: 'the identity key can’t be read' }]);
    expect(await status(phone)).toMatchObject({ identityKey: null, keyVersion: before.keyVersion + 1 });
    expect(await phone.keys.identity()).toBeNull();

    // Whoever asks again finds nothing more to reset.
    expect(await phone.client.start()).toBe('needsSetup');
    expect(phone.client.metrics().resets).toHaveLength(1);
    expect((await status(phone)).keyVersion).toBe(before.keyVersion + 1);
    expect(await phone.client.setUp()).toBe('ready');
  });

  it('leads to one reset also where the device is set up at once', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    const { keyVersion } = await status(phone);
    await phone.restart();
    phone.disk.changeLocalKey();
    expect(await phone.client.setUp()).toBe('ready');
    expect(phone.client.metrics()).toMatchObject({
      identityRegenerations: 1,
      resets: [{ reason: 'the identity key can’t be read' }],
    });
    expect((await status(phone)).keyVersion).toBe(keyVersion + 2);
  });

  it('leads to one reset also where the check runs beside `start` and loses its answers', async () => {
    const phone = await enrolPhone(proxy.url, bob);
    const before = await status(phone);
    await phone.restart();
    phone.disk.changeLocalKey();
    const lost = proxy.loseAnswerOf('resetKeys');
    const [end] = await Promise.all([phone.client.start(), phone.client.checkKeys(), lost]);
    expect(end).toBe('needsSetup');
    expect(phone.client.metrics().resets).toHaveLength(1);
    expect((await status(phone)).keyVersion).toBe(before.keyVersion + 1);
  });

  it('is reset here alone where the repeat of a lost reset finds newer keys on the gateway', async () => {
    const phone = await enrolPhone(proxy.url, bob);
    await phone.restart();
    phone.disk.changeLocalKey();
    const lost = proxy.loseAnswerOf('resetKeys').then(() => proxy.unplug());
    const started = phone.client.start();
    await lost;
    // The user has set the device up by another application meanwhile.
    const other = new SignalDevice(bob);
    const { identityKey, ...rest } = other.uploadInput({ oneTimePreKeys: 3, pqOneTimePreKeys: 0 });
    await post('/api/keys/upload', { keyBundle: { ...rest, identityPubKey: identityKey } });
    proxy.plugIn();
    expect(await started).toBe('needsSetup');
    expect(phone.client.metrics().resets).toHaveLength(1);
    expect(await status(phone)).toMatchObject({ identityKey: other.identityKey, preKeyCount: 3 });
  });

  it('deletes nothing while there is no network, and is reset once there is', async () => {
    const phone = await enrolPhone(proxy.url, bob);
    const names = phone.disk.names().length;
    proxy.unplug();
    await phone.restart();
    phone.disk.changeLocalKey();
    expect(await phone.client.checkKeys()).toMatchObject({ needsSetup: true, offline: true });
    expect(phone.disk.names()).toHaveLength(names);
    expect(phone.client.metrics().resets).toEqual([]);

    const started = phone.client.start();
    proxy.plugIn();
    expect(await started).toBe('needsSetup');
    expect(phone.client.metrics().resets).toHaveLength(1);
  });

  it('is found by the first key that fails, whatever else is broken', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    const [signed] = await phone.keys.signedPreKey.ids();
    phone.disk.damage(`signedPreKey/${signed}`);
    for (const id of await phone.keys.oneTimePreKeys.ids()) phone.disk.damage(`preKey/${id}`);
    await phone.restart();
    expect(await phone.client.start()).toBe('needsSetup');
    expect(phone.client.metrics().resets).toMatchObject([{ reason: 'the signedPreKey can’t be read' }]);
  });
});

describe('another identity on the gateway', () => {
  it('leads to one reset and a new set-up', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    phone.close();
    const other = await enrolPhone(gateway.url, bob);
    const { keyVersion } = await status(other);
    other.close();

    await phone.restart();
    expect(await phone.client.start()).toBe('needsSetup');
    expect(phone.client.metrics().resets).toMatchObject([{ reason: 'the gateway has another identity key' }]);
    expect(await phone.keys.identity()).toBeNull();
    expect(await status(phone)).toMatchObject({ identityKey: null, keyVersion: keyVersion + 1 });

    expect(await phone.client.setUp()).toBe('ready');
    await filled(phone);
  });
});

describe('a reset', () => {
  it('that the user asks for may have any reason, however long', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    const reason = 'because '.repeat(1_000);
    await phone.client.reset(reason);
    expect(phone.client.state).toBe('needsSetup');
    expect(phone.client.metrics().resets).toMatchObject([{ reason }]);
    expect((await status(phone)).identityKey).toBeNull();
  });

  it('goes on where the keys change on the gateway while it is asked for', async () => {
    const phone = await enrolPhone(proxy.url, bob);
    const { keyVersion } = await status(phone);
    const lost = proxy.loseRequest('resetKeys').then(() => proxy.unplug());
    const reset = phone.client.reset('a fresh start');
    await lost;
    await rotateElsewhere(phone);
    proxy.plugIn();
    await reset;
    expect(await status(phone)).toMatchObject({ identityKey: null, keyVersion: keyVersion + 2 });
    expect(phone.client.metrics().resets).toHaveLength(1);
  });
});

describe('an identity key', () => {
  it('is the same with its type byte and without', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    const before = await status(phone);
    await phone.restart();
    const { keys } = phone;
    const identity = keys.identity.bind(keys);
    keys.identity = async () => {
      const whole = (await identity())!;
      const bare = Buffer.from(whole.identityKey, 'base64').subarray(1).toString('base64');
      return { ...whole, identityKey: bare };
    };
    expect(await phone.client.start()).toBe('ready');
    expect(phone.client.metrics().resets).toEqual([]);
    expect(await status(phone)).toMatchObject({ identityKey: before.identityKey });
  });
});

describe('without a network', () => {
  it('the verdict is of the local keys alone, and with the network comes the rest', async () => {
    const phone = await enrolPhone(proxy.url, bob);
    await filled(phone);
    proxy.unplug();
    await phone.restart();
    expect(await phone.client.checkKeys()).toEqual({
      needsSetup: false,
      missingKeys: [],
      reason: null,
      offline: true,
    });
    const started = phone.client.start();
    expect(['offline', 'connecting']).toContain(phone.client.state);
    proxy.plugIn();
    expect(await started).toBe('ready');
    expect(await phone.client.checkKeys()).toMatchObject({ needsSetup: false, offline: false });
  });

  it('the verdict comes also while `start` waits for it', async () => {
    const phone = await enrolPhone(proxy.url, bob);
    proxy.unplug();
    await phone.restart();
    const started = phone.client.start();
    expect(await phone.client.checkKeys()).toMatchObject({ needsSetup: false, offline: true });
    proxy.plugIn();
    expect(await started).toBe('ready');
  });
});

describe('one-time prekeys that can’t be read', () => {
  it.each(['preKey', 'pqPreKey'] as const)(
    'a single %s is withdrawn and replaced under a new id, and nothing else changes',
    async (folder) => {
      const phone = await enrolPhone(gateway.url, bob);
      await filled(phone);
      const before = await status(phone);
      const pool = folder === 'preKey' ? phone.keys.oneTimePreKeys : phone.keys.pqOneTimePreKeys;
      const ids = await pool.ids();
      const broken = ids[3]!;
      phone.disk.damage(`${folder}/${broken}`);

      await phone.restart();
      expect(await phone.client.start()).toBe('ready');
      await filled(phone);
      const after = await pool.ids();
      expect(after).not.toContain(broken);
      expect(after.filter((id) => !ids.includes(id))).toHaveLength(1);
      expect(Math.max(...after)).toBeGreaterThan(Math.max(...ids));
      expect(await status(phone)).toMatchObject({
        identityKey: before.identityKey,
        keyVersion: before.keyVersion,
      });
      expect(phone.client.metrics()).toMatchObject({ resets: [], preKeysRegenerated: 1 });
      // Whatever is claimed now can be decrypted.
      const friend = await enrolPhone(gateway.url, alice);
      for (let index = 0; index < POOL_LEVEL; index++) {
        friend.keys.forgetSession(bob);
        await friend.say(bob.userId, `message ${index}`);
      }
      await eventually(() => expect(phone.shown).toHaveLength(POOL_LEVEL));
    },
  );

  it('several are replaced as long as some other can be read', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    const ids = await phone.keys.oneTimePreKeys.ids();
    for (const id of ids.slice(0, 4)) phone.disk.damage(`preKey/${id}`);
    await phone.restart();
    expect(await phone.client.start()).toBe('ready');
    await filled(phone);
    expect(phone.client.metrics()).toMatchObject({ resets: [], preKeysRegenerated: 4 });
  });

  it('a single one is replaced also where the gateway has lost all keys of the device', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    await filled(phone);
    const [broken] = await phone.keys.oneTimePreKeys.ids();
    phone.close();
    const elsewhere = await gateway.connect(bob);
    await elsewhere.call('resetKeys', {});
    elsewhere.close();
    phone.disk.damage(`preKey/${broken}`);
    await phone.restart();
    expect(await phone.client.checkKeys()).toMatchObject({
      needsSetup: false,
      missingKeys: ['identity', 'signedPreKey'],
    });
    expect(await phone.keys.oneTimePreKeys.ids()).not.toContain(broken);
    expect(await phone.client.start()).toBe('ready');
    await filled(phone);
    expect(phone.client.metrics().resets).toEqual([]);
  });

  it('all of them are systemic: one reset', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    for (const id of await phone.keys.pqOneTimePreKeys.ids()) phone.disk.damage(`pqPreKey/${id}`);
    await phone.restart();
    expect(await phone.client.start()).toBe('needsSetup');
    expect(phone.client.metrics().resets).toMatchObject([{ reason: 'no one-time prekey can be read' }]);
  });
});

describe('what is out of step is mended before the gate opens', () => {
  /** Closes the phone's client, alters what the kit remembers, and starts another; resolves when its pools are full. */
  async function restartWith(phone: Phone, change: (memory: KitMemory) => KitMemory): Promise<void> {
    phone.close();
    const storage = phone.disk.kitStorage();
    await storage.save(change((await storage.load())!));
    await phone.restart();
    expect(await phone.client.start()).toBe('ready');
    await filled(phone);
  }

  it('several prekeys claimed while offline: kept, not offered again, and made up for after the drain', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    await filled(phone);
    const friend = await enrolPhone(gateway.url, alice);
    const ids = await phone.keys.oneTimePreKeys.ids();
    phone.close();
    for (let index = 0; index < 5; index++) {
      friend.keys.forgetSession(bob);
      await claimSession(friend, bob);
    }
    await phone.restart();
    expect(await phone.client.start()).toBe('ready');
    await filled(phone);
    const after = await phone.keys.oneTimePreKeys.ids();
    expect(after).toEqual(expect.arrayContaining(ids));
    expect(after).toHaveLength(ids.length + 5);
    const stats = await phone.client.call('keyStats', {});
    expect(stats).toMatchObject({ availablePreKeys: POOL_LEVEL, consumedPreKeys: 5 });
  });

  it('a signed prekey that the gateway does not have is rotated under an id that was never used', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    const { signedPreKeyId, keyVersion } = await status(phone);
    // The application ended after making a new one, before the gateway heard of it.
    await phone.keys.signedPreKey.generate(500);
    await phone.restart();
    expect(await phone.client.checkKeys()).toMatchObject({
      needsSetup: false,
      missingKeys: ['signedPreKey'],
    });
    expect(await phone.client.start()).toBe('ready');
    const after = await status(phone);
    expect(after.keyVersion).toBe(keyVersion + 1);
    expect(after.signedPreKeyId).toBeGreaterThan(500);
    expect(await phone.keys.signedPreKey.ids()).toEqual([signedPreKeyId, 500, after.signedPreKeyId]);
    expect(phone.client.metrics().signedPreKeyRotations).toBe(1);
  });

  it('a signed prekey that came to the gateway while another was made stays, where it is held here', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    const { keyVersion } = await status(phone);
    await phone.keys.signedPreKey.generate(500);
    await phone.restart();
    const { signedPreKey } = phone.keys;
    const { generate, read } = signedPreKey;
    signedPreKey.generate = async (id) => {
      Object.assign(signedPreKey, { generate });
      await generate(id);
      signedPreKey.read = async () => {
        Object.assign(signedPreKey, { read });
        const made = await read();
        await rotateElsewhere(phone);
        return made;
      };
    };
    expect(await phone.client.start()).toBe('ready');
    expect(await status(phone)).toMatchObject({ signedPreKeyId: 777, keyVersion: keyVersion + 1 });
    expect(phone.client.metrics()).toMatchObject({ signedPreKeyRotations: 0, resets: [] });
  });

  it.each([
    ['signed prekey', 'signedPreKey', 'signedPreKeyId'],
    ['last-resort prekey', 'pqLastResortPreKey', 'pqLastResortPreKeyId'],
  ] as const)(
    'a %s that this device has forgotten is replaced under an id beyond its own',
    async (_, slot, id) => {
      const phone = await enrolPhone(gateway.url, bob);
      phone.close();
      await phone.keys[slot].generate(500);
      const elsewhere = await gateway.connect(bob);
      await elsewhere.call('rotateSignedPreKey', { [slot]: (await phone.keys[slot].read())! });
      elsewhere.close();
      // As after a restore of the application's own backup.
      await phone.keys[slot].delete([500]);
      await phone.restart();
      expect(await phone.client.start()).toBe('ready');
      const after = await status(phone);
      expect(after[id]).toBeGreaterThan(500);
      expect(after[id]).toBe((await phone.keys[slot].read())?.keyId);
    },
  );

  it('prekeys that were never uploaded are uploaded, those that are lost are withdrawn', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    await filled(phone);
    const ids = await phone.keys.oneTimePreKeys.ids();
    await phone.keys.oneTimePreKeys.generate([800, 801]);
    await phone.keys.oneTimePreKeys.delete([ids[0]!, ids[1]!, ids[2]!]);
    await phone.restart();
    expect(await phone.client.start()).toBe('ready');
    await filled(phone);
    const held = await phone.keys.oneTimePreKeys.ids();
    expect(held).toEqual(expect.arrayContaining([800, 801]));
    // Whatever is offered is held: what a friend claims can be decrypted.
    const elsewhere = await enrolPhone(gateway.url, alice);
    for (let index = 0; index < POOL_LEVEL; index++) {
      const bundle = await elsewhere.client.call('requestBundle', { claimId: randomUUID(), ...bob });
      expect(held).toContain(bundle.devices[0]?.oneTimePreKey?.keyId);
    }
  });

  it('prekeys are compared as many as may be where there are more of them', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    await filled(phone);
    phone.close();
    await phone.keys.oneTimePreKeys.generate(Array.from({ length: 2_001 }, (_, index) => 100 + index));
    await phone.restart();
    expect(await phone.client.start()).toBe('ready');
    // Whatever is offered is held.
    const held = await phone.keys.oneTimePreKeys.ids();
    for (const id of await claimedIds(3)) expect(held).toContain(id);
  });

  it('keys that were wiped from the gateway alone are uploaded again, one-time prekeys under new ids', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    await filled(phone);
    // Those of a refill are among them.
    await claimedIds(3);
    await filled(phone);
    const { identityKey } = await status(phone);
    const ids = await phone.keys.oneTimePreKeys.ids();
    await phone.client.call('resetKeys', {});
    await eventually(async () => expect((await status(phone)).identityKey).toBe(identityKey));
    await filled(phone);
    const claimed = await claimedIds(POOL_LEVEL);
    expect(claimed.filter((id) => ids.includes(id))).toEqual([]);
    expect(phone.client.metrics().resets).toEqual([]);
  });

  it('keys that were wiped go up with another signed prekey where its id was that of another key', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    phone.close();
    const { signedPreKey } = phone.keys;
    await signedPreKey.generate(500);
    const elsewhere = await gateway.connect(bob);
    await elsewhere.call('rotateSignedPreKey', { signedPreKey: (await signedPreKey.read())! });
    await elsewhere.call('resetKeys', {});
    elsewhere.close();
    await signedPreKey.delete([500]);
    await signedPreKey.generate(500);
    await phone.restart();
    expect(await phone.client.start()).toBe('ready');
    const { signedPreKeyId } = await status(phone);
    expect(signedPreKeyId).toBeGreaterThan(500);
    expect(signedPreKeyId).toBe((await phone.keys.signedPreKey.read())?.keyId);
    expect(phone.client.metrics().resets).toEqual([]);
  });

  it.each([
    ['is rotated', { isReset: false }],
    ['is uploaded again', { isReset: true }],
  ])(
    'a signed prekey %s under an id beyond any number of those that this device has forgotten',
    async (_, { isReset }) => {
      const phone = await enrolPhone(gateway.url, bob);
      phone.close();
      const { signedPreKey } = phone.keys;
      const elsewhere = await gateway.connect(bob);
      for (let id = 510; id >= 500; id--) {
        await signedPreKey.generate(id);
        await elsewhere.call('rotateSignedPreKey', { signedPreKey: (await signedPreKey.read())! });
        await signedPreKey.delete([id]);
      }
      if (isReset) await elsewhere.call('resetKeys', {});
      elsewhere.close();
      await signedPreKey.generate(500);
      await phone.restart();
      expect(await phone.client.start()).toBe('ready');
      const { signedPreKeyId } = await status(phone);
      expect(signedPreKeyId).toBeGreaterThan(510);
      expect(signedPreKeyId).toBe((await signedPreKey.read())?.keyId);
      expect(phone.client.metrics().resets).toEqual([]);
    },
  );

  it('keys that were wiped, and came up anew by another door, are not replaced by the repeat of a lost upload', async () => {
    const phone = await enrolPhone(proxy.url, bob);
    phone.close();
    const elsewhere = await gateway.connect(bob);
    await elsewhere.call('resetKeys', {});
    elsewhere.close();
    const lost = proxy.loseRequest('uploadKeys').then(() => proxy.unplug());
    await phone.restart();
    const started = phone.client.start();
    await lost;
    await rotateElsewhere(phone);
    proxy.plugIn();
    expect(await started).toBe('ready');
    expect((await status(phone)).signedPreKeyId).toBe(777);
    expect(phone.client.metrics()).toMatchObject({ signedPreKeyRotations: 0, resets: [] });
  });

  it('another registration id on the gateway is replaced by this device’s', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    phone.close();
    const { identityKey, registrationId } = (await phone.keys.identity())!;
    const signedPreKey = await phone.keys.signedPreKey.read();
    const keyBundle = { identityPubKey: identityKey, signedPreKey, oneTimePreKeys: [] };
    const another = registrationId === 1 ? 2 : 1;
    await post('/api/keys/upload', { keyBundle: { ...keyBundle, registrationId: another } });
    await phone.restart();
    expect(await phone.client.start()).toBe('ready');
    const { devices } = await phone.client.call('listDevices', { userId: bob.userId });
    expect(devices).toEqual([{ deviceId: bob.deviceId, registrationId }]);
    expect(phone.client.metrics()).toMatchObject({ signedPreKeyRotations: 0, resets: [] });
  });

  it('another signed prekey under the id that this device’s has is replaced', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    phone.close();
    const { keyId } = (await phone.keys.signedPreKey.read())!;
    await phone.keys.signedPreKey.generate(keyId);
    await phone.restart();
    expect(await phone.client.start()).toBe('ready');
    expect((await status(phone)).signedPreKeyId).toBeGreaterThan(keyId);
    // Whatever is claimed now can be decrypted.
    const friend = await enrolPhone(gateway.url, alice);
    await friend.say(bob.userId, 'by the present key');
    await eventually(() => expect(phone.shown).toEqual([`${alice.userId}.1: by the present key`]));
  });

  it.each(['lastKeyVersion', 'lastCountVersion'] as const)(
    'every one-time prekey is replaced where the gateway is behind the %s that it told of',
    async (version) => {
      const phone = await enrolPhone(gateway.url, bob);
      await filled(phone);
      const ids = await phone.keys.oneTimePreKeys.ids();
      await restartWith(phone, (memory) => ({ ...memory, [version]: memory[version] + 1 }));
      const claimed = await claimedIds(POOL_LEVEL);
      expect(claimed.filter((id) => ids.includes(id))).toEqual([]);
    },
  );

  it('a prekey that is known to be handed out is withdrawn where the gateway offers it again', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    await filled(phone);
    const [again] = await phone.keys.oneTimePreKeys.ids();
    await restartWith(phone, (memory) => {
      memory.offered.ec[again!] = Date.now();
      return memory;
    });
    expect(await claimedIds(POOL_LEVEL)).not.toContain(again);
    expect(await phone.keys.oneTimePreKeys.ids()).toContain(again);
  });
});

describe('replenishing', () => {
  it('fills up once per crossing', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    await filled(phone);
    const notices: unknown[] = [];
    phone.client.on('preKeysLow', (notice) => notices.push(notice));
    const friend = await enrolPhone(gateway.url, alice);
    for (let round = 1; round <= 2; round++) {
      // The threshold is 10: the third claim of twelve crosses it.
      for (let index = 0; index < 3; index++) {
        await friend.client.call('requestBundle', { claimId: randomUUID(), ...bob });
      }
      await filled(phone);
      expect(notices).toHaveLength(round);
      expect(phone.client.metrics().preKeysRegenerated).toBe(6 * round);
    }
  });

  it('shows how far it is, in steps, and that it is over when it failed', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    await filled(phone);
    await phone.restart({ poolLevel: POOL_LEVEL + 45 });
    const made = new Set<string>();
    phone.client.subscribe(
      ({ keyProgress }) => keyProgress && made.add(`${keyProgress.made} of ${keyProgress.wanted}`),
    );
    const { oneTimePreKeys } = phone.keys;
    const { generate } = oneTimePreKeys;
    const failed = new Promise<void>((resolve) => {
      oneTimePreKeys.generate = async (ids) => {
        if (ids.length === 20) return await generate(ids);
        resolve();
        throw new Error('the disk is full');
      };
    });
    expect(await phone.client.start()).toBe('ready');
    await failed;
    await eventually(() => expect(phone.client.snapshot().keyProgress).toBeNull());
    expect([...made]).toEqual(['0 of 45', '20 of 45', '40 of 45']);
    expect(phone.client.state).toBe('ready');
  });

  it('fills pools that hold more than one upload may', async () => {
    const phone = await enrolPhone(gateway.url, bob, { poolLevel: 230 });
    await eventually(async () => {
      expect(await status(phone)).toMatchObject({ preKeyCount: 230, pqPreKeyCount: 230 });
    });
    await eventually(() => expect(phone.client.metrics().preKeysRegenerated).toBe(2 * 130));
  });

  it('fills up to the level also where keys are claimed while it fills', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    await filled(phone);
    const friend = await enrolPhone(gateway.url, alice);
    const claim = async (): Promise<void> => {
      await friend.client.call('requestBundle', { claimId: randomUUID(), ...bob });
    };
    const { generate } = phone.keys.oneTimePreKeys;
    let generations = 0;
    phone.keys.oneTimePreKeys.generate = async (ids) => {
      // After the counts were told, and before they are acted on.
      if (generations++ === 0) for (let index = 0; index < 5; index++) await claim();
      await generate(ids);
    };
    for (let index = 0; index < 3; index++) await claim();
    await filled(phone);
    expect(generations).toBe(2);
  });

  it('misses no crossing, however claims and refills fall together', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    const friend = await enrolPhone(gateway.url, alice);
    for (let round = 0; round < 15; round++) {
      for (let index = 0; index < 6; index++) {
        await friend.client.call('requestBundle', { claimId: randomUUID(), ...bob });
        await status(phone);
      }
      await eventually(async () => {
        const { preKeyCount, pqPreKeyCount } = await status(phone);
        // The threshold.
        expect(Math.min(preKeyCount, pqPreKeyCount)).toBeGreaterThanOrEqual(10);
      });
    }
  });

  it('answers ids that were used before with new ones, also after its memory was lost', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    await filled(phone);
    const friend = await enrolPhone(gateway.url, alice);
    const seen = new Set<number>();
    const claim = async (): Promise<void> => {
      const { devices } = await friend.client.call('requestBundle', { claimId: randomUUID(), ...bob });
      const id = devices[0]!.oneTimePreKey!.keyId;
      expect(seen).not.toContain(id);
      seen.add(id);
    };
    phone.close();
    for (let index = 0; index < 8; index++) await claim();
    // The keys that were handed out are gone with the memory: the device believes that their ids are free.
    phone.disk.remove('kit');
    await phone.keys.oneTimePreKeys.delete(await phone.keys.oneTimePreKeys.ids());
    await phone.restart();
    expect(await phone.client.start()).toBe('ready');
    await filled(phone);
    for (let index = 0; index < POOL_LEVEL; index++) await claim();
  });

  it('leaps over the ids that a lost memory knew, and goes on from there', async () => {
    const phone = await enrolPhone(gateway.url, bob, { clock: { ...hurriedClock, random: () => 0.5 } });
    await filled(phone);
    const { oneTimePreKeys } = phone.keys;
    const highest = async (): Promise<number> => Math.max(...(await oneTimePreKeys.ids()));
    const known = await highest();
    phone.close();
    await claimedIds(8);
    phone.disk.remove('kit');
    await phone.restart();
    expect(await phone.client.start()).toBe('ready');
    await filled(phone);
    const leapt = await highest();
    expect(leapt).toBeGreaterThan(known + 1_000);
    for (let refills = 0; refills < 2; refills++) {
      const before = await highest();
      // The third claim of twelve crosses the threshold; one after the refill would leave the pool below its level.
      await claimedIds(3);
      await filled(phone);
      expect(await highest()).toBeGreaterThan(before);
    }
    expect(await highest()).toBeLessThan(leapt + 1_000);
  });

  it('answers ids under which the gateway has another key with new ones, and has that key withdrawn', async () => {
    const phone = await enrolPhone(gateway.url, bob, { clock: { ...hurriedClock, random: () => 0 } });
    await filled(phone);
    const next =
      1 + Math.max(...(await phone.keys.oneTimePreKeys.ids()), ...(await phone.keys.pqOneTimePreKeys.ids()));
    // Of an older install, say: nobody holds its private half any more.
    const stranger = new SignalDevice({ ...bob, firstPreKeyId: next });
    const { oneTimePreKeys } = stranger.morePreKeys(1);
    await post('/api/keys/add-prekeys', { preKeys: oneTimePreKeys });

    const friend = await enrolPhone(gateway.url, alice);
    for (let index = 0; index < 5; index++) {
      await friend.client.call('requestBundle', { claimId: randomUUID(), ...bob });
    }
    await eventually(() => expect(phone.client.metrics().preKeysRegenerated).toBeGreaterThan(0));
    // The check waits for its turn after the refill.
    await phone.client.checkKeys();
    expect(await phone.keys.oneTimePreKeys.ids()).not.toContain(next);
    for (let index = 0; index < POOL_LEVEL; index++) {
      friend.keys.forgetSession(bob);
      await friend.say(bob.userId, `message ${index}`);
    }
    await eventually(() => expect(phone.shown).toHaveLength(POOL_LEVEL));
    expect(phone.client.metrics().decryptionFailures).toBe(0);
  });

  it('gives up after a bounded number of rounds when every id is refused', async () => {
    // Without chance, new ids follow right after those that were refused.
    const phone = await enrolPhone(gateway.url, bob, { clock: { ...hurriedClock, random: () => 0 } });
    await filled(phone);
    const ids = await phone.keys.oneTimePreKeys.ids();
    const last = Math.max(...ids, ...(await phone.keys.pqOneTimePreKeys.ids()));
    const refused = Array.from({ length: 900 }, (_, index) => last + 1 + index);
    await phone.client.call('withdrawPreKeys', { preKeyIds: [...refused, ...ids.slice(0, 3)] });
    await phone.restart();
    expect(await phone.client.start()).toBe('ready');
    await eventually(() => expect(phone.client.snapshot().drainProgress).toBeNull());
    // The check waits for its turn after the refill.
    await phone.client.checkKeys();
    expect((await status(phone)).preKeyCount).toBe(POOL_LEVEL - 3);
    const rounds = ((await phone.keys.oneTimePreKeys.ids()).length - ids.length) / 3;
    expect(rounds).toBe(4);
  });
});
