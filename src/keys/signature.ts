/**
 * The only cryptography of the server: which public keys are sound, and whether one signed another.
 * Public values only, so nothing here needs constant time; the curve arithmetic is left to OpenSSL.
 */
import { createPublicKey, type KeyObject, verify } from 'node:crypto';

/** The field prime of Curve25519 and Ed25519, 2²⁵⁵ − 19. */
const P = 2n ** 255n - 19n;
/** The order of the base point; a signature's S must lie below it. */
const L = 2n ** 252n + 27742317777372353535851937790883648493n;
/** The Montgomery coefficient: v² = u³ + A·u² + u. */
const A = 486662n;
/** The Edwards coefficient: −x² + y² = 1 + d·x²·y². */
const D = 37095705934669439343138083508754565189542113879843219016388785533085940283555n;

/** The first byte of an EC public key in Signal's serialised form. */
const CURVE_KEY_TYPE = 0x05;
const SIGN_BIT = 0x80;

/** Every canonical u of order 1, 2, 4 or 8, on the curve (0, 1, the last two) and on its twist (0, p − 1). */
const LOW_ORDER_U: ReadonlySet<bigint> = new Set([
  0n,
  1n,
  P - 1n,
  325606250916557431795983626356110631294008115727848805560023387167927233504n,
  39382357235489614581723060781553021112529911719440698176882885853963445705823n,
]);

const ORDER_8_Y = 2707385501144840649318225287225658788936804267575313519463743609750303402022n;
/** The y of every point of order 1, 2, 4 or 8; with both signs of x these are the eight torsion points. */
const LOW_ORDER_Y: ReadonlySet<bigint> = new Set([1n, P - 1n, 0n, ORDER_8_Y, P - ORDER_8_Y]);

/**
 * A key that signatures are checked against. Opaque to its holder; made once per upload, since the conversion
 * costs more than a verification.
 */
export type VerifyingKey = XEdDsaKey | Ed25519Key;

interface XEdDsaKey {
  readonly scheme: 'xeddsa';
  /** The Edwards y, 32 bytes, without a sign. */
  readonly encodedY: Uint8Array;
  /**
   * The point by the sign of its x. A signature says which one it is for; libraries differ in whether they
   * always use one sign, so each is made when the first signature asks for it.
   */
  readonly points: { positive?: KeyObject; negative?: KeyObject };
}

interface Ed25519Key {
  readonly scheme: 'ed25519';
  readonly point: KeyObject;
}

/**
 * Checks one signature over `message`: a tenth of a millisecond of the thread that asks.
 *
 * Stricter than the specification in what a forger would need: S ≥ L and an R of low order are refused. A
 * non-canonical R never passes, because OpenSSL compares R with the encoding that it computes, byte for byte.
 *
 * @param signature 64 bytes; of XEdDSA the highest bit holds the sign of the signer's Edwards point
 * @returns false for whatever does not verify, malformed input included; never throws
 * @see The XEdDSA and VXEdDSA Signature Schemes, section 2.6; RFC 8032, section 5.1.7
 */
export function verifySignature(key: VerifyingKey, message: Uint8Array, signature: Uint8Array): boolean {
  if (signature.length !== 64) return false;
  // A copy, because the sign bit is cleared in it.
  const plain = Uint8Array.from(signature);
  let point: KeyObject;
  if (key.scheme === 'xeddsa') {
    point = xEdDsaPoint(key, (plain[63]! & SIGN_BIT) !== 0);
    plain[63]! &= ~SIGN_BIT;
  } else {
    point = key.point;
  }
  if (readLittleEndian(plain.subarray(32)) >= L) return false;
  // Only r = 0 makes such an R: no honest signer ever does, and it costs a thousandth of the verification.
  if (LOW_ORDER_Y.has(readLittleEndian(plain.subarray(0, 32), 255))) return false;
  try {
    return verify(null, message, point, plain);
  } catch {
    return false;
  }
}

/**
 * Makes the key that an upload's signatures are checked against: Ed25519 where the identity has such a key,
 * else XEdDSA by `identityKey`.
 *
 * The two keys of an identity need not be one key in two forms: some libraries generate them apart.
 *
 * @returns null where either key is not canonical or of low order, or where no point on the curve belongs to
 *   the one that signs: with such a key a forger needs no private key
 */
export function verifyingKeyOf(identity: {
  identityKey: Uint8Array;
  identityKeyEd25519?: Uint8Array | null;
}): VerifyingKey | null {
  const canonical = canonicalCurveKey(identity.identityKey);
  if (canonical === null) return null;
  if (identity.identityKeyEd25519 != null) {
    const point = canonicalEd25519Key(identity.identityKeyEd25519);
    return point === null ? null : { scheme: 'ed25519', point: keyObjectOf(point) };
  }
  const u = readLittleEndian(canonical);
  // A u on the twist is good enough for an agreement, but there is no Edwards point to verify with.
  if (!isSquare(u * (u * u + A * u + 1n))) return null;
  // u = −1, where the map has no value, is of low order and gone already.
  const y = ((u - 1n) * inverse(u + 1n)) % P;
  return { scheme: 'xeddsa', encodedY: writeLittleEndian(y), points: {} };
}

/**
 * Checks an EC public key: identity key, signed prekey or one-time prekey.
 *
 * @param publicKey 33 bytes, 0x05 ‖ u, or the raw 32 bytes of u
 * @returns the 32 bytes of u, a copy; null if the form is wrong, u ≥ p (a set bit 255 counts) or u is of low
 *   order on the curve or on its twist, which would make every agreement with it predictable
 * @see RFC 7748, section 6.1
 */
export function canonicalCurveKey(publicKey: Uint8Array): Uint8Array | null {
  const hasType = publicKey.length === 33;
  if (hasType ? publicKey[0] !== CURVE_KEY_TYPE : publicKey.length !== 32) return null;
  const raw = Uint8Array.from(hasType ? publicKey.subarray(1) : publicKey);
  const u = readLittleEndian(raw);
  return u >= P || LOW_ORDER_U.has(u) ? null : raw;
}

/**
 * Checks an Ed25519 public key.
 *
 * @param publicKey 32 bytes
 * @returns a copy of it; null if the length is wrong, y ≥ p, no point has this y, or the point is of low order:
 *   then one signature would fit every message. The forms "x = 0 with a sign" are of low order too.
 * @see RFC 8032, section 5.1.3
 */
export function canonicalEd25519Key(publicKey: Uint8Array): Uint8Array | null {
  if (publicKey.length !== 32) return null;
  const y = readLittleEndian(publicKey, 255);
  if (y >= P || LOW_ORDER_Y.has(y)) return null;
  // x² = (y² − 1) / (d·y² + 1); a quotient is a square exactly where the product is, which saves an inversion.
  const ySquared = (y * y) % P;
  if (!isSquare((ySquared - 1n) * (D * ySquared + 1n))) return null;
  return Uint8Array.from(publicKey);
}

function xEdDsaPoint(key: XEdDsaKey, negative: boolean): KeyObject {
  if (negative) {
    key.points.negative ??= keyObjectOf(withSign(key.encodedY));
    return key.points.negative;
  }
  key.points.positive ??= keyObjectOf(key.encodedY);
  return key.points.positive;
}

function withSign(encodedY: Uint8Array): Uint8Array {
  // Not `slice`: of a Buffer that is a view, and the sign would land in the shared bytes.
  const encoded = Uint8Array.from(encodedY);
  encoded[31]! |= SIGN_BIT;
  return encoded;
}

/** A JWK, because node takes it five times faster than the same key in DER. */
function keyObjectOf(encodedPoint: Uint8Array): KeyObject {
  const x = Buffer.from(encodedPoint).toString('base64url');
  return createPublicKey({ key: { kty: 'OKP', crv: 'Ed25519', x }, format: 'jwk' });
}

function readLittleEndian(bytes: Uint8Array, bits: 255 | 256 = 256): bigint {
  const value = BigInt(`0x${Buffer.from(bytes).reverse().toString('hex')}`);
  return bits === 256 ? value : BigInt.asUintN(bits, value);
}

function writeLittleEndian(value: bigint): Uint8Array {
  return Buffer.from(value.toString(16).padStart(64, '0'), 'hex').reverse();
}

/** Euler's criterion; zero counts as a square. */
function isSquare(value: bigint): boolean {
  return power(value, (P - 1n) / 2n) <= 1n;
}

/** Fermat's; the value must not be a multiple of p. */
function inverse(value: bigint): bigint {
  return power(value, P - 2n);
}

function power(base: bigint, exponent: bigint): bigint {
  let result = 1n;
  let square = base % P;
  for (let rest = exponent; rest > 0n; rest >>= 1n) {
    if (rest & 1n) result = (result * square) % P;
    square = (square * square) % P;
  }
  return result;
}
