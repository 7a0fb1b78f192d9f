// The promises of ports/key-store, for every engine that keeps them.
import { randomBytes, randomUUID } from 'node:crypto';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type {
  ClaimedBundle,
  ClaimRequest,
  DeviceKeysUpdate,
  Identity,
  KeySetTransaction,
  KeyStore,
  OneTimePreKey,
  PreKeyKind,
  SignedPreKey,
} from '../../src/ports/key-store.ts';
import { PRE_KEY_KINDS } from '../../src/ports/key-store.ts';
import { addressKey, type DeviceAddress } from '../../src/protocol/ids.ts';
import { DEVICE_ID_MAX, WITHDRAW_IDENTITIES_MAX, WITHDRAW_UNSEEN_MAX } from '../../src/protocol/limits.ts';

export interface OpenKeyStore {
  keys: KeyStore;
  /** The same store, as another node sees it, or this node after a restart. */
  otherNode: KeyStore;
  /** Resolves when somebody waits for a row that another holds. */
  isWaitedFor(): Promise<void>;
  close(): Promise<void>;
}

const NOW_MS = Date.UTC(2026, 0, 1);
const HOUR_MS = 3_600_000;
const DAY_MS = 24 * HOUR_MS;
const LOW_THRESHOLD = 3;

/** Bytes that mean nothing: a store never looks into a key. The id is in them, so that a mix-up shows. */
export function publicKeyOf(kind: PreKeyKind, keyId: number, variant = 0): Uint8Array {
  const bytes = new Uint8Array(kind === 'ec' ? 33 : 1569).fill(variant + 1);
  bytes[0] = kind === 'ec' ? 5 : 8;
  new DataView(bytes.buffer).setUint32(1, keyId);
  new DataView(bytes.buffer).setUint32(bytes.length - 4, keyId);
  return bytes;
}

export function signedPreKeyOf(kind: PreKeyKind, keyId: number, variant = 0): SignedPreKey {
  return { keyId, publicKey: publicKeyOf(kind, keyId, variant), signature: new Uint8Array(64).fill(keyId) };
}

function oneTimePreKeyOf(kind: PreKeyKind, keyId: number): OneTimePreKey {
  const { publicKey, signature } = signedPreKeyOf(kind, keyId, 7);
  return { keyId, publicKey, signature: kind === 'ec' ? null : signature };
}

export const base64 = (bytes: Uint8Array): string => Buffer.from(bytes).toString('base64');

function onWire({ keyId, publicKey, signature }: OneTimePreKey) {
  return { keyId, publicKey: base64(publicKey), signature: signature && base64(signature) };
}

export function identityOf(name: string): Identity {
  const canonicalKey = new Uint8Array(32).fill(name.charCodeAt(0));
  return { identityKey: Uint8Array.of(5, ...canonicalKey), canonicalKey, identityKeyEd25519: null };
}

export interface KeySet {
  identity?: Identity;
  registrationId?: number;
  signedPreKeyId?: number;
  lastResortPreKeyId?: number | null;
  ec?: readonly number[];
  pq?: readonly number[];
}

/** How ids of one kind compare that a client of identity A lists. */
async function compareIds(
  store: KeyStore,
  device: DeviceAddress,
  kind: PreKeyKind,
  listed: readonly number[],
  { canonicalKey: identity } = identityOf('A'),
) {
  const ids = { ec: null, pq: null, [kind]: listed };
  return (await store.compare(device, { identity, ids, handedOut: null })).ids[kind];
}

async function handedOut(store: KeyStore, device: DeviceAddress, sinceMs: number, limit: number) {
  const view = { identity: identityOf('A').canonicalKey, ids: { ec: null, pq: null } };
  return (await store.compare(device, { ...view, handedOut: { sinceMs, limit } })).handedOut;
}

/** Stores a key set in one transaction, in place of another identity's, as the rules of uploads do. */
export async function storeKeySet(store: KeyStore, device: DeviceAddress, set: KeySet): Promise<void> {
  const {
    identity = identityOf('A'),
    registrationId = 7,
    signedPreKeyId = 1,
    lastResortPreKeyId = null,
  } = set;
  await store.change(device, async (keys) => {
    const replaced =
      keys.current.identity !== null &&
      Buffer.compare(keys.current.identity.canonicalKey, identity.canonicalKey) !== 0;
    if (replaced) await keys.wipe('RECIPIENT_IDENTITY_CHANGED', NOW_MS);
    const update = updateOf(keys);
    if (replaced) update.availableCounts = { ec: 0, pq: 0 };
    if (replaced) update.claimedCounts = { ec: 0, pq: 0 };
    if (replaced) update.offersPq = false;
    await keys.activateSignedPreKey('ec', signedPreKeyOf('ec', signedPreKeyId), NOW_MS);
    if (lastResortPreKeyId !== null) {
      await keys.activateSignedPreKey('pq', signedPreKeyOf('pq', lastResortPreKeyId), NOW_MS);
    }
    for (const kind of PRE_KEY_KINDS) {
      const ids = set[kind] ?? [];
      await keys.addToPool(
        kind,
        ids.map((keyId) => oneTimePreKeyOf(kind, keyId)),
      );
      update.availableCounts[kind] += ids.length;
    }
    await keys.save({
      ...update,
      identity,
      registrationId,
      keyVersion: update.keyVersion + 1,
      countVersion: update.countVersion + 1,
      identityVersion: update.identityVersion + (replaced || keys.current.identity === null ? 1 : 0),
    });
  });
}

/** Adds one-time prekeys to what stands. */
async function addToPool(
  store: KeyStore,
  device: DeviceAddress,
  pools: Pick<KeySet, 'ec' | 'pq'>,
): Promise<void> {
  await store.change(device, async (keys) => {
    const update = updateOf(keys);
    for (const kind of PRE_KEY_KINDS) {
      const ids = pools[kind] ?? [];
      await keys.addToPool(
        kind,
        ids.map((keyId) => oneTimePreKeyOf(kind, keyId)),
      );
      update.availableCounts[kind] += ids.length;
    }
    await keys.save({ ...update, countVersion: update.countVersion + 1 });
  });
}

/** Takes every key away, as the rules of resets do. */
export async function wipeKeySet(
  store: KeyStore,
  device: DeviceAddress,
  nowMs = NOW_MS,
  how?: { leavesMessages: boolean },
): Promise<void> {
  await store.change(device, async (keys) => {
    await keys.wipe('RECIPIENT_KEYS_RESET', nowMs, how);
    const update = updateOf(keys);
    await keys.save({
      ...update,
      registrationId: null,
      identity: null,
      availableCounts: { ec: 0, pq: 0 },
      claimedCounts: { ec: 0, pq: 0 },
      offersPq: false,
      keyVersion: update.keyVersion + 1,
      identityVersion: update.identityVersion + 1,
    });
  });
}

export function updateOf(keys: KeySetTransaction): DeviceKeysUpdate {
  const { signedPreKeys: _, servedAtMs: __, fence: ___, revokedAtMs: ____, ...rest } = keys.current;
  return structuredClone(rest);
}

export function newDevice(deviceId = 1): DeviceAddress {
  return { userId: `user-${randomBytes(6).toString('hex')}`, deviceId };
}

const claimer: DeviceAddress = { userId: 'claimer', deviceId: 1 };

function requestOf(target: DeviceAddress | string, options: Partial<ClaimRequest> = {}): ClaimRequest {
  const [userId, deviceId] = typeof target === 'string' ? [target, null] : [target.userId, target.deviceId];
  return { claimer, claimId: randomUUID(), userId, deviceId, ...options };
}

const ids = (from: number, count: number): number[] => Array.from({ length: count }, (_, i) => from + i);
const ecIdOf = (bundle: ClaimedBundle | undefined): number | null | undefined =>
  bundle && (bundle.oneTimePreKey?.keyId ?? null);

/** @param open an empty store; every test has devices of its own on it */
export function describeKeyStore(engine: string, open: () => Promise<OpenKeyStore>): void {
  describe(`the key store (${engine})`, () => {
    let opened: OpenKeyStore;
    let keys: KeyStore;
    let otherNode: KeyStore;
    beforeAll(async () => {
      opened = await open();
      ({ keys, otherNode } = opened);
    });
    afterAll(() => opened.close());

    const claimAll = async (requests: ClaimRequest[], store = keys, nowMs = NOW_MS) => {
      const { bundles, ranLow } = await store.claim(requests, {
        nowMs,
        lowThreshold: LOW_THRESHOLD,
        waits: true,
      });
      return { bundles: bundles.map((list) => list!), ranLow };
    };
    const claim = async (request: ClaimRequest, store = keys, nowMs = NOW_MS) =>
      (await claimAll([request], store, nowMs)).bundles[0]!;
    const claimOne = async (device: DeviceAddress, options: Partial<ClaimRequest> = {}) =>
      (await claim(requestOf(device, options)))[0]!;
    const sweep = (nowMs: number, limit = 100) =>
      keys.sweep({ claimedBeforeMs: nowMs, replacedBeforeMs: nowMs, limit });
    const sweepAll = async (nowMs: number) => {
      while ((await sweep(nowMs)) >= 100);
    };
    const usedIds = (device: DeviceAddress, kind: PreKeyKind, identity: Identity, keyIds: number[]) =>
      keys.change(device, async (set) =>
        [...(await set.usedIds(kind, identity.canonicalKey, keyIds))].sort((a, b) => a - b),
      );
    const signedState = (
      device: DeviceAddress,
      kind: PreKeyKind,
      keyId: number,
      identity = identityOf('A'),
    ) => keys.change(device, (set) => set.signedPreKeyIdState(kind, identity.canonicalKey, keyId));

    describe('a device’s row', () => {
      it('is null for a device that never uploaded, and zeros and nulls inside a change', async () => {
        const device = newDevice();
        expect(await keys.read(device)).toBeNull();
        expect(await keys.devicesOf(device.userId)).toEqual([]);
        const current = await keys.change(device, async (set) => set.current);
        expect(current).toEqual({
          registrationId: null,
          identity: null,
          signedPreKeys: { ec: null, pq: null },
          signedPreKeyExpiresAtMs: null,
          availableCounts: { ec: 0, pq: 0 },
          claimedCounts: { ec: 0, pq: 0 },
          offersPq: false,
          keyVersion: 0,
          countVersion: 0,
          identityVersion: 0,
          updatedAtMs: null,
          servedAtMs: null,
          fence: 0,
          revokedAtMs: null,
          restoredAtMs: null,
        });
      });

      it('gives back what was saved, keys byte for byte, also to another node', async () => {
        const device = newDevice();
        const identity: Identity = {
          identityKey: randomBytes(32),
          canonicalKey: randomBytes(32),
          identityKeyEd25519: randomBytes(32),
        };
        const saved: DeviceKeysUpdate = {
          registrationId: 16_383,
          identity,
          signedPreKeyExpiresAtMs: NOW_MS + 1,
          availableCounts: { ec: 0, pq: 0 },
          claimedCounts: { ec: 4_000_000_000, pq: 5 },
          offersPq: true,
          keyVersion: 2 ** 48,
          countVersion: 2 ** 48 - 1,
          identityVersion: 3,
          updatedAtMs: NOW_MS,
          restoredAtMs: NOW_MS + 2,
        };
        const ec = signedPreKeyOf('ec', 2 ** 32 - 1);
        const pq = signedPreKeyOf('pq', 0);
        await keys.change(device, async (set) => {
          await set.activateSignedPreKey('ec', ec, NOW_MS);
          await set.activateSignedPreKey('pq', pq, NOW_MS);
          await set.save(saved);
        });
        for (const store of [keys, otherNode]) {
          const { identity: readIdentity, signedPreKeys, ...rest } = (await store.read(device))!;
          const { identity: _, ...savedRest } = saved;
          expect(rest).toEqual({ ...savedRest, servedAtMs: null, fence: 0, revokedAtMs: null });
          expect(plain(readIdentity!)).toEqual(plain(identity));
          expect(plain(signedPreKeys)).toMatchObject(plain({ ec, pq }) as object);
        }
      });

      it('is untouched by a change that throws, which throws the same', async () => {
        const device = newDevice();
        const failure = new Error('no');
        await expect(
          keys.change(device, async (set) => {
            await set.activateSignedPreKey('ec', signedPreKeyOf('ec', 1), NOW_MS);
            await set.addToPool('ec', [oneTimePreKeyOf('ec', 1)]);
            await set.withdraw('ec', identityOf('A').canonicalKey, [2]);
            throw failure;
          }),
        ).rejects.toBe(failure);
        expect(await keys.read(device)).toBeNull();
        await storeKeySet(keys, device, { ec: [1] });
        expect(await usedIds(device, 'ec', identityOf('A'), [2])).toEqual([]);
      });

      it('bears the number of the newest connection that asked for a change, whether or not anything was changed', async () => {
        const device = newDevice();
        const asked = async (fence: number | null, action: () => Promise<void> = async () => {}) => {
          await keys.change(device, action, { fence }).catch(() => {});
          return (await otherNode.read(device))?.fence;
        };
        expect(await asked(5)).toBe(5);
        expect(await asked(3)).toBe(5);
        expect(await asked(null)).toBe(5);
        const failing = () => Promise.reject(new Error('no'));
        expect(await asked(8, failing)).toBe(5);
        expect(await asked(8)).toBe(8);
      });

      it('is changed by one at a time, over all nodes', async () => {
        const device = newDevice();
        await Promise.all(
          ids(0, 20).map((i) =>
            (i % 2 === 0 ? keys : otherNode).change(device, async (set) => {
              await set.save({ ...updateOf(set), keyVersion: set.current.keyVersion + 1 });
            }),
          ),
        );
        expect((await keys.read(device))?.keyVersion).toBe(20);
      });

      it('is read as it stood at one moment, however often it is changed meanwhile', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { signedPreKeyId: 1 });
        let isChanging = true;
        const changing = (async () => {
          // Each is one change: the version counts them, as the ids do.
          for (const signedPreKeyId of ids(2, 100)) await storeKeySet(otherNode, device, { signedPreKeyId });
        })().finally(() => {
          isChanging = false;
        });
        const torn: unknown[] = [];
        while (isChanging) {
          const { keyVersion, signedPreKeys } = (await keys.read(device))!;
          if (signedPreKeys.ec?.keyId !== keyVersion)
            torn.push({ keyVersion, keyId: signedPreKeys.ec?.keyId });
        }
        await changing;
        expect(torn).toEqual([]);
      });

      it('is listed among the user’s devices, in order, while it has keys', async () => {
        const { userId } = newDevice();
        for (const deviceId of [127, 3, 20]) {
          await storeKeySet(keys, { userId, deviceId }, { registrationId: deviceId * 2 });
        }
        await storeKeySet(keys, { userId: `${userId}x`, deviceId: 9 }, {});
        expect(await keys.devicesOf(userId)).toEqual([
          { deviceId: 3, registrationId: 6 },
          { deviceId: 20, registrationId: 40 },
          { deviceId: 127, registrationId: 254 },
        ]);
        await wipeKeySet(keys, { userId, deviceId: 20 });
        expect((await keys.devicesOf(userId)).map((device) => device.deviceId)).toEqual([3, 127]);
      });
    });

    describe('claims', () => {
      it('give the whole bundle, as it was uploaded', async () => {
        const device = newDevice(5);
        await storeKeySet(keys, device, { lastResortPreKeyId: 9, ec: [11], pq: [12] });
        const bundle = await claimOne(device);
        const { signature: _, ...oneTimePreKey } = onWire(oneTimePreKeyOf('ec', 11));
        expect(bundle).toEqual({
          deviceId: 5,
          registrationId: 7,
          identity: { identityKey: base64(identityOf('A').identityKey), identityKeyEd25519: null },
          signedPreKey: onWire(signedPreKeyOf('ec', 1)),
          oneTimePreKey,
          pqPreKey: { ...onWire(oneTimePreKeyOf('pq', 12)), lastResort: false },
          isTargetSpared: false,
        });
        const without = await claimOne(device);
        expect(without.oneTimePreKey).toBeNull();
        expect(without.pqPreKey).toEqual({ ...onWire(signedPreKeyOf('pq', 9)), lastResort: true });
      });

      it('give an Ed25519 identity key where one was uploaded', async () => {
        const device = newDevice();
        const identityKeyEd25519 = Uint8Array.from(randomBytes(32));
        await storeKeySet(keys, device, { identity: { ...identityOf('A'), identityKeyEd25519 } });
        const told = await claimOne(device);
        expect(told.identity.identityKeyEd25519).toBe(base64(identityKeyEd25519));
        expect((await claimOne(device)).identity).toEqual(told.identity);
      });

      it('tell the last-resort key that stands, also where an older one had the id of the signed prekey', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { signedPreKeyId: 1, lastResortPreKeyId: 1 });
        await keys.change(device, async (set) => {
          await set.activateSignedPreKey('pq', signedPreKeyOf('pq', 2), NOW_MS);
          await set.save(updateOf(set));
        });
        const told = await claimOne(device);
        expect(told.pqPreKey).toEqual({ ...onWire(signedPreKeyOf('pq', 2)), lastResort: true });
        expect((await claimOne(device)).pqPreKey).toEqual(told.pqPreKey);
      });

      it('keep an identity key of 32 bytes apart from one of 33', async () => {
        const [short, long] = [newDevice(), newDevice()];
        const identity = identityOf('S');
        await storeKeySet(keys, short, { identity: { ...identity, identityKey: identity.canonicalKey } });
        await storeKeySet(keys, long, { identity });
        expect((await claimOne(short)).identity.identityKey).toBe(base64(identity.canonicalKey));
        expect((await claimOne(long)).identity.identityKey).toBe(base64(identity.identityKey));
      });

      it('tell the identity key in the form in which it came back after a reset', async () => {
        const device = newDevice();
        const identity = identityOf('A');
        await storeKeySet(keys, device, { identity });
        expect((await claimOne(device)).identity.identityKey).toBe(base64(identity.identityKey));
        await wipeKeySet(keys, device);
        await storeKeySet(keys, device, { identity: { ...identity, identityKey: identity.canonicalKey } });
        expect((await claimOne(device)).identity.identityKey).toBe(base64(identity.canonicalKey));
      });

      it('immunity 6: go out oldest upload first, in the order of the list, whatever the ids', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { ec: [50, 7, 4_294_967_295], pq: [8, 3] });
        await addToPool(keys, device, { ec: [0, 6], pq: [1] });
        const order = [50, 7, 4_294_967_295, 0, 6];
        for (const expected of order) expect(ecIdOf(await claimOne(device))).toBe(expected);
        expect(ecIdOf(await claimOne(device))).toBeNull();
      });

      it('go out in that order within a batch too, in the order of the requests', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { lastResortPreKeyId: 1, ec: [5, 4, 3], pq: [9, 2] });
        const { bundles } = await claimAll(ids(0, 5).map(() => requestOf(device)));
        expect(bundles.map((list) => ecIdOf(list[0]))).toEqual([5, 4, 3, null, null]);
        expect(bundles.map((list) => list[0]!.pqPreKey!.keyId)).toEqual([9, 2, 1, 1, 1]);
        expect(bundles.map((list) => list[0]!.pqPreKey!.lastResort)).toEqual([
          false,
          false,
          true,
          true,
          true,
        ]);
      });

      it('go past repetitions and spared requests within a batch, which spend none', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { lastResortPreKeyId: 1, ec: [5, 4, 3], pq: [9, 2] });
        const earlier = requestOf(device);
        await claimAll([earlier]);
        const spared = () => requestOf(device, { isTargetSpared: true });
        const batch = [spared(), earlier, requestOf(device), spared(), requestOf(device), requestOf(device)];
        // Once by a node that knows the device, and once, as repetitions, by one that does not.
        for (const store of [keys, otherNode]) {
          const { bundles } = await claimAll(batch, store);
          expect(bundles.map((list) => ecIdOf(list[0]))).toEqual([null, 5, 4, null, 3, null]);
          expect(bundles.map((list) => list[0]!.pqPreKey!.keyId)).toEqual([1, 9, 2, 1, 1, 1]);
        }
        expect(await keys.read(device)).toMatchObject({
          availableCounts: { ec: 0, pq: 0 },
          claimedCounts: { ec: 3, pq: 2 },
        });
      });

      it('of all devices leave out the claimer’s own, and are sorted by device id', async () => {
        const { userId } = newDevice();
        for (const deviceId of [30, 2, 111])
          await storeKeySet(keys, { userId, deviceId }, { ec: [deviceId] });
        const own = { userId, deviceId: 2 };
        expect((await claim(requestOf(userId))).map((bundle) => bundle.deviceId)).toEqual([2, 30, 111]);
        const others = await claim(requestOf(userId, { claimer: own }));
        expect(others.map((bundle) => bundle.deviceId)).toEqual([30, 111]);
        const named = await claim(requestOf(own, { claimer: own }));
        expect(named.map((bundle) => bundle.deviceId)).toEqual([2]);
      });

      it('of all devices are of as many as a user can have', async () => {
        const { userId } = newDevice();
        const all = ids(1, DEVICE_ID_MAX);
        for (const deviceId of all) await storeKeySet(keys, { userId, deviceId }, { ec: [deviceId] });
        expect((await claim(requestOf(userId))).map(ecIdOf)).toEqual(all);
      });

      it('of an unknown user or device are empty lists', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { ec: [1] });
        const { bundles, ranLow } = await claimAll([
          requestOf('nobody'),
          requestOf({ ...device, deviceId: 2 }),
          requestOf(device),
        ]);
        expect(bundles.map((list) => list.length)).toEqual([0, 0, 1]);
        expect(ranLow).toEqual([device]);
      });

      it('leave a device without a whole bundle out, and spend nothing of it', async () => {
        const { userId } = newDevice();
        const [whole, broken] = [
          { userId, deviceId: 1 },
          { userId, deviceId: 2 },
        ];
        await storeKeySet(keys, whole, { ec: [1] });
        await keys.change(broken, async (set) => {
          await set.addToPool('ec', [oneTimePreKeyOf('ec', 5)]);
          await set.save({
            ...updateOf(set),
            identity: identityOf('A'),
            registrationId: 1,
            availableCounts: { ec: 1, pq: 0 },
          });
        });
        expect((await claim(requestOf(userId))).map((bundle) => bundle.deviceId)).toEqual([1]);
        expect(await claim(requestOf(broken))).toEqual([]);
        expect(await keys.read(broken)).toMatchObject({
          availableCounts: { ec: 1, pq: 0 },
          claimedCounts: { ec: 0, pq: 0 },
          countVersion: 0,
        });
        expect(await usedIds(broken, 'ec', identityOf('A'), [5])).toEqual([]);
      });

      it('count what they spent', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { lastResortPreKeyId: 1, ec: [1, 2], pq: [1] });
        await claimAll(ids(0, 3).map(() => requestOf(device)));
        expect(await otherNode.read(device)).toMatchObject({
          availableCounts: { ec: 0, pq: 0 },
          claimedCounts: { ec: 2, pq: 1 },
        });
      });

      it.each(PRE_KEY_KINDS)(
        'raise countVersion when they spend of kind %s, and leave it when they don’t',
        async (kind) => {
          const device = newDevice();
          await storeKeySet(keys, device, { lastResortPreKeyId: 1, [kind]: [1] });
          const versionOf = async () => (await keys.read(device))!.countVersion;
          const before = await versionOf();
          const { claimId } = requestOf(device);
          await claimOne(device, { claimId });
          const after = await versionOf();
          expect(after).toBeGreaterThan(before);
          await claimOne(device, { claimId });
          await claimOne(device);
          expect(await versionOf()).toBe(after);
        },
      );

      it.each(PRE_KEY_KINDS)(
        'tell once when the %s pool falls below the threshold, and once at zero',
        async (kind) => {
          const device = newDevice();
          const spent = ids(1, LOW_THRESHOLD + 1);
          // The other kind has plenty, so that only one crosses.
          const plenty = ids(1, 50);
          await storeKeySet(keys, device, { lastResortPreKeyId: 1, ec: plenty, pq: plenty, [kind]: spent });
          const told: boolean[] = [];
          for (let i = 0; i < LOW_THRESHOLD + 3; i++) {
            const { ranLow } = await claimAll([requestOf(device)]);
            expect(ranLow.every((low) => addressKey(low) === addressKey(device))).toBe(true);
            told.push(ranLow.length > 0);
          }
          // Left after each: 3 (the threshold itself), 2, 1, 0, and then nothing falls any more.
          expect(told).toEqual([false, true, false, true, false, false]);
        },
      );

      it('tell of each crossing anew after the pool was filled again', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { ec: [1] });
        expect((await claimAll([requestOf(device)])).ranLow).toEqual([device]);
        await addToPool(keys, device, { ec: [2, 3] });
        // Two, below the threshold all the time: one falls, and nothing is crossed.
        expect((await claimAll([requestOf(device)])).ranLow).toEqual([]);
        expect((await claimAll([requestOf(device)])).ranLow).toEqual([device]);
      });

      it('tell once of a batch that crosses both at once, and of each of its devices', async () => {
        const [one, other, none] = [newDevice(), newDevice(), newDevice()];
        await storeKeySet(keys, one, { ec: ids(1, 5) });
        await storeKeySet(keys, other, { ec: ids(1, 4) });
        await storeKeySet(keys, none, { ec: ids(1, 50) });
        const requests = [...ids(0, 7).map(() => one), other, other, none].map((device) => requestOf(device));
        const { ranLow } = await claimAll(requests);
        expect(ranLow.map(addressKey).sort()).toEqual([one, other].map(addressKey).sort());
      });

      it('hand out no key twice and deny none, from many batches on two nodes at once', async () => {
        const { userId } = newDevice();
        const targets = ids(1, 6).map((deviceId) => ({ userId, deviceId }));
        for (const device of targets) await storeKeySet(keys, device, { ec: ids(1, 30), pq: ids(1, 20) });
        const answers = await Promise.all(
          ids(0, 40).map((i) => {
            const node = i % 2 === 0 ? keys : otherNode;
            const order = i % 3 === 0 ? [...targets].reverse() : targets;
            return claimAll(
              i % 4 === 0 ? [requestOf(userId)] : order.map((device) => requestOf(device)),
              node,
            );
          }),
        );
        for (const device of targets) {
          const mine = answers
            .flatMap(({ bundles }) => bundles.flat())
            .filter((bundle) => bundle.deviceId === device.deviceId);
          expect(mine).toHaveLength(40);
          const handedOut = mine.map(ecIdOf).filter((keyId) => keyId !== null);
          expect(handedOut.sort((a, b) => a! - b!)).toEqual(ids(1, 30));
          const pqIds = mine.flatMap((bundle) => bundle.pqPreKey?.keyId ?? []).sort((a, b) => a - b);
          expect(pqIds).toEqual(ids(1, 20));
          expect(await keys.read(device)).toMatchObject({
            availableCounts: { ec: 0, pq: 0 },
            claimedCounts: { ec: 30, pq: 20 },
          });
        }
      });

      it('wait for a change of the device that is under way, and see what it did', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { ec: [1] });
        const changing = gate();
        const finish = gate();
        const change = otherNode.change(device, async (set) => {
          await set.withdraw('ec', identityOf('A').canonicalKey, 'all');
          await set.addToPool('ec', [oneTimePreKeyOf('ec', 2)]);
          await set.save({ ...updateOf(set), availableCounts: { ec: 1, pq: 0 } });
          changing.open();
          await finish.opened;
        });
        await changing.opened;
        const claims = claimAll([requestOf(device), requestOf(device)]);
        await opened.isWaitedFor();
        finish.open();
        await change;
        const { bundles, ranLow } = await claims;
        expect(bundles.map((list) => ecIdOf(list[0]))).toEqual([2, null]);
        expect(ranLow).toEqual([device]);
      });

      it('that wait answer each request of their batch with its own, and each device once', async () => {
        const { userId } = newDevice();
        const [held, free] = [
          { userId, deviceId: 1 },
          { userId, deviceId: 2 },
        ];
        for (const device of [held, free])
          await storeKeySet(keys, device, { ec: [1, 2].map((nth) => 10 * device.deviceId + nth) });
        const changing = gate();
        const finish = gate();
        const change = otherNode.change(held, async () => {
          changing.open();
          await finish.opened;
        });
        await changing.opened;
        const claims = claimAll([requestOf(free), requestOf(userId), requestOf(held)]);
        await opened.isWaitedFor();
        finish.open();
        await change;
        const { bundles } = await claims;
        expect(bundles.map((list) => list.map(ecIdOf))).toEqual([[21], [11, 22], [12]]);
      });

      it('that don’t wait leave such a device unanswered, and are held up for no other', async () => {
        const { userId } = newDevice();
        const [held, free] = [
          { userId, deviceId: 1 },
          { userId, deviceId: 2 },
        ];
        for (const device of [held, free]) await storeKeySet(keys, device, { ec: [1, 2, 3] });
        const changing = gate();
        const finish = gate();
        const change = otherNode.change(held, async () => {
          changing.open();
          await finish.opened;
        });
        await changing.opened;
        const requests = [requestOf(held), requestOf(free), requestOf(userId)];
        const how = { nowMs: NOW_MS, lowThreshold: LOW_THRESHOLD, waits: false };
        const { bundles } = await keys.claim(requests, how);
        expect(bundles.map((list) => list?.map(ecIdOf))).toEqual([undefined, [1], undefined]);
        finish.open();
        await change;
        // Asked again, each gets the rest, and what it was given the first time.
        const again = await keys.claim(requests, how);
        expect(again.bundles.map((list) => list?.map(ecIdOf))).toEqual([[1], [1], [2, 2]]);
        expect((await keys.read(free))?.availableCounts.ec).toBe(1);
      });

      it('that don’t wait are answered beside repetitions, which come first in the batch', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { ec: [1, 2, 3] });
        const earlier = requestOf(device);
        await claim(earlier);
        const { bundles } = await keys.claim([earlier, requestOf(device), requestOf(device)], {
          nowMs: NOW_MS,
          lowThreshold: LOW_THRESHOLD,
          waits: false,
        });
        expect(bundles.map((list) => list?.map(ecIdOf))).toEqual([[1], [2], [3]]);
      });

      it('see what a change that rolled back left alone', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { ec: [1, 2] });
        const changing = gate();
        const finish = gate();
        const change = otherNode
          .change(device, async (set) => {
            await set.withdraw('ec', identityOf('A').canonicalKey, 'all');
            await set.save({ ...updateOf(set), availableCounts: { ec: 0, pq: 0 } });
            changing.open();
            await finish.opened;
            throw new Error('rolled back');
          })
          .catch(() => {});
        await changing.opened;
        const claims = claimAll([requestOf(device), requestOf(device)]);
        await opened.isWaitedFor();
        finish.open();
        await change;
        expect((await claims).bundles.map((list) => ecIdOf(list[0]))).toEqual([1, 2]);
      });

      it('of a device that is wiped beside them give nothing of the old key set', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { ec: ids(1, 20) });
        const results = await Promise.all([
          ...ids(0, 8).map(() => claim(requestOf(device), otherNode)),
          wipeKeySet(keys, device),
          ...ids(0, 8).map(() => claim(requestOf(device))),
        ]);
        const bundles = results.flatMap((result) => result ?? []);
        expect(new Set(bundles.map(ecIdOf)).size).toBe(bundles.length);
        expect(await claim(requestOf(device))).toEqual([]);
        await storeKeySet(keys, device, { identity: identityOf('B'), signedPreKeyId: 2, ec: [1] });
        expect(await claimOne(device)).toMatchObject({
          signedPreKey: { keyId: 2 },
          oneTimePreKey: { keyId: 1 },
        });
      });
    });

    describe('a claim that spares its target', () => {
      const spared = (device: DeviceAddress, options: Partial<ClaimRequest> = {}) =>
        requestOf(device, { isTargetSpared: true, ...options });

      it('gives the bundle with the last-resort key, spends nothing, and alarms nobody', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { lastResortPreKeyId: 7, ec: [1], pq: [2] });
        const before = (await keys.read(device))!;
        const { bundles, ranLow } = await claimAll([spared(device)]);
        expect(bundles[0]).toMatchObject([
          {
            deviceId: 1,
            oneTimePreKey: null,
            pqPreKey: { keyId: 7, lastResort: true },
            isTargetSpared: true,
          },
        ]);
        expect(ranLow).toEqual([]);
        const { availableCounts, claimedCounts, countVersion } = (await keys.read(device))!;
        expect({ availableCounts, claimedCounts, countVersion }).toEqual({
          availableCounts: before.availableCounts,
          claimedCounts: before.claimedCounts,
          countVersion: before.countVersion,
        });
        expect(await claimOne(device)).toMatchObject({ isTargetSpared: false, oneTimePreKey: { keyId: 1 } });
      });

      it('is answered in one statement with others of the same device, which get the oldest keys', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { ec: [5, 4, 3] });
        const { bundles } = await claimAll([
          spared(device),
          requestOf(device),
          spared(device),
          requestOf(device),
          spared(device),
        ]);
        expect(bundles.map((list) => ecIdOf(list[0]))).toEqual([null, 5, null, 4, null]);
        expect(bundles.map((list) => list[0]!.isTargetSpared)).toEqual([true, false, true, false, true]);
        expect(ecIdOf(await claimOne(device))).toBe(3);
      });

      it('gets no key beside a single other, which gets it alone', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { lastResortPreKeyId: 1, ec: [5], pq: [6] });
        const { bundles } = await claimAll([spared(device), requestOf(device), spared(device)]);
        expect(bundles.map((list) => ecIdOf(list[0]))).toEqual([null, 5, null]);
        expect(bundles.map((list) => list[0]!.pqPreKey!.keyId)).toEqual([1, 6, 1]);
        expect((await keys.read(device))!.claimedCounts).toEqual({ ec: 1, pq: 1 });
      });

      it('is repeated as it was answered, whichever way it is asked again', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { ec: [1, 2] });
        const [without, withKey] = [{ claimId: randomUUID() }, { claimId: randomUUID() }];
        await claim(spared(device, without));
        await claim(requestOf(device, withKey));
        for (const isTargetSpared of [true, false]) {
          expect(await claimOne(device, { ...without, isTargetSpared })).toMatchObject({
            oneTimePreKey: null,
            isTargetSpared: true,
          });
          expect(await claimOne(device, { ...withKey, isTargetSpared })).toMatchObject({
            oneTimePreKey: { keyId: 1 },
            isTargetSpared: false,
          });
        }
        expect((await keys.read(device))!.availableCounts.ec).toBe(1);
      });
    });

    describe('a repeated claim', () => {
      it('gets its first answer and spends nothing, on any node', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { lastResortPreKeyId: 1, ec: [1, 2], pq: [3, 4] });
        const request = requestOf(device);
        const first = await claim(request);
        for (const store of [keys, otherNode])
          expect(plain(await claim(request, store))).toEqual(plain(first));
        expect((await keys.read(device))?.availableCounts).toEqual({ ec: 1, pq: 1 });
      });

      it('gets its first answer also where that was without, and keys came since', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { lastResortPreKeyId: 1 });
        const request = requestOf(device);
        expect(ecIdOf((await claim(request))[0])).toBeNull();
        await addToPool(keys, device, { ec: [1], pq: [1] });
        const [again] = await claim(request, otherNode);
        expect(ecIdOf(again)).toBeNull();
        expect(again!.pqPreKey).toMatchObject({ lastResort: true });
        expect((await keys.read(device))?.availableCounts).toEqual({ ec: 1, pq: 1 });
      });

      it('gets its first answer for a day, over the retention sweep', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { ec: [1, 2] });
        const request = requestOf(device);
        const first = await claim(request);
        const later = NOW_MS + DAY_MS;
        await sweep(later - DAY_MS);
        expect(plain(await claim(request, otherNode, later))).toEqual(plain(first));
      });

      it('gets the signed prekeys that it got, although they were replaced since', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { lastResortPreKeyId: 1, ec: [1] });
        const request = requestOf(device);
        const first = await claim(request);
        await keys.change(device, async (set) => {
          await set.activateSignedPreKey('ec', signedPreKeyOf('ec', 2), NOW_MS);
          await set.activateSignedPreKey('pq', signedPreKeyOf('pq', 2), NOW_MS);
          await set.save({ ...updateOf(set), registrationId: 8 });
        });
        expect(plain(await claim(request))).toEqual(plain(first));
        expect(await claimOne(device)).toMatchObject({
          registrationId: 8,
          signedPreKey: { keyId: 2 },
          pqPreKey: { keyId: 2 },
        });
      });

      it('gets the signed prekeys of its time, also where one of them alone was replaced', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { lastResortPreKeyId: 1 });
        const requests = ids(0, 3).map(() => requestOf(device.userId));
        const answers = [await claim(requests[0]!)];
        for (const [nth, kind] of PRE_KEY_KINDS.entries()) {
          await keys.change(device, async (set) => {
            await set.activateSignedPreKey(kind, signedPreKeyOf(kind, 2), NOW_MS);
            await set.save(updateOf(set));
          });
          answers.push(await claim(requests[nth + 1]!));
        }
        expect(answers.map(([bundle]) => [bundle!.signedPreKey.keyId, bundle!.pqPreKey!.keyId])).toEqual([
          [1, 1],
          [2, 1],
          [2, 2],
        ]);
        // By a node that knows none of them, and by one that knows the last.
        for (const store of [otherNode, keys]) {
          expect(plain((await claimAll(requests, store)).bundles)).toEqual(plain(answers));
        }
      });

      it('is answered anew where the identity was replaced since', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { ec: [1] });
        const request = requestOf(device);
        await claim(request);
        await storeKeySet(keys, device, { identity: identityOf('B'), ec: [1] });
        const [anew] = await claim(request);
        expect(anew!.identity.identityKey).toBe(base64(identityOf('B').identityKey));
        expect(ecIdOf(anew)).toBe(1);
        expect((await keys.read(device))?.availableCounts.ec).toBe(0);
      });

      it('is another’s where claimer, device or id differ in anything', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { ec: ids(1, 9) });
        const { claimId } = requestOf(device);
        const others = [
          { claimId },
          { claimId, claimer: { ...claimer, deviceId: 2 } },
          { claimId, claimer: { ...claimer, userId: 'claimer.1' } },
          {},
        ];
        const answers: unknown[] = [];
        for (const other of others) answers.push(ecIdOf(await claimOne(device, other)));
        expect(answers).toEqual([1, 2, 3, 4]);
      });

      it('spends for a device that it had not asked before, and for no other', async () => {
        const { userId } = newDevice();
        const [one, other] = [
          { userId, deviceId: 1 },
          { userId, deviceId: 2 },
        ];
        await storeKeySet(keys, one, { ec: [1, 2] });
        const { claimId } = requestOf(userId);
        await claim(requestOf(one, { claimId }));
        await storeKeySet(keys, other, { ec: [5, 6] });
        const both = await claim(requestOf(userId, { claimId }));
        expect(both.map(ecIdOf)).toEqual([1, 5]);
      });

      it('costs one key also where its copies overlap within one batch', async () => {
        const { userId } = newDevice();
        const targets = [1, 2].map((deviceId) => ({ userId, deviceId }));
        for (const device of targets) await storeKeySet(keys, device, { ec: [1, 2, 3] });
        const claimId = randomUUID();
        const [one, all, stranger] = [
          requestOf(targets[0]!, { claimId }),
          requestOf(userId, { claimId }),
          requestOf(targets[0]!),
        ];
        const { bundles } = await claimAll([one, all, stranger, all, one]);
        expect(bundles.map((list) => list.length)).toEqual([1, 2, 1, 2, 1]);
        expect(plain(bundles[1]![0]!)).toEqual(plain(bundles[0]![0]!));
        expect(plain(bundles[3]!)).toEqual(plain(bundles[1]!));
        expect(plain(bundles[4]!)).toEqual(plain(bundles[0]!));
        expect(ecIdOf(bundles[2]![0])).not.toBe(ecIdOf(bundles[0]![0]));
        expect((await keys.read(targets[0]!))?.availableCounts.ec).toBe(1);
        expect((await keys.read(targets[1]!))?.availableCounts.ec).toBe(2);
      });

      it('costs one key also where a copy for one device follows one for all', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { ec: [1, 2] });
        const claimId = randomUUID();
        const { bundles } = await claimAll([
          requestOf(device.userId, { claimId }),
          requestOf(device, { claimId }),
        ]);
        expect(bundles.map((list) => list.map(ecIdOf))).toEqual([[1], [1]]);
        expect((await keys.read(device))?.availableCounts.ec).toBe(1);
      });

      it('costs one key from many callers on two nodes at once, and gives all the same', async () => {
        const { userId } = newDevice();
        const targets = [1, 2, 3].map((deviceId) => ({ userId, deviceId }));
        for (const device of targets) await storeKeySet(keys, device, { ec: ids(1, 40), pq: ids(1, 40) });
        const request = requestOf(userId);
        const answers = await Promise.all(
          ids(0, 20).map((i) => claim(request, i % 2 === 0 ? keys : otherNode)),
        );
        for (const answer of answers) expect(plain(answer)).toEqual(plain(answers[0]!));
        for (const device of targets) {
          expect((await keys.read(device))?.availableCounts).toEqual({ ec: 39, pq: 39 });
        }
      });
    });

    describe('used ids', () => {
      const everyTime = [1, 2, 3, 4];

      it.each(PRE_KEY_KINDS)('of kind %s are those handed out or withdrawn, and no others', async (kind) => {
        const device = newDevice();
        await storeKeySet(keys, device, { lastResortPreKeyId: 1, ec: [1, 2], pq: [1, 2] });
        await claimOne(device);
        await keys.change(device, async (set) => {
          expect(await set.withdraw(kind, identityOf('A').canonicalKey, [2, 4])).toBe(1);
        });
        expect(await usedIds(device, kind, identityOf('A'), everyTime)).toEqual([1, 2, 4]);
        const other = kind === 'ec' ? 'pq' : 'ec';
        expect(await usedIds(device, other, identityOf('A'), everyTime)).toEqual([1]);
        expect(await usedIds({ ...device, deviceId: 2 }, kind, identityOf('A'), everyTime)).toEqual([]);
      });

      it('stay used after the claim’s record was swept', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { lastResortPreKeyId: 1, ec: [1, 3], pq: [2] });
        await sweepAll(NOW_MS + 1);
        await claimOne(device);
        await claimOne(device);
        expect(await sweep(NOW_MS + 1)).toBe(2);
        expect(await usedIds(device, 'ec', identityOf('A'), everyTime)).toEqual([1, 3]);
        expect(await usedIds(device, 'pq', identityOf('A'), everyTime)).toEqual([2]);
        expect(await compareIds(keys, device, 'ec', everyTime)).toEqual({
          used: [1, 3],
          unknown: [2, 4],
          notListed: [],
        });
      });

      it('of an identity that is replaced are free for the next, and used again when it comes back', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { ec: [1, 2], pq: [3] });
        await claimOne(device);
        await storeKeySet(keys, device, { identity: identityOf('B'), signedPreKeyId: 2, ec: [1, 4] });
        expect(await usedIds(device, 'ec', identityOf('B'), everyTime)).toEqual([]);
        await claimOne(device);
        expect(await usedIds(device, 'ec', identityOf('B'), everyTime)).toEqual([1]);
        await storeKeySet(keys, device, { signedPreKeyId: 3 });
        expect(await usedIds(device, 'ec', identityOf('A'), everyTime)).toEqual([1]);
        expect(await usedIds(device, 'pq', identityOf('A'), everyTime)).toEqual([3]);
      });

      it('outlive a reset, also where they were swept or withdrawn before', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { ec: [1, 2, 3] });
        await claimOne(device);
        await sweep(NOW_MS + 1);
        await claimOne(device);
        await keys.change(device, (set) => set.withdraw('ec', identityOf('A').canonicalKey, [4]));
        await wipeKeySet(keys, device);
        await storeKeySet(keys, device, { signedPreKeyId: 2 });
        // What waited unclaimed was never handed out: it may be offered again.
        expect(await usedIds(device, 'ec', identityOf('A'), everyTime)).toEqual([1, 2, 4]);
      });

      it('may be many, scattered and large', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, {});
        const scattered = ids(0, 1000).map((i) => 2 ** 32 - 1 - 3 * i);
        await keys.change(device, async (set) => {
          expect(await set.withdraw('ec', identityOf('A').canonicalKey, scattered)).toBe(0);
        });
        const asked = ids(0, 2000).map((i) => 2 ** 32 - 1 - i);
        const used = await usedIds(device, 'ec', identityOf('A'), asked);
        expect(used).toEqual(asked.filter((id) => (2 ** 32 - 1 - id) % 3 === 0).reverse());
      });
    });

    describe('used ids in great number', () => {
      const { canonicalKey } = identityOf('A');

      it('are found by their hundred thousands, each without a look at the others', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, {});
        const scattered = ids(0, 100_000).map((i) => 2 ** 32 - 1 - 3 * i);
        await keys.change(device, async (set) => {
          await set.addToPool(
            'ec',
            scattered.map((keyId) => ({ keyId, publicKey: Uint8Array.of(5), signature: null })),
          );
          expect(await set.withdraw('ec', canonicalKey, 'all')).toBe(100_000);
        });
        const asked = ids(0, 2000).map((i) => 2 ** 32 - 1 - 2 * i);
        const used = asked.filter((keyId) => (2 ** 32 - 1 - keyId) % 3 === 0).reverse();
        const unknown = asked.filter((keyId) => (2 ** 32 - 1 - keyId) % 3 !== 0).reverse();
        expect(await usedIds(device, 'ec', identityOf('A'), asked)).toEqual(used);
        expect(await compareIds(keys, device, 'ec', asked)).toEqual({ used, unknown, notListed: [] });
      });

      it('are taken for ids that were never there up to a bound, which no other id meets', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { lastResortPreKeyId: 1, ec: [1, 3, 5], pq: [1] });
        await claimOne(device);
        const withdraw = (kind: PreKeyKind, keyIds: number[]) =>
          keys.change(device, (set) => set.withdraw(kind, canonicalKey, keyIds));
        const unseen = ids(0, WITHDRAW_UNSEEN_MAX).map((i) => 101 + 2 * i);
        expect(await withdraw('ec', unseen.slice(1))).toBe(0);
        // What waits, was handed out or was withdrawn before counts for nothing.
        expect(await withdraw('ec', [1, 3, ...unseen.slice(1, 99)])).toBe(1);
        expect(await withdraw('ec', [5, unseen[0]!, 100])).toBeNull();
        expect(await usedIds(device, 'ec', identityOf('A'), [1, 3, 5, 100, 101, 103])).toEqual([1, 3, 103]);
        expect(await withdraw('ec', [unseen[0]!])).toBe(0);
        expect(await withdraw('ec', [100])).toBeNull();
        expect(await withdraw('ec', [1, 5, ...unseen])).toBe(1);
        expect(await withdraw('pq', [100])).toBe(0);
      });

      it('are taken under so many identities that the device may have, and always under the one that it has', async () => {
        const device = newDevice();
        const withdrawUnder = (name: string, keyId: number) =>
          keys.change(device, (set) => set.withdraw('ec', identityOf(name).canonicalKey, [keyId]));
        await storeKeySet(keys, device, { identity: identityOf('A') });
        const others = [...'BCDEFGHI'];
        expect(others).toHaveLength(WITHDRAW_IDENTITIES_MAX);
        for (const name of others) expect(await withdrawUnder(name, 1)).toBe(0);
        expect(await withdrawUnder('Z', 1)).toBeNull();
        for (const name of ['A', ...others]) expect(await withdrawUnder(name, 2)).toBe(0);
        expect(await usedIds(device, 'ec', identityOf('Z'), [1])).toEqual([]);
        expect(await usedIds(device, 'ec', identityOf('B'), [1, 2])).toEqual([1, 2]);
      });
    });

    describe('the pool', () => {
      it('takes nothing out for another device, kind or id, and says what it took', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { ec: ids(1, 5), pq: ids(1, 5) });
        await storeKeySet(keys, { ...device, deviceId: 2 }, { ec: ids(1, 5) });
        const { canonicalKey } = identityOf('A');
        await keys.change(device, async (set) => {
          expect(await set.withdraw('ec', canonicalKey, [2, 9])).toBe(1);
          expect(await set.withdraw('ec', canonicalKey, [2, 9])).toBe(0);
          expect(await set.withdraw('ec', canonicalKey, [])).toBe(0);
          expect([...(await set.pooled('ec', ids(0, 9))).keys()].sort()).toEqual([1, 3, 4, 5]);
          expect(await set.withdraw('ec', canonicalKey, 'all')).toBe(4);
          expect((await set.pooled('pq', ids(0, 9))).size).toBe(5);
          await set.save({ ...updateOf(set), availableCounts: { ec: 0, pq: 5 } });
        });
        expect(ecIdOf(await claimOne(device))).toBeNull();
        expect(ecIdOf(await claimOne({ ...device, deviceId: 2 }))).toBe(1);
        expect(await usedIds(device, 'ec', identityOf('A'), ids(0, 10))).toEqual([1, 2, 3, 4, 5, 9]);
      });

      it('tells the public keys that wait, byte for byte', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { ec: [1], pq: [2] });
        await keys.change(device, async (set) => {
          expect(plain(await set.pooled('ec', [1, 2]))).toEqual(
            plain(new Map([[1, publicKeyOf('ec', 1, 7)]])),
          );
          expect(plain(await set.pooled('pq', [1, 2]))).toEqual(
            plain(new Map([[2, publicKeyOf('pq', 2, 7)]])),
          );
          expect(await set.pooled('ec', [])).toEqual(new Map());
        });
      });

      it('immunity 20: takes no second key under an id that waits', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { ec: [1] });
        await expect(addToPool(keys, device, { ec: [2, 1] })).rejects.toThrow();
        expect((await keys.read(device))?.availableCounts.ec).toBe(1);
        expect(ecIdOf(await claimOne(device))).toBe(1);
        expect(ecIdOf(await claimOne(device))).toBeNull();
      });

      it('compares a client’s ids: used, unknown, and waiting but not listed', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { lastResortPreKeyId: 1, ec: [10, 11, 12], pq: [10] });
        await claimOne(device);
        expect(await compareIds(keys, device, 'ec', [9, 10, 11])).toEqual({
          used: [10],
          unknown: [9],
          notListed: [12],
        });
        expect(await compareIds(keys, device, 'pq', [])).toEqual({
          used: [],
          unknown: [],
          notListed: [],
        });
        expect(await compareIds(keys, newDevice(), 'ec', [1])).toEqual({
          used: [],
          unknown: [1],
          notListed: [],
        });
      });

      it('compares nothing under another identity than the device has, and keeps what is withdrawn under it', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { ec: [1, 2, 3] });
        await claimOne(device);
        const other = identityOf('B').canonicalKey;
        expect(await compareIds(keys, device, 'ec', [1, 2], identityOf('B'))).toEqual({
          used: [],
          unknown: [1, 2],
          notListed: [],
        });
        // Claimed under the present identity: under the other one it was never seen until now.
        await keys.change(device, async (set) => {
          await set.withdraw('ec', other, [1, 2]);
        });
        expect(await usedIds(device, 'ec', identityOf('B'), [1, 2, 3])).toEqual([1, 2]);
      });

      it('compares with what stands at one moment, however the keys are changed meanwhile', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { ec: ids(1, 40) });
        const identity = identityOf('A').canonicalKey;
        const view = { identity, ids: { ec: [], pq: null }, handedOut: { sinceMs: 0, limit: 99 } };
        const changes = Promise.all([
          ...ids(0, 30).map(() => claimOne(device)),
          ...ids(50, 10).map((keyId) => addToPool(otherNode, device, { ec: [keyId] })),
        ]);
        let isOver = false;
        const end = (): void => {
          isOver = true;
        };
        void changes.then(end, end);
        const seen = new Set<number>();
        while (!isOver) {
          const { keys: found, ids: compared, handedOut: given } = await keys.compare(device, view);
          expect(compared.ec.notListed).toHaveLength(found!.availableCounts.ec);
          expect(given).toHaveLength(found!.claimedCounts.ec);
          seen.add(found!.countVersion);
        }
        await changes;
        expect(seen.size).toBeGreaterThan(2);
      });

      it('answers each of many who ask at once, whatever each of them asks', async () => {
        const devices = ids(0, 150).map(() => newDevice());
        await Promise.all(
          devices.map((device, nth) =>
            storeKeySet(keys, device, { lastResortPreKeyId: nth, ec: [nth, 1000] }),
          ),
        );
        const answers = await Promise.all(
          devices.flatMap((device, nth) => [
            compareIds(keys, device, 'ec', [1000, 2000 + nth]),
            keys.read(device),
            compareIds(keys, newDevice(), 'pq', [500 + nth, 7]),
          ]),
        );
        devices.forEach((_, nth) => {
          expect(answers.slice(nth * 3, nth * 3 + 3)).toMatchObject([
            { used: [], unknown: [2000 + nth], notListed: [nth] },
            { signedPreKeys: { pq: { keyId: nth } } },
            { used: [], unknown: [7, 500 + nth], notListed: [] },
          ]);
        });
      });

      it('tells the ids handed out since a time, newest first, and no more than asked for', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { ec: ids(1, 4) });
        for (const hour of [0, 1, 2, 3]) await claim(requestOf(device), keys, NOW_MS + hour * HOUR_MS);
        expect(await handedOut(keys, device, NOW_MS + HOUR_MS, 9)).toEqual([4, 3, 2]);
        expect(await handedOut(keys, device, NOW_MS, 2)).toEqual([4, 3]);
        await storeKeySet(keys, device, { identity: identityOf('B'), signedPreKeyId: 2 });
        expect(await handedOut(keys, device, NOW_MS, 9)).toEqual([]);
      });
    });

    describe('the id of a signed prekey', () => {
      it.each(PRE_KEY_KINDS)('of kind %s is free, then active, then retired for good', async (kind) => {
        const device = newDevice();
        await storeKeySet(keys, device, { signedPreKeyId: 1, lastResortPreKeyId: 1 });
        expect(await signedState(device, kind, 2)).toEqual({ state: 'free' });
        expect(plain(await signedState(device, kind, 1))).toEqual(
          plain({ state: 'active', publicKey: publicKeyOf(kind, 1) }),
        );
        await storeKeySet(keys, device, { signedPreKeyId: 2, lastResortPreKeyId: 2 });
        expect(await signedState(device, kind, 1)).toEqual({ state: 'retired' });
        expect((await keys.read(device))?.signedPreKeys[kind]?.keyId).toBe(2);
        await sweep(NOW_MS + 1);
        expect(await signedState(device, kind, 1)).toEqual({ state: 'retired' });
        await storeKeySet(keys, device, {
          identity: identityOf('B'),
          signedPreKeyId: 1,
          lastResortPreKeyId: 1,
        });
        expect(await signedState(device, kind, 1, identityOf('A'))).toMatchObject({ state: 'active' });
        await wipeKeySet(keys, device);
        expect(await signedState(device, kind, 1, identityOf('A'))).toEqual({ state: 'retired' });
      });

      it('has states of its own, apart from one-time prekeys and from the other kind', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { signedPreKeyId: 1, ec: [2], pq: [1] });
        await claimOne(device);
        expect(await signedState(device, 'ec', 2)).toEqual({ state: 'free' });
        expect(await signedState(device, 'pq', 1)).toEqual({ state: 'free' });
      });

      it('that was replaced, and wiped then, is no used id of one-time prekeys', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { signedPreKeyId: 1 });
        await storeKeySet(keys, device, { signedPreKeyId: 2 });
        await wipeKeySet(keys, device);
        expect(await signedState(device, 'ec', 1)).toEqual({ state: 'retired' });
        expect(await usedIds(device, 'ec', identityOf('A'), [1, 2])).toEqual([]);
      });

      it.each(PRE_KEY_KINDS)(
        'of kind %s, wiped while active, may come back with the same key only',
        async (kind) => {
          const device = newDevice();
          await storeKeySet(keys, device, { signedPreKeyId: 3, lastResortPreKeyId: 3 });
          await wipeKeySet(keys, device);
          const wiped = await signedState(device, kind, 3);
          if (wiped.state !== 'wiped') throw new Error(`it is ${wiped.state}`);
          expect(wiped.matches(publicKeyOf(kind, 3))).toBe(true);
          expect(wiped.matches(publicKeyOf(kind, 3, 1))).toBe(false);
          expect(await signedState(device, kind, 4)).toEqual({ state: 'free' });
          expect(await signedState(device, kind, 3, identityOf('B'))).toEqual({ state: 'free' });
        },
      );

      it('is the same key in both encodings of a curve point, and no other', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { signedPreKeyId: 3 });
        await wipeKeySet(keys, device);
        const wiped = await signedState(device, 'ec', 3);
        if (wiped.state !== 'wiped') throw new Error(`it is ${wiped.state}`);
        expect(wiped.matches(publicKeyOf('ec', 3).subarray(1))).toBe(true);
        expect(wiped.matches(publicKeyOf('ec', 4).subarray(1))).toBe(false);
      });

      it('that was wiped, and another came in its place, never stands for another key again', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { signedPreKeyId: 3 });
        await wipeKeySet(keys, device);
        await storeKeySet(keys, device, { signedPreKeyId: 4 });
        await wipeKeySet(keys, device);
        expect(await signedState(device, 'ec', 4)).toMatchObject({ state: 'wiped' });
        expect(await signedState(device, 'ec', 3)).toEqual({ state: 'retired' });
      });

      it.each(PRE_KEY_KINDS)(
        'of kind %s stays retired over a wipe that no sweep came before',
        async (kind) => {
          const device = newDevice();
          for (const keyId of [1, 2]) {
            await storeKeySet(keys, device, { signedPreKeyId: keyId, lastResortPreKeyId: keyId });
          }
          await wipeKeySet(keys, device);
          expect(await signedState(device, kind, 1)).toEqual({ state: 'retired' });
          expect(await signedState(device, kind, 2)).toMatchObject({ state: 'wiped' });
        },
      );

      it('that was wiped may come back as itself any number of times, until another has replaced it', async () => {
        const device = newDevice();
        for (const _ of ids(0, 3)) {
          await storeKeySet(keys, device, { signedPreKeyId: 3 });
          await wipeKeySet(keys, device);
          expect(await signedState(device, 'ec', 3)).toMatchObject({ state: 'wiped' });
        }
        await storeKeySet(keys, device, { signedPreKeyId: 3 });
        await storeKeySet(keys, device, { signedPreKeyId: 4 });
        await sweep(NOW_MS + 1);
        expect(await signedState(device, 'ec', 3)).toEqual({ state: 'retired' });
      });
    });

    describe('the sweep', () => {
      it('takes what is older than its cuts, at most so many rows at a time, and says when it is done', async () => {
        const devices = [newDevice(), newDevice()];
        for (const device of devices) await storeKeySet(keys, device, { ec: ids(1, 5) });
        for (const device of devices) {
          for (let i = 0; i < 4; i++) await claim(requestOf(device), keys, NOW_MS - DAY_MS);
          await claim(requestOf(device), keys, NOW_MS);
        }
        const cut = { claimedBeforeMs: NOW_MS, replacedBeforeMs: 0, limit: 3 };
        let removed = 0;
        for (let last = 3; last >= 3; removed += last) last = await keys.sweep(cut);
        expect(removed).toBeGreaterThanOrEqual(8);
        expect(await keys.sweep(cut)).toBe(0);
        for (const device of devices) {
          expect(await handedOut(keys, device, 0, 9)).toEqual([5]);
          expect(await usedIds(device, 'ec', identityOf('A'), ids(1, 6))).toEqual(ids(1, 5));
          expect((await keys.read(device))?.claimedCounts.ec).toBe(5);
        }
      });

      it('leaves the active signed prekeys, and what was replaced lately', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { signedPreKeyId: 1, lastResortPreKeyId: 1, ec: [1] });
        const request = requestOf(device);
        const first = await claim(request);
        await storeKeySet(keys, device, { signedPreKeyId: 2 });
        await keys.sweep({ claimedBeforeMs: 0, replacedBeforeMs: NOW_MS, limit: 100 });
        expect((await keys.read(device))?.signedPreKeys).toMatchObject({
          ec: { keyId: 2 },
          pq: { keyId: 1 },
        });
        expect(plain(await claim(request))).toEqual(plain(first));
      });

      it('answers a claim anew whose signed prekey it dropped, and never with the same one-time prekey', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { signedPreKeyId: 1, lastResortPreKeyId: 1, ec: [1, 2], pq: [1, 2] });
        const request = requestOf(device);
        await claim(request);
        await storeKeySet(keys, device, { signedPreKeyId: 2 });
        await keys.sweep({ claimedBeforeMs: 0, replacedBeforeMs: NOW_MS + 1, limit: 100 });
        const [anew] = await claim(request, otherNode);
        expect(anew).toMatchObject({
          signedPreKey: { keyId: 2 },
          oneTimePreKey: { keyId: 2 },
          pqPreKey: { keyId: 2 },
        });
        expect(await usedIds(device, 'ec', identityOf('A'), [1, 2])).toEqual([1, 2]);
        expect(await usedIds(device, 'pq', identityOf('A'), [1, 2])).toEqual([1, 2]);
      });

      it('drops a signed prekey with the last of the claims that name it, however few it takes at a time', async () => {
        await sweepAll(NOW_MS + 1);
        const device = newDevice();
        await storeKeySet(keys, device, { signedPreKeyId: 1, ec: ids(1, 9) });
        const requests = ids(0, 3).map(() => requestOf(device));
        await claimAll(requests);
        await storeKeySet(keys, device, { signedPreKeyId: 2 });
        const cut = { claimedBeforeMs: 0, replacedBeforeMs: NOW_MS + 1, limit: 2 };
        expect(await keys.sweep(cut)).toBe(2);
        const signedIds = async () =>
          (await claimAll(requests, otherNode)).bundles.map((list) => list[0]?.signedPreKey.keyId).sort();
        expect(await signedIds()).toEqual([1, 2, 2]);
        // The two that were answered anew name no dropped key: the last claim goes, and the key with it.
        expect(await keys.sweep(cut)).toBe(2);
        expect(await signedIds()).toEqual([2, 2, 2]);
      });

      it.each(PRE_KEY_KINDS)(
        'drops what names a key of kind %s that it drops, and nothing else',
        async (kind) => {
          const device = newDevice();
          await storeKeySet(keys, device, { lastResortPreKeyId: 1, ec: ids(1, 9) });
          const [older, newer] = [requestOf(device), requestOf(device)];
          await claim(older);
          await keys.change(device, async (set) => {
            await set.activateSignedPreKey(kind, signedPreKeyOf(kind, 2), NOW_MS);
            await set.save(updateOf(set));
          });
          // It names the key of the other kind under the id of the one that is dropped.
          const answer = await claim(newer);
          await keys.sweep({ claimedBeforeMs: 0, replacedBeforeMs: NOW_MS + 1, limit: 100 });
          expect(plain(await claim(newer))).toEqual(plain(answer));
          const [anew] = await claim(older);
          expect(kind === 'ec' ? anew!.signedPreKey.keyId : anew!.pqPreKey!.keyId).toBe(2);
          expect(ecIdOf(anew)).toBe(3);
        },
      );

      it('counts from when a key was replaced, not from the replacements after it', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { signedPreKeyId: 1, ec: [1, 2] });
        const request = requestOf(device);
        await claim(request);
        for (const [keyId, atMs] of [
          [2, NOW_MS],
          [3, NOW_MS + DAY_MS],
        ] as const) {
          await keys.change(device, async (set) => {
            await set.activateSignedPreKey('ec', signedPreKeyOf('ec', keyId), atMs);
            await set.save(updateOf(set));
          });
        }
        await keys.sweep({ claimedBeforeMs: 0, replacedBeforeMs: NOW_MS + 1, limit: 100 });
        expect(await claim(request)).toMatchObject([{ signedPreKey: { keyId: 3 } }]);
      });

      it('beside claims on two nodes loses no used id', async () => {
        const device = newDevice();
        await storeKeySet(keys, device, { ec: ids(1, 60) });
        await Promise.all([
          ...ids(0, 60).map((i) => claim(requestOf(device), i % 2 === 0 ? keys : otherNode)),
          ...ids(0, 10).map(() =>
            otherNode.sweep({ claimedBeforeMs: NOW_MS + 1, replacedBeforeMs: 0, limit: 7 }),
          ),
        ]);
        expect(await usedIds(device, 'ec', identityOf('A'), ids(1, 61))).toEqual(ids(1, 60));
      });
    });

    describe('the search for idle devices', () => {
      const at = (device: DeviceAddress, change: Partial<DeviceKeysUpdate>) =>
        keys.change(device, async (set) => set.save({ ...updateOf(set), ...change }));

      /** Of `among`, those that a walk over all devices finds, a few at a time. */
      async function idleAmong(among: readonly DeviceAddress[], idleBeforeMs: number): Promise<string[]> {
        const found = new Set<string>();
        let after: DeviceAddress | null = null;
        do {
          const page = await otherNode.findIdle({ idleBeforeMs, after, limit: 7 });
          for (const device of page.idle) found.add(addressKey(device));
          after = page.last;
        } while (after !== null);
        return among.map(addressKey).filter((key) => found.has(key));
      }

      it('finds each device that has keys and was not used since, on every page', async () => {
        const userId = newDevice().userId;
        const idle = ids(1, 20).map((deviceId) => ({ userId, deviceId }));
        const used = { userId, deviceId: 30 };
        for (const device of [...idle, used]) {
          await storeKeySet(keys, device, {});
          await at(device, { updatedAtMs: NOW_MS - DAY_MS });
        }
        await at(used, { updatedAtMs: NOW_MS });
        expect(await idleAmong([...idle, used], NOW_MS)).toEqual(idle.map(addressKey));
        expect(await idleAmong([...idle, used], NOW_MS - DAY_MS)).toEqual([]);
      });

      it('finds none that has no keys, was restored since, or says nothing of its use', async () => {
        const [wiped, restored, silent] = [newDevice(), newDevice(), newDevice()];
        for (const device of [wiped, restored, silent]) await storeKeySet(keys, device, { ec: [1] });
        for (const device of [wiped, restored]) await at(device, { updatedAtMs: NOW_MS - DAY_MS });
        await at(restored, { restoredAtMs: NOW_MS });
        expect(await idleAmong([wiped, restored, silent], NOW_MS)).toEqual([addressKey(wiped)]);
        await wipeKeySet(keys, wiped);
        expect(await idleAmong([wiped, restored, silent], NOW_MS)).toEqual([]);
      });
    });

    describe('a shared secret', () => {
      it('is made once and is the same for all that ask at once, and ever after', async () => {
        const name = `secret-${randomBytes(6).toString('hex')}`;
        const all = await Promise.all(
          ids(0, 20).map((i) => (i % 2 === 0 ? keys : otherNode).sharedSecret(name)),
        );
        expect(new Set(all.map((secret) => Buffer.from(secret).toString('hex'))).size).toBe(1);
        expect(all[0]).toHaveLength(32);
        expect(Buffer.from(await otherNode.sharedSecret(name))).toEqual(Buffer.from(all[0]!));
        expect(Buffer.from(await keys.sharedSecret(`${name}-2`))).not.toEqual(Buffer.from(all[0]!));
      });
    });
  });
}

/** Bytes of whatever class as text, so that what was stored compares with what is read. */
function plain(value: unknown): unknown {
  if (value instanceof Uint8Array) return Buffer.from(value).toString('hex');
  if (value instanceof Map) return [...value].map(plain);
  if (Array.isArray(value)) return value.map(plain);
  if (typeof value !== 'object' || value === null) return value;
  return Object.fromEntries(Object.entries(value).map(([name, part]) => [name, plain(part)]));
}

function gate(): { opened: Promise<void>; open(): void } {
  let open = () => {};
  const opened = new Promise<void>((resolve) => {
    open = resolve;
  });
  return { opened, open };
}
