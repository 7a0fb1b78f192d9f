/** Public keys under one identity, made to order: whatever id and encoding a test asks for, properly signed. */
import { generateKeyPairSync, sign } from 'node:crypto';
import { IdentityKeyPair, KEMKeyPair, PrivateKey } from '@signalapp/libsignal-client';
import type { RequestInput } from '../../src/protocol/events.ts';
import type { OneTimePreKey, SignedKey } from './libsignal-device.ts';

/** 33 bytes with the prefix, or the raw 32. */
export type Encoding = 'prefixed' | 'raw';

/** Keeps no private half but the identity's: nothing here can be decrypted, and no test of keys needs it. */
export class KeyMaker {
  readonly identity = IdentityKeyPair.generate();

  /** As libsignal serialises it, or raw. */
  identityKey(encoding: Encoding = 'prefixed'): string {
    return encoded(this.identity.publicKey.serialize(), encoding);
  }

  /** A new key under this id, signed over the very bytes that are uploaded. */
  signed(keyId: number, encoding: Encoding = 'prefixed'): SignedKey {
    const publicKey = encoded(PrivateKey.generate().getPublicKey().serialize(), encoding);
    return this.signedAgain({ keyId, publicKey });
  }

  /** The same key under a fresh signature: XEdDSA is randomised. */
  signedAgain({ keyId, publicKey }: Pick<SignedKey, 'keyId' | 'publicKey'>): SignedKey {
    const bytes = Uint8Array.from(Buffer.from(publicKey, 'base64'));
    return {
      keyId,
      publicKey,
      signature: Buffer.from(this.identity.privateKey.sign(bytes)).toString('base64'),
    };
  }

  pq(keyId: number): SignedKey {
    const publicKey = Buffer.from(KEMKeyPair.generate().getPublicKey().serialize()).toString('base64');
    return this.signedAgain({ keyId, publicKey });
  }

  oneTime(keyId: number, encoding: Encoding = 'prefixed'): OneTimePreKey {
    return { keyId, publicKey: encoded(PrivateKey.generate().getPublicKey().serialize(), encoding) };
  }

  /** A whole key set with signed prekey 1, and whatever `more` says. */
  keySet(more: Partial<RequestInput<'uploadKeys'>> = {}): RequestInput<'uploadKeys'> {
    return { registrationId: 77, identityKey: this.identityKey(), signedPreKey: this.signed(1), ...more };
  }
}

/** The key set with its signed prekey signed by a new Ed25519 key, which stands beside the identity key. */
export function signedByEd25519(keySet: RequestInput<'uploadKeys'>) {
  const { publicKey, privateKey } = generateKeyPairSync('ed25519');
  const { signedPreKey } = keySet;
  const signature = sign(null, Buffer.from(signedPreKey.publicKey, 'base64'), privateKey).toString('base64');
  return {
    ...keySet,
    identityKeyEd25519: Buffer.from(publicKey.export({ format: 'jwk' }).x!, 'base64url').toString('base64'),
    signedPreKey: { ...signedPreKey, signature },
  };
}

/** `first`, `first + 1`, … */
export function ids(first: number, count: number): number[] {
  return Array.from({ length: count }, (_, index) => first + index);
}

function encoded(serialised: Uint8Array, encoding: Encoding): string {
  return Buffer.from(encoding === 'raw' ? serialised.slice(1) : serialised).toString('base64');
}
