/** The gate through sockets: what opens it, what closes it, and what becomes of messages meanwhile. */
import { randomUUID } from 'node:crypto';
import postgres from 'postgres';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createInProcessLocks } from '../../src/backends/in-process/locks.ts';
import { openDatabase } from '../../src/backends/postgres/database.ts';
import { createKeyStore } from '../../src/backends/postgres/key-store.ts';
import { rotateSignedPreKey } from '../../src/keys/rotate.ts';
import { type UploadParts, uploadKeys } from '../../src/keys/upload.ts';
import { systemClock } from '../../src/lib/clock.ts';
import { silentLog } from '../../src/lib/log.ts';
import { requests } from '../../src/protocol/events.ts';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import { WINDOW_ENVELOPES_MAX } from '../../src/protocol/limits.ts';
import { eventually } from '../support/eventually.ts';
import {
  afterOthersGotTheirs,
  FEW_KEYS,
  gatewayFor,
  hold,
  NO_MORE_KEYS,
  opened,
  redisFor,
  someone,
  undoAfterEach,
} from '../support/flow.ts';
import {
  contents,
  enrol,
  open,
  type Party,
  send,
  startGateway,
  type TestGateway,
} from '../support/gateway.ts';
import { type FullUpload, SignalDevice } from '../support/libsignal-device.ts';
import { createManualClock } from '../support/manual-clock.ts';

const undo = undoAfterEach();
let shared: TestGateway;
beforeAll(async () => {
  shared = await startGateway();
});
afterAll(() => shared.stop());
async function post(at: TestGateway, address: DeviceAddress, path: string, body: unknown): Promise<Response> {
  return await fetch(`${at.url}${path}`, {
    method: 'POST',
    headers: { authorization: `Bearer ${await at.token(address)}`, 'content-type': 'application/json' },
    body: JSON.stringify(body),
  });
}

async function uploadOverHttp(
  at: TestGateway,
  address: DeviceAddress,
  { identityKey, ...rest }: FullUpload & { replaceIdentity?: boolean },
): Promise<Response> {
  const response = await post(at, address, '/api/keys/upload', {
    keyBundle: { ...rest, identityPubKey: identityKey },
  });
  expect(response.status).toBe(200);
  return response;
}

/** A fresh install of the same device: another identity. */
async function replaceOverHttp(at: TestGateway, party: Party): Promise<SignalDevice> {
  const device = new SignalDevice(party.address);
  await uploadOverHttp(at, party.address, { ...device.uploadInput(FEW_KEYS), replaceIdentity: true });
  return device;
}

async function validationOverHttp(
  at: TestGateway,
  party: Pick<Party, 'address' | 'device'>,
): Promise<string> {
  const response = await post(at, party.address, '/signal/validate-and-sync', party.device.validateInput());
  const { validation } = (await response.json()) as { validation: string };
  return validation;
}

/** A gateway whose sweep is never due: what nobody tells it of, only a request finds. */
async function neverSweeping(): Promise<TestGateway> {
  return await gatewayFor(undo, { timing: { sweepPeriodMs: 3_600_000 } });
}

/** Changes keys in the store as a node would whose pokes are all lost. */
function inSilence(databaseUrl: string) {
  const database = openDatabase({
    address: { kind: 'url', url: databaseUrl },
    clock: systemClock,
    log: silentLog,
  });
  undo.push(() => database.close());
  const parts: UploadParts = {
    store: createKeyStore(database),
    locks: createInProcessLocks({ clock: systemClock }),
    clock: systemClock,
    poolMax: 1_000,
    lowThreshold: 10,
    signedPreKeyLifetimeMs: 86_400_000,
  };
  return {
    /** Committed when it resolves. */
    async rotate({ address, device }: Party): Promise<number> {
      const input = requests.rotateSignedPreKey.input.parse({ signedPreKey: device.newSignedPreKey() });
      return (await rotateSignedPreKey(parts, address, input)).data.keyVersion;
    },
    async replace({ address }: Party): Promise<SignalDevice> {
      const device = new SignalDevice(address);
      const input = { ...device.uploadInput(FEW_KEYS), replaceIdentity: true };
      await uploadKeys(parts, address, requests.uploadKeys.input.parse(input));
      return device;
    },
  };
}

describe('before clientReady', () => {
  it('no message is pushed, not even to a device that has just validated its keys', async () => {
    const alice = await opened(shared);
    const bob = await enrol(shared, someone(), FEW_KEYS);
    await send(alice.client, bob, 'one');
    await bob.client.call('validateKeys', bob.device.validateInput());
    await send(alice.client, bob, 'two');
    await afterOthersGotTheirs(shared, alice.client);
    expect(bob.client.waiting('queueEmpty')).toBe(0);
    expect(contents(bob.client)).toEqual([]);

    expect(await bob.client.call('clientReady')).toEqual({ pendingCount: 2, keyVersion: 1 });
    expect(await bob.client.next('queueEmpty')).toEqual({ deliveredCount: 2 });
    expect(contents(bob.client)).toEqual(['one', 'two']);
  });

  it('a device without keys is told KEYS_NOT_UPLOADED, whatever it brings', async () => {
    const bob = await opened(shared);
    const { validation } = await bob.client.call('validateKeys', bob.device.validateInput());
    const client = await shared.connect(someone());
    expect(await client.refusal('clientReady')).toMatchObject({ code: 'KEYS_NOT_UPLOADED' });
    expect(await client.refusal('clientReady', { validation: validation! })).toMatchObject({
      code: 'KEYS_NOT_UPLOADED',
    });
    expect(
      await client.refusal('sendMessages', {
        messageId: randomUUID(),
        userId: bob.address.userId,
        envelopes: [{ deviceId: 1, registrationId: bob.device.registrationId, type: 3, content: 'AAAA' }],
      }),
    ).toMatchObject({ code: 'KEYS_NOT_UPLOADED' });

    await bob.client.call('resetKeys');
    expect(await bob.client.refusal('clientReady', { validation: validation! })).toMatchObject({
      code: 'KEYS_NOT_UPLOADED',
    });
  });

  it('without a validation, or after one that failed, the answer is KEYS_NOT_VALIDATED', async () => {
    const bob = await enrol(shared, someone(), FEW_KEYS);
    expect(await bob.client.refusal('clientReady')).toMatchObject({ code: 'KEYS_NOT_VALIDATED' });
    const other = new SignalDevice(bob.address);
    expect(await bob.client.call('validateKeys', other.validateInput())).toMatchObject({
      keysValid: false,
      missingKeys: expect.arrayContaining(['identity']),
    });
    expect(await bob.client.refusal('clientReady')).toMatchObject({ code: 'KEYS_NOT_VALIDATED' });
    await open(bob);
  });

  it('a forged validation, or one of another device or user, is KEYS_NOT_VALIDATED', async () => {
    const bob = await enrol(shared, someone(), FEW_KEYS);
    const sibling = await enrol(shared, { ...bob.address, deviceId: 2 }, FEW_KEYS);
    const stranger = await enrol(shared, someone(), FEW_KEYS);
    const validationOf = async (party: Party) =>
      (await party.client.call('validateKeys', party.device.validateInput())).validation!;
    const good = await validationOf(bob);
    const [payload, mac] = good.split('.') as [string, string];
    const claims = JSON.parse(Buffer.from(payload, 'base64url').toString());
    const altered = Buffer.from(JSON.stringify({ ...claims, expiresAtMs: claims.expiresAtMs + 1 }));
    const bad = {
      'another device’s': await validationOf(sibling),
      'another user’s': await validationOf(stranger),
      'other claims under the same seal': `${altered.toString('base64url')}.${mac}`,
      'another seal': `${payload}.${Buffer.alloc(32).toString('base64url')}`,
      'half a seal': `${payload}.${mac.slice(0, 20)}`,
      'no seal': payload,
      'a part too many': `${good}.`,
      'an empty one': '',
      'a dot': '.',
      garbage: '🗝️'.repeat(50),
    };
    // A fresh socket: the one above has a validation of its own.
    const client = await shared.connect(bob.address);
    for (const [what, validation] of Object.entries(bad)) {
      expect(await client.refusal('clientReady', { validation }), what).toMatchObject({
        code: 'KEYS_NOT_VALIDATED',
      });
    }
    expect(await client.call('clientReady', { validation: good })).toMatchObject({ keyVersion: 1 });
  });

  it('a validation is good for ten minutes', async () => {
    const clock = createManualClock();
    const at = await gatewayFor(undo, { clock });
    const bob = await enrol(at, someone(), FEW_KEYS);
    const { validation } = await bob.client.call('validateKeys', bob.device.validateInput());
    bob.client.close();
    await clock.advance(10 * 60_000 - 1);
    await (await at.connect(bob.address)).call('clientReady', { validation: validation! });
    await clock.advance(1);
    const late = await at.connect(bob.address);
    expect(await late.refusal('clientReady', { validation: validation! })).toMatchObject({
      code: 'KEYS_NOT_VALIDATED',
    });
    await open({ client: late, device: bob.device });
  });

  it('a validation of an older key set is KEYS_OUT_OF_SYNC with the version that counts', async () => {
    const alice = await opened(shared);
    const bob = await enrol(shared, someone(), FEW_KEYS);
    const { validation } = await bob.client.call('validateKeys', bob.device.validateInput());
    await uploadOverHttp(shared, bob.address, {
      ...bob.device.uploadInput(NO_MORE_KEYS),
      signedPreKey: bob.device.newSignedPreKey(),
    });
    await send(alice.client, bob, 'held');
    // Brought along, or from this very socket: the same.
    for (const input of [{ validation: validation! }, {}]) {
      expect(await bob.client.refusal('clientReady', input)).toMatchObject({
        code: 'KEYS_OUT_OF_SYNC',
        details: { keyVersion: 2 },
      });
    }
    expect(contents(bob.client)).toEqual([]);
    await open(bob);
    await eventually(() => contents(bob.client).includes('held'));
  });
});

describe('a validation brought along', () => {
  it('opens the gate at once after a reconnect', async () => {
    const alice = await opened(shared);
    const bob = await enrol(shared, someone(), FEW_KEYS);
    const { validation } = await bob.client.call('validateKeys', bob.device.validateInput());
    bob.client.close();
    await send(alice.client, bob, 'while away');
    const again = await shared.connect(bob.address);
    await again.call('clientReady', { validation: validation! });
    await again.next('queueEmpty');
    expect(contents(again)).toEqual(['while away']);
  });

  it('opens it on every other node, and on a node that starts later', async () => {
    const redis = await redisFor(undo);
    const first = await gatewayFor(undo, { redisUrl: redis.url });
    const second = await gatewayFor(undo, { redisUrl: redis.url, databaseUrl: first.databaseUrl });
    const bob = await enrol(first, someone(), FEW_KEYS);
    const { validation } = await bob.client.call('validateKeys', bob.device.validateInput());
    await (await second.connect(bob.address)).call('clientReady', { validation: validation! });
    const third = await gatewayFor(undo, { redisUrl: redis.url, databaseUrl: first.databaseUrl });
    await (await third.connect(bob.address)).call('clientReady', { validation: validation! });
  });
});

describe('an identity that is replaced by another path', () => {
  it('over HTTP: the gate closes, what was in flight bounces to its sender once, the new keys get the rest', async () => {
    const alice = await opened(shared);
    const bob = await opened(shared);
    hold(bob.client);
    const lost: string[] = [];
    for (const text of ['1', '2', '3']) lost.push(await send(alice.client, bob, text));
    await eventually(() => contents(bob.client).length === 3);

    const device = await replaceOverHttp(shared, bob);
    expect(await bob.client.next('gateClosed')).toEqual({ reason: 'identityReplaced', keyVersion: 2 });
    await eventually(() => alice.client.envelopes.length === 3);
    expect(alice.client.envelopes).toEqual(
      lost.map((messageId) => ({
        id: expect.any(String),
        kind: 'bounce',
        messageId,
        recipient: bob.address,
        reason: 'RECIPIENT_IDENTITY_CHANGED',
        storedAt: expect.any(String),
      })),
    );

    // The old registration id is refused, the new one is held until the new keys are proven.
    await expect(send(alice.client, bob, 'for the old keys')).rejects.toThrow('DEVICES_MISMATCHED');
    await send(alice.client, { ...bob, device }, 'for the new keys');
    expect(await bob.client.refusal('clientReady')).toMatchObject({ code: 'KEYS_OUT_OF_SYNC' });
    expect(await open({ client: bob.client, device })).toEqual({ pendingCount: 1, keyVersion: 2 });
    await eventually(() => contents(bob.client).length === 4);
    expect(contents(bob.client)).toEqual(['1', '2', '3', 'for the new keys']);
    expect(alice.client.envelopes).toHaveLength(3);
  });

  it('closes the gate also of a client that acknowledges nothing of a full window', async () => {
    const alice = await opened(shared);
    const bob = await opened(shared);
    hold(bob.client);
    for (let i = 0; i < WINDOW_ENVELOPES_MAX; i++) await send(alice.client, bob, String(i));
    await eventually(() => contents(bob.client).length === WINDOW_ENVELOPES_MAX);
    await replaceOverHttp(shared, bob);
    expect(await bob.client.next('gateClosed')).toEqual({ reason: 'identityReplaced', keyVersion: 2 });
  });

  it('on another node: the same, and the bounce goes to the node of the sender', async () => {
    const redis = await redisFor(undo);
    const first = await gatewayFor(undo, { redisUrl: redis.url });
    const second = await gatewayFor(undo, { redisUrl: redis.url, databaseUrl: first.databaseUrl });
    const alice = await opened(second);
    const bob = await opened(first);
    hold(bob.client);
    const messageId = await send(alice.client, bob, 'lost');
    await eventually(() => contents(bob.client).length === 1);
    await replaceOverHttp(second, bob);
    expect(await bob.client.next('gateClosed')).toEqual({ reason: 'identityReplaced', keyVersion: 2 });
    await eventually(() => alice.client.envelopes.length === 1);
    expect(alice.client.envelopes).toMatchObject([
      { kind: 'bounce', messageId, reason: 'RECIPIENT_IDENTITY_CHANGED' },
    ]);
  });

  it('while messages stream in: each one that was accepted is processed or bounced, and bounced once', async () => {
    const alice = await opened(shared);
    let bob = await opened(shared);
    const processed = new Set<string>();
    bob.client.onMessages = (page) => {
      for (const envelope of page.envelopes) processed.add(envelope.messageId);
      return { processed: page.envelopes.map((envelope) => envelope.id) };
    };
    const accepted: string[] = [];
    let streaming = true;
    const streams = [1, 2, 3].map(async () => {
      while (streaming) {
        await send(alice.client, bob, 'x').then(
          (messageId) => accepted.push(messageId),
          (error: Error) => expect(error.message).toContain('DEVICES_MISMATCHED'),
        );
      }
    });
    for (let round = 1; round <= 3; round++) {
      const before = accepted.length;
      await eventually(() => accepted.length > before + 20);
      const device = await replaceOverHttp(shared, bob);
      expect(await bob.client.next('gateClosed')).toMatchObject({ reason: 'identityReplaced' });
      await open({ client: bob.client, device });
      bob = { ...bob, device };
    }
    streaming = false;
    await Promise.all(streams);
    await eventually(() => {
      const bounced = alice.client.envelopes.map((envelope) => envelope.messageId);
      expect(new Set(bounced).size).toBe(bounced.length);
      const ended = new Set([...processed, ...bounced]);
      expect(accepted.filter((messageId) => !ended.has(messageId))).toEqual([]);
    });
  });

  it('bounces wait for the sender’s own gate, over a restart of the gateway', async () => {
    const first = await startGateway();
    const alice = await enrol(first, someone(), FEW_KEYS);
    const bob = await enrol(first, someone(), FEW_KEYS);
    const messageId = await send(alice.client, bob, 'lost');
    await replaceOverHttp(first, bob);
    alice.client.close();
    // The store outlives its gateway: only the second one drops it.
    const second = await gatewayFor(undo, { databaseUrl: first.databaseUrl });
    undo.unshift(() => first.stop());
    const client = await second.connect(alice.address);
    await client.call('validateKeys', alice.device.validateInput());
    expect(client.envelopes).toEqual([]);
    expect(await client.call('clientReady')).toMatchObject({ pendingCount: 1 });
    expect(await client.next('queueEmpty')).toEqual({ deliveredCount: 1 });
    expect(client.envelopes).toMatchObject([
      { kind: 'bounce', messageId, recipient: bob.address, reason: 'RECIPIENT_IDENTITY_CHANGED' },
    ]);
    // Acknowledged: it does not come again.
    const again = await second.connect(alice.address);
    expect(await open({ client: again, device: alice.device })).toMatchObject({ pendingCount: 0 });
  });

  it('what a node left behind that died before it brought the bounces home, the sweep brings home', async () => {
    const clock = createManualClock();
    const at = await gatewayFor(undo, { clock });
    const alice = await opened(at);
    const bob = await enrol(at, someone(), FEW_KEYS);
    await send(alice.client, bob, 'lost');
    await inSilence(at.databaseUrl).replace(bob);
    await clock.advance(60_000);
    await eventually(() => contents(alice.client).length === 1);
    expect(contents(alice.client)).toEqual(['RECIPIENT_IDENTITY_CHANGED']);
  });
});

describe('a change by the socket itself', () => {
  it('a rotation carries the open gate, and messages keep flowing in order', async () => {
    const alice = await opened(shared);
    const bob = await opened(shared);
    const texts = Array.from({ length: 60 }, (_, i) => String(i));
    const sending = (async () => {
      for (const text of texts) await send(alice.client, bob, text);
    })();
    for (let i = 0; i < 8; i++) {
      const input =
        i % 2
          ? { signedPreKey: bob.device.newSignedPreKey() }
          : { pqLastResortPreKey: bob.device.newPqLastResort() };
      expect(await bob.client.call('rotateSignedPreKey', input)).toMatchObject({ keyVersion: i + 2 });
    }
    await sending;
    await eventually(() => contents(bob.client).length >= texts.length);
    expect(contents(bob.client)).toEqual(texts);
    expect(bob.client.waiting('gateClosed')).toBe(0);
    // It stands at the newest version: a further rotation still finds it one behind.
    expect(
      await bob.client.call('clientReady', { validation: await validationOverHttp(shared, bob) }),
    ).toMatchObject({ keyVersion: 9 });
  });

  it('rotations that overlap, by either request, carry it too', async () => {
    const alice = await opened(shared);
    const bob = await opened(shared);
    for (let round = 0; round < 5; round++) {
      const lastResort = bob.device.newPqLastResort();
      await Promise.all([
        bob.client.call('rotateSignedPreKey', { pqLastResortPreKey: lastResort }),
        bob.client.call('uploadKeys', {
          ...bob.device.uploadInput(NO_MORE_KEYS),
          pqLastResortPreKey: lastResort,
          signedPreKey: bob.device.newSignedPreKey(),
        }),
        bob.client.call('rotateSignedPreKey', { signedPreKey: bob.device.newSignedPreKey() }),
      ]);
      await send(alice.client, bob, `round ${round}`);
      await eventually(() => contents(bob.client).includes(`round ${round}`));
    }
    expect(bob.client.waiting('gateClosed')).toBe(0);
  });

  it('a rotation that comes with another registration id closes the gate: no sender knows it yet', async () => {
    const bob = await opened(shared);
    const upload = { ...bob.device.uploadInput(NO_MORE_KEYS), signedPreKey: bob.device.newSignedPreKey() };
    const registrationId = (upload.registrationId + 1) % 16_384;
    await bob.client.call('uploadKeys', { ...upload, registrationId });
    expect(await bob.client.next('gateClosed')).toEqual({ reason: 'keysRotated', keyVersion: 2 });
  });

  it('asking for what already stands, or for what is refused, leaves the gate open', async () => {
    const alice = await opened(shared);
    const bob = await opened(shared);
    await bob.client.call('uploadKeys', bob.device.uploadInput(FEW_KEYS));
    const { signedPreKey } = new SignalDevice(bob.address).uploadInput(NO_MORE_KEYS);
    expect(await bob.client.refusal('rotateSignedPreKey', { signedPreKey })).toMatchObject({
      code: 'SIGNATURE_INVALID',
    });
    await send(alice.client, bob, 'still open');
    await eventually(() => contents(bob.client).includes('still open'));
    expect(bob.client.waiting('gateClosed')).toBe(0);
  });

  it('a rotation through a gate that is not open opens nothing', async () => {
    const alice = await opened(shared);
    const bob = await enrol(shared, someone(), FEW_KEYS);
    await bob.client.call('validateKeys', bob.device.validateInput());
    await bob.client.call('rotateSignedPreKey', { signedPreKey: bob.device.newSignedPreKey() });
    await send(alice.client, bob, 'held');
    expect(await bob.client.refusal('clientReady')).toMatchObject({ code: 'KEYS_OUT_OF_SYNC' });
    await afterOthersGotTheirs(shared, alice.client);
    expect(contents(bob.client)).toEqual([]);
  });

  it('a rotation by the socket after somebody else’s change closes the gate all the same', async () => {
    const at = await neverSweeping();
    const alice = await opened(at);
    const bob = await opened(at);
    const newest = await inSilence(at.databaseUrl).rotate(bob);
    await bob.client.call('rotateSignedPreKey', { signedPreKey: bob.device.newSignedPreKey() });
    expect(await bob.client.next('gateClosed')).toEqual({ reason: 'keysRotated', keyVersion: newest + 1 });
    await send(alice.client, bob, 'held');
    await afterOthersGotTheirs(at, alice.client);
    expect(contents(bob.client)).toEqual([]);
    await open(bob);
    await eventually(() => contents(bob.client).includes('held'));
  });

  it('a replaced identity or a reset closes it, and says which', async () => {
    const bob = await opened(shared);
    const device = new SignalDevice(bob.address);
    await bob.client.call('uploadKeys', { ...device.uploadInput(FEW_KEYS), replaceIdentity: true });
    expect(await bob.client.next('gateClosed')).toEqual({ reason: 'identityReplaced', keyVersion: 2 });
    await open({ client: bob.client, device });
    await bob.client.call('resetKeys');
    expect(await bob.client.next('gateClosed')).toEqual({ reason: 'keysReset', keyVersion: 3 });
    expect(await bob.client.refusal('clientReady')).toMatchObject({ code: 'KEYS_NOT_UPLOADED' });
    // Doing it twice is one reset, and one notice.
    expect(await bob.client.call('resetKeys')).toEqual({ keyVersion: 3 });
    await bob.client.call('uploadKeys', bob.device.uploadInput(FEW_KEYS));
    expect(await open(bob)).toMatchObject({ keyVersion: 4 });
    expect(bob.client.waiting('gateClosed')).toBe(0);
  });
});

describe('a rotation over HTTP', () => {
  it('is an upload, and closes the gate with keysRotated; what was in flight stays and comes again', async () => {
    const alice = await opened(shared);
    const bob = await opened(shared);
    const held = hold(bob.client);
    await send(alice.client, bob, 'in flight');
    await eventually(() => contents(bob.client).length === 1);
    await uploadOverHttp(shared, bob.address, {
      ...bob.device.uploadInput(NO_MORE_KEYS),
      signedPreKey: bob.device.newSignedPreKey(),
    });
    expect(await bob.client.next('gateClosed')).toEqual({ reason: 'keysRotated', keyVersion: 2 });
    await send(alice.client, bob, 'behind it');
    expect(await open(bob)).toEqual({ pendingCount: 2, keyVersion: 2 });
    await eventually(() => contents(bob.client).length === 3);
    expect(contents(bob.client)).toEqual(['in flight', 'in flight', 'behind it']);
    expect(bob.client.envelopes[0]!.id).toBe(bob.client.envelopes[1]!.id);
    held.answerAll();
    expect(await bob.client.next('queueEmpty')).toEqual({ deliveredCount: 2 });
    expect(alice.client.envelopes).toEqual([]);
  });

  it('what is acknowledged after the gate closed is processed, and does not come again', async () => {
    const alice = await opened(shared);
    const bob = await opened(shared);
    const held = hold(bob.client);
    await send(alice.client, bob, 'in flight');
    await eventually(() => contents(bob.client).length === 1);
    await uploadOverHttp(shared, bob.address, {
      ...bob.device.uploadInput(NO_MORE_KEYS),
      signedPreKey: bob.device.newSignedPreKey(),
    });
    await bob.client.next('gateClosed');
    held.answerAll();
    await eventually(async () => {
      const again = await shared.connect(bob.address);
      expect(await open({ client: again, device: bob.device })).toMatchObject({ pendingCount: 0 });
    });
  });

  it('has no route of its own', async () => {
    const bob = await opened(shared);
    const signedPreKey = bob.device.newSignedPreKey();
    for (const path of ['/api/keys/rotate', '/api/keys/rotate-signed-prekey', '/signal/rotate']) {
      // GET /api/keys/:userId is no door for it either.
      expect([404, 405]).toContain((await post(shared, bob.address, path, { signedPreKey })).status);
    }
    expect(await bob.client.call('keyStatus')).toMatchObject({ keyVersion: 1 });
  });
});

describe('a change whose poke was lost', () => {
  it('is found by the next page’s proof: no message whose read began after the commit is pushed', async () => {
    const alice = await opened(shared);
    const bob = await opened(shared);
    const silence = inSilence(shared.databaseUrl);
    for (let round = 1; round <= 4; round++) {
      let streaming = true;
      const sent: string[] = [];
      const stream = (async () => {
        while (streaming) sent.push(await send(alice.client, bob, 'x'));
      })();
      await eventually(() => sent.length > 10);
      const keyVersion = await silence.rotate(bob);
      const sentByThen = new Set(sent);
      // The one that is under way now may have been stored and read before the commit.
      const nth = sent.length;
      await eventually(() => sent.length > nth + 5);
      expect(await bob.client.next('gateClosed')).toEqual({ reason: 'keysRotated', keyVersion });
      const pushed = new Set(bob.client.envelopes.map((envelope) => envelope.messageId));
      streaming = false;
      await stream;
      for (const messageId of sent.slice(nth + 1)) expect(pushed).not.toContain(messageId);
      await open(bob);
      await eventually(() => {
        const got = new Set(bob.client.envelopes.map((envelope) => envelope.messageId));
        for (const messageId of [...sentByThen, ...sent]) expect(got).toContain(messageId);
      });
    }
  });

  it('of a replaced identity, too: the messages of the old key set bounce', async () => {
    const alice = await opened(shared);
    const bob = await opened(shared);
    const device = await inSilence(shared.databaseUrl).replace(bob);
    await send(alice.client, { ...bob, device }, 'for the new keys');
    expect(await bob.client.next('gateClosed')).toEqual({ reason: 'identityReplaced', keyVersion: 2 });
    expect(contents(bob.client)).toEqual([]);
    await open({ client: bob.client, device });
    await eventually(() => contents(bob.client).includes('for the new keys'));
  });

  it('is found by the slow sweep where no message comes', async () => {
    const clock = createManualClock();
    const at = await gatewayFor(undo, { clock });
    const bob = await opened(at);
    await inSilence(at.databaseUrl).rotate(bob);
    await clock.advance(15_000);
    expect(await bob.client.next('gateClosed')).toEqual({ reason: 'keysRotated', keyVersion: 2 });
  });

  it('is found by clientReady with a newer validation: it closes with the reason, opens, and delivers', async () => {
    const alice = await opened(shared);
    const bob = await opened(shared);
    const silence = inSilence(shared.databaseUrl);
    await silence.rotate(bob);
    const validation = await validationOverHttp(shared, bob);
    expect(await bob.client.call('clientReady', { validation })).toMatchObject({ keyVersion: 2 });
    expect(await bob.client.next('gateClosed')).toEqual({ reason: 'keysRotated', keyVersion: 2 });
    expect(await bob.client.next('queueEmpty')).toEqual({ deliveredCount: 0 });

    const device = await silence.replace(bob);
    await bob.client.call('validateKeys', device.validateInput());
    expect(await bob.client.call('clientReady')).toMatchObject({ keyVersion: 3 });
    expect(await bob.client.next('gateClosed')).toEqual({ reason: 'identityReplaced', keyVersion: 3 });
    expect(await bob.client.next('queueEmpty')).toEqual({ deliveredCount: 0 });
    await send(alice.client, { ...bob, device }, 'open again');
    await eventually(() => contents(bob.client).includes('open again'));
  });
});

describe('a server that was restored from an older backup', () => {
  /** What a restored dump does to the device's row. */
  async function goBack(at: TestGateway, { address }: Party): Promise<void> {
    const sql = postgres(at.databaseUrl, { max: 1 });
    await sql`UPDATE devices SET key_version = 1
              WHERE user_id = ${address.userId} AND device_id = ${address.deviceId}`;
    await sql.end();
  }

  it('closes the gate with serverRestored where it knows nothing of the connection, though its keys are the same', async () => {
    const alice = await opened(shared);
    const bob = await opened(shared);
    const sql = postgres(shared.databaseUrl, { max: 1 });
    await sql`UPDATE devices SET fence = 0
              WHERE user_id = ${bob.address.userId} AND device_id = ${bob.address.deviceId}`;
    await sql.end();
    await send(alice.client, bob, 'held');
    expect(await bob.client.next('gateClosed')).toEqual({ reason: 'serverRestored', keyVersion: 1 });
    expect(contents(bob.client)).toEqual([]);
    await open(bob);
    expect(await bob.client.next('queueEmpty')).toEqual({ deliveredCount: 1 });
    expect(contents(bob.client)).toEqual(['held']);
  });

  it.each([
    ['adds prekeys', 'addPreKeys'],
    ['withdraws some', 'withdrawPreKeys'],
    ['rotates', 'rotateSignedPreKey'],
  ] as const)(
    'is found out though the first that it hears of a connection is that it %s',
    async (_, request) => {
      const at = await neverSweeping();
      const alice = await opened(at);
      const bob = await opened(at);
      const before = await bob.client.call('keyStatus');
      const sql = postgres(at.databaseUrl, { max: 1 });
      await sql`UPDATE devices SET fence = 0
              WHERE user_id = ${bob.address.userId} AND device_id = ${bob.address.deviceId}`;
      await sql.end();
      const input = {
        addPreKeys: bob.device.morePreKeys(1),
        withdrawPreKeys: { preKeyIds: [1] },
        rotateSignedPreKey: { signedPreKey: bob.device.newSignedPreKey() },
      };
      // What it offers may have been handed out in the time that was lost.
      expect(await bob.client.refusal(request, input[request])).toMatchObject({ code: 'UNAVAILABLE' });
      expect(await bob.client.next('gateClosed')).toEqual({ reason: 'serverRestored', keyVersion: 1 });
      expect(await bob.client.call('keyStatus')).toEqual(before);
      await bob.client.call(request, input[request]);
      await send(alice.client, bob, 'held');
      await afterOthersGotTheirs(at, alice.client);
      expect(contents(bob.client)).toEqual([]);
    },
  );

  it.each([
    ['says which version it knows', true],
    ['does not say which version it knows', false],
  ])('closes the gate with serverRestored, and a client that %s opens it again', async (_, tells) => {
    const alice = await opened(shared);
    const bob = await opened(shared);
    await bob.client.call('rotateSignedPreKey', { signedPreKey: bob.device.newSignedPreKey() });
    await goBack(shared, bob);
    await send(alice.client, bob, 'held');
    expect(await bob.client.next('gateClosed')).toEqual({ reason: 'serverRestored', keyVersion: 1 });
    expect(contents(bob.client)).toEqual([]);
    expect(await bob.client.refusal('clientReady')).toMatchObject({ code: 'KEYS_NOT_VALIDATED' });

    if (tells) {
      const verdict = await bob.client.call('validateKeys', {
        ...bob.device.validateInput(),
        lastKeyVersion: 2,
      });
      expect(verdict).toMatchObject({ keysValid: false, missingKeys: ['rolledBack'], keyVersion: 3 });
    }
    await bob.client.call('validateKeys', bob.device.validateInput());
    expect(await bob.client.call('clientReady')).toMatchObject({ keyVersion: tells ? 3 : 1 });
    await eventually(() => contents(bob.client).includes('held'));
  });

  it('closes the gate with serverRestored where a validation finds it, and its keys are older', async () => {
    const bob = await opened(shared);
    const local = { ...bob.device.validateInput(), lastKeyVersion: 9 };
    const verdict = await bob.client.call('validateKeys', local);
    expect(verdict).toMatchObject({ missingKeys: ['rolledBack'], keyVersion: 10 });
    expect(await bob.client.next('gateClosed')).toEqual({ reason: 'serverRestored', keyVersion: 10 });
  });

  it('leaves the gate open where a validation finds that its pools alone are older', async () => {
    const alice = await opened(shared);
    const bob = await opened(shared);
    const local = { ...bob.device.validateInput(), lastCountVersion: 9 };
    const verdict = await bob.client.call('validateKeys', local);
    expect(verdict).toMatchObject({ missingKeys: ['rolledBack'], keyVersion: 1 });
    await send(alice.client, bob, 'delivered all the same');
    await eventually(() => contents(bob.client).includes('delivered all the same'));
    expect(bob.client.waiting('gateClosed')).toBe(0);
  });

  it('a validation from before it opens nothing, and the next one does', async () => {
    const alice = await opened(shared);
    const bob = await enrol(shared, someone(), FEW_KEYS);
    await bob.client.call('rotateSignedPreKey', { signedPreKey: bob.device.newSignedPreKey() });
    await bob.client.call('validateKeys', bob.device.validateInput());
    await goBack(shared, bob);
    expect(await bob.client.refusal('clientReady')).toMatchObject({ code: 'KEYS_OUT_OF_SYNC' });
    await send(alice.client, bob, 'held');
    expect(await open(bob)).toEqual({ pendingCount: 1, keyVersion: 1 });
    await eventually(() => contents(bob.client).includes('held'));
  });
});

describe('queueEmpty', () => {
  it('comes for an empty queue', async () => {
    const bob = await enrol(shared, someone(), FEW_KEYS);
    expect(await open(bob)).toEqual({ pendingCount: 0, keyVersion: 1 });
    expect(await bob.client.next('queueEmpty')).toEqual({ deliveredCount: 0 });
  });

  it('waits for the last acknowledgement, and counts what was processed', async () => {
    const alice = await opened(shared);
    const bob = await enrol(shared, someone(), FEW_KEYS);
    for (let i = 0; i < 3; i++) await send(alice.client, bob, String(i));
    const held = hold(bob.client);
    await open(bob);
    await eventually(() => bob.client.envelopes.length === 3);
    await afterOthersGotTheirs(shared, alice.client);
    expect(bob.client.waiting('queueEmpty')).toBe(0);
    held.answerAll();
    expect(await bob.client.next('queueEmpty')).toEqual({ deliveredCount: 3 });
  });

  it('does not wait for what was stored after clientReady, and comes once', async () => {
    const alice = await opened(shared);
    const bob = await enrol(shared, someone(), FEW_KEYS);
    await send(alice.client, bob, 'backlog');
    const held = hold(bob.client);
    await open(bob);
    await eventually(() => bob.client.envelopes.length === 1);
    await send(alice.client, bob, 'live');
    await eventually(() => bob.client.envelopes.length === 2);
    // Only the page with the backlog is answered.
    bob.client.onMessages = () => null;
    held.answerAll();
    await bob.client.next('queueEmpty');
    await send(alice.client, bob, 'later');
    await eventually(() => bob.client.envelopes.length === 3);
    held.answerAll();
    await afterOthersGotTheirs(shared, alice.client);
    expect(bob.client.waiting('queueEmpty')).toBe(0);
  });

  it('comes anew after every clientReady, which offers nothing again that is on its way', async () => {
    const alice = await opened(shared);
    const bob = await enrol(shared, someone(), FEW_KEYS);
    await send(alice.client, bob, 'one');
    await send(alice.client, bob, 'two');
    const held = hold(bob.client);
    expect(await open(bob)).toMatchObject({ pendingCount: 2 });
    await eventually(() => bob.client.envelopes.length === 2);
    expect(await open(bob)).toMatchObject({ pendingCount: 2 });
    await send(alice.client, bob, 'three');
    await eventually(() => contents(bob.client).includes('three'));
    expect(contents(bob.client)).toEqual(['one', 'two', 'three']);
    expect(bob.client.waiting('queueEmpty')).toBe(0);
    held.answerOne();
    expect(await bob.client.next('queueEmpty')).toEqual({ deliveredCount: 2 });
    held.letGo();
    await eventually(async () => expect(await open(bob)).toMatchObject({ pendingCount: 0 }));
    await bob.client.next('queueEmpty');
  });
});
