// What is written by hand for its speed says the same as what it stands for.
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { isStrictBase64 } from '../../src/protocol/base64.ts';
import { envelopesJson, type IncomingEnvelope } from '../../src/protocol/envelope.ts';
import { bundlesJson, type DeviceBundle, deviceBundle } from '../../src/protocol/keys.ts';

const USER_ID_LETTERS = [...'ABCxyz019_.:@-'];
const address = fc.record({
  userId: fc.string({ unit: fc.constantFrom(...USER_ID_LETTERS), minLength: 1, maxLength: 128 }),
  deviceId: fc.integer({ min: 1, max: 127 }),
});
const common = {
  id: fc.uuid(),
  messageId: fc.uuid(),
  storedAt: fc
    .date({ min: new Date(0), max: new Date('9999-01-01'), noInvalidDate: true })
    .map((date) => date.toISOString()),
};
const envelope = fc.oneof(
  fc.record({
    ...common,
    kind: fc.constant('message' as const),
    sender: address,
    type: fc.integer({ min: 0, max: 255 }),
    content: fc.uint8Array({ minLength: 1 }).map((bytes) => Buffer.from(bytes).toString('base64')),
  }),
  fc.record({
    ...common,
    kind: fc.constant('bounce' as const),
    recipient: address,
    reason: fc.constant('EXPIRED' as const),
  }),
);

describe('envelopes', () => {
  it('are written as JSON would be', () => {
    fc.assert(
      fc.property(fc.array(envelope), (envelopes: IncomingEnvelope[]) => {
        expect(JSON.parse(envelopesJson(envelopes))).toEqual(envelopes);
      }),
    );
  });
});

describe('bundles', () => {
  const keyId = fc.integer({ min: 0, max: 0xffffff });
  const base64 = fc
    .uint8Array({ minLength: 33, maxLength: 64 })
    .map((bytes) => Buffer.from(bytes).toString('base64'));
  const signed = { keyId, publicKey: base64, signature: base64 };
  const bundle = fc
    .record({
      deviceId: fc.integer({ min: 1, max: 127 }),
      registrationId: fc.integer({ min: 0, max: 16_383 }),
      identityKey: base64,
      identityKeyEd25519: fc.option(base64, { nil: undefined }),
      signedPreKey: fc.record(signed),
      oneTimePreKey: fc.option(fc.record({ keyId, publicKey: base64 })),
      oneTimePreKeyAbsent: fc.constantFrom('noneLeft' as const, 'limited' as const),
      pqPreKey: fc.option(fc.record({ ...signed, lastResort: fc.boolean() })),
    })
    .map(
      ({ identityKeyEd25519, oneTimePreKeyAbsent, ...rest }): DeviceBundle => ({
        ...rest,
        ...(identityKeyEd25519 === undefined ? {} : { identityKeyEd25519 }),
        ...(rest.oneTimePreKey === null ? { oneTimePreKeyAbsent } : {}),
      }),
    );

  it('are written as JSON would be', () => {
    // Of a field that came later, this file would know as little as what it tests.
    expect(Object.keys(deviceBundle.shape).sort()).toEqual(
      [
        ...['deviceId', 'identityKey', 'identityKeyEd25519', 'oneTimePreKey', 'oneTimePreKeyAbsent'],
        ...['pqPreKey', 'registrationId', 'signedPreKey'],
      ].sort(),
    );
    fc.assert(
      fc.property(address, fc.array(bundle, { maxLength: 3 }), ({ userId }, devices) => {
        expect(JSON.parse(bundlesJson({ userId, devices }))).toEqual({ userId, devices });
      }),
    );
  });
});

describe('strict base64', () => {
  const isCanonical = (text: string): boolean => Buffer.from(text, 'base64').toString('base64') === text;

  it('is what its bytes are encoded as, and nothing else', () => {
    const alphabet = [...'ABQcgw4+/=', '-', '_', '\n', ' ', 'é'];
    fc.assert(
      fc.property(fc.string({ unit: fc.constantFrom(...alphabet), maxLength: 12 }), (text) => {
        expect(isStrictBase64(text)).toBe(isCanonical(text));
      }),
      { numRuns: 5_000 },
    );
    fc.assert(
      fc.property(fc.uint8Array(), (bytes) => {
        expect(isStrictBase64(Buffer.from(bytes).toString('base64'))).toBe(true);
      }),
    );
  });

  it('has no character beyond its alphabet, wherever it stands', () => {
    for (let code = 0; code < 0x1_00_41; code++) {
      const character = String.fromCodePoint(code);
      const isOfAlphabet = /^[A-Za-z0-9+/]$/.test(character);
      for (const text of [`${character}AAA`, `AAA${character}`, `AAAA${character}A==`]) {
        if (isStrictBase64(text) !== (isOfAlphabet || text === 'AAA=')) throw new Error(JSON.stringify(text));
      }
    }
  });

  it.each(['AA=A', 'A===', '====', 'AB==', 'AAB=', 'AAAA=', 'AAAA\n', '=AAA', 'AAAA===='])(
    'is not %j',
    (text) => {
      expect(isStrictBase64(text)).toBe(false);
    },
  );
});
