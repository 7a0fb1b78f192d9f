// The thread that signatures are checked on, as the gateway asks it.
import { generateKeyPairSync, randomBytes, sign } from 'node:crypto';
import { PrivateKey } from '@signalapp/libsignal-client';
import { expect, it } from 'vitest';
import { checkSignatures } from '../../src/keys/signature-checks.ts';

const identity = PrivateKey.generate();
const signer = { identityKey: identity.getPublicKey().serialize(), identityKeyEd25519: null };

function signed(count: number) {
  return Array.from({ length: count }, () => {
    const message = randomBytes(1569);
    return { message, signature: identity.sign(message) };
  });
}

it('tells of each whether it is the signer’s, in order', async () => {
  const offered = signed(20);
  offered[3]!.message = randomBytes(1569);
  offered[17]!.signature = offered[16]!.signature;
  const expected = offered.map((_, nth) => nth !== 3 && nth !== 17);
  expect(await checkSignatures(signer, offered)).toEqual(expected);
});

it('goes by the Ed25519 key where there is one', async () => {
  const { publicKey, privateKey } = generateKeyPairSync('ed25519');
  const identityKeyEd25519 = Buffer.from(publicKey.export({ format: 'jwk' }).x!, 'base64url');
  const message = randomBytes(33);
  const both = [{ message, signature: sign(null, message, privateKey) }, signed(1)[0]!];
  expect(await checkSignatures({ ...signer, identityKeyEd25519 }, both)).toEqual([true, false]);
});

it('has no verdict where the signer’s key is unusable', async () => {
  const identityKey = Uint8Array.of(5, ...new Uint8Array(32));
  expect(await checkSignatures({ ...signer, identityKey }, signed(1))).toBeNull();
});

it('answers one signature before a hundred that were asked first', async () => {
  await checkSignatures(signer, []);
  const order: number[] = [];
  const ask = async (count: number) => {
    expect(await checkSignatures(signer, signed(count))).toEqual(new Array(count).fill(true));
    order.push(count);
  };
  await Promise.all([ask(100), ask(1)]);
  expect(order).toEqual([1, 100]);
});

it('answers one signature before large ones that wait for their turn', async () => {
  const order: string[] = [];
  const offered = signed(9);
  const expected = new Array(9).fill(true);
  const asked = Array.from({ length: 100 }, async () => {
    expect(await checkSignatures(signer, offered)).toEqual(expected);
    order.push('large');
  });
  expect(await checkSignatures(signer, signed(1))).toEqual([true]);
  order.push('small');
  await Promise.all(asked);
  expect(order).toHaveLength(101);
  expect(order.indexOf('small')).toBeLessThanOrEqual(32);
});

it('refuses what a thread that dies was asked, and asks another from then on', async () => {
  const lost = await Promise.allSettled([
    checkSignatures(signer, signed(100)),
    // Nothing that comes by the wire makes the thread throw: a question of no shape does.
    checkSignatures(null as never, []),
  ]);
  for (const { status, ...outcome } of lost) {
    expect(status).toBe('rejected');
    expect(outcome).toMatchObject({
      reason: { message: 'the thread that checks signatures has ended', cause: expect.any(TypeError) },
    });
  }
  expect(await checkSignatures(signer, signed(2))).toEqual([true, true]);
});
