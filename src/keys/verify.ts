/** Every signed key of an upload is checked here, before anything of it is stored. */
import type { Identity, OneTimePreKey, SignedPreKey } from '../ports/key-store.ts';
import { GatewayError, type InvalidKey } from '../protocol/errors.ts';
import { canonicalCurveKey, verifyingKeyOf, verifySignature } from './signature.ts';

export interface SignedKeys {
  signedPreKey?: SignedPreKey | undefined;
  pqLastResortPreKey?: SignedPreKey | undefined;
  pqOneTimePreKeys?: readonly OneTimePreKey[];
}

/** Keys of one turn: node's thread pool has four threads, which the rest of the process wants too. */
const TURN_KEYS_MAX = 8;

let lastTurn: Promise<unknown> = Promise.resolve();

/** Uploads take turns, first come, first served, so that a large one keeps no small one waiting long. */
function inTurn<Result>(action: () => Promise<Result>): Promise<Result> {
  const turn = lastTurn.then(action);
  lastTurn = turn.catch(() => {});
  return turn;
}

/**
 * Verifies all of `keys` against `identity`, off the event loop.
 *
 * @throws GatewayError SIGNATURE_INVALID naming every key that fails; the identity key alone where it is itself unusable
 */
export async function verifySignedKeys(
  identity: Pick<Identity, 'identityKey' | 'identityKeyEd25519'> | null,
  keys: SignedKeys,
): Promise<void> {
  const { signedPreKey, pqLastResortPreKey, pqOneTimePreKeys = [] } = keys;
  if (signedPreKey === undefined && pqLastResortPreKey === undefined && pqOneTimePreKeys.length === 0) return;
  const verifyingKey =
    identity &&
    verifyingKeyOf({
      identityKey: identity.identityKey,
      identityKeyEd25519: identity.identityKeyEd25519 ?? undefined,
    });
  if (verifyingKey === null) throw signatureInvalid([{ kind: 'identityKey' }]);

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

  const invalid: InvalidKey[] = [];
  for (let start = 0; start < checks.length; start += TURN_KEYS_MAX) {
    const chunk = checks.slice(start, start + TURN_KEYS_MAX);
    const verdicts = await inTurn(() =>
      Promise.all(
        chunk.map(async ({ key, elliptic }) => {
          if (elliptic && canonicalCurveKey(key.publicKey) === null) return false;
          return await verifySignature(verifyingKey, key.publicKey, key.signature!);
        }),
      ),
    );
    chunk.forEach((check, index) => {
      if (!verdicts[index]) invalid.push(check.name);
    });
  }
  if (invalid.length > 0) throw signatureInvalid(invalid);
}

function signatureInvalid(keys: InvalidKey[]): GatewayError {
  return new GatewayError('SIGNATURE_INVALID', 'a key is not signed by the identity key, or no usable key', {
    details: { keys },
  });
}
