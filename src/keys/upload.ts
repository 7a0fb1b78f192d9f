/** Uploads: a whole key set, or more one-time prekeys. One upload is one transaction. */
import type { Clock } from '../lib/clock.ts';
import { together } from '../lib/together.ts';
import type {
  DeviceKeysUpdate,
  Identity,
  KeySetTransaction,
  KeyStore,
  OneTimePreKey,
  PreKeyKind,
} from '../ports/key-store.ts';
import type { DeviceLocks } from '../ports/lock.ts';
import { GatewayError } from '../protocol/errors.ts';
import type { ParsedInput, RequestData } from '../protocol/events.ts';
import type { DeviceAddress } from '../protocol/ids.ts';
import {
  decodeIdentity,
  decodeOneTimePreKeys,
  decodePqOneTimePreKeys,
  decodeSigned,
  sameIdentity,
} from './decode.ts';
import {
  draftOf,
  fellLow,
  judgePreKeys,
  type KeyChange,
  placeOf,
  refuseLateChange,
  untouched,
  withCourtesyLock,
} from './key-set.ts';
import { verifySignedKeys } from './verify.ts';

export interface UploadParts {
  store: KeyStore;
  locks: DeviceLocks;
  clock: Clock;
  /** Unclaimed one-time prekeys of one kind that a device may have waiting. */
  poolMax: number;
  lowThreshold: number;
  signedPreKeyLifetimeMs: number;
}

type UploadData = RequestData<'uploadKeys'>;

/**
 * Stores a key set: new, added to, rotated, or in place of another identity's. Every signed key is verified first,
 * against the very identity that is stored with them.
 *
 * @throws GatewayError SIGNATURE_INVALID, IDENTITY_MISMATCH, PREKEY_CONFLICT, KEYS_OUT_OF_SYNC, BAD_REQUEST,
 *   UNAVAILABLE; nothing was stored then
 */
export async function uploadKeys(
  parts: UploadParts,
  device: DeviceAddress,
  input: ParsedInput<'uploadKeys'>,
): Promise<KeyChange<UploadData>> {
  const oneTimePreKeys = decodeOneTimePreKeys(input.oneTimePreKeys);
  const pqOneTimePreKeys = decodePqOneTimePreKeys(input.pqOneTimePreKeys);
  const signedPreKey = decodeSigned(input.signedPreKey);
  const pqLastResortPreKey = input.pqLastResortPreKey && decodeSigned(input.pqLastResortPreKey);
  const identity = decodeIdentity(input);
  await verifySignedKeys(identity, { signedPreKey, pqLastResortPreKey, pqOneTimePreKeys });
  // Verification refuses a null identity; said again for the compiler.
  if (identity === null) throw new GatewayError('SIGNATURE_INVALID');

  return await withCourtesyLock(parts.locks, device, async () =>
    parts.store.change(device, async (keys) => {
      const { current } = keys;
      const nowMs = parts.clock.nowMs();
      const draft = draftOf(current);
      const stands = current.identity !== null && sameIdentity(current.identity, identity);
      const wiped = current.identity !== null && !stands;
      if (wiped) {
        if (input.replaceIdentity !== true) {
          refuseLateChange(input.ifKeyVersion, current, true);
          throw new GatewayError('IDENTITY_MISMATCH');
        }
        await keys.wipe('RECIPIENT_IDENTITY_CHANGED', nowMs);
        draft.availableCounts = { ec: 0, pq: 0 };
        draft.claimedCounts = { ec: 0, pq: 0 };
        draft.offersPq = false;
        draft.countVersion += 1;
      }

      const { canonicalKey } = identity;
      const [place, pqPlace] = await together([
        placeOf(keys, 'ec', canonicalKey, signedPreKey),
        pqLastResortPreKey === undefined ? 'stands' : placeOf(keys, 'pq', canonicalKey, pqLastResortPreKey),
      ]);
      const rotates = place !== 'stands' || pqPlace !== 'stands';
      const keysChanged = !stands || rotates || input.registrationId !== current.registrationId;
      refuseLateChange(input.ifKeyVersion, current, keysChanged);
      if (place === 'conflict' || pqPlace === 'conflict') throw new GatewayError('PREKEY_CONFLICT');

      if (place === 'new') draft.signedPreKeyExpiresAtMs = nowMs + parts.signedPreKeyLifetimeMs;
      if (!stands) {
        draft.identity = identity;
        draft.identityVersion += 1;
      }
      draft.registrationId = input.registrationId;
      if (keysChanged) draft.keyVersion += 1;
      const hasLastResort = pqLastResortPreKey !== undefined || (stands && current.signedPreKeys.pq !== null);
      const pools = { ec: oneTimePreKeys, pq: pqOneTimePreKeys, hasLastResort };
      const judged = await judgePools(parts, keys, draft, canonicalKey, pools);
      draft.updatedAtMs = nowMs;
      const ranLow = fellLow(current.availableCounts, draft.availableCounts, parts.lowThreshold);
      // Sent together: none of these waits for another's answer.
      await together([
        place === 'new' && keys.activateSignedPreKey('ec', signedPreKey, nowMs),
        pqPlace === 'new' && keys.activateSignedPreKey('pq', pqLastResortPreKey!, nowMs),
        addFresh(keys, judged),
        keys.save(draft, { ranLow }),
      ]);
      return {
        data: uploadData(draft, judged),
        keysChanged,
        ranLow,
        rotation: stands && rotates && input.registrationId === current.registrationId,
        wiped,
      };
    }),
  );
}

/** A key set may be replaced between its reading and the transaction; so often it is read again. */
const IDENTITY_READS_MAX = 3;

/**
 * Adds one-time prekeys to the stored key set.
 *
 * @param input.ifIdentityVersion the identity that they are of, where it is known
 * @throws GatewayError KEYS_NOT_UPLOADED, SIGNATURE_INVALID, KEYS_OUT_OF_SYNC, BAD_REQUEST, UNAVAILABLE; nothing was stored then
 */
export async function addPreKeys(
  parts: UploadParts,
  device: DeviceAddress,
  input: ParsedInput<'addPreKeys'> & { ifIdentityVersion?: number },
): Promise<KeyChange<UploadData>> {
  const oneTimePreKeys = decodeOneTimePreKeys(input.oneTimePreKeys);
  const pqOneTimePreKeys = decodePqOneTimePreKeys(input.pqOneTimePreKeys);
  return await withVerifiedIdentity(parts.store, device, { pqOneTimePreKeys }, async (keys, canonicalKey) => {
    const draft = draftOf(keys.current);
    const { ifIdentityVersion = draft.identityVersion } = input;
    if (ifIdentityVersion !== draft.identityVersion) throw replacedMeanwhile(draft);
    const judged = await judgePools(parts, keys, draft, canonicalKey, {
      ec: oneTimePreKeys,
      pq: pqOneTimePreKeys,
      hasLastResort: keys.current.signedPreKeys.pq !== null,
    });
    draft.updatedAtMs = parts.clock.nowMs();
    await together([addFresh(keys, judged), keys.save(draft)]);
    return untouched(uploadData(draft, judged));
  });
}

/**
 * Verifies `signed` against the stored identity, then runs `action` in a transaction that proves this identity still
 * to be the stored one.
 *
 * @throws GatewayError KEYS_NOT_UPLOADED, SIGNATURE_INVALID, KEYS_OUT_OF_SYNC, UNAVAILABLE, and what `action` throws
 */
export async function withVerifiedIdentity<Result>(
  store: KeyStore,
  device: DeviceAddress,
  signed: Parameters<typeof verifySignedKeys>[1],
  action: (keys: KeySetTransaction, canonicalKey: Uint8Array) => Promise<Result>,
): Promise<Result> {
  let found: Identity | null = null;
  for (let reads = 0; reads < IDENTITY_READS_MAX; reads++) {
    const current = await store.read(device);
    if (current?.identity == null) throw new GatewayError('KEYS_NOT_UPLOADED');
    const { identity } = current;
    await verifySignedKeys(identity, signed);
    found ??= identity;
    // What bears no signature does not say whose it is: it may be of the identity that is gone.
    if (!sameIdentity(found, identity)) throw replacedMeanwhile(current);
    const outcome = await store.change(device, async (keys) => {
      if (keys.current.identity === null) throw new GatewayError('KEYS_NOT_UPLOADED');
      if (!sameIdentity(keys.current.identity, identity)) return null;
      return { result: await action(keys, identity.canonicalKey) };
    });
    if (outcome !== null) return outcome.result;
  }
  throw new GatewayError('UNAVAILABLE', 'the identity key keeps changing; try again', {
    retryAfterMs: 1_000,
  });
}

function replacedMeanwhile({ keyVersion }: { keyVersion: number }): GatewayError {
  return new GatewayError('KEYS_OUT_OF_SYNC', 'the identity key was replaced meanwhile', {
    details: { keyVersion },
  });
}

type Judged = Record<PreKeyKind, Awaited<ReturnType<typeof judgePreKeys>>>;

/** Counts in `draft` what can be added. */
async function judgePools(
  parts: UploadParts,
  keys: KeySetTransaction,
  draft: DeviceKeysUpdate,
  canonicalKey: Uint8Array,
  offered: Record<PreKeyKind, OneTimePreKey[]> & { hasLastResort: boolean },
): Promise<Judged> {
  if (offered.pq.length > 0 && !offered.hasLastResort) {
    throw new GatewayError('BAD_REQUEST', 'one-time PQ prekeys need a last-resort prekey', {
      details: {
        issues: [{ path: ['pqOneTimePreKeys'], message: 'need a stored or accompanying pqLastResortPreKey' }],
      },
    });
  }
  const judge = async (kind: PreKeyKind) => {
    const room = Math.max(0, parts.poolMax - draft.availableCounts[kind]);
    return await judgePreKeys(keys, kind, canonicalKey, offered[kind], room);
  };
  const [ec, pq] = await together([judge('ec'), judge('pq')]);
  draft.availableCounts.ec += ec.fresh.length;
  draft.availableCounts.pq += pq.fresh.length;
  if (ec.fresh.length + pq.fresh.length > 0) draft.countVersion += 1;
  return { ec, pq };
}

async function addFresh(keys: KeySetTransaction, { ec, pq }: Judged): Promise<void> {
  await together([keys.addToPool('ec', ec.fresh), keys.addToPool('pq', pq.fresh)]);
}

function uploadData(draft: DeviceKeysUpdate, { ec, pq }: Judged): UploadData {
  return {
    keyVersion: draft.keyVersion,
    oneTimePreKeys: ec.verdict,
    pqOneTimePreKeys: pq.verdict,
    availableCount: draft.availableCounts.ec,
    pqAvailableCount: draft.availableCounts.pq,
    countVersion: draft.countVersion,
  };
}
