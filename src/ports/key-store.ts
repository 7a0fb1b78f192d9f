/** What the prekey rules need of storage. Every method is one transaction unless it says otherwise. */
import type { DeviceAddress } from '../protocol/ids.ts';

/** One-time prekeys and signed prekeys come in an elliptic-curve and a post-quantum kind. */
export type PreKeyKind = 'ec' | 'pq';
export const PRE_KEY_KINDS = ['ec', 'pq'] as const satisfies readonly PreKeyKind[];

/** Signed over `publicKey`. Of kind `pq` it is the last-resort prekey. */
export interface SignedPreKey {
  keyId: number;
  publicKey: Uint8Array;
  signature: Uint8Array;
}

/** `signature` is null for kind `ec`. */
export interface OneTimePreKey {
  keyId: number;
  publicKey: Uint8Array;
  signature: Uint8Array | null;
}

export interface Identity {
  /** As uploaded: 33 or 32 bytes. */
  identityKey: Uint8Array;
  /** The 32 bytes of u: what decides whether two identities are the same, and under which used ids are kept. */
  canonicalKey: Uint8Array;
  identityKeyEd25519: Uint8Array | null;
}

/** A device's row: everything about its key set but the pools themselves. */
export interface DeviceKeys {
  registrationId: number | null;
  /** Null after a reset, and before the first upload. */
  identity: Identity | null;
  signedPreKeys: Record<PreKeyKind, SignedPreKey | null>;
  signedPreKeyExpiresAtMs: number | null;
  /** Unclaimed one-time prekeys. */
  availableCounts: Record<PreKeyKind, number>;
  /** One-time prekeys handed out under the present identity. */
  claimedCounts: Record<PreKeyKind, number>;
  /** Whether one-time PQ prekeys were ever offered under the present identity: a device that has none left lacks them. */
  offersPq: boolean;
  keyVersion: number;
  countVersion: number;
  /** Rises with every replacement and reset; messages are stamped with it. */
  identityVersion: number;
  updatedAtMs: number | null;
  /** When the device's gate was opened last, or was last found open, give or take half a day. */
  servedAtMs: number | null;
  /** The number of the newest connection that was ever served or asked for a change; 0 before the first. */
  fence: number;
  /** Tokens issued until then speak for the device no more; null where it was never revoked. */
  revokedAtMs: number | null;
  /**
   * When a backup was restored, until the client has compared its keys with what is left of them: until then any key
   * that it holds may have been handed out in the time that was lost.
   */
  restoredAtMs: number | null;
}

/** What a signed prekey id stands for under the present identity. */
export type SignedPreKeyIdState =
  | { state: 'free' }
  | { state: 'active'; publicKey: Uint8Array }
  /** Wiped by a reset or replacement while active: may come back, with the same key only. */
  | { state: 'wiped'; matches: (publicKey: Uint8Array) => boolean }
  | { state: 'retired' };

/** Why a key set was wiped: what its senders are told of the messages that waited. */
export type WipeReason = 'RECIPIENT_IDENTITY_CHANGED' | 'RECIPIENT_KEYS_RESET' | 'DEVICE_REVOKED';

/** The fields that a change of a key set ends with. */
export type DeviceKeysUpdate = Omit<DeviceKeys, 'signedPreKeys' | 'servedAtMs' | 'fence' | 'revokedAtMs'>;

/**
 * One device's key set inside a transaction that holds the device's row: nothing of this device's
 * keys, claims or pools changes beside it.
 */
export interface KeySetTransaction {
  /** As it stood when the row was locked; zeros and nulls for a device that never uploaded. */
  readonly current: DeviceKeys;
  /** Those of `keyIds` that were handed out or withdrawn under `canonicalKey`, ever. */
  usedIds(kind: PreKeyKind, canonicalKey: Uint8Array, keyIds: readonly number[]): Promise<Set<number>>;
  /** The public keys of those of `keyIds` that wait unclaimed. */
  pooled(kind: PreKeyKind, keyIds: readonly number[]): Promise<Map<number, Uint8Array>>;
  /** Appends to the pool; claims go out in the order of the list, after everything stored before. */
  addToPool(kind: PreKeyKind, keys: readonly OneTimePreKey[]): Promise<void>;
  /**
   * Takes ids out of the pool and makes every one of them unusable under `canonicalKey` for good,
   * whether or not it was there. `'all'` takes the whole pool.
   *
   * @returns how many were in the pool; null where more ids than WITHDRAW_UNSEEN_MAX would be kept that were never
   *   there, or ids of an identity that is neither the present one nor among the first WITHDRAW_IDENTITIES_MAX that
   *   ids are kept of: nothing was withdrawn then
   */
  withdraw(
    kind: PreKeyKind,
    canonicalKey: Uint8Array,
    keyIds: readonly number[] | 'all',
  ): Promise<number | null>;
  signedPreKeyIdState(
    kind: PreKeyKind,
    canonicalKey: Uint8Array,
    keyId: number,
  ): Promise<SignedPreKeyIdState>;
  /** Makes `key` the one active signed prekey of its kind; the one before it is retired and stays readable. */
  activateSignedPreKey(kind: PreKeyKind, key: SignedPreKey, nowMs: number): Promise<void>;
  /**
   * Wipes signed prekeys, pools and claims, keeping only the used ids under the identity that ends; pending
   * messages turn into bounces, since nobody can decrypt them any more.
   *
   * @param how.leavesMessages for `bounceStale` of the message store: a full queue would hold the row for long
   */
  wipe(reason: WipeReason, nowMs: number, how?: { leavesMessages: boolean }): Promise<void>;
  /** Notes that tokens issued until `atMs` speak for the device no more; an earlier moment than the noted one changes nothing. */
  revoke(atMs: number): Promise<void>;
  /** Writes the device's row. `ranLow`: a pool fell below the threshold, or to zero, as its `countVersion` tells. */
  save(update: DeviceKeysUpdate, how?: { ranLow: boolean }): Promise<void>;
}

export interface ClaimRequest {
  claimer: DeviceAddress;
  /** UUID of the claimer's; the same one for the same target gets the same answer. */
  claimId: string;
  userId: string;
  /** Null stands for every device of the user but the claimer. */
  deviceId: number | null;
  /** Whether to spend no one-time prekey, though there may be some: the target is protected from being drained. */
  isTargetSpared?: boolean;
}

/** A key as it goes on the wire: its bytes in base64, which nobody looks into on the way. */
export interface WireKey {
  keyId: number;
  publicKey: string;
}

export interface SignedWireKey extends WireKey {
  signature: string;
}

/** The answer of one device to one claim; the very same for a repeated `claimId`. */
export interface ClaimedBundle {
  deviceId: number;
  registrationId: number;
  /** In base64. */
  identity: { identityKey: string; identityKeyEd25519: string | null };
  signedPreKey: SignedWireKey;
  /** Null when none was left, or none was to be spent. */
  oneTimePreKey: WireKey | null;
  pqPreKey: (SignedWireKey & { lastResort: boolean }) | null;
  /** Whether the claim spared the device's one-time prekeys when it was first answered. */
  isTargetSpared: boolean;
}

export interface ClaimResult {
  /**
   * One list per request, in the order of the requests; each sorted by device id. Null, where nobody waits, for a
   * request of whose devices one was being changed: asked again, it gets what it was given and the rest.
   */
  bundles: (ClaimedBundle[] | null)[];
  /** Devices of which a pool fell below the threshold, or to zero, by this very claim. */
  ranLow: DeviceAddress[];
}

/** What a client holds, as it says. */
export interface ClientView {
  /** Its identity key, canonical. */
  identity: Uint8Array;
  /** Ids of one-time prekeys; null where it lists none. */
  ids: Record<PreKeyKind, readonly number[] | null>;
  /** Which EC ids it wants to be told: those that were handed out since then, the newest ones where there are more. */
  handedOut: { sinceMs: number; limit: number } | null;
}

/** How the ids that a client listed stand, each list ascending; all are empty where it listed none. */
export interface ComparedIds {
  /** Handed out or withdrawn under its identity, also where the device has another one by now. */
  used: number[];
  /** Never seen. */
  unknown: number[];
  /** Pooled, and not listed; where the device has another identity by now, nothing is pooled under the client's. */
  notListed: number[];
}

export interface KeyStore {
  /** Null for a device that never uploaded. */
  read(device: DeviceAddress): Promise<DeviceKeys | null>;

  /**
   * Compares a client's view with the store as it stands at one moment.
   *
   * @returns the keys as of `read`; `handedOut` under the present identity, newest first
   */
  compare(
    device: DeviceAddress,
    view: ClientView,
  ): Promise<{ keys: DeviceKeys | null; ids: Record<PreKeyKind, ComparedIds>; handedOut: number[] }>;

  /**
   * Runs `action` in one transaction that holds the device's row; throws what it throws, having changed nothing then.
   *
   * @param how.isUpkeep whether nobody is told that it was done: a crash soon after may undo it, and the row waits for
   *   no disk
   * @param how.fence the number of the connection that asks, which is noted unless `action` throws: from then on no older
   *   one is served, and whoever asks can tell that an older one came late
   */
  change<Result>(
    device: DeviceAddress,
    action: (keys: KeySetTransaction) => Promise<Result>,
    how?: { isUpkeep?: boolean; fence?: number | null },
  ): Promise<Result>;

  /** The user's devices that have keys, sorted by device id. */
  devicesOf(userId: string): Promise<{ deviceId: number; registrationId: number }[]>;

  /**
   * Claims at most one one-time prekey of each kind for each request and device, oldest upload first.
   * No key is ever in two answers; a repeated (claimer, claimId, device) gets its first answer and spends
   * nothing, unless the device's keys were wiped since; "none" is said only where none is left. Devices without a whole bundle are left out, and
   * nothing of theirs is spent.
   *
   * @param how.waits whether to wait for devices that are being changed, or to leave their requests unanswered
   * @throws GatewayError UNAVAILABLE when the store can't be reached; what was claimed then is what a repetition gets
   */
  claim(
    requests: readonly ClaimRequest[],
    how: { nowMs: number; lowThreshold: number; waits: boolean },
  ): Promise<ClaimResult>;

  /**
   * Folds claims made before `claimedBeforeMs` into the device's used ids, and drops signed prekeys that were
   * replaced before `replacedBeforeMs`, with the claims that name them, which are answered anew from then on; at most
   * `limit` claims and devices at a time. The ids stay unusable.
   *
   * @returns rows removed; fewer than `limit` means that nothing is left to sweep
   */
  sweep(cut: { claimedBeforeMs: number; replacedBeforeMs: number; limit: number }): Promise<number>;

  /**
   * Looks at the next `limit` devices in the order of their addresses, whatever they are, and locks none.
   *
   * @param page.after the `last` of the page before; null for the first page
   * @returns those that have keys and were neither served nor changed since `idleBeforeMs`, nor restored, and those
   *   that have lost them while messages wait for them still; `last` is where the next page begins, null where there
   *   is none
   */
  findIdle(page: {
    idleBeforeMs: number;
    after: DeviceAddress | null;
    limit: number;
  }): Promise<{ idle: DeviceAddress[]; last: DeviceAddress | null }>;

  /** 32 random bytes, made once by whichever node asks first and the same for every node ever after. */
  sharedSecret(name: string): Promise<Uint8Array>;
}
