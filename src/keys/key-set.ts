/** Steps that uploads, rotations and resets share, each inside a transaction that holds the device's row. */

import { together } from '../lib/together.ts';
import {
  type DeviceKeys,
  type DeviceKeysUpdate,
  type KeySetTransaction,
  type KeyStore,
  type OneTimePreKey,
  PRE_KEY_KINDS,
  type PreKeyKind,
  type SignedPreKey,
  type WipeReason,
} from '../ports/key-store.ts';
import type { DeviceLocks, HeldLocks } from '../ports/lock.ts';
import { GatewayError } from '../protocol/errors.ts';
import type { DeviceAddress } from '../protocol/ids.ts';
import type { Verdict } from '../protocol/keys.ts';
import { samePublicKey } from './decode.ts';

/** What a change of keys answers, and what it means for those who watch the device. */
export interface KeyChange<Data> {
  data: Data;
  /** Whether `keyVersion` rose, or the device was revoked: its gates close, or its sockets end. */
  keysChanged: boolean;
  /** Whether it was nothing but a new signed or last-resort prekey. */
  rotation: boolean;
  /** Whether a pool fell below the threshold, or to zero: the device is to be told. */
  ranLow: boolean;
  /** Whether pending messages turned into bounces that are to be brought to their senders. */
  wiped: boolean;
}

export function untouched<Data>(data: Data): KeyChange<Data> {
  return { data, keysChanged: false, rotation: false, ranLow: false, wiped: false };
}

/**
 * The store as one request may change it.
 *
 * @param by.fence the number of the connection that asks; null where none does
 * @param by.refuse throws where the request may not change the device as it stands, of which the transaction holds the row
 * @param by.onRefused hears that it has thrown, when the transaction has ended
 */
export function changedBy(
  {
    fence,
    refuse,
    onRefused,
  }: {
    fence: number | null;
    refuse: (current: DeviceKeys) => void;
    onRefused: () => void;
  },
  store: KeyStore,
): KeyStore {
  return {
    ...store,
    async change(device, action, how) {
      let isRefused = false;
      const judged: typeof action = (keys) => {
        isRefused = true;
        refuse(keys.current);
        isRefused = false;
        return action(keys);
      };
      try {
        return await store.change(device, judged, { ...how, fence });
      } finally {
        if (isRefused) onRefused();
      }
    },
  };
}

/** Whether a pool fell below the threshold, or to zero. */
export function fellLow(
  before: DeviceKeys['availableCounts'],
  after: DeviceKeys['availableCounts'],
  lowThreshold: number,
): boolean {
  return PRE_KEY_KINDS.some(
    (kind) =>
      after[kind] < before[kind] &&
      (after[kind] === 0 || (before[kind] >= lowThreshold && after[kind] < lowThreshold)),
  );
}

/** The row to save, to be changed step by step. */
export function draftOf(current: DeviceKeys): DeviceKeysUpdate {
  const { signedPreKeys: _, servedAtMs: __, fence: ___, revokedAtMs: ____, ...rest } = current;
  return { ...rest, availableCounts: { ...rest.availableCounts }, claimedCounts: { ...rest.claimedCounts } };
}

/**
 * Whether a signed prekey would be new, stands already, or may not be stored under its id.
 * A fresh signature over the same key is no change: the stored one is as good.
 */
export async function placeOf(
  keys: KeySetTransaction,
  kind: PreKeyKind,
  canonicalKey: Uint8Array,
  offered: SignedPreKey,
): Promise<'new' | 'stands' | 'conflict'> {
  const stored = await keys.signedPreKeyIdState(kind, canonicalKey, offered.keyId);
  switch (stored.state) {
    case 'free':
      return 'new';
    case 'active':
      return samePublicKey(kind, stored.publicKey, offered.publicKey) ? 'stands' : 'conflict';
    case 'wiped':
      return stored.matches(offered.publicKey) ? 'new' : 'conflict';
    case 'retired':
      return 'conflict';
  }
}

/** @throws GatewayError KEYS_OUT_OF_SYNC where the caller's view is older and something would change */
export function refuseLateChange(
  ifKeyVersion: number | undefined,
  current: DeviceKeys,
  changes: boolean,
): void {
  if (changes && ifKeyVersion !== undefined && ifKeyVersion < current.keyVersion) {
    throw new GatewayError(
      'KEYS_OUT_OF_SYNC',
      'the keys have changed since ifKeyVersion, or since the request came',
      {
        details: { keyVersion: current.keyVersion },
      },
    );
  }
}

/** Leaves nothing of a key set but its versions and the ids that were used. @returns the new key version */
export async function wipeKeySet(
  keys: KeySetTransaction,
  reason: WipeReason,
  nowMs: number,
  how?: { leavesMessages: boolean },
): Promise<number> {
  const { current } = keys;
  await keys.wipe(reason, nowMs, how);
  const keyVersion = current.keyVersion + 1;
  await keys.save({
    ...draftOf(current),
    registrationId: null,
    identity: null,
    signedPreKeyExpiresAtMs: null,
    availableCounts: { ec: 0, pq: 0 },
    claimedCounts: { ec: 0, pq: 0 },
    offersPq: false,
    keyVersion,
    countVersion: current.countVersion + 1,
    identityVersion: current.identityVersion + 1,
    updatedAtMs: nowMs,
  });
  return keyVersion;
}

/**
 * Says of each key that is offered whether it can be added: one bad key never sinks the batch. After a restored backup
 * nothing can be added before the client has compared its keys.
 *
 * @returns `fresh`, to be added to the pool, counts as stored in the verdict
 */
export async function judgePreKeys(
  keys: KeySetTransaction,
  kind: PreKeyKind,
  canonicalKey: Uint8Array,
  offered: readonly OneTimePreKey[],
  room: number,
): Promise<{ verdict: Verdict; fresh: OneTimePreKey[] }> {
  const verdict: Verdict = { stored: 0, unchanged: 0, conflicts: [] };
  const fresh: OneTimePreKey[] = [];
  if (offered.length === 0) return { verdict, fresh };
  const keyIds = offered.map((key) => key.keyId);
  if (keys.current.restoredAtMs !== null) {
    // A retry of what was uploaded, and handed out, in the time that a restored backup lost looks just like new keys.
    await keys.withdraw(kind, canonicalKey, keyIds);
    verdict.conflicts = keyIds.map((keyId) => ({ keyId, reason: 'alreadyClaimed' }));
    return { verdict, fresh };
  }
  const [used, pooled] = await together([
    keys.usedIds(kind, canonicalKey, keyIds),
    keys.pooled(kind, keyIds),
  ]);
  for (const key of offered) {
    const stored = pooled.get(key.keyId);
    if (used.has(key.keyId)) verdict.conflicts.push({ keyId: key.keyId, reason: 'alreadyClaimed' });
    else if (stored !== undefined) {
      if (samePublicKey(kind, stored, key.publicKey)) verdict.unchanged += 1;
      else verdict.conflicts.push({ keyId: key.keyId, reason: 'idTaken' });
    } else if (fresh.length >= room) verdict.conflicts.push({ keyId: key.keyId, reason: 'poolFull' });
    else fresh.push(key);
  }
  verdict.stored = fresh.length;
  return { verdict, fresh };
}

/**
 * Runs `action` while other nodes are kept off the device, if the lock is to be had at once; without it the row's
 * lock alone decides, which is as right and only slower.
 */
export async function withCourtesyLock<Result>(
  locks: DeviceLocks,
  device: DeviceAddress,
  action: () => Promise<Result>,
): Promise<Result> {
  const lock: HeldLocks = await locks.acquire([device]);
  try {
    return await action();
  } finally {
    await lock.release();
  }
}
