/** The equation of an Ed25519 signature by itself: what a library checks that trusts the key and the point R. */
import { createHash } from 'node:crypto';
import { ed25519 } from '@noble/curves/ed25519.js';
import { bytesToNumberLE } from '@noble/curves/utils.js';

const { Point } = ed25519;

/**
 * Whether S·B = R + H(R ‖ A ‖ M)·A. Some versions of OpenSSL take whatever fits, points of low order included, others
 * don't: that a forgery is one must not depend on which of them runs the tests.
 *
 * @param publicKey A, 32 bytes
 * @param signature R ‖ S, 64 bytes
 * @see RFC 8032, section 5.1.7
 */
export function fitsEquation(publicKey: Uint8Array, message: Uint8Array, signature: Uint8Array): boolean {
  const encodedR = signature.subarray(0, 32);
  const hash = createHash('sha512').update(encodedR).update(publicKey).update(message).digest();
  const challenge = bytesToNumberLE(hash) % Point.Fn.ORDER;
  const s = bytesToNumberLE(signature.subarray(32));
  const [a, r] = [publicKey, encodedR].map((point) => Point.fromBytes(point, true));
  return Point.BASE.multiplyUnsafe(s).equals(r!.add(a!.multiplyUnsafe(challenge)));
}
