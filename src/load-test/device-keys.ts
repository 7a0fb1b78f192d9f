/**
 * A device's key set as the gateway accepts it: well-formed and properly signed. No private half is kept, since
 * nothing of a load test is ever decrypted.
 */
import { generateKeyPairSync, type KeyObject, randomBytes, randomInt, sign } from 'node:crypto';
import type { RequestInput } from '../protocol/events.ts';
import { KYBER_1024_KEY_BYTES, KYBER_1024_PREFIX } from '../protocol/keys.ts';
import { REGISTRATION_ID_MAX } from '../protocol/limits.ts';

export interface LoadKeys {
  readonly registrationId: number;
  readonly identityKey: string;
  /** What `uploadKeys` takes, with so many one-time prekeys of each kind, of ids that were never used before. */
  upload(oneTimeCount: number): RequestInput<'uploadKeys'>;
  /** What `addPreKeys` takes, of ids that were never used before. */
  refill(oneTimeCount: number): RequestInput<'addPreKeys'>;
  /** What the device says to have its gate opened. */
  validation(): RequestInput<'validateKeys'>;
}

/** The first byte of an EC public key in Signal's serialised form. */
const CURVE_KEY_TYPE = 0x05;
const SIGNED_PRE_KEY_ID = 1;
const PQ_LAST_RESORT_PRE_KEY_ID = 2;

/** @param options.hasPq whether the device has post-quantum prekeys beside the others: a last-resort one, and one-time ones */
export function createLoadKeys({ hasPq }: { hasPq: boolean }): LoadKeys {
  // The identity signs with an Ed25519 key of its own, as some client libraries do: node makes and uses it cheaply.
  const signer = generateKeyPairSync('ed25519');
  const registrationId = randomInt(1, REGISTRATION_ID_MAX);
  const identityKey = curveKey().toString('base64');
  const signedPreKey = { keyId: SIGNED_PRE_KEY_ID, ...signedKey(curveKey(), signer.privateKey) };
  // One for all ids: to sign each would take as long as the rest of a claim, and this process is not to be the limit.
  const pqKey = hasPq ? signedKey(pqPublicKey(), signer.privateKey) : null;
  let lastKeyId = PQ_LAST_RESORT_PRE_KEY_ID;

  function refill(count: number): RequestInput<'addPreKeys'> {
    if (count === 0) return {};
    const keyIds = Array.from({ length: count }, () => ++lastKeyId);
    return {
      oneTimePreKeys: keyIds.map((keyId) => ({ keyId, publicKey: curveKey().toString('base64') })),
      ...(pqKey === null ? {} : { pqOneTimePreKeys: keyIds.map((keyId) => ({ keyId, ...pqKey })) }),
    };
  }

  return {
    registrationId,
    identityKey,
    upload: (oneTimeCount) => ({
      registrationId,
      identityKey,
      identityKeyEd25519: rawPublicKey(signer.publicKey),
      signedPreKey,
      ...(pqKey === null ? {} : { pqLastResortPreKey: { keyId: PQ_LAST_RESORT_PRE_KEY_ID, ...pqKey } }),
      ...refill(oneTimeCount),
    }),
    refill,
    validation: () => ({
      localIdentityKey: identityKey,
      localSignedPreKeyId: SIGNED_PRE_KEY_ID,
      localSignedPreKeyPublicKey: signedPreKey.publicKey,
      localRegistrationId: registrationId,
      ...(pqKey === null ? {} : { localPqLastResortPreKeyId: PQ_LAST_RESORT_PRE_KEY_ID }),
    }),
  };
}

/** Any number below the field's prime is a public key of Curve25519: random ones stand for real ones. */
function curveKey(): Buffer {
  const key = randomBytes(33);
  key[0] = CURVE_KEY_TYPE;
  // The highest byte is kept clear of the prime's.
  key[32]! &= 0x3f;
  return key;
}

/** Nothing is encapsulated to it, and a server has no use for its inside. */
function pqPublicKey(): Buffer {
  const key = randomBytes(KYBER_1024_KEY_BYTES);
  key[0] = KYBER_1024_PREFIX;
  return key;
}

function signedKey(publicKey: Buffer, privateKey: KeyObject) {
  return {
    publicKey: publicKey.toString('base64'),
    signature: sign(null, publicKey, privateKey).toString('base64'),
  };
}

function rawPublicKey(key: KeyObject): string {
  return Buffer.from(key.export({ format: 'jwk' }).x ?? '', 'base64url').toString('base64');
}
