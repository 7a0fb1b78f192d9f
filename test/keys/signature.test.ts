// Signatures and keys, held against libsignal and, for what must be refused, against the bare equation.
import {
  createHash,
  createPublicKey,
  diffieHellman,
  generateKeyPairSync,
  type KeyObject,
  randomInt,
  sign,
} from 'node:crypto';
import { PrivateKey, PublicKey } from '@signalapp/libsignal-client';
import { describe, expect, it } from 'vitest';
import {
  canonicalCurveKey,
  canonicalEd25519Key,
  type VerifyingKey,
  verifyingKeyOf,
  verifySignature,
} from '../../src/keys/signature.ts';
import { fitsEquation } from '../support/ed25519-equation.ts';

const P = 2n ** 255n - 19n;
const L = 2n ** 252n + 27742317777372353535851937790883648493n;

const ORDER_8_U = [
  325606250916557431795983626356110631294008115727848805560023387167927233504n,
  39382357235489614581723060781553021112529911719440698176882885853963445705823n,
];
const LOW_ORDER_U = [0n, 1n, P - 1n, ...ORDER_8_U];

const ORDER_8_Y = 2707385501144840649318225287225658788936804267575313519463743609750303402022n;
const TORSION_POINTS = [
  encode(1n),
  encode(P - 1n),
  ...[0n, ORDER_8_Y, P - ORDER_8_Y].flatMap((y) => [encode(y), encode(y, { negative: true })]),
];
const IDENTITY_POINT = encode(1n);

describe('verifySignature', () => {
  it('agrees with libsignal on 10,000 mutated signatures, messages and keys', {
    timeout: 60_000,
  }, async () => {
    const seed = Number(process.env.SEED ?? randomInt(2 ** 31));
    console.log(`signature mutations: SEED=${seed}`);
    const random = mulberry32(seed);
    const bytes = (length: number) => Uint8Array.from({ length }, () => random() * 256);
    const pick = <T>(list: readonly T[]): T => list[Math.floor(random() * list.length)]!;

    const privateKeys = Array.from({ length: 200 }, () => PrivateKey.deserialize(bytes(32)));
    const signed = privateKeys.map((privateKey) => ({
      publicKey: privateKey.getPublicKey().serialize(),
      privateKey,
    }));
    const verifyingKeys = new Map<string, VerifyingKey | null>();
    const verifyingKey = (identityKey: Uint8Array): VerifyingKey | null => {
      const name = hex(identityKey);
      if (!verifyingKeys.has(name)) verifyingKeys.set(name, verifyingKeyOf({ identityKey }));
      return verifyingKeys.get(name)!;
    };

    const counts = { cases: 0, accepted: 0, refused: 0, stricter: 0 };
    const seen = new Set<string>();
    const check = async (
      mutation: string,
      publicKey: Uint8Array,
      message: Uint8Array,
      signature: Uint8Array,
    ) => {
      const theirs = libsignalVerifies(publicKey, message, signature);
      // What this server refuses by rule, whatever a library thinks of it.
      const byRule =
        decode(publicKey.slice(1)) >= P ||
        LOW_ORDER_U.includes(decode(publicKey.slice(1))) ||
        (signature.length === 64 && scalarOf(signature) >= L);
      const expected = theirs && !byRule;
      for (const identityKey of [publicKey, publicKey.slice(1)]) {
        const key = verifyingKey(identityKey);
        const ours = key !== null && verifySignature(key, message, signature);
        if (ours !== expected) {
          expect.fail(
            `${mutation}: ours ${ours}, libsignal ${theirs}, by rule ${byRule}; SEED=${seed} ` +
              `key=${hex(identityKey)} message=${hex(message)} signature=${hex(signature)}`,
          );
        }
      }
      counts.cases += 1;
      counts[expected ? 'accepted' : 'refused'] += 1;
      if (theirs && byRule) counts.stricter += 1;
      seen.add(mutation);
    };

    const mutations: readonly [string, (c: Case) => Case][] = [
      // A fifth stays sound, so that what must be accepted is tried as hard as what must not.
      ...Array.from({ length: 5 }, (): [string, (c: Case) => Case] => ['nothing', (c) => c]),
      ['bit of R', (c) => ({ ...c, signature: flipped(c.signature, Math.floor(random() * 256)) })],
      ['bit of S', (c) => ({ ...c, signature: flipped(c.signature, 256 + Math.floor(random() * 256)) })],
      ['a top bit of S', (c) => ({ ...c, signature: flipped(c.signature, 508 + Math.floor(random() * 4)) })],
      ['sign bit', (c) => ({ ...c, signature: flipped(c.signature, 511) })],
      [
        'bit of the message',
        (c) => ({ ...c, message: flipped(c.message, Math.floor(random() * c.message.length * 8)) }),
      ],
      ['message cut', (c) => ({ ...c, message: c.message.slice(1) })],
      ['bit of u', (c) => ({ ...c, publicKey: flipped(c.publicKey, 8 + Math.floor(random() * 256)) })],
      ['bit 255 of u', (c) => ({ ...c, publicKey: flipped(c.publicKey, 8 + 255) })],
      ['another key', (c) => ({ ...c, publicKey: pick(signed).publicKey })],
      ['S + L', (c) => ({ ...c, signature: withScalar(c.signature, scalarOf(c.signature) + L) })],
      ['L − S', (c) => ({ ...c, signature: withScalar(c.signature, L - scalarOf(c.signature)) })],
      [
        'L − S, sign bit',
        (c) => ({ ...c, signature: flipped(withScalar(c.signature, L - scalarOf(c.signature)), 511) }),
      ],
      ['S = 0', (c) => ({ ...c, signature: withScalar(c.signature, 0n) })],
      ['R = the identity point', (c) => ({ ...c, signature: concat(IDENTITY_POINT, c.signature.slice(32)) })],
      ['R of low order', (c) => ({ ...c, signature: concat(pick(TORSION_POINTS), c.signature.slice(32)) })],
      ['R not canonical', (c) => ({ ...c, signature: concat(encode(P + 1n), c.signature.slice(32)) })],
      ['random bytes', (c) => ({ ...c, signature: bytes(64) })],
      ['signature too short', (c) => ({ ...c, signature: c.signature.slice(0, 63) })],
      ['signature too long', (c) => ({ ...c, signature: concat(c.signature, bytes(1)) })],
      ['low-order u', (c) => ({ ...c, publicKey: concat(Uint8Array.of(5), encode(pick(LOW_ORDER_U))) })],
    ];
    let unchecked: Promise<void>[] = [];
    for (let i = 0; i < 12_500; i += 1) {
      const { publicKey, privateKey } = signed[i % signed.length]!;
      const message = bytes(pick([1, 32, 33, 1569]));
      const signature = privateKey.sign(message as Uint8Array<ArrayBuffer>);
      const [name, mutate] = mutations[i % mutations.length]!;
      const mutated = mutate({ publicKey, message, signature });
      unchecked.push(check(name, mutated.publicKey, mutated.message, mutated.signature));
      // A hundred at a time, so that the thread pool is kept busy and memory stays small.
      if (unchecked.length === 100) {
        await Promise.all(unchecked);
        unchecked = [];
      }
    }
    await Promise.all(unchecked);
    console.log(`signature mutations: ${JSON.stringify(counts)}`);
    expect(counts.cases).toBeGreaterThanOrEqual(10_000);
    expect(counts.accepted).toBeGreaterThanOrEqual(2_000);
    expect(seen).toEqual(new Set(mutations.map(([name]) => name)));
  });

  it('accepts signatures for both signs of the Edwards point', async () => {
    const signs = new Set<boolean>();
    const message = Buffer.from('either sign');
    for (let i = 0; i < 64; i += 1) {
      const privateKey = PrivateKey.generate();
      const signature = privateKey.sign(message as Uint8Array<ArrayBuffer>);
      const key = keyFor(privateKey.getPublicKey().serialize());
      expect(verifySignature(key, message, signature)).toBe(true);
      signs.add((signature[63]! & 0x80) !== 0);
    }
    expect(signs.size).toBe(2);
  });

  it('leaves the signature as it was', async () => {
    const privateKey = PrivateKey.generate();
    const message = Uint8Array.of(1);
    const signature = flipped(privateKey.sign(message), 511);
    const before = signature.slice();
    verifySignature(keyFor(privateKey.getPublicKey().serialize()), message, signature);
    expect(signature).toEqual(before);
  });

  it('refuses an XEdDSA signature whose S was raised by L', async () => {
    const privateKey = PrivateKey.generate();
    const message = Uint8Array.of(1, 2, 3);
    const signature = privateKey.sign(message);
    const key = keyFor(privateKey.getPublicKey().serialize());
    expect(verifySignature(key, message, signature)).toBe(true);
    expect(verifySignature(key, message, withScalar(signature, scalarOf(signature) + L))).toBe(false);
  });

  it('refuses a signature made with r = 0, which gives the private key away and some libraries take', async () => {
    const { publicKey, privateKey } = ed25519Pair();
    const message = Uint8Array.of(1, 2, 3);
    const seed = Buffer.from(privateKey.export({ format: 'jwk' }).d!, 'base64url');
    const secret = sha512(seed).subarray(0, 32);
    secret[0]! &= 0xf8;
    secret[31]! = (secret[31]! & 0x7f) | 0x40;
    const challenge = decode(sha512(concat(IDENTITY_POINT, publicKey, message))) % L;
    const signature = concat(IDENTITY_POINT, encode((challenge * decode(secret)) % L));
    expect(fitsEquation(publicKey, message, signature)).toBe(true);
    const identityKey = PrivateKey.generate().getPublicKey().serialize();
    const key = verifyingKeyOf({ identityKey, identityKeyEd25519: publicKey })!;
    expect(verifySignature(key, message, signature)).toBe(false);
  });

  it('verifies by the Ed25519 key where the identity has one, and only by it', async () => {
    const ed25519 = ed25519Pair();
    const identity = PrivateKey.generate();
    const message = Uint8Array.of(1, 2, 3);
    const key = verifyingKeyOf({
      identityKey: identity.getPublicKey().serialize(),
      identityKeyEd25519: ed25519.publicKey,
    })!;
    const signature = Uint8Array.from(sign(null, message, ed25519.privateKey));
    expect(verifySignature(key, message, signature)).toBe(true);
    expect(verifySignature(key, Uint8Array.of(1, 2, 4), signature)).toBe(false);
    expect(verifySignature(key, message, identity.sign(message))).toBe(false);
    expect(verifySignature(key, message, signature.slice(1))).toBe(false);
    // The highest bit means nothing here, so that it makes S ≥ L.
    expect(verifySignature(key, message, flipped(signature, 511))).toBe(false);
    expect(verifySignature(key, message, withScalar(signature, scalarOf(signature) + L))).toBe(false);
  });
});

describe('verifyingKeyOf', () => {
  it('refuses u = 0, with which one forged signature fits about half of all messages', () => {
    // u = 0 maps to y = −1, a point of order two: R = identity, S = 0 fits every message with an even hash.
    const point = encode(P - 1n);
    const forged = concat(IDENTITY_POINT, new Uint8Array(32));
    const messages = Array.from({ length: 64 }, (_, i) => Uint8Array.of(i));
    expect(messages.filter((message) => fitsEquation(point, message, forged))).toHaveLength(33);

    expect(verifyingKeyOf({ identityKey: new Uint8Array(32) })).toBeNull();
    expect(verifyingKeyOf({ identityKey: concat(Uint8Array.of(5), new Uint8Array(32)) })).toBeNull();
  });

  it('refuses a low-order Ed25519 key, with which one signature fits every message', () => {
    const forged = concat(IDENTITY_POINT, new Uint8Array(32));
    const messages = Array.from({ length: 64 }, (_, i) => Uint8Array.of(i));
    expect(messages.every((message) => fitsEquation(IDENTITY_POINT, message, forged))).toBe(true);

    const identityKey = PrivateKey.generate().getPublicKey().serialize();
    expect(verifyingKeyOf({ identityKey, identityKeyEd25519: ed25519Pair().publicKey })).not.toBeNull();
    for (const identityKeyEd25519 of TORSION_POINTS) {
      expect(verifyingKeyOf({ identityKey, identityKeyEd25519 })).toBeNull();
    }
  });

  it('refuses an unsound EC key also beside a sound Ed25519 key', () => {
    const identityKeyEd25519 = ed25519Pair().publicKey;
    expect(verifyingKeyOf({ identityKey: new Uint8Array(32), identityKeyEd25519 })).toBeNull();
  });

  it('refuses a u that is on the twist, where no signature can verify', () => {
    // 2 is the least u on the twist: 8 + 4·486662 + 2 is no square.
    const onTwist = encode(2n);
    expect(canonicalCurveKey(onTwist)).toEqual(onTwist);
    expect(verifyingKeyOf({ identityKey: onTwist })).toBeNull();
    expect(verifyingKeyOf({ identityKey: encode(9n) })).not.toBeNull();
  });
});

describe('canonicalCurveKey', () => {
  it('gives the 32 bytes of u for both forms', () => {
    for (let i = 0; i < 50; i += 1) {
      const serialised = PrivateKey.generate().getPublicKey().serialize();
      const u = serialised.slice(1);
      expect(canonicalCurveKey(serialised)).toEqual(u);
      expect(canonicalCurveKey(u)).toEqual(u);
    }
  });

  it('refuses any other form', () => {
    // Not a key by chance: one in 256 begins with 5, and with any byte behind it is of the form 0x05 ‖ u.
    const u = encode(9n);
    const serialised = concat(Uint8Array.of(5), u);
    for (const form of [
      new Uint8Array(0),
      u.slice(1),
      concat(serialised, Uint8Array.of(0)),
      concat(Uint8Array.of(6), u),
      concat(Uint8Array.of(0), u),
      concat(u, Uint8Array.of(5)),
    ]) {
      expect(canonicalCurveKey(form)).toBeNull();
    }
  });

  it('refuses every u from p to 2²⁵⁵ − 1, and accepts p − 2', () => {
    for (let u = P; u < 2n ** 255n; u += 1n) expectNoCurveKey(encode(u));
    expect(canonicalCurveKey(encode(P - 2n))).toEqual(encode(P - 2n));
  });

  it('refuses a set bit 255', () => {
    for (let i = 0; i < 50; i += 1) {
      expectNoCurveKey(flipped(PrivateKey.generate().getPublicKey().getPublicKeyBytes(), 255));
    }
  });

  it('refuses every u of low order, in every representation', () => {
    for (const u of LOW_ORDER_U) {
      // OpenSSL refuses an agreement whose result is zero: these are of low order indeed.
      expect(() => agreementWith(encode(u))).toThrow();
      expectNoCurveKey(encode(u));
      expectNoCurveKey(encode(u, { negative: true }));
      if (u + P < 2n ** 255n) expectNoCurveKey(encode(u + P));
    }
    expect(() => agreementWith(encode(9n))).not.toThrow();
  });

  it('gives a copy, also of a Buffer', () => {
    for (const u of [encode(9n), Buffer.from(encode(9n))]) {
      canonicalCurveKey(u)!.fill(0);
      expect(decode(u)).toBe(9n);
    }
  });
});

describe('canonicalEd25519Key', () => {
  it('gives back every sound key', () => {
    for (let i = 0; i < 50; i += 1) {
      const { publicKey } = ed25519Pair();
      expect(canonicalEd25519Key(publicKey)).toEqual(publicKey);
    }
  });

  it('refuses all eight torsion points, each of which has a forgery', () => {
    expect(new Set(TORSION_POINTS.map(hex)).size).toBe(8);
    const forged = concat(IDENTITY_POINT, new Uint8Array(32));
    for (const point of TORSION_POINTS) {
      const messages = Array.from({ length: 256 }, (_, i) => Uint8Array.of(i));
      expect(messages.some((message) => fitsEquation(point, message, forged))).toBe(true);
      expect(canonicalEd25519Key(point)).toBeNull();
    }
  });

  it('refuses the forms that are not canonical', () => {
    for (const negative of [false, true]) {
      for (let y = P; y < 2n ** 255n; y += 1n)
        expect(canonicalEd25519Key(encode(y, { negative }))).toBeNull();
    }
    // x = 0 has no sign.
    expect(canonicalEd25519Key(encode(1n, { negative: true }))).toBeNull();
    expect(canonicalEd25519Key(encode(P - 1n, { negative: true }))).toBeNull();
  });

  it('refuses a y that no point has', () => {
    // 2 is the least such y.
    expect(canonicalEd25519Key(encode(2n))).toBeNull();
    expect(canonicalEd25519Key(encode(3n))).toEqual(encode(3n));
  });

  it('refuses any other length', () => {
    const { publicKey } = ed25519Pair();
    expect(canonicalEd25519Key(publicKey.slice(1))).toBeNull();
    expect(canonicalEd25519Key(concat(publicKey, Uint8Array.of(0)))).toBeNull();
    expect(canonicalEd25519Key(new Uint8Array(0))).toBeNull();
  });
});

interface Case {
  publicKey: Uint8Array;
  message: Uint8Array;
  signature: Uint8Array;
}

function keyFor(identityKey: Uint8Array): VerifyingKey {
  const key = verifyingKeyOf({ identityKey });
  if (key === null) throw new Error('a sound key was refused');
  return key;
}

function expectNoCurveKey(u: Uint8Array): void {
  for (const publicKey of [u, concat(Uint8Array.of(5), u)]) {
    expect(canonicalCurveKey(publicKey)).toBeNull();
    expect(verifyingKeyOf({ identityKey: publicKey })).toBeNull();
  }
}

function libsignalVerifies(publicKey: Uint8Array, message: Uint8Array, signature: Uint8Array): boolean {
  try {
    const key = PublicKey.deserialize(Uint8Array.from(publicKey));
    return key.verify(Uint8Array.from(message), Uint8Array.from(signature));
  } catch {
    return false;
  }
}

function ed25519Pair(): { publicKey: Uint8Array; privateKey: KeyObject } {
  const { publicKey, privateKey } = generateKeyPairSync('ed25519');
  return {
    publicKey: Uint8Array.from(Buffer.from(publicKey.export({ format: 'jwk' }).x!, 'base64url')),
    privateKey,
  };
}

function agreementWith(u: Uint8Array): Buffer {
  const { privateKey } = generateKeyPairSync('x25519');
  const publicKey = createPublicKey({ key: { kty: 'OKP', crv: 'X25519', x: base64url(u) }, format: 'jwk' });
  return diffieHellman({ privateKey, publicKey });
}

function scalarOf(signature: Uint8Array): bigint {
  return BigInt.asUintN(255, decode(signature.slice(32)));
}

/** The signature with another S and the same sign bit. */
function withScalar(signature: Uint8Array, scalar: bigint): Uint8Array {
  return concat(signature.slice(0, 32), encode(scalar, { negative: (signature[63]! & 0x80) !== 0 }));
}

function flipped(bytes: Uint8Array, bit: number): Uint8Array {
  const copy = Uint8Array.from(bytes);
  copy[bit >> 3]! ^= 1 << (bit & 7);
  return copy;
}

function encode(value: bigint, { negative = false } = {}): Uint8Array {
  const bytes = Uint8Array.from(Buffer.from(value.toString(16).padStart(64, '0'), 'hex').reverse());
  if (negative) bytes[31]! |= 0x80;
  return bytes;
}

function decode(bytes: Uint8Array): bigint {
  return BigInt(`0x${hex(Uint8Array.from(bytes).reverse())}`);
}

function sha512(bytes: Uint8Array): Buffer {
  return createHash('sha512').update(bytes).digest();
}

function concat(...parts: Uint8Array[]): Uint8Array {
  return Uint8Array.from(Buffer.concat(parts));
}

function hex(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString('hex');
}

function base64url(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString('base64url');
}

/** A small seeded generator, so that a failing run can be repeated. */
function mulberry32(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}
