/** Rotation: a new signed or last-resort prekey under the same identity; the old one stays readable for 30 days. */

import { GatewayError } from '../protocol/errors.ts';
import type { ParsedInput, RequestData } from '../protocol/events.ts';
import type { DeviceAddress } from '../protocol/ids.ts';
import { decodeSigned } from './decode.ts';
import { draftOf, type KeyChange, placeOf, refuseLateChange } from './key-set.ts';
import { type UploadParts, withVerifiedIdentity } from './upload.ts';

/**
 * Makes the offered prekeys the active ones. Asking for what already stands changes nothing.
 *
 * @throws GatewayError KEYS_NOT_UPLOADED, SIGNATURE_INVALID, PREKEY_CONFLICT, KEYS_OUT_OF_SYNC, UNAVAILABLE;
 *   nothing was stored then
 */
export async function rotateSignedPreKey(
  parts: UploadParts,
  device: DeviceAddress,
  input: ParsedInput<'rotateSignedPreKey'>,
): Promise<KeyChange<RequestData<'rotateSignedPreKey'>>> {
  const signedPreKey = input.signedPreKey && decodeSigned(input.signedPreKey);
  const pqLastResortPreKey = input.pqLastResortPreKey && decodeSigned(input.pqLastResortPreKey);
  return await withVerifiedIdentity(
    parts.store,
    device,
    { signedPreKey, pqLastResortPreKey },
    async (keys, canonicalKey) => {
      const place = signedPreKey ? await placeOf(keys, 'ec', canonicalKey, signedPreKey) : 'stands';
      const pqPlace = pqLastResortPreKey
        ? await placeOf(keys, 'pq', canonicalKey, pqLastResortPreKey)
        : 'stands';
      const keysChanged = place !== 'stands' || pqPlace !== 'stands';
      refuseLateChange(input.ifKeyVersion, keys.current, keysChanged);
      if (place === 'conflict' || pqPlace === 'conflict') throw new GatewayError('PREKEY_CONFLICT');

      const nowMs = parts.clock.nowMs();
      const draft = draftOf(keys.current);
      if (keysChanged) {
        if (place === 'new') {
          await keys.activateSignedPreKey('ec', signedPreKey!, nowMs);
          draft.signedPreKeyExpiresAtMs = nowMs + parts.signedPreKeyLifetimeMs;
        }
        if (pqPlace === 'new') await keys.activateSignedPreKey('pq', pqLastResortPreKey!, nowMs);
        draft.keyVersion += 1;
        draft.updatedAtMs = nowMs;
        await keys.save(draft);
      }
      return {
        data: {
          keyVersion: draft.keyVersion,
          signedPreKeyExpiresAt: new Date(draft.signedPreKeyExpiresAtMs ?? nowMs).toISOString(),
        },
        keysChanged,
        rotation: keysChanged,
        ranLow: false,
        wiped: false,
      };
    },
  );
}
