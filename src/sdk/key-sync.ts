/** Brings the gateway's view of the keys in line with the device's own, so that a validation can open the gate. */
import type { RequestData, RequestInput } from '../protocol/events.ts';
import { UPLOAD_PRE_KEYS_MAX, VALIDATE_PRE_KEYS_MAX, WITHDRAW_PRE_KEYS_MAX } from '../protocol/limits.ts';
import type { Link } from './connection.ts';
import type {
  DeviceKeys,
  PreKeyPool,
  SignedPreKeySlot,
  WireIdentity,
  WireSignedPreKey,
} from './device-keys.ts';
import { KeygateError } from './errors.ts';
import type { Metrics } from './metrics.ts';
import type { Notebook } from './storage.ts';
import type { KitClock } from './time.ts';

export interface KeySyncParts {
  link: Link;
  keys: DeviceKeys;
  clock: KitClock;
  metrics: Metrics;
  notebook: Notebook;
  /** One-time prekeys of each kind that the gateway is kept filled to. */
  poolLevel: number;
  /** Private halves of what was handed out or replaced go this long after that was first heard of. */
  usedLifetimeMs: number;
  onProgress(progress: { made: number; wanted: number } | null): void;
}

export type Validation = RequestData<'validateKeys'>;
export type PoolCounts = Pick<
  RequestData<'checkPreKeys'>,
  'availableCount' | 'pqAvailableCount' | 'countVersion'
>;

/** Calls must not overlap. */
export interface KeySync {
  /** Makes a new identity with everything that belongs to it, and puts it in place of whatever the gateway holds. */
  createKeySet(): Promise<void>;
  /**
   * Uploads identity and signed prekeys as they are here; `replaceIdentity` in place of another identity.
   *
   * @throws KeygateError IDENTITY_MISMATCH, KEYS_OUT_OF_SYNC
   */
  uploadKeySet(options?: { replaceIdentity: boolean }): Promise<void>;
  /** Asks the gateway what it thinks of the keys that are here. */
  validate(): Promise<Validation>;
  /**
   * Mends what a validation found, short of another identity.
   *
   * @returns whether another validation is due
   */
  mend(found: Validation): Promise<boolean>;
  /** Replaces signed and last-resort prekey by fresh ones. */
  rotate(): Promise<void>;
  /** Withdraws and deletes single prekeys that can't be read; `upload` puts fresh ones under new ids in their place. */
  replaceBroken(broken: { ec: number[]; pq: number[] }, options: { upload: boolean }): Promise<void>;
  /** Fills the pools up to the level. */
  replenish(counts: PoolCounts): Promise<void>;
  /** Deletes private halves whose time is over. */
  forgetUsed(): Promise<void>;
}

/** Rounds in which refused ids are answered with new ones. */
const NEW_ID_ROUNDS_MAX = 4;
/** Times that a pool is filled which is claimed from at the same time. */
const REFILLS_MAX = 10;
/** Keys made between two reports of progress. */
const PROGRESS_STEP = 20;
/** Where ids may have been used that nobody here remembers, the next ones begin anywhere up to here. */
const LEAP_MAX = 2 ** 23;
const KINDS = ['ec', 'pq'] as const;
type Kind = (typeof KINDS)[number];
const SLOT_NAMES = ['signedPreKey', 'pqLastResortPreKey'] as const;
type SlotName = (typeof SLOT_NAMES)[number];

export function createKeySync(parts: KeySyncParts): KeySync {
  const { link, keys, clock, metrics, notebook } = parts;
  const { memory } = notebook;
  /** A memory that was lost knew ids that are not to be used again. */
  let mayHaveUsedMore = notebook.isNew;

  function learn(versions: { keyVersion?: number; countVersion?: number }): void {
    memory.lastKeyVersion = Math.max(memory.lastKeyVersion, versions.keyVersion ?? 0);
    memory.lastCountVersion = Math.max(memory.lastCountVersion, versions.countVersion ?? 0);
  }

  function poolOf(kind: Kind): PreKeyPool<{ keyId: number }> | undefined {
    return kind === 'ec' ? keys.oneTimePreKeys : keys.pqOneTimePreKeys;
  }

  function slotOf(kind: Kind): SignedPreKeySlot | undefined {
    return kind === 'ec' ? keys.signedPreKey : keys.pqLastResortPreKey;
  }

  async function idsIn(store: { ids(): Promise<number[]> } | undefined): Promise<number[]> {
    return (await store?.ids()) ?? [];
  }

  /** Ids that no key of any kind ever had: the counter is on disk before the first of them is used. */
  async function takeIds(count: number, { leap = false } = {}): Promise<number[]> {
    const held = (await Promise.all(KINDS.flatMap((kind) => [poolOf(kind), slotOf(kind)]).map(idsIn))).flat();
    // Without any key of its own this device begins afresh, and so do its ids.
    const leaps = leap || (mayHaveUsedMore && held.length > 0);
    const least = held.reduce((next, id) => Math.max(next, id + 1), memory.nextKeyId);
    const first = least + (leaps ? Math.floor(clock.random() * LEAP_MAX) : 0);
    mayHaveUsedMore = false;
    memory.nextKeyId = first + count;
    await notebook.save();
    return Array.from({ length: count }, (_, index) => first + index);
  }

  async function make(kind: Kind, ids: readonly number[]): Promise<void> {
    let made = 0;
    for (const step of chunks(ids, PROGRESS_STEP)) {
      parts.onProgress({ made, wanted: ids.length });
      await poolOf(kind)?.generate(step);
      made += step.length;
    }
    parts.onProgress(null);
  }

  /** @returns how many wait in the gateway's pool then; null where none could be added */
  async function add(kind: Kind, count: number): Promise<number | null> {
    if (poolOf(kind) === undefined) return null;
    let wanted = count;
    let available: number | null = null;
    for (let round = 0; wanted > 0 && round < NEW_ID_ROUNDS_MAX; round++) {
      const ids = await takeIds(wanted, { leap: round > 0 });
      await make(kind, ids);
      const outcome = await offer(kind, ids);
      if (outcome.stored > 0) available = outcome.available;
      wanted = outcome.refused;
    }
    return available;
  }

  /** Marked before the gateway hears of them: what was offered once is never offered as new again. */
  async function markOffered(kind: Kind, ids: readonly number[]): Promise<void> {
    for (const id of ids) memory.offered[kind][id] ??= null;
    await notebook.save();
  }

  /** The time of their private halves begins to run. */
  async function noteHandedOut(kind: Kind, ids: readonly number[]): Promise<void> {
    if (ids.length === 0) return;
    for (const id of ids) memory.offered[kind][id] ??= clock.nowMs();
    await notebook.save();
  }

  /** Uploads held keys that were never offered. @returns `refused` counts the ids that ask for others in their place */
  async function offer(
    kind: Kind,
    ids: readonly number[],
  ): Promise<{ stored: number; refused: number; available: number }> {
    const outcome = { stored: 0, refused: 0, available: 0 };
    for (const chunk of chunks(ids, UPLOAD_PRE_KEYS_MAX)) {
      await markOffered(kind, chunk);
      const input: RequestInput<'addPreKeys'> =
        kind === 'ec'
          ? { oneTimePreKeys: await keys.oneTimePreKeys.read(chunk) }
          : { pqOneTimePreKeys: (await keys.pqOneTimePreKeys?.read(chunk)) ?? [] };
      const data = await link.call('addPreKeys', input, { own: true });
      learn(data);
      const { conflicts } = kind === 'ec' ? data.oneTimePreKeys : data.pqOneTimePreKeys;
      // With the repetition of a lost answer they are unchanged, and no less taken.
      const stored = chunk.length - conflicts.length;
      metrics.preKeysRegenerated += stored;
      const idsWith = (reason: string): number[] =>
        conflicts.filter((conflict) => conflict.reason === reason).map(({ keyId }) => keyId);
      // Under this id the gateway offers a key that nobody holds any more.
      await withdraw(kind, idsWith('idTaken'));
      await drop(kind, [...idsWith('idTaken'), ...idsWith('poolFull')]);
      // It may have been this very key.
      await noteHandedOut(kind, idsWith('alreadyClaimed'));
      outcome.stored += stored;
      outcome.refused += idsWith('idTaken').length + idsWith('alreadyClaimed').length;
      outcome.available = kind === 'ec' ? data.availableCount : data.pqAvailableCount;
    }
    return outcome;
  }

  async function withdraw(kind: Kind, ids: readonly number[]): Promise<void> {
    for (const chunk of chunks(ids, WITHDRAW_PRE_KEYS_MAX)) {
      const input = kind === 'ec' ? { preKeyIds: chunk } : { pqPreKeyIds: chunk };
      learn(await link.call('withdrawPreKeys', input, { own: true }));
    }
  }

  async function drop(kind: Kind, ids: readonly number[]): Promise<void> {
    if (ids.length === 0) return;
    await poolOf(kind)?.delete(ids);
    for (const id of ids) delete memory.offered[kind][id];
    await notebook.save();
  }

  async function readKeySet(): Promise<{
    identity: WireIdentity;
    signedPreKey: WireSignedPreKey;
    pqLastResortPreKey: WireSignedPreKey | null;
  }> {
    const identity = await keys.identity();
    const signedPreKey = await keys.signedPreKey.read();
    if (identity === null || signedPreKey === null)
      throw new Error('the key set went away while it was in use');
    return {
      identity,
      signedPreKey,
      pqLastResortPreKey: (await keys.pqLastResortPreKey?.read()) ?? null,
    };
  }

  /** Changed elsewhere meanwhile, or under a signed prekey's id that was used before: mended, and asked again. */
  async function uploadSet(more: Partial<RequestInput<'uploadKeys'>>): Promise<void> {
    for (let round = 1; ; round++) {
      const status = await link.call('keyStatus', {}, { own: true });
      learn(status);
      const { identity, signedPreKey, pqLastResortPreKey } = await readKeySet();
      const input: RequestInput<'uploadKeys'> = {
        ...identity,
        signedPreKey,
        ...(pqLastResortPreKey && { pqLastResortPreKey }),
        ifKeyVersion: memory.lastKeyVersion,
        ...more,
      };
      try {
        learn(await link.call('uploadKeys', input, { own: true }));
        return await notebook.save();
      } catch (error) {
        if (round >= NEW_ID_ROUNDS_MAX || !(error instanceof KeygateError)) throw error;
        if (error.code === 'PREKEY_CONFLICT') await makeSigned(SLOT_NAMES, { leap: round > 1 });
        else if (error.code !== 'KEYS_OUT_OF_SYNC') throw error;
      }
    }
  }

  /** New keys in these slots, under new ids. */
  async function makeSigned(names: readonly SlotName[], { leap = false } = {}): Promise<void> {
    const ids = await takeIds(names.length, { leap });
    for (const [index, name] of names.entries()) await keys[name]?.generate(ids[index]!);
  }

  /** Makes new keys for these slots and puts them in the place of the gateway's. */
  async function rotateSlots(names: readonly SlotName[]): Promise<void> {
    for (let round = 1; ; round++) {
      const status = await link.call('keyStatus', {}, { own: true });
      // A key store that was restored from a backup has forgotten ids which the gateway knows.
      memory.nextKeyId = Math.max(
        memory.nextKeyId,
        (status.signedPreKeyId ?? 0) + 1,
        (status.pqLastResortPreKeyId ?? 0) + 1,
      );
      await makeSigned(names, { leap: round > 1 });
      const input: RequestInput<'rotateSignedPreKey'> = { ifKeyVersion: memory.lastKeyVersion };
      for (const name of names) {
        const key = await keys[name]?.read();
        if (key) input[name] = key;
      }
      try {
        learn(await link.call('rotateSignedPreKey', input, { own: true }));
        metrics.signedPreKeyRotations += 1;
        return await notebook.save();
      } catch (error) {
        const isIdUsed = error instanceof KeygateError && error.code === 'PREKEY_CONFLICT';
        if (!isIdUsed || round >= NEW_ID_ROUNDS_MAX) throw error;
      }
    }
  }

  /** Held ids that may be waiting in the gateway's pool. */
  async function idsToCompare(kind: Kind): Promise<number[]> {
    const ids = await idsIn(poolOf(kind));
    // What was handed out is past comparing; should the gateway offer it again, it hears that it is not to.
    const waiting = ids.filter((id) => memory.offered[kind][id] == null);
    return waiting.sort((a, b) => a - b).slice(-VALIDATE_PRE_KEYS_MAX);
  }

  return {
    async createKeySet() {
      // Whatever a reset that was cut short has left is of another identity.
      await keys.reset();
      Object.assign(memory, { offered: { ec: {}, pq: {} }, replaced: { ec: {}, pq: {} } });
      await keys.createIdentity();
      metrics.identityRegenerations += 1;
      const first = Math.min(parts.poolLevel, UPLOAD_PRE_KEYS_MAX);
      await makeSigned(SLOT_NAMES);
      const own: { ec: number[]; pq: number[] } = { ec: [], pq: [] };
      for (const kind of KINDS) {
        if (poolOf(kind) === undefined) continue;
        own[kind] = await takeIds(first);
        await make(kind, own[kind]);
        await markOffered(kind, own[kind]);
      }
      await uploadSet({
        oneTimePreKeys: await keys.oneTimePreKeys.read(own.ec),
        ...(keys.pqOneTimePreKeys && { pqOneTimePreKeys: await keys.pqOneTimePreKeys.read(own.pq) }),
        replaceIdentity: true,
      });
    },

    uploadKeySet: ({ replaceIdentity } = { replaceIdentity: false }) => uploadSet({ replaceIdentity }),

    async validate() {
      const { identity, signedPreKey, pqLastResortPreKey } = await readKeySet();
      const input: RequestInput<'validateKeys'> = {
        localIdentityKey: identity.identityKey,
        localRegistrationId: identity.registrationId,
        localSignedPreKeyId: signedPreKey.keyId,
        localSignedPreKeyPublicKey: signedPreKey.publicKey,
        ...(pqLastResortPreKey && { localPqLastResortPreKeyId: pqLastResortPreKey.keyId }),
        localPreKeyIds: await idsToCompare('ec'),
        ...(keys.pqOneTimePreKeys && { localPqPreKeyIds: await idsToCompare('pq') }),
        lastKeyVersion: memory.lastKeyVersion,
        lastCountVersion: memory.lastCountVersion,
      };
      const found = await link.call('validateKeys', input, { own: true });
      learn(found);
      await noteHandedOut('ec', found.preKeyIdsToDelete);
      await noteHandedOut('pq', found.pqPreKeyIdsToDelete);
      await notebook.save();
      return found;
    },

    async mend(found) {
      const missing = new Set(found.missingKeys);
      const slots = SLOT_NAMES.filter((name) => missing.has(name));
      if (slots.length > 0) await rotateSlots(slots);
      const pools = {
        ec: { notHeld: found.preKeyIdsNotHeld, unseen: found.preKeyIdsToUpload },
        pq: { notHeld: found.pqPreKeyIdsNotHeld, unseen: found.pqPreKeyIdsToUpload },
      };
      for (const kind of KINDS) {
        const { notHeld, unseen } = pools[kind];
        await withdraw(kind, notHeld);
        const lost = unseen.filter((id) => id in memory.offered[kind]);
        // The gateway had these once; it was restored or wiped since, and may have handed them out in between.
        await noteHandedOut(kind, lost);
        const { refused } = await offer(
          kind,
          unseen.filter((id) => !lost.includes(id)),
        );
        await add(kind, missing.has('rolledBack') ? parts.poolLevel : refused);
      }
      return slots.length > 0 || missing.has('rolledBack');
    },

    rotate: () => rotateSlots(SLOT_NAMES),

    async replaceBroken(broken, { upload }) {
      for (const kind of KINDS) {
        if (broken[kind].length === 0) continue;
        await withdraw(kind, broken[kind]);
        await drop(kind, broken[kind]);
        if (upload) await add(kind, broken[kind].length);
      }
    },

    async replenish(counts) {
      learn(counts);
      for (const kind of KINDS) {
        let available: number | null = kind === 'ec' ? counts.availableCount : counts.pqAvailableCount;
        // Claimed from meanwhile, a pool may be low still: that is no new crossing, and nobody would tell.
        for (
          let round = 0;
          available !== null && available < parts.poolLevel && round < REFILLS_MAX;
          round++
        ) {
          available = await add(kind, parts.poolLevel - available);
        }
      }
    },

    async forgetUsed() {
      const dueMs = clock.nowMs() - parts.usedLifetimeMs;
      for (const kind of KINDS) {
        const { [kind]: offered } = memory.offered;
        const held = new Set(await idsIn(poolOf(kind)));
        for (const id of Object.keys(offered).map(Number)) if (!held.has(id)) delete offered[id];
        await poolOf(kind)?.delete(
          [...held].filter((id) => (offered[id] ?? Number.POSITIVE_INFINITY) <= dueMs),
        );

        const slot = slotOf(kind);
        const present = (await slot?.read())?.keyId;
        const { [kind]: replaced } = memory.replaced;
        const older = (await idsIn(slot)).filter((id) => id !== present);
        for (const id of Object.keys(replaced).map(Number)) if (!older.includes(id)) delete replaced[id];
        for (const id of older) replaced[id] ??= clock.nowMs();
        await slot?.delete(older.filter((id) => replaced[id]! <= dueMs));
      }
      await notebook.save();
    },
  };
}

function chunks<Item>(list: readonly Item[], lengthMax: number): Item[][] {
  const result: Item[][] = [];
  for (let start = 0; start < list.length; start += lengthMax) {
    result.push(list.slice(start, start + lengthMax));
  }
  return result;
}
