/** From the wire's base64 to bytes, refusing keys that no honest client makes. */
import type { Identity, OneTimePreKey, SignedPreKey } from '../ports/key-store.ts';
import { GatewayError, type Issue } from '../protocol/errors.ts';
import type { ParsedInput } from '../protocol/events.ts';
import { canonicalCurveKey } from './signature.ts';

type WireKeySet = ParsedInput<'uploadKeys'>;
type WireSigned = NonNullable<ParsedInput<'rotateSignedPreKey'>['signedPreKey']>;

export function bytesOf(base64: string): Buffer {
  return Buffer.from(base64, 'base64');
}

export function base64Of(bytes: Uint8Array): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString('base64');
}

export function decodeSigned(key: WireSigned): SignedPreKey {
  return { keyId: key.keyId, publicKey: bytesOf(key.publicKey), signature: bytesOf(key.signature) };
}

/**
 * The u-coordinate that two encodings of one key share.
 *
 * @returns null where the key is not canonical or of low order
 */
export function decodeIdentity(
  wire: Pick<WireKeySet, 'identityKey' | 'identityKeyEd25519'>,
): Identity | null {
  const identityKey = bytesOf(wire.identityKey);
  const canonicalKey = canonicalCurveKey(identityKey);
  if (canonicalKey === null) return null;
  return {
    identityKey,
    canonicalKey,
    identityKeyEd25519: wire.identityKeyEd25519 === undefined ? null : bytesOf(wire.identityKeyEd25519),
  };
}

/** @throws GatewayError BAD_REQUEST with the path of each key that is not canonical or of low order */
export function decodeOneTimePreKeys(wire: WireKeySet['oneTimePreKeys']): OneTimePreKey[] {
  const issues: Issue[] = [];
  const keys = (wire ?? []).map((key, index) => {
    const publicKey = bytesOf(key.publicKey);
    if (canonicalCurveKey(publicKey) === null) {
      issues.push({
        path: ['oneTimePreKeys', index, 'publicKey'],
        message: 'must be a canonical key that is not of low order',
      });
    }
    return { keyId: key.keyId, publicKey, signature: null };
  });
  if (issues.length > 0) {
    throw new GatewayError('BAD_REQUEST', 'a one-time prekey is no usable key', { details: { issues } });
  }
  return keys;
}

export function decodePqOneTimePreKeys(wire: WireKeySet['pqOneTimePreKeys']): OneTimePreKey[] {
  return (wire ?? []).map(decodeSigned);
}

/** Whether two encodings stand for one EC key, or two PQ keys are the same. */
export function samePublicKey(kind: 'ec' | 'pq', a: Uint8Array, b: Uint8Array): boolean {
  // The 33-byte form is the 32-byte one behind a prefix.
  const significant = (key: Uint8Array) => (kind === 'ec' ? key.subarray(-32) : key);
  return Buffer.compare(significant(a), significant(b)) === 0;
}

/** Whether two identities are the same: both of their keys count, in whatever encoding. */
export function sameIdentity(
  a: Pick<Identity, 'canonicalKey' | 'identityKeyEd25519'>,
  b: Pick<Identity, 'canonicalKey' | 'identityKeyEd25519'>,
): boolean {
  if (Buffer.compare(a.canonicalKey, b.canonicalKey) !== 0) return false;
  if (a.identityKeyEd25519 === null || b.identityKeyEd25519 === null) {
    return a.identityKeyEd25519 === b.identityKeyEd25519;
  }
  return Buffer.compare(a.identityKeyEd25519, b.identityKeyEd25519) === 0;
}
