// The test device itself: two real clients chat in memory, so that a fault in a flow test is the server's.
import { ErrorCode, LibSignalErrorBase } from '@signalapp/libsignal-client';
import { describe, expect, it } from 'vitest';
import { verifyingKeyOf, verifySignature } from '../../src/keys/signature.ts';
import { requests } from '../../src/protocol/events.ts';
import type { DeviceBundle } from '../../src/protocol/keys.ts';
import { type FullUpload, type OutgoingEnvelope, SignalDevice } from './libsignal-device.ts';

const ALICE = { userId: 'alice', deviceId: 1 };
const BOB = { userId: 'bob', deviceId: 2 };

describe('a session', () => {
  it.each([
    { pools: 'one-time keys of both kinds', oneTime: true, pqOneTime: true },
    { pools: 'a one-time prekey and the last-resort key', oneTime: true, pqOneTime: false },
    { pools: 'a one-time PQ prekey alone', oneTime: false, pqOneTime: true },
    { pools: 'the last-resort key alone', oneTime: false, pqOneTime: false },
  ])('starts and goes on with $pools', async (pools) => {
    const { alice, bob } = pair();
    const upload = bob.uploadInput({ oneTimePreKeys: 2, pqOneTimePreKeys: 2 });
    await alice.establishSession(bundleOf(bob, pools, upload));

    const first = await alice.encrypt(BOB, 'hello');
    expect(first).toMatchObject({ deviceId: 2, registrationId: bob.registrationId, type: 3 });
    expect(await bob.decrypt({ sender: ALICE, ...first })).toBe('hello');
    // Delivery is at least once: the repeat is recognised although its one-time prekeys are gone.
    expect(await codeOf(bob.decrypt({ sender: ALICE, ...first }))).toBe(ErrorCode.DuplicatedMessage);
    expect(bob.hasPreKey(upload.oneTimePreKeys[0]!.keyId)).toBe(!pools.oneTime);
    expect(bob.hasPreKey(upload.oneTimePreKeys[1]!.keyId)).toBe(true);
    expect(bob.hasPqPreKey(upload.pqOneTimePreKeys[0]!.keyId)).toBe(!pools.pqOneTime);

    const answer = await bob.encrypt(ALICE, 'hello yourself');
    expect(answer).toMatchObject({ deviceId: 1, registrationId: alice.registrationId, type: 2 });
    expect(await alice.decrypt({ sender: BOB, ...answer })).toBe('hello yourself');
    const later = await alice.encrypt(BOB, 'how are you? 🙂');
    expect(later.type).toBe(2);
    // Other libraries number this kind 1.
    expect(await bob.decrypt({ sender: ALICE, ...later, type: 1 })).toBe('how are you? 🙂');
  });

  it('lets two senders share the last-resort key', async () => {
    const bob = new SignalDevice(BOB);
    const bundle = bundleOf(bob);
    for (const userId of ['alice', 'carol']) {
      const sender = { userId, deviceId: 1 };
      const device = new SignalDevice(sender);
      await device.establishSession(bundle);
      expect(await bob.decrypt({ sender, ...(await device.encrypt(BOB, userId)) })).toBe(userId);
    }
  });

  it('survives a rotation of the signed and the last-resort key between bundle and message', async () => {
    const { alice, bob } = pair();
    await alice.establishSession(bundleOf(bob));
    const rotated = { signedPreKey: bob.newSignedPreKey(), pqLastResortPreKey: bob.newPqLastResort() };
    expect(bob.uploadInput({ oneTimePreKeys: 0, pqOneTimePreKeys: 0 })).toMatchObject(rotated);
    expect(await bob.decrypt({ sender: ALICE, ...(await alice.encrypt(BOB, 'late')) })).toBe('late');
  });

  it('keeps its order when calls overlap', async () => {
    const { alice, bob } = await chatting();
    const texts = Array.from({ length: 50 }, (_, i) => `message ${i}`);
    const sent = await Promise.all(texts.map((text) => alice.encrypt(BOB, text)));
    const received = await Promise.all(sent.map((envelope) => bob.decrypt({ sender: ALICE, ...envelope })));
    expect(received).toEqual(texts);
  });

  it('tells a message that was decrypted before from one that can’t be', async () => {
    const { alice, bob } = await chatting();
    const envelope = await alice.encrypt(BOB, 'once');
    await bob.decrypt({ sender: ALICE, ...envelope });
    expect(await codeOf(bob.decrypt({ sender: ALICE, ...envelope }))).toBe(ErrorCode.DuplicatedMessage);
    const garbled = Buffer.from((await alice.encrypt(BOB, 'never')).content, 'base64');
    garbled[garbled.length - 1]! ^= 1;
    const undecryptable = bob.decrypt({ sender: ALICE, type: 2, content: garbled.toString('base64') });
    expect(await codeOf(undecryptable)).not.toBe(ErrorCode.DuplicatedMessage);
  });

  it('can’t start where the private half of its one-time prekey was lost', async () => {
    const { alice, bob } = pair();
    const upload = bob.uploadInput({ oneTimePreKeys: 1, pqOneTimePreKeys: 0 });
    await alice.establishSession(bundleOf(bob, { oneTime: true }, upload));
    bob.losePreKeys({ preKeyIds: [upload.oneTimePreKeys[0]!.keyId] });
    const first = await alice.encrypt(BOB, 'hello');
    await expect(bob.decrypt({ sender: ALICE, ...first })).rejects.toThrow('not held: one-time prekey 1');
  });

  it('needs a bundle first', async () => {
    await expect(new SignalDevice(ALICE).encrypt(BOB, 'hello?')).rejects.toThrow('no session with bob.2');
  });

  it('is refused where the bundle holds a bad signature or no PQ prekey', async () => {
    const { alice, bob } = pair();
    const bundle = bundleOf(bob);
    const { signature } = bundle.pqPreKey!;
    const forged = { ...bundle, signedPreKey: { ...bundle.signedPreKey, signature } };
    await expect(alice.establishSession(forged)).rejects.toThrow('invalid signature');
    await expect(alice.establishSession({ ...bundle, pqPreKey: null })).rejects.toThrow('no PQ prekey');
  });
});

describe('a fresh install', () => {
  it('has another identity, can’t read what was meant for the old one, and starts anew', async () => {
    const { alice, bob } = await chatting();
    const forOldInstall = await alice.encrypt(BOB, 'too late');
    const newBob = new SignalDevice(BOB);
    expect(newBob.identityKey).not.toBe(bob.identityKey);
    await expect(newBob.decrypt({ sender: ALICE, ...forOldInstall })).rejects.toThrow(LibSignalErrorBase);

    expect(alice.identityChanges).toEqual([]);
    const bundle = bundleOf(newBob, {
      oneTime: true,
      pqOneTime: true,
    });
    await alice.establishSession(bundle);
    const again = await alice.encrypt(BOB, 'again');
    expect(again.registrationId).toBe(newBob.registrationId);
    expect(await newBob.decrypt({ sender: ALICE, ...again })).toBe('again');
    const answer = await newBob.encrypt(ALICE, 'here');
    expect(await alice.decrypt({ sender: BOB, ...answer })).toBe('here');
    expect(alice.identityChanges).toEqual(['bob.2']);
  });

  it('can be the one that writes first', async () => {
    const { alice } = await chatting();
    const newBob = new SignalDevice(BOB);
    const bundle = bundleOf(alice);
    await newBob.establishSession(bundle);
    expect(await alice.decrypt({ sender: BOB, ...(await newBob.encrypt(ALICE, 'new phone')) })).toBe(
      'new phone',
    );
    expect(alice.identityChanges).toEqual(['bob.2']);
  });
});

describe('what a device uploads', () => {
  it('has the shapes of the contract', async () => {
    const { alice, bob } = await chatting();
    const upload = bob.uploadInput({ oneTimePreKeys: 100, pqOneTimePreKeys: 100 });
    expect(requests.uploadKeys.input.parse(upload)).toEqual(upload);
    for (const added of [
      bob.morePreKeys(3),
      bob.morePreKeys(0, { pqOneTimePreKeys: 2 }),
      bob.morePreKeys(1, { pqOneTimePreKeys: 1 }),
    ]) {
      expect(requests.addPreKeys.input.parse(added)).toEqual(added);
    }
    const rotation = { signedPreKey: bob.newSignedPreKey(), pqLastResortPreKey: bob.newPqLastResort() };
    expect(requests.rotateSignedPreKey.input.parse(rotation)).toEqual(rotation);
    const held = bob.validateInput();
    expect(requests.validateKeys.input.parse(held)).toEqual(held);
    const message = {
      messageId: 'a2c1f0a4-37c8-4a8e-9c9b-1d1c6f1f5b11',
      userId: 'bob',
      envelopes: [await alice.encrypt(BOB, 'hi')],
    };
    expect(requests.sendMessages.input.parse(message)).toEqual(message);
  });

  it('is signed by the identity key', async () => {
    const upload = new SignalDevice(BOB).uploadInput({ oneTimePreKeys: 0, pqOneTimePreKeys: 2 });
    const key = verifyingKeyOf({ identityKey: Buffer.from(upload.identityKey, 'base64') })!;
    for (const signed of [upload.signedPreKey, upload.pqLastResortPreKey, ...upload.pqOneTimePreKeys]) {
      const message = Buffer.from(signed.publicKey, 'base64');
      expect(verifySignature(key, message, Buffer.from(signed.signature, 'base64'))).toBe(true);
    }
  });

  it('numbers its keys from `firstPreKeyId` on and never twice', () => {
    const device = new SignalDevice({ ...BOB, firstPreKeyId: 2 ** 32 - 10 });
    const upload = device.uploadInput({ oneTimePreKeys: 2, pqOneTimePreKeys: 2 });
    const more = device.morePreKeys(1);
    const ids = [...upload.oneTimePreKeys, ...more.oneTimePreKeys!].map((key) => key.keyId);
    expect(ids).toEqual([2 ** 32 - 10, 2 ** 32 - 9, 2 ** 32 - 8]);
    const pqIds = [upload.pqLastResortPreKey, ...upload.pqOneTimePreKeys].map((key) => key.keyId);
    expect(new Set(pqIds).size).toBe(3);
  });

  it('lists for validation what it holds, without what was used or lost', async () => {
    const { alice, bob } = pair();
    const upload = bob.uploadInput({ oneTimePreKeys: 3, pqOneTimePreKeys: 3 });
    await alice.establishSession(bundleOf(bob, { oneTime: true, pqOneTime: true }, upload));
    await bob.decrypt({ sender: ALICE, ...(await alice.encrypt(BOB, 'hello')) });
    const [, secondId, thirdId] = upload.oneTimePreKeys.map((key) => key.keyId);
    const [, secondPqId, thirdPqId] = upload.pqOneTimePreKeys.map((key) => key.keyId);
    bob.losePreKeys({ preKeyIds: [secondId!], pqPreKeyIds: [thirdPqId!] });
    expect(bob.validateInput()).toEqual({
      localIdentityKey: upload.identityKey,
      localSignedPreKeyId: upload.signedPreKey.keyId,
      localSignedPreKeyPublicKey: upload.signedPreKey.publicKey,
      localRegistrationId: upload.registrationId,
      localPqLastResortPreKeyId: upload.pqLastResortPreKey.keyId,
      localPreKeyIds: [thirdId],
      localPqPreKeyIds: [secondPqId],
    });
  });
});

function pair(): { alice: SignalDevice; bob: SignalDevice } {
  return { alice: new SignalDevice(ALICE), bob: new SignalDevice(BOB) };
}

/** A pair that has exchanged a message each way. */
async function chatting(): Promise<{ alice: SignalDevice; bob: SignalDevice }> {
  const { alice, bob } = pair();
  const bundle = bundleOf(bob);
  await alice.establishSession(bundle);
  const first: OutgoingEnvelope = await alice.encrypt(BOB, 'hello');
  await bob.decrypt({ sender: ALICE, ...first });
  await alice.decrypt({ sender: BOB, ...(await bob.encrypt(ALICE, 'hello')) });
  return { alice, bob };
}

/** What a server would hand out of the device after this upload; the last-resort key alone if not told. */
function bundleOf(
  device: SignalDevice,
  pools: { oneTime?: boolean; pqOneTime?: boolean } = {},
  upload: FullUpload = device.uploadInput({ oneTimePreKeys: 1, pqOneTimePreKeys: 1 }),
): DeviceBundle & { userId: string } {
  return {
    userId: device.userId,
    deviceId: device.deviceId,
    registrationId: upload.registrationId,
    identityKey: upload.identityKey,
    signedPreKey: upload.signedPreKey,
    oneTimePreKey: pools.oneTime ? upload.oneTimePreKeys[0]! : null,
    pqPreKey: pools.pqOneTime
      ? { ...upload.pqOneTimePreKeys[0]!, lastResort: false }
      : { ...upload.pqLastResortPreKey, lastResort: true },
  };
}

async function codeOf(decryption: Promise<string>): Promise<ErrorCode | undefined> {
  const error: unknown = await decryption.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(LibSignalErrorBase);
  return (error as LibSignalErrorBase).code;
}
