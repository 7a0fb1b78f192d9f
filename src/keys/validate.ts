/** Validation: do client and server agree on the key set? Only where they do is there a proof that opens the gate. */
import type { Clock } from '../lib/clock.ts';
import type { ClientView, ComparedIds, DeviceKeys, KeyStore, PreKeyKind } from '../ports/key-store.ts';
import { GatewayError } from '../protocol/errors.ts';
import type { MissingKey, ParsedInput, RequestData } from '../protocol/events.ts';
import type { DeviceAddress } from '../protocol/ids.ts';
import { VERSION_LEAP_MAX, VERSION_MAX } from '../protocol/limits.ts';
import { bytesOf, samePublicKey } from './decode.ts';
import { draftOf, fellLow } from './key-set.ts';
import { versionAfterRestore } from './restored.ts';
import { canonicalCurveKey } from './signature.ts';
import { NO_KEYS } from './status.ts';
import { digestOfKeys, type ValidationProofs } from './validation.ts';

export interface ValidateParts {
  store: KeyStore;
  clock: Clock;
  proofs: ValidationProofs;
  claimedPreKeyRetentionMs: number;
  lowThreshold: number;
}

type Input = ParsedInput<'validateKeys'>;

/** Ids listed for a client that only gave a count. */
const CLAIMED_IDS_MAX = 10_000;

/**
 * Compares the client's view of its keys with the server's and names every fault. A server that was rolled back to an
 * older backup withdraws the device's pools at once, since it may have handed their keys out before.
 *
 * @returns `changed` tells whether that happened
 * @throws GatewayError BAD_REQUEST for an unusable key or a version that no server can have given, UNAVAILABLE
 */
export async function validateKeys(
  parts: ValidateParts,
  device: DeviceAddress,
  input: Input,
): Promise<{ data: RequestData<'validateKeys'>; changed: boolean }> {
  const localIdentity = localIdentityOf(input);
  const view = viewOf(parts, input, localIdentity);
  const found = await parts.store.compare(device, view);
  const foundKeys = found.keys ?? NO_KEYS;
  refuseImpossibleVersions(foundKeys, input, parts.clock.nowMs());
  const wasRolledBack = isRolledBack(foundKeys, input);
  const keys = wasRolledBack ? await withdrawAfterRollback(parts, device, input, localIdentity) : foundKeys;
  const { ec, pq } = wasRolledBack
    ? withdrawnPools(input, await handedOutLately(parts, device, view))
    : comparedPools(input, found, hasIdentity(keys, localIdentity));

  const faults = faultsOf(keys, input, localIdentity);
  if (wasRolledBack) {
    faults.push({
      key: 'rolledBack',
      why: 'the server was restored from an older backup: upload new one-time prekeys',
    });
  }
  const keysValid = faults.length === 0;
  return {
    data: {
      keysValid,
      missingKeys: faults.map((fault) => fault.key),
      preKeyIdsToDelete: ec.toDelete,
      preKeyIdsToUpload: ec.toUpload,
      preKeyIdsNotHeld: ec.notHeld,
      pqPreKeyIdsToDelete: pq.toDelete,
      pqPreKeyIdsToUpload: pq.toUpload,
      pqPreKeyIdsNotHeld: pq.notHeld,
      rotationDue:
        keys.signedPreKeyExpiresAtMs !== null && keys.signedPreKeyExpiresAtMs <= parts.clock.nowMs(),
      ...(keysValid ? {} : { reason: faults.map((fault) => fault.why).join('; ') }),
      keyVersion: keys.keyVersion,
      countVersion: keys.countVersion,
      ...(keysValid ? { validation: await parts.proofs.issue(device, keys) } : {}),
    },
    changed: wasRolledBack,
  };
}

/**
 * What a validation that was brought along proves.
 *
 * @param validatedVersion tells what this very socket was found in step at: a validation that says the same proves
 *   nothing more, and the keys are not read again
 * @returns the key version that it was made for, which is for the store to prove current
 * @throws GatewayError KEYS_NOT_UPLOADED, KEYS_NOT_VALIDATED where it is forged or ran out, KEYS_OUT_OF_SYNC, UNAVAILABLE
 */
export async function openValidation(
  parts: ValidateParts,
  device: DeviceAddress,
  validation: string,
  validatedVersion: () => number | null = () => null,
): Promise<number> {
  const proof = await parts.proofs.open(device, validation);
  if (proof !== null && proof.keyVersion === validatedVersion()) return proof.keyVersion;
  const keys = await parts.store.read(device);
  if (keys?.identity == null) throw new GatewayError('KEYS_NOT_UPLOADED');
  if (proof === null) throw new GatewayError('KEYS_NOT_VALIDATED', 'the validation is not good, or ran out');
  // The same version with other keys: a restored backup counted up to it again.
  if (proof.keyVersion !== keys.keyVersion || proof.keysDigest !== digestOfKeys(keys)) {
    throw new GatewayError('KEYS_OUT_OF_SYNC', undefined, { details: { keyVersion: keys.keyVersion } });
  }
  return proof.keyVersion;
}

/** @throws GatewayError BAD_REQUEST with the path of each key that is not canonical or of low order */
function localIdentityOf(input: Input): Uint8Array {
  const localIdentity = canonicalCurveKey(bytesOf(input.localIdentityKey));
  const { localSignedPreKeyPublicKey: signedPreKey } = input;
  const unusable = [
    ...(localIdentity === null ? ['localIdentityKey'] : []),
    ...(signedPreKey !== undefined && canonicalCurveKey(bytesOf(signedPreKey)) === null
      ? ['localSignedPreKeyPublicKey']
      : []),
  ];
  if (localIdentity === null || unusable.length > 0) {
    const message = 'must be a canonical key that is not of low order';
    throw new GatewayError('BAD_REQUEST', `${unusable[0]}: ${message}`, {
      details: { issues: unusable.map((field) => ({ path: [field], message })) },
    });
  }
  return localIdentity;
}

function hasIdentity({ identity }: DeviceKeys, canonicalKey: Uint8Array): boolean {
  return identity !== null && Buffer.compare(identity.canonicalKey, canonicalKey) === 0;
}

/**
 * Versions rise by one at a time: one far beyond the server's is made up, and lifting the server's over it would soon
 * leave none to come.
 *
 * @throws GatewayError BAD_REQUEST with the path of each
 */
function refuseImpossibleVersions(keys: DeviceKeys, input: Input, nowMs: number): void {
  const issues = (
    [
      ['lastKeyVersion', keys.keyVersion],
      ['lastCountVersion', keys.countVersion],
    ] as const
  )
    .filter(([field, present]) => {
      // As high as a restore just now would have lifted it, at least: an older backup may have followed that one.
      const highest = Math.max(present, versionAfterRestore(nowMs)) + VERSION_LEAP_MAX;
      return (input[field] ?? 0) > Math.min(highest, VERSION_MAX - 2);
    })
    .map(([field]) => ({ path: [field], message: 'is beyond any version that this device can have seen' }));
  if (issues.length === 0) return;
  throw new GatewayError('BAD_REQUEST', `${issues[0]!.path[0]}: ${issues[0]!.message}`, {
    details: { issues },
  });
}

function isRolledBack(keys: DeviceKeys, input: Input): boolean {
  return (
    keys.restoredAtMs !== null ||
    keys.keyVersion < (input.lastKeyVersion ?? 0) ||
    keys.countVersion < (input.lastCountVersion ?? 0)
  );
}

/**
 * Takes the pools away and lifts the versions over what the client has seen, so that they never repeat. What the
 * client holds is withdrawn too: in the time that was lost it may have been uploaded and handed out.
 */
async function withdrawAfterRollback(
  parts: ValidateParts,
  device: DeviceAddress,
  input: Input,
  localIdentity: Uint8Array,
): Promise<DeviceKeys> {
  return await parts.store.change(device, async (keys) => {
    const { current } = keys;
    const draft = draftOf(current);
    // Another validation may have done it meanwhile: then this one's lists are left.
    const isDone = !isRolledBack(current, input);
    // Of another identity's by now, the store could not tell what is pooled under which.
    if (isDone && current.identity !== null && !hasIdentity(current, localIdentity)) return current;
    if (!isDone && current.identity !== null) {
      await keys.withdraw('ec', current.identity.canonicalKey, 'all');
      await keys.withdraw('pq', current.identity.canonicalKey, 'all');
    }
    // Beyond the store's bounds they are not kept; the client is told all the same that they are gone.
    const ecCount = (await keys.withdraw('ec', localIdentity, input.localPreKeyIds ?? [])) ?? 0;
    const pqCount = (await keys.withdraw('pq', localIdentity, input.localPqPreKeyIds ?? [])) ?? 0;
    if (isDone) {
      if (ecCount + pqCount === 0) return current;
      draft.availableCounts.ec -= ecCount;
      draft.availableCounts.pq -= pqCount;
      draft.countVersion += 1;
      await keys.save(draft);
      return { ...current, ...draft };
    }
    draft.availableCounts = { ec: 0, pq: 0 };
    draft.restoredAtMs = null;
    const lastKeyVersion = input.lastKeyVersion ?? 0;
    if (current.keyVersion < lastKeyVersion) draft.keyVersion = lastKeyVersion + 1;
    draft.countVersion = Math.max(current.countVersion, input.lastCountVersion ?? 0) + 1;
    const ranLow = fellLow(current.availableCounts, draft.availableCounts, parts.lowThreshold);
    await keys.save(draft, { ranLow });
    return { ...current, ...draft };
  });
}

function faultsOf(
  keys: DeviceKeys,
  input: Input,
  localIdentity: Uint8Array,
): { key: MissingKey; why: string }[] {
  const faults: { key: MissingKey; why: string }[] = [];
  const signed = keys.signedPreKeys.ec;
  const lastResort = keys.signedPreKeys.pq;

  if (keys.identity === null) faults.push({ key: 'identity', why: 'the server has no identity key' });
  else if (!hasIdentity(keys, localIdentity)) {
    faults.push({ key: 'identity', why: 'the server has another identity key' });
  } else if (input.localRegistrationId !== undefined && input.localRegistrationId !== keys.registrationId) {
    faults.push({ key: 'identity', why: 'the server has another registration id' });
  }

  if (signed === null) faults.push({ key: 'signedPreKey', why: 'the server has no signed prekey' });
  else if (signed.keyId !== input.localSignedPreKeyId) {
    faults.push({ key: 'signedPreKey', why: 'the server has another signed prekey' });
  } else if (
    input.localSignedPreKeyPublicKey !== undefined &&
    !samePublicKey('ec', signed.publicKey, bytesOf(input.localSignedPreKeyPublicKey))
  ) {
    faults.push({ key: 'signedPreKey', why: 'the server has another key under the signed prekey’s id' });
  }

  if (
    input.localPqLastResortPreKeyId !== undefined &&
    lastResort?.keyId !== input.localPqLastResortPreKeyId
  ) {
    faults.push({
      key: 'pqLastResortPreKey',
      why: lastResort ? 'the server has another last-resort prekey' : 'the server has no last-resort prekey',
    });
  }
  return faults;
}

function viewOf(
  { clock, claimedPreKeyRetentionMs }: ValidateParts,
  { localPreKeyIds, localPreKeyCount, localPqPreKeyIds }: Input,
  identity: Uint8Array,
): ClientView {
  const isCounted = localPreKeyIds === undefined && localPreKeyCount !== undefined;
  return {
    identity,
    ids: { ec: localPreKeyIds ?? null, pq: localPqPreKeyIds ?? null },
    handedOut: isCounted
      ? { sinceMs: clock.nowMs() - claimedPreKeyRetentionMs, limit: CLAIMED_IDS_MAX }
      : null,
  };
}

type Compared = Awaited<ReturnType<KeyStore['compare']>>;
type Pools = Record<PreKeyKind, Record<'toDelete' | 'toUpload' | 'notHeld', number[]>>;

/** @param isStored whether the client's identity is the one that the server has */
function comparedPools({ localPreKeyIds }: Input, { ids, handedOut }: Compared, isStored: boolean): Pools {
  const of = ({ used, unknown, notListed }: ComparedIds) => ({
    toDelete: used,
    toUpload: unknown,
    notHeld: notListed,
  });
  const ec = of(ids.ec);
  // Ids that were handed out under another identity are none of this client's.
  if (localPreKeyIds === undefined && isStored) ec.toDelete = handedOut;
  return { ec, pq: of(ids.pq) };
}

/** What a client is told that gave a count alone; of the others nothing is asked. */
async function handedOutLately(
  { store }: ValidateParts,
  device: DeviceAddress,
  { identity, handedOut }: ClientView,
): Promise<number[]> {
  if (handedOut === null) return [];
  return (await store.compare(device, { identity, ids: { ec: null, pq: null }, handedOut })).handedOut;
}

/** Whatever the client holds was withdrawn just now. */
function withdrawnPools({ localPreKeyIds, localPqPreKeyIds }: Input, handedOut: number[]): Pools {
  const of = (toDelete: readonly number[]) => ({ toDelete: [...toDelete], toUpload: [], notHeld: [] });
  return { ec: of(localPreKeyIds ?? handedOut), pq: of(localPqPreKeyIds ?? []) };
}
