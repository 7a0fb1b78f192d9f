/**
 * A device's key set as the gateway accepts it: well-formed and properly signed. No private half is kept, since
 * nothing of a load test is ever decrypted.
 */
import { generateKeyPairSync, type KeyObject, randomBytes, randomInt, sign } from 'node:crypto';
import type { RequestInput } from '../protocol/events.ts';
import { REGISTRATION_ID_MAX } from '../protocol/limits.ts';

export interface LoadKeys {
  readonly registrationId: number;
  readonly identityKey: string;
  /** What `uploadKeys` takes, with one-time prekeys of ids that were never used before. */
  upload(oneTimeCount: number): RequestInput<'uploadKeys'>;
  oneTimePreKeys(count: number): { keyId: number; publicKey: string }[];
  /** What the device says to have its gate opened. */
  validation(): RequestInput<'validateKeys'>;
}

/** The first byte of an EC public key in Signal's serialised form. */
const CURVE_KEY_TYPE = 0x05;
const SIGNED_PRE_KEY_ID = 1;

export function createLoadKeys(): LoadKeys {
  // The identity signs with an Ed25519 key of its own, as some client libraries do: node makes and uses it cheaply.
  const signer = generateKeyPairSync('ed25519');
  const registrationId = randomInt(1, REGISTRATION_ID_MAX);
  const identityKey = curveKey().toString('base64');
  const signedPreKey = signedKey(SIGNED_PRE_KEY_ID, signer.privateKey);
  let lastKeyId = 0;

  function oneTimePreKeys(count: number) {
    return Array.from({ length: count }, () => ({
      keyId: ++lastKeyId,
      publicKey: curveKey().toString('base64'),
    }));
  }

  return {
    registrationId,
    identityKey,
    upload: (oneTimeCount) => ({
      registrationId,
      identityKey,
      identityKeyEd25519: rawPublicKey(signer.publicKey),
      signedPreKey,
      ...(oneTimeCount === 0 ? {} : { oneTimePreKeys: oneTimePreKeys(oneTimeCount) }),
    }),
    oneTimePreKeys,
    validation: () => ({
      localIdentityKey: identityKey,
      localSignedPreKeyId: SIGNED_PRE_KEY_ID,
      localSignedPreKeyPublicKey: signedPreKey.publicKey,
      localRegistrationId: registrationId,
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

function signedKey(keyId: number, privateKey: KeyObject) {
  const publicKey = curveKey();
  return {
    keyId,
    publicKey: publicKey.toString('base64'),
    signature: sign(null, publicKey, privateKey).toString('base64'),
  };
}

function rawPublicKey(key: KeyObject): string {
  return Buffer.from(key.export({ format: 'jwk' }).x ?? '', 'base64url').toString('base64');
}
