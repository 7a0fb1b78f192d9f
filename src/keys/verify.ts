/** Every signed key of an upload is checked here, before anything of it is stored. */
import type { Identity, OneTimePreKey, SignedPreKey } from '../ports/key-store.ts';
import { GatewayError, type InvalidKey } from '../protocol/errors.ts';
import { canonicalCurveKey } from './signature.ts';
import { checkSignatures } from './signature-checks.ts';

export interface SignedKeys {
  signedPreKey?: SignedPreKey | undefined;
  pqLastResortPreKey?: SignedPreKey | undefined;
  pqOneTimePreKeys?: readonly OneTimePreKey[];
}

/**
 * Verifies all of `keys` against `identity`, off the event loop.
 *
 * @throws GatewayError SIGNATURE_INVALID naming every key that fails, or the identity key alone where it is itself unusable;
 *   UNAVAILABLE where too many wait
 */
export async function verifySignedKeys(
  identity: Pick<Identity, 'identityKey' | 'identityKeyEd25519'> | null,
  keys: SignedKeys,
): Promise<void> {
  const { signedPreKey, pqLastResortPreKey, pqOneTimePreKeys = [] } = keys;
  if (signedPreKey === undefined && pqLastResortPreKey === undefined && pqOneTimePreKeys.length === 0) return;
  if (identity === null) throw signatureInvalid([{ kind: 'identityKey' }]);
  const checks: { name: InvalidKey; key: SignedPreKey | OneTimePreKey; elliptic: boolean }[] = [];
  if (signedPreKey !== undefined) {
    checks.push({
      name: { kind: 'signedPreKey', keyId: signedPreKey.keyId },
      key: signedPreKey,
      elliptic: true,
    });
  }
  if (pqLastResortPreKey !== undefined) {
    checks.push({
      name: { kind: 'pqLastResortPreKey', keyId: pqLastResortPreKey.keyId },
      key: pqLastResortPreKey,
      elliptic: false,
    });
  }
  for (const key of pqOneTimePreKeys) {
    checks.push({ name: { kind: 'pqOneTimePreKey', keyId: key.keyId }, key, elliptic: false });
  }

  const verdicts = await checkSignatures(
    identity,
    checks.map(({ key }) => ({ message: key.publicKey, signature: key.signature! })),
  );
  if (verdicts === null) throw signatureInvalid([{ kind: 'identityKey' }]);
  const invalid = checks
    .filter(
      ({ key, elliptic }, nth) => !verdicts[nth] || (elliptic && canonicalCurveKey(key.publicKey) === null),
    )
    .map(({ name }) => name);
  if (invalid.length > 0) throw signatureInvalid(invalid);
}

function signatureInvalid(keys: InvalidKey[]): GatewayError {
  return new GatewayError('SIGNATURE_INVALID', 'a key is not signed by the identity key, or no usable key', {
    details: { keys },
  });
}
