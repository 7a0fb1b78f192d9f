/** Two real clients of Signal's own library, with nothing between them but the gateway's socket. */
import { generateKeyPairSync, randomUUID, sign } from 'node:crypto';
import { PrivateKey } from '@signalapp/libsignal-client';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { RequestData, RequestInput } from '../../src/protocol/events.ts';
import { fitsEquation } from '../support/ed25519-equation.ts';
import { eventually } from '../support/eventually.ts';
import { type Client, enrol, open, type Party, startGateway, type TestGateway } from '../support/gateway.ts';
import { ids, KeyMaker } from '../support/key-maker.ts';
import { SignalDevice, type SignedKey } from '../support/libsignal-device.ts';

let gateway: TestGateway;

beforeAll(async () => {
  gateway = await startGateway();
});

afterAll(async () => {
  await gateway?.stop();
});

let users = 0;

function nobody(name: string): string {
  users += 1;
  return `${name}-${users}`;
}

type Bundle = RequestData<'requestBundle'>['devices'][number];

/** Claims a bundle of the device, and starts a session with it. */
async function meet(from: Party, to: Party['address']): Promise<Bundle> {
  const { devices } = await from.client.call('requestBundle', { claimId: randomUUID(), ...to });
  const bundle = devices[0]!;
  await from.device.establishSession({ userId: to.userId, ...bundle });
  return bundle;
}

async function say(from: Party, to: Party['address'], text: string): Promise<string> {
  const messageId = randomUUID();
  const envelope = await from.device.encrypt(to, text);
  await from.client.call('sendMessages', { messageId, userId: to.userId, envelopes: [envelope] });
  return messageId;
}

/** What a party can read of what it was handed, decrypted in order; waits until there are `count`. */
async function heard(party: Party, count: number): Promise<string[]> {
  await eventually(() => expect(party.client.envelopes.length).toBeGreaterThanOrEqual(count));
  const texts: string[] = [];
  for (const envelope of party.client.envelopes.splice(0)) {
    texts.push(envelope.kind === 'bounce' ? envelope.reason : await party.device.decrypt(envelope));
  }
  return texts;
}

/** The same device on a new socket. */
async function comeBack(party: Party): Promise<Party> {
  return { ...party, client: await gateway.connect(party.address) };
}

describe('two clients', () => {
  it.each([
    { oneTimePreKeys: 1, pqOneTimePreKeys: 1 },
    { oneTimePreKeys: 1, pqOneTimePreKeys: 0 },
    { oneTimePreKeys: 0, pqOneTimePreKeys: 1 },
    { oneTimePreKeys: 0, pqOneTimePreKeys: 0 },
  ])('talk where the bundle has %o', async (counts) => {
    const alice = await enrol(gateway, { userId: nobody('alice'), deviceId: 1 });
    let bob = await enrol(gateway, { userId: nobody('bob'), deviceId: 1 }, counts);
    bob.client.close();

    const bundle = await meet(alice, bob.address);
    expect(bundle.oneTimePreKey === null).toBe(counts.oneTimePreKeys === 0);
    expect(bundle.oneTimePreKeyAbsent).toBe(counts.oneTimePreKeys === 0 ? 'noneLeft' : undefined);
    expect(bundle.pqPreKey?.lastResort).toBe(counts.pqOneTimePreKeys === 0);
    await say(alice, bob.address, 'are you there?');
    await say(alice, bob.address, 'never mind');

    bob = await comeBack(bob);
    expect(await open(bob)).toEqual({ pendingCount: 2, keyVersion: 1 });
    expect(await heard(bob, 2)).toEqual(['are you there?', 'never mind']);
    // The one-time halves were used and are gone; what is told of them was told in time.
    if (bundle.oneTimePreKey !== null) expect(bob.device.hasPreKey(bundle.oneTimePreKey.keyId)).toBe(false);
    if (bundle.pqPreKey?.lastResort === false) {
      expect(bob.device.hasPqPreKey(bundle.pqPreKey.keyId)).toBe(false);
    }

    await open(alice);
    await say(bob, alice.address, 'now I am');
    expect(await heard(alice, 1)).toEqual(['now I am']);
    await say(alice, bob.address, 'good');
    expect(await heard(bob, 1)).toEqual(['good']);
  });

  it('go on for long, in both directions and over interruptions', async () => {
    const alice = await enrol(gateway, { userId: nobody('alice'), deviceId: 1 });
    let bob = await enrol(gateway, { userId: nobody('bob'), deviceId: 1 });
    await open(alice);
    await meet(alice, bob.address);
    const expected: string[] = [];
    for (let round = 0; round < 3; round++) {
      bob.client.close();
      for (const text of ids(round * 10, 10).map(String)) await say(alice, bob.address, text);
      bob = await comeBack(bob);
      await open(bob);
      expect(await heard(bob, 10)).toEqual(ids(round * 10, 10).map(String));
      await say(bob, alice.address, `read ${round}`);
      expected.push(`read ${round}`);
    }
    expect(await heard(alice, 3)).toEqual(expected);
  });

  it('both begin at once, and understand each other', async () => {
    const alice = await enrol(gateway, { userId: nobody('alice'), deviceId: 1 });
    const bob = await enrol(gateway, { userId: nobody('bob'), deviceId: 1 });
    await Promise.all([meet(alice, bob.address), meet(bob, alice.address)]);
    await Promise.all([say(alice, bob.address, 'hello Bob'), say(bob, alice.address, 'hello Alice')]);
    await Promise.all([open(alice), open(bob)]);
    expect(await Promise.all([heard(alice, 1), heard(bob, 1)])).toEqual([['hello Alice'], ['hello Bob']]);
    await say(alice, bob.address, 'you first');
    expect(await heard(bob, 1)).toEqual(['you first']);
  });

  it('go on when prekeys were rotated and refilled between bundle and message', async () => {
    const alice = await enrol(gateway, { userId: nobody('alice'), deviceId: 1 });
    const bob = await enrol(gateway, { userId: nobody('bob'), deviceId: 1 });
    await meet(alice, bob.address);
    await bob.client.call('rotateSignedPreKey', {
      signedPreKey: bob.device.newSignedPreKey(),
      pqLastResortPreKey: bob.device.newPqLastResort(),
    });
    await bob.client.call('addPreKeys', bob.device.morePreKeys(5, { pqOneTimePreKeys: 5 }));
    await say(alice, bob.address, 'by the old key');
    await open(bob);
    expect(await heard(bob, 1)).toEqual(['by the old key']);
    const carol = await enrol(gateway, { userId: nobody('carol'), deviceId: 1 });
    expect((await meet(carol, bob.address)).signedPreKey.keyId).toBe(2);
    await say(carol, bob.address, 'by the new one');
    expect(await heard(bob, 1)).toEqual(['by the new one']);
  });
});

describe('a fresh install under a new identity', () => {
  it('uses the same ids again; what was for the old one comes back, and new sessions work', async () => {
    const alice = await enrol(gateway, { userId: nobody('alice'), deviceId: 1 });
    let bob = await enrol(gateway, { userId: nobody('bob'), deviceId: 1 });
    await open(alice);
    const first = await meet(alice, bob.address);
    const lost = await say(alice, bob.address, 'nobody will read this');
    bob.client.close();

    bob = await comeBack({ ...bob, device: new SignalDevice(bob.address) });
    const upload = bob.device.uploadInput({ oneTimePreKeys: 10, pqOneTimePreKeys: 5 });
    expect(await bob.client.refusal('uploadKeys', upload)).toMatchObject({ code: 'IDENTITY_MISMATCH' });
    expect(await bob.client.call('uploadKeys', { ...upload, replaceIdentity: true })).toMatchObject({
      oneTimePreKeys: { stored: 10, unchanged: 0, conflicts: [] },
      pqOneTimePreKeys: { stored: 5, unchanged: 0, conflicts: [] },
    });

    // What waited for the old install comes back to its sender, and nothing of it is pushed to the new one.
    await eventually(() => expect(alice.client.envelopes).toHaveLength(1));
    expect(alice.client.envelopes.splice(0)).toEqual([
      expect.objectContaining({
        kind: 'bounce',
        messageId: lost,
        recipient: bob.address,
        reason: 'RECIPIENT_IDENTITY_CHANGED',
      }),
    ]);
    expect(await open(bob)).toMatchObject({ pendingCount: 0 });

    // The old session is to a device that is no more.
    const stale = await alice.device.encrypt(bob.address, 'by the old session');
    const messageId = randomUUID();
    expect(
      await alice.client.refusal('sendMessages', {
        messageId,
        userId: bob.address.userId,
        envelopes: [stale],
      }),
    ).toMatchObject({
      code: 'DEVICES_MISMATCHED',
      details: { missingDevices: [], extraDevices: [], staleDevices: [1] },
    });

    const second = await meet(alice, bob.address);
    expect(second.identityKey).toBe(bob.device.identityKey);
    // The same ids as in the first bundle, and other keys under them.
    expect(second.oneTimePreKey?.keyId).toBe(first.oneTimePreKey?.keyId);
    expect(second.oneTimePreKey?.publicKey).not.toBe(first.oneTimePreKey?.publicKey);
    expect(second.signedPreKey.keyId).toBe(first.signedPreKey.keyId);
    await say(alice, bob.address, 'welcome back');
    expect(await heard(bob, 1)).toEqual(['welcome back']);
    await say(bob, alice.address, 'a new phone');
    expect(await heard(alice, 1)).toEqual(['a new phone']);
    expect(alice.device.identityChanges).toEqual([`${bob.address.userId}.1`]);
  });
});

describe('several devices of a user', () => {
  it('are each claimed, addressed and handed what is theirs', async () => {
    const aliceId = nobody('alice');
    const bobId = nobody('bob');
    const alice = await enrol(gateway, { userId: aliceId, deviceId: 1 });
    const aliceTablet = await enrol(gateway, { userId: aliceId, deviceId: 2 });
    const bobs: Party[] = [];
    for (const deviceId of [1, 2, 3]) bobs.push(await enrol(gateway, { userId: bobId, deviceId }));
    const envelopesFor = async (userId: string, text: string) => {
      const { devices } = await alice.client.call('requestBundle', { claimId: randomUUID(), userId });
      return await Promise.all(
        devices.map(async (bundle) => {
          await alice.device.establishSession({ userId, ...bundle });
          return await alice.device.encrypt({ userId, deviceId: bundle.deviceId }, text);
        }),
      );
    };
    const envelopes = await envelopesFor(bobId, 'to all of you');
    expect(envelopes.map((envelope) => envelope.deviceId)).toEqual([1, 2, 3]);
    const missing = await alice.client.refusal('sendMessages', {
      messageId: randomUUID(),
      userId: bobId,
      envelopes: envelopes.slice(1),
    });
    expect(missing).toMatchObject({
      code: 'DEVICES_MISMATCHED',
      details: { missingDevices: [1], extraDevices: [], staleDevices: [] },
    });
    expect(
      await alice.client.call('sendMessages', { messageId: randomUUID(), userId: bobId, envelopes }),
    ).toMatchObject({ accepted: [1, 2, 3], rejected: [] });
    // Her own other device gets a copy; the one that sends is not among them.
    const copies = await envelopesFor(aliceId, 'what I said');
    expect(copies.map((envelope) => envelope.deviceId)).toEqual([2]);
    await alice.client.call('sendMessages', { messageId: randomUUID(), userId: aliceId, envelopes: copies });

    for (const bob of bobs) {
      await open(bob);
      expect(await heard(bob, 1)).toEqual(['to all of you']);
    }
    await open(aliceTablet);
    expect(await heard(aliceTablet, 1)).toEqual(['what I said']);
  });
});

describe('the two encodings of an EC key', () => {
  it.each(['prefixed', 'raw'] as const)('%s: are given back byte for byte', async (encoding) => {
    const address = { userId: nobody('both'), deviceId: 1 };
    const keys = new KeyMaker();
    const client = await gateway.connect(address);
    const upload = {
      registrationId: 1,
      identityKey: keys.identityKey(encoding),
      signedPreKey: keys.signed(1, encoding),
      oneTimePreKeys: [keys.oneTime(1, encoding)],
    };
    expect(Buffer.from(upload.identityKey, 'base64')).toHaveLength(encoding === 'raw' ? 32 : 33);
    await client.call('uploadKeys', upload);
    expect((await client.call('keyStatus')).identityKey).toBe(upload.identityKey);
    const { devices } = await client.call('requestBundle', { claimId: randomUUID(), ...address });
    expect(devices[0]).toMatchObject({
      identityKey: upload.identityKey,
      signedPreKey: upload.signedPreKey,
      oneTimePreKey: upload.oneTimePreKeys[0],
    });
    // A signature is over the bytes as uploaded: it does not fit the other form of the same key.
    const other = Buffer.from(upload.signedPreKey.publicKey, 'base64');
    const otherForm = encoding === 'raw' ? Buffer.concat([Buffer.from([5]), other]) : other.subarray(1);
    const swapped = { ...upload.signedPreKey, keyId: 2, publicKey: otherForm.toString('base64') };
    expect(await client.refusal('rotateSignedPreKey', { signedPreKey: swapped })).toMatchObject({
      code: 'SIGNATURE_INVALID',
      details: { keys: [{ kind: 'signedPreKey', keyId: 2 }] },
    });
  });
});

const P = 2n ** 255n - 19n;
/** The order of the base point: S and S + L make the same signature to whoever does not look. */
const L = 2n ** 252n + 27742317777372353535851937790883648493n;
const LOW_ORDER_U = [
  0n,
  1n,
  P - 1n,
  325606250916557431795983626356110631294008115727848805560023387167927233504n,
  39382357235489614581723060781553021112529911719440698176882885853963445705823n,
];
const ORDER_8_Y = 2707385501144840649318225287225658788936804267575313519463743609750303402022n;

function littleEndian(value: bigint): Buffer {
  return Buffer.from(value.toString(16).padStart(64, '0'), 'hex').reverse();
}

/** The signature with S + L for S, and the sign bit as it was. */
function malleated(signature: string): string {
  const bytes = Buffer.from(signature, 'base64');
  const signBit = bytes[63]! & 0x80;
  bytes[63]! &= 0x7f;
  const s = BigInt(`0x${Buffer.from(bytes.subarray(32)).reverse().toString('hex')}`);
  const raised = littleEndian(s + L);
  raised[31]! |= signBit;
  return Buffer.concat([bytes.subarray(0, 32), raised]).toString('base64');
}

function withFlippedBit(signature: string, bit: number): string {
  const bytes = Buffer.from(signature, 'base64');
  bytes[bit >> 3]! ^= 1 << (bit & 7);
  return bytes.toString('base64');
}

type SignedKind = 'signedPreKey' | 'pqLastResortPreKey' | 'pqOneTimePreKey';

describe('a bad key', () => {
  /** An upload with every kind of signed key, of which the one of `kind` is made by `spoil`. */
  function uploadWith(
    keys: KeyMaker,
    kind: SignedKind,
    spoil: (key: SignedKey) => SignedKey,
  ): RequestInput<'uploadKeys'> {
    const spoilt = (of: SignedKind, key: SignedKey) => (of === kind ? spoil(key) : key);
    return {
      registrationId: 1,
      identityKey: keys.identityKey(),
      signedPreKey: spoilt('signedPreKey', keys.signed(11)),
      pqLastResortPreKey: spoilt('pqLastResortPreKey', keys.pq(12)),
      oneTimePreKeys: [keys.oneTime(1)],
      pqOneTimePreKeys: [keys.pq(13), spoilt('pqOneTimePreKey', keys.pq(14)), keys.pq(15)],
    };
  }

  const KEY_IDS: Record<SignedKind, number> = {
    signedPreKey: 11,
    pqLastResortPreKey: 12,
    pqOneTimePreKey: 14,
  };

  const SPOILERS: Record<string, (key: SignedKey) => SignedKey> = {
    'forged by another identity': (key) => new KeyMaker().signedAgain(key),
    malleated: (key) => ({ ...key, signature: malleated(key.signature) }),
    'with a flipped bit of R': (key) => ({ ...key, signature: withFlippedBit(key.signature, 3) }),
    'with a flipped bit of S': (key) => ({ ...key, signature: withFlippedBit(key.signature, 256) }),
    'with the other sign bit': (key) => ({ ...key, signature: withFlippedBit(key.signature, 511) }),
    'with no signature but zeros': (key) => ({ ...key, signature: Buffer.alloc(64).toString('base64') }),
    'signed as another key': (key) => ({
      ...key,
      publicKey: Buffer.from(key.publicKey, 'base64').fill(7, 10, 20).toString('base64'),
    }),
  };

  it.each(
    (Object.keys(KEY_IDS) as SignedKind[]).flatMap((kind) =>
      Object.keys(SPOILERS).map((how) => [kind, how] as const),
    ),
  )('%s %s is refused by its name, and nothing is stored', async (kind, how) => {
    const keys = new KeyMaker();
    const client = await gateway.connect({ userId: nobody('mallory'), deviceId: 1 });
    const upload = uploadWith(keys, kind, SPOILERS[how]!);
    expect(await client.refusal('uploadKeys', upload)).toMatchObject({
      code: 'SIGNATURE_INVALID',
      retryable: false,
      details: { keys: [{ kind, keyId: KEY_IDS[kind] }] },
    });
    expect(await client.call('keyStatus')).toMatchObject({ keyVersion: 0, countVersion: 0 });

    // The same upload as it should be is taken; then the other ways in refuse the bad key too.
    await client.call(
      'uploadKeys',
      uploadWith(keys, kind, (key) => key),
    );
    const bad = SPOILERS[how]!(kind === 'signedPreKey' ? keys.signed(21) : keys.pq(21));
    const request =
      kind === 'pqOneTimePreKey'
        ? client.refusal('addPreKeys', { pqOneTimePreKeys: [bad] })
        : client.refusal('rotateSignedPreKey', { [kind]: bad });
    expect(await request).toMatchObject({
      code: 'SIGNATURE_INVALID',
      details: { keys: [{ kind, keyId: 21 }] },
    });
    expect(await client.call('keyStatus')).toMatchObject({ keyVersion: 1, signedPreKeyId: 11 });
  });

  it('is named together with every other one', async () => {
    const keys = new KeyMaker();
    const client = await gateway.connect({ userId: nobody('mallory'), deviceId: 1 });
    const forge = (key: SignedKey) => new KeyMaker().signedAgain(key);
    const refused = await client.refusal('uploadKeys', {
      registrationId: 1,
      identityKey: keys.identityKey(),
      signedPreKey: forge(keys.signed(1)),
      pqLastResortPreKey: forge(keys.pq(2)),
      pqOneTimePreKeys: ids(3, 30).map((id) => (id % 2 === 0 ? keys.pq(id) : forge(keys.pq(id)))),
    });
    expect(refused).toMatchObject({
      code: 'SIGNATURE_INVALID',
      details: {
        keys: [
          { kind: 'signedPreKey', keyId: 1 },
          { kind: 'pqLastResortPreKey', keyId: 2 },
          ...ids(3, 30)
            .filter((id) => id % 2 === 1)
            .map((keyId) => ({ kind: 'pqOneTimePreKey', keyId })),
        ],
      },
    });
  });

  it('of low order, or not canonical, is refused although it is signed', async () => {
    const keys = new KeyMaker();
    const client = await gateway.connect({ userId: nobody('mallory'), deviceId: 1 });
    for (const u of [...LOW_ORDER_U, P, P + 9n]) {
      for (const form of [littleEndian(u), Buffer.concat([Buffer.from([5]), littleEndian(u)])]) {
        const signedPreKey = keys.signedAgain({ keyId: 7, publicKey: form.toString('base64') });
        expect(await client.refusal('uploadKeys', keys.keySet({ signedPreKey }))).toMatchObject({
          code: 'SIGNATURE_INVALID',
          details: { keys: [{ kind: 'signedPreKey', keyId: 7 }] },
        });
        // Without a signature to name it by, the path does.
        const oneTimePreKeys = [keys.oneTime(1), { keyId: 2, publicKey: form.toString('base64') }];
        expect(await client.refusal('uploadKeys', keys.keySet({ oneTimePreKeys }))).toMatchObject({
          code: 'BAD_REQUEST',
          details: { issues: [{ path: ['oneTimePreKeys', 1, 'publicKey'] }] },
        });
      }
    }
    expect(await client.call('keyStatus')).toMatchObject({ keyVersion: 0 });
  });
});

describe('an identity under which anybody can sign', () => {
  /** R is the identity point, S is 0. */
  const FITS_ALL = Buffer.concat([littleEndian(1n), Buffer.alloc(32)]);

  async function refusedIdentity(client: Client, upload: RequestInput<'uploadKeys'>): Promise<void> {
    const refused = await client.refusal('uploadKeys', upload);
    expect(refused).toMatchObject({ code: 'SIGNATURE_INVALID' });
    expect(refused.details).toEqual({ keys: [{ kind: 'identityKey' }] });
    expect(await client.call('keyStatus')).toMatchObject({ keyVersion: 0, identityKey: null });
  }

  it('is refused as an EC key of low order, or one that is not canonical', async () => {
    const client = await gateway.connect({ userId: nobody('mallory'), deviceId: 1 });
    const signedPreKey = { ...new KeyMaker().signed(1), signature: FITS_ALL.toString('base64') };
    for (const u of [...LOW_ORDER_U, P, P + 1n, P + 9n]) {
      for (const form of [littleEndian(u), Buffer.concat([Buffer.from([5]), littleEndian(u)])]) {
        const identityKey = form.toString('base64');
        await refusedIdentity(client, { registrationId: 1, identityKey, signedPreKey });
      }
    }
  });

  it('is refused as an Ed25519 key of low order, where one signature fits every message', async () => {
    const client = await gateway.connect({ userId: nobody('mallory'), deviceId: 1 });
    const keys = new KeyMaker();
    const identityPoint = littleEndian(1n);
    // It does fit, for a library that does not look at the key.
    for (const message of ['a', 'b', 'whatever']) {
      expect(fitsEquation(identityPoint, Buffer.from(message), FITS_ALL)).toBe(true);
    }
    const signature = FITS_ALL.toString('base64');
    const signedPreKey = { ...keys.signed(1), signature };
    const pqLastResortPreKey = { ...keys.pq(2), signature };
    const lowOrder = [1n, P - 1n, 0n, ORDER_8_Y, P - ORDER_8_Y].flatMap((y) => {
      const negative = littleEndian(y);
      negative[31]! |= 0x80;
      return [littleEndian(y), negative];
    });
    for (const key of [...lowOrder, littleEndian(P), littleEndian(P + 1n)]) {
      await refusedIdentity(client, {
        registrationId: 1,
        identityKey: keys.identityKey(),
        identityKeyEd25519: key.toString('base64'),
        signedPreKey,
        pqLastResortPreKey,
      });
    }
  });

  it('is not the Ed25519 identity of an honest client, whose malleated signatures are refused', async () => {
    const client = await gateway.connect({ userId: nobody('honest'), deviceId: 1 });
    const keys = new KeyMaker();
    const { publicKey, privateKey } = generateKeyPairSync('ed25519');
    const prekey = Buffer.from(PrivateKey.generate().getPublicKey().serialize());
    const signature = sign(null, prekey, privateKey).toString('base64');
    const upload = {
      registrationId: 1,
      identityKey: keys.identityKey(),
      identityKeyEd25519: Buffer.from(publicKey.export({ format: 'jwk' }).x!, 'base64url').toString('base64'),
      signedPreKey: { keyId: 5, publicKey: prekey.toString('base64'), signature },
    };
    for (const bad of [malleated(signature), withFlippedBit(signature, 511), FITS_ALL.toString('base64')]) {
      const signedPreKey = { ...upload.signedPreKey, signature: bad };
      expect(await client.refusal('uploadKeys', { ...upload, signedPreKey })).toMatchObject({
        code: 'SIGNATURE_INVALID',
        details: { keys: [{ kind: 'signedPreKey', keyId: 5 }] },
      });
    }
    expect(await client.call('uploadKeys', upload)).toMatchObject({ keyVersion: 1 });
  });
});
