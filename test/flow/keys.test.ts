/** Every request on keys, sentence by sentence of the contract, as a client at a socket sees it. */
import { randomUUID } from 'node:crypto';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { RequestData } from '../../src/protocol/events.ts';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import { eventually } from '../support/eventually.ts';
import { type Client, startGateway, type TestGateway } from '../support/gateway.ts';
import { ids, KeyMaker, signedByEd25519 } from '../support/key-maker.ts';
import { createManualClock } from '../support/manual-clock.ts';

const HOUR_MS = 3_600_000;
const ROTATION_MS = 48 * HOUR_MS;
const DAY_MS = 24 * HOUR_MS;
const ISO = /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/;
const NOTHING_OFFERED = { stored: 0, unchanged: 0, conflicts: [] };

const clock = createManualClock();
let gateway: TestGateway;
/** Claims for everybody's bundles. */
let claimer: Client;

beforeAll(async () => {
  gateway = await startGateway({
    clock,
    env: { PREKEY_POOL_MAX: '120', CLAIMED_PREKEY_RETENTION_DAYS: '3', SIGNED_PREKEY_ROTATION_HOURS: '48' },
  });
  claimer = await connect('claimer');
});

afterAll(() => stop(gateway));

/** A gateway that drains waits for the clock. */
async function stop(one: TestGateway): Promise<void> {
  let stopped = false;
  const stopping = one.stop().finally(() => {
    stopped = true;
  });
  while (!stopped) await clock.advance(100);
  await stopping;
}

/** Everybody's tokens run out meanwhile: who goes on connects again. */
async function letPass(ms: number): Promise<void> {
  await clock.advance(ms);
  claimer = await connect('claimer');
}

let users = 0;

/** A device of a user whom nobody has met, with the means to make its keys. */
async function stranger(): Promise<{ keys: KeyMaker; client: Client; userId: string; deviceId: number }> {
  users += 1;
  const userId = `user-${users}`;
  return { keys: new KeyMaker(), client: await connect(userId), userId, deviceId: 1 };
}

function connect(userId: string, deviceId = 1): Promise<Client> {
  return gateway.connect({ userId, deviceId });
}

type Bundle = RequestData<'requestBundle'>['devices'][number];

async function claim(target: DeviceAddress, claimId: string = randomUUID(), by = claimer): Promise<Bundle> {
  const { userId, deviceId } = target;
  const { devices } = await by.call('requestBundle', { claimId, userId, deviceId });
  expect(devices).toHaveLength(1);
  return devices[0]!;
}

/** Emits as the wire lets anybody do, whatever the types say. */
function emit(client: Client, event: string, ...args: unknown[]): void {
  (client.socket.emit as (event: string, ...args: unknown[]) => void).call(client.socket, event, ...args);
}

/** Ids of the one-time prekeys that come out, until none is left. */
async function claimAll(target: DeviceAddress): Promise<number[]> {
  const claimed: number[] = [];
  for (;;) {
    const { oneTimePreKey } = await claim(target);
    if (oneTimePreKey === null) return claimed;
    claimed.push(oneTimePreKey.keyId);
  }
}

describe('uploadKeys', () => {
  it('stores a key set and says what became of each part', async () => {
    const { keys, client, ...device } = await stranger();
    const input = keys.keySet({
      pqLastResortPreKey: keys.pq(9),
      oneTimePreKeys: [keys.oneTime(4), keys.oneTime(2), keys.oneTime(3)],
      pqOneTimePreKeys: [keys.pq(7), keys.pq(8)],
    });
    expect(await client.call('uploadKeys', input)).toEqual({
      keyVersion: 1,
      oneTimePreKeys: { stored: 3, unchanged: 0, conflicts: [] },
      pqOneTimePreKeys: { stored: 2, unchanged: 0, conflicts: [] },
      availableCount: 3,
      pqAvailableCount: 2,
      countVersion: 1,
    });
    expect(await client.call('keyStatus')).toEqual({
      identityKey: input.identityKey,
      signedPreKeyId: 1,
      pqLastResortPreKeyId: 9,
      preKeyCount: 3,
      pqPreKeyCount: 2,
      keyVersion: 1,
      countVersion: 1,
      signedPreKeyExpiresAt: new Date(clock.nowMs() + ROTATION_MS).toISOString(),
    });
    expect(await claim(device)).toEqual({
      deviceId: 1,
      registrationId: 77,
      identityKey: input.identityKey,
      signedPreKey: input.signedPreKey,
      oneTimePreKey: input.oneTimePreKeys![0],
      pqPreKey: { ...input.pqOneTimePreKeys![0], lastResort: false },
    });
  });

  it('takes a key set without one-time or PQ keys, and its bundle is one without', async () => {
    const { keys, client, ...device } = await stranger();
    const input = keys.keySet();
    expect(await client.call('uploadKeys', input)).toEqual({
      keyVersion: 1,
      oneTimePreKeys: NOTHING_OFFERED,
      pqOneTimePreKeys: NOTHING_OFFERED,
      availableCount: 0,
      pqAvailableCount: 0,
      countVersion: 0,
    });
    expect(await claim(device)).toEqual({
      deviceId: 1,
      registrationId: 77,
      identityKey: input.identityKey,
      signedPreKey: input.signedPreKey,
      oneTimePreKey: null,
      oneTimePreKeyAbsent: 'noneLeft',
      pqPreKey: null,
    });
  });

  it('changes nothing when the same is uploaded again', async () => {
    const { keys, client } = await stranger();
    const input = keys.keySet({
      pqLastResortPreKey: keys.pq(9),
      oneTimePreKeys: [keys.oneTime(1), keys.oneTime(2)],
      pqOneTimePreKeys: [keys.pq(1)],
    });
    const first = await client.call('uploadKeys', input);
    const status = await client.call('keyStatus');
    expect(await client.call('uploadKeys', input)).toEqual({
      ...first,
      oneTimePreKeys: { stored: 0, unchanged: 2, conflicts: [] },
      pqOneTimePreKeys: { stored: 0, unchanged: 1, conflicts: [] },
    });
    expect(await client.call('keyStatus')).toEqual(status);
  });

  it('rotates the signed prekey where it is new, and adds the one-time prekeys', async () => {
    const { keys, client, ...device } = await stranger();
    await client.call('uploadKeys', keys.keySet({ oneTimePreKeys: [keys.oneTime(1)] }));
    await clock.advance(HOUR_MS / 2);
    const newer = keys.keySet({ signedPreKey: keys.signed(2), oneTimePreKeys: [keys.oneTime(2)] });
    expect(await client.call('uploadKeys', newer)).toMatchObject({
      keyVersion: 2,
      oneTimePreKeys: { stored: 1, unchanged: 0, conflicts: [] },
      availableCount: 2,
      countVersion: 2,
    });
    expect(await client.call('keyStatus')).toMatchObject({
      signedPreKeyId: 2,
      signedPreKeyExpiresAt: new Date(clock.nowMs() + ROTATION_MS).toISOString(),
    });
    expect(await claim(device)).toMatchObject({
      signedPreKey: newer.signedPreKey,
      oneTimePreKey: { keyId: 1 },
    });
  });

  it('raises keyVersion for another registration id, and hands that one out', async () => {
    const { keys, client, ...device } = await stranger();
    const input = keys.keySet();
    await client.call('uploadKeys', input);
    expect(await client.call('uploadKeys', { ...input, registrationId: 78 })).toMatchObject({
      keyVersion: 2,
    });
    expect(await claim(device)).toMatchObject({ registrationId: 78 });
    expect(await claimer.call('listDevices', { userId: device.userId })).toEqual({
      devices: [{ deviceId: 1, registrationId: 78 }],
    });
  });

  it('refuses another identity key, unless it is to replace everything', async () => {
    const { keys, client, ...device } = await stranger();
    await client.call(
      'uploadKeys',
      keys.keySet({
        pqLastResortPreKey: keys.pq(1),
        oneTimePreKeys: ids(1, 5).map((id) => keys.oneTime(id)),
        pqOneTimePreKeys: [keys.pq(2)],
      }),
    );
    const status = await client.call('keyStatus');
    const other = new KeyMaker();
    const replacement = other.keySet({ oneTimePreKeys: [other.oneTime(1), other.oneTime(9)] });
    expect(await client.refusal('uploadKeys', replacement)).toMatchObject({
      code: 'IDENTITY_MISMATCH',
      retryable: false,
    });
    expect(await client.refusal('uploadKeys', { ...replacement, replaceIdentity: false })).toMatchObject({
      code: 'IDENTITY_MISMATCH',
    });
    expect(await client.call('keyStatus')).toEqual(status);

    const data = await client.call('uploadKeys', { ...replacement, replaceIdentity: true });
    expect(data).toMatchObject({
      keyVersion: 2,
      // The same id under another identity starts afresh.
      oneTimePreKeys: { stored: 2, unchanged: 0, conflicts: [] },
      availableCount: 2,
      pqAvailableCount: 0,
    });
    expect(data.countVersion).toBeGreaterThan(status.countVersion);
    expect(await client.call('keyStatus')).toMatchObject({
      identityKey: other.identityKey(),
      pqLastResortPreKeyId: null,
      preKeyCount: 2,
      pqPreKeyCount: 0,
    });
    expect(await claim(device)).toMatchObject({
      identityKey: other.identityKey(),
      oneTimePreKey: replacement.oneTimePreKeys![0],
      pqPreKey: null,
    });
  });

  it('adds to the stored identity also where replaceIdentity is said', async () => {
    const { keys, client } = await stranger();
    const input = keys.keySet({ oneTimePreKeys: [keys.oneTime(1)] });
    await client.call('uploadKeys', input);
    const again = { ...input, oneTimePreKeys: [keys.oneTime(2)], replaceIdentity: true };
    expect(await client.call('uploadKeys', again)).toMatchObject({ keyVersion: 1, availableCount: 2 });
  });

  it('takes one-time PQ keys only beside a last-resort key, stored or accompanying', async () => {
    const { keys, client } = await stranger();
    const without = keys.keySet({ pqOneTimePreKeys: [keys.pq(1)] });
    expect(await client.refusal('uploadKeys', without)).toMatchObject({
      code: 'BAD_REQUEST',
      details: { issues: [{ path: ['pqOneTimePreKeys'] }] },
    });
    expect(await client.call('keyStatus')).toMatchObject({ keyVersion: 0, identityKey: null });

    await client.call('uploadKeys', { ...without, pqLastResortPreKey: keys.pq(9) });
    const more = await client.call('uploadKeys', { ...without, pqOneTimePreKeys: [keys.pq(2)] });
    expect(more).toMatchObject({ keyVersion: 1, pqAvailableCount: 2 });
    // The last-resort key of the identity that goes does not count for the one that comes.
    const other = new KeyMaker();
    const replacement = other.keySet({ pqOneTimePreKeys: [other.pq(1)], replaceIdentity: true });
    expect(await client.refusal('uploadKeys', replacement)).toMatchObject({ code: 'BAD_REQUEST' });
    expect(await client.call('keyStatus')).toMatchObject({ identityKey: keys.identityKey(), keyVersion: 1 });
  });

  it('verifies by identityKeyEd25519 where there is one, and hands it out', async () => {
    const { keys, client, ...device } = await stranger();
    const signed = keys.signed(1);
    const keySet = keys.keySet({ signedPreKey: signed });
    const input = signedByEd25519(keySet);
    // Signed by the identity key, which is not what the upload says to verify by.
    expect(await client.refusal('uploadKeys', { ...input, signedPreKey: signed })).toMatchObject({
      code: 'SIGNATURE_INVALID',
      details: { keys: [{ kind: 'signedPreKey', keyId: 1 }] },
    });
    await client.call('uploadKeys', input);
    expect(await claim(device)).toMatchObject({
      identityKeyEd25519: input.identityKeyEd25519,
      signedPreKey: input.signedPreKey,
    });
    // Without it, or with another one beside the same identity key, it is another identity.
    for (const another of [keySet, signedByEd25519(keySet)]) {
      expect(await client.refusal('uploadKeys', another)).toMatchObject({ code: 'IDENTITY_MISMATCH' });
    }
  });

  it('stores nothing of an upload of which one part is refused', async () => {
    const { keys, client } = await stranger();
    await client.call('uploadKeys', keys.keySet({ oneTimePreKeys: [keys.oneTime(1)] }));
    const status = await client.call('keyStatus');
    const refused = await client.refusal('uploadKeys', {
      ...keys.keySet({ signedPreKey: keys.signed(2), pqLastResortPreKey: keys.pq(3) }),
      oneTimePreKeys: [keys.oneTime(2)],
      pqOneTimePreKeys: [keys.pq(4), { ...keys.pq(5), signature: keys.signed(1).signature }],
    });
    expect(refused).toMatchObject({
      code: 'SIGNATURE_INVALID',
      details: { keys: [{ kind: 'pqOneTimePreKey', keyId: 5 }] },
    });
    expect(await client.call('keyStatus')).toEqual(status);
  });

  it('says poolFull for what has no room, and takes it when there is', async () => {
    const { keys, client, ...device } = await stranger();
    await client.call(
      'uploadKeys',
      keys.keySet({ oneTimePreKeys: ids(1, 100).map((id) => keys.oneTime(id)) }),
    );
    const more = ids(101, 22).map((id) => keys.oneTime(id));
    expect(await client.call('addPreKeys', { oneTimePreKeys: more })).toMatchObject({
      oneTimePreKeys: {
        stored: 20,
        unchanged: 0,
        conflicts: [
          { keyId: 121, reason: 'poolFull' },
          { keyId: 122, reason: 'poolFull' },
        ],
      },
      availableCount: 120,
    });
    await claim(device);
    expect(await client.call('addPreKeys', { oneTimePreKeys: more })).toMatchObject({
      oneTimePreKeys: { stored: 1, unchanged: 20, conflicts: [{ keyId: 122, reason: 'poolFull' }] },
      availableCount: 120,
    });
  });
});

describe('immunity', () => {
  it('immunity 1: an upload whose acknowledgement was lost is no way to hand a key out twice', async () => {
    const { keys, client, ...device } = await stranger();
    const input = keys.keySet({
      pqLastResortPreKey: keys.pq(9),
      oneTimePreKeys: [keys.oneTime(1), keys.oneTime(2)],
      pqOneTimePreKeys: [keys.pq(1), keys.pq(2)],
    });
    // The socket goes before the acknowledgement comes; whether it was stored, the device can't know.
    emit(client, 'uploadKeys', input, () => {});
    const watcher = await connect('watcher');
    await eventually(async () => (await watcher.ask('listDevices', { userId: device.userId })).ok);
    client.close();

    const first = await claim(device);
    const again = await connect(device.userId);
    expect(await again.call('uploadKeys', input)).toMatchObject({
      keyVersion: 1,
      oneTimePreKeys: { stored: 0, unchanged: 1, conflicts: [{ keyId: 1, reason: 'alreadyClaimed' }] },
      pqOneTimePreKeys: { stored: 0, unchanged: 1, conflicts: [{ keyId: 1, reason: 'alreadyClaimed' }] },
      availableCount: 1,
    });
    const second = await claim(device);
    expect([first.oneTimePreKey?.keyId, second.oneTimePreKey?.keyId]).toEqual([1, 2]);
    expect([first.pqPreKey?.keyId, second.pqPreKey?.keyId]).toEqual([1, 2]);
    expect(await claimAll(device)).toEqual([]);
  });

  it('immunity 1: an id that was handed out stays alreadyClaimed after the retention sweep', async () => {
    const { keys, client, ...device } = await stranger();
    await client.call('uploadKeys', keys.keySet({ oneTimePreKeys: ids(1, 3).map((id) => keys.oneTime(id)) }));
    const claimId = randomUUID();
    const first = await claim(device, claimId);
    await letPass(4 * DAY_MS);
    // The sweep has been there when the claim's record is gone: the same claimId is answered anew.
    await eventually(async () => {
      await clock.advance(60_000);
      expect(await claim(device, claimId)).not.toEqual(first);
    });
    const later = await connect(device.userId);
    expect(await later.call('addPreKeys', { oneTimePreKeys: [keys.oneTime(1)] })).toMatchObject({
      oneTimePreKeys: { stored: 0, unchanged: 0, conflicts: [{ keyId: 1, reason: 'alreadyClaimed' }] },
    });
    expect(await later.call('addPreKeys', { oneTimePreKeys: [first.oneTimePreKey!] })).toMatchObject({
      oneTimePreKeys: { stored: 0, unchanged: 0, conflicts: [{ keyId: 1, reason: 'alreadyClaimed' }] },
    });
    expect(await claimAll(device)).toEqual([3]);
  });

  it('immunity 2: one conflict in a hundred costs that one alone', async () => {
    const { keys, client } = await stranger();
    await client.call('uploadKeys', keys.keySet({ oneTimePreKeys: [keys.oneTime(50)] }));
    const hundred = ids(1, 100).map((id) => keys.oneTime(id));
    expect(await client.call('addPreKeys', { oneTimePreKeys: hundred })).toMatchObject({
      oneTimePreKeys: { stored: 99, unchanged: 0, conflicts: [{ keyId: 50, reason: 'idTaken' }] },
      availableCount: 100,
    });
  });

  it('immunity 3: the same key signed again is the same key', async () => {
    const { keys, client, ...device } = await stranger();
    const input = keys.keySet({
      pqLastResortPreKey: keys.pq(5),
      pqOneTimePreKeys: [keys.pq(6)],
    });
    const first = await client.call('uploadKeys', input);
    const again = {
      ...input,
      signedPreKey: keys.signedAgain(input.signedPreKey),
      pqLastResortPreKey: keys.signedAgain(input.pqLastResortPreKey!),
      pqOneTimePreKeys: input.pqOneTimePreKeys!.map((key) => keys.signedAgain(key)),
    };
    expect(again.signedPreKey.signature).not.toBe(input.signedPreKey.signature);
    expect(await client.call('uploadKeys', again)).toEqual({
      ...first,
      pqOneTimePreKeys: { stored: 0, unchanged: 1, conflicts: [] },
    });
    const rotated = await client.call('rotateSignedPreKey', {
      signedPreKey: keys.signedAgain(input.signedPreKey),
      pqLastResortPreKey: keys.signedAgain(input.pqLastResortPreKey!),
    });
    expect(rotated.keyVersion).toBe(first.keyVersion);
    // One row: its one key comes out once, then the last-resort key.
    expect((await claim(device)).pqPreKey).toMatchObject({ keyId: 6, lastResort: false });
    expect((await claim(device)).pqPreKey).toMatchObject({ keyId: 5, lastResort: true });
  });

  it('immunity 5: twenty identical uploads at once store one set, without an error', async () => {
    const { keys, client, ...device } = await stranger();
    const input = keys.keySet({
      pqLastResortPreKey: keys.pq(200),
      oneTimePreKeys: ids(1, 10).map((id) => keys.oneTime(id)),
      pqOneTimePreKeys: ids(1, 4).map((id) => keys.pq(id)),
    });
    const answers = await Promise.all(Array.from({ length: 20 }, () => client.call('uploadKeys', input)));
    expect(answers.map((answer) => answer.oneTimePreKeys.stored).sort((a, b) => b - a)).toEqual([
      10,
      ...Array.from({ length: 19 }, () => 0),
    ]);
    for (const answer of answers) {
      expect(answer).toMatchObject({
        keyVersion: 1,
        countVersion: 1,
        availableCount: 10,
        pqAvailableCount: 4,
      });
      expect(answer.oneTimePreKeys.stored + answer.oneTimePreKeys.unchanged).toBe(10);
      expect([...answer.oneTimePreKeys.conflicts, ...answer.pqOneTimePreKeys.conflicts]).toEqual([]);
    }
    expect(await claimAll(device)).toEqual(ids(1, 10));
  });

  it('immunity 5: also where they come by both doors', async () => {
    const { keys, client, ...device } = await stranger();
    const { identityKey, ...rest } = keys.keySet({ oneTimePreKeys: ids(1, 5).map((id) => keys.oneTime(id)) });
    const authorization = `Bearer ${await gateway.token(device)}`;
    const post = async () => {
      const response = await fetch(`${gateway.url}/api/keys/upload`, {
        method: 'POST',
        headers: { authorization, 'content-type': 'application/json' },
        body: JSON.stringify({ keyBundle: { ...rest, identityPubKey: identityKey } }),
      });
      return (await response.json()) as { success: boolean; keyVersion: number };
    };
    const [bySocket, byHttp] = await Promise.all([
      Promise.all(Array.from({ length: 10 }, () => client.call('uploadKeys', { identityKey, ...rest }))),
      Promise.all(Array.from({ length: 10 }, post)),
    ]);
    for (const answer of byHttp) expect(answer).toMatchObject({ success: true, keyVersion: 1 });
    for (const answer of bySocket) expect(answer).toMatchObject({ keyVersion: 1, availableCount: 5 });
    expect(await claimAll(device)).toEqual(ids(1, 5));
  });

  it('immunity 16: an upload stores under the token’s device, and no field can name another', async () => {
    const victim = await stranger();
    await victim.client.call('uploadKeys', victim.keys.keySet());
    const before = await victim.client.call('keyStatus');
    const { keys, client, userId } = await stranger();
    for (const owner of [{ userId: victim.userId }, { deviceId: 2 }, { owner: victim.userId }]) {
      const refused = await client.refusal('uploadKeys', { ...keys.keySet(), ...owner });
      expect(refused).toMatchObject({
        code: 'BAD_REQUEST',
        details: { issues: [{ path: Object.keys(owner) }] },
      });
    }
    await client.call('uploadKeys', { ...keys.keySet(), replaceIdentity: true });
    expect(await victim.client.call('keyStatus')).toEqual(before);
    expect(await client.call('listDevices', { userId })).toEqual({
      devices: [{ deviceId: 1, registrationId: 77 }],
    });
  });

  it('immunity 20: a refill that starts again at old ids overwrites nothing', async () => {
    const { keys, client, ...device } = await stranger();
    const first = [keys.oneTime(0), keys.oneTime(1), keys.oneTime(2)];
    await client.call('uploadKeys', keys.keySet({ oneTimePreKeys: first }));
    expect((await claim(device)).oneTimePreKey).toEqual(first[0]);

    const refill = [keys.oneTime(0), keys.oneTime(1), keys.oneTime(2), keys.oneTime(3)];
    expect(await client.call('addPreKeys', { oneTimePreKeys: refill })).toMatchObject({
      oneTimePreKeys: {
        stored: 1,
        unchanged: 0,
        conflicts: [
          { keyId: 0, reason: 'alreadyClaimed' },
          { keyId: 1, reason: 'idTaken' },
          { keyId: 2, reason: 'idTaken' },
        ],
      },
      availableCount: 3,
    });
    // What comes out is what was first under its id.
    expect((await claim(device)).oneTimePreKey).toEqual(first[1]);
    expect((await claim(device)).oneTimePreKey).toEqual(first[2]);
    expect((await claim(device)).oneTimePreKey).toEqual(refill[3]);
  });
});

describe('versions', () => {
  it('start at 0, rise with each change that the contract names, and outlive a reset', async () => {
    const { keys, client, ...device } = await stranger();
    const status = async () => {
      const { keyVersion, countVersion } = await client.call('keyStatus');
      return [keyVersion, countVersion];
    };
    expect(await status()).toEqual([0, 0]);
    const input = keys.keySet({ oneTimePreKeys: [keys.oneTime(1), keys.oneTime(2), keys.oneTime(3)] });
    await client.call('uploadKeys', input);
    expect(await status()).toEqual([1, 1]);
    await client.call('rotateSignedPreKey', { signedPreKey: keys.signed(2) });
    expect(await status()).toEqual([2, 1]);
    await client.call('rotateSignedPreKey', { pqLastResortPreKey: keys.pq(1) });
    expect(await status()).toEqual([3, 1]);
    await client.call('addPreKeys', { pqOneTimePreKeys: [keys.pq(2)] });
    expect(await status()).toEqual([3, 2]);
    await claim(device);
    expect(await status()).toEqual([3, 3]);
    await client.call('withdrawPreKeys', { preKeyIds: [2] });
    expect(await status()).toEqual([3, 4]);
    await client.call('resetKeys');
    const [afterReset, countAfterReset] = await status();
    expect(afterReset).toBe(4);
    expect(countAfterReset).toBeGreaterThan(4);
    const back = await client.call(
      'uploadKeys',
      keys.keySet({ signedPreKey: keys.signed(5), oneTimePreKeys: [keys.oneTime(10)] }),
    );
    expect(back.keyVersion).toBe(5);
    expect(back.countVersion).toBeGreaterThan(countAfterReset!);
  });

  it('rise both where another identity comes without one-time prekeys', async () => {
    const { keys, client } = await stranger();
    await client.call('uploadKeys', keys.keySet({ oneTimePreKeys: [keys.oneTime(1)] }));
    const other = new KeyMaker().keySet({ replaceIdentity: true });
    expect(await client.call('uploadKeys', other)).toMatchObject({
      keyVersion: 2,
      countVersion: 2,
      availableCount: 0,
    });
  });

  it('count an empty claim as no change of the pools', async () => {
    const { keys, client, ...device } = await stranger();
    await client.call('uploadKeys', keys.keySet({ oneTimePreKeys: [keys.oneTime(1)] }));
    await claim(device);
    const { countVersion } = await client.call('checkPreKeys');
    await claim(device);
    expect(await client.call('checkPreKeys')).toMatchObject({ countVersion, availableCount: 0 });
  });
});

describe('ifKeyVersion', () => {
  it('lets what it saw be changed, and refuses where the server has gone on', async () => {
    const { keys, client } = await stranger();
    const input = keys.keySet();
    await client.call('uploadKeys', { ...input, ifKeyVersion: 0 });
    await client.call('rotateSignedPreKey', { signedPreKey: keys.signed(2), ifKeyVersion: 1 });
    const status = await client.call('keyStatus');
    expect(status).toMatchObject({ keyVersion: 2, signedPreKeyId: 2 });

    const stale = { code: 'KEYS_OUT_OF_SYNC', details: { keyVersion: 2 } };
    const third = keys.signed(3);
    const requests = [
      client.refusal('uploadKeys', keys.keySet({ signedPreKey: third, ifKeyVersion: 1 })),
      client.refusal('uploadKeys', {
        ...keys.keySet(),
        signedPreKey: third,
        registrationId: 5,
        ifKeyVersion: 1,
      }),
      client.refusal('rotateSignedPreKey', { signedPreKey: third, ifKeyVersion: 1 }),
      client.refusal('rotateSignedPreKey', { pqLastResortPreKey: keys.pq(1), ifKeyVersion: 1 }),
      client.refusal('resetKeys', { ifKeyVersion: 1 }),
    ];
    for (const refused of await Promise.all(requests)) expect(refused).toMatchObject(stale);
    expect(await client.call('keyStatus')).toEqual(status);

    await client.call('uploadKeys', keys.keySet({ signedPreKey: third, ifKeyVersion: 2 }));
    expect(await client.call('resetKeys', { ifKeyVersion: 3 })).toEqual({ keyVersion: 4 });
  });

  it('keeps a late repeat from destroying newer keys', async () => {
    const { keys, client } = await stranger();
    const first = keys.keySet({ oneTimePreKeys: [keys.oneTime(1)] });
    await client.call('uploadKeys', { ...first, ifKeyVersion: 0 });
    // The device was set up anew; then the network hands in what it had held back.
    const other = new KeyMaker();
    await client.call('uploadKeys', { ...other.keySet(), replaceIdentity: true, ifKeyVersion: 1 });
    const late = { ...first, replaceIdentity: true, ifKeyVersion: 0 };
    expect(await client.refusal('uploadKeys', late)).toMatchObject({ code: 'KEYS_OUT_OF_SYNC' });
    expect(await client.refusal('uploadKeys', { ...first, ifKeyVersion: 0 })).toMatchObject({
      code: 'KEYS_OUT_OF_SYNC',
    });
    expect(await client.refusal('resetKeys', { ifKeyVersion: 1 })).toMatchObject({
      code: 'KEYS_OUT_OF_SYNC',
    });
    expect(await client.call('keyStatus')).toMatchObject({
      identityKey: other.identityKey(),
      keyVersion: 2,
    });
  });

  it('is looked at before ids that were retired, and lets a view pass that is newer than the server’s', async () => {
    const { keys, client } = await stranger();
    const first = keys.keySet({ pqLastResortPreKey: keys.pq(1) });
    await client.call('uploadKeys', first);
    await client.call('rotateSignedPreKey', { signedPreKey: keys.signed(2), pqLastResortPreKey: keys.pq(2) });
    const { signedPreKey } = first;
    for (const late of [
      await client.refusal('uploadKeys', { ...first, ifKeyVersion: 0 }),
      await client.refusal('rotateSignedPreKey', { signedPreKey, ifKeyVersion: 1 }),
    ]) {
      expect(late).toMatchObject({ code: 'KEYS_OUT_OF_SYNC', details: { keyVersion: 2 } });
    }
    const newer = { signedPreKey: keys.signed(3), ifKeyVersion: 9 };
    expect(await client.call('rotateSignedPreKey', newer)).toMatchObject({ keyVersion: 3 });
  });

  it('lets what is asked for already stand', async () => {
    const { keys, client } = await stranger();
    const first = keys.keySet({ pqLastResortPreKey: keys.pq(1), oneTimePreKeys: [keys.oneTime(1)] });
    await client.call('uploadKeys', { ...first, ifKeyVersion: 0 });
    // The acknowledgement was lost, and the upload is repeated as it was.
    expect(await client.call('uploadKeys', { ...first, ifKeyVersion: 0 })).toMatchObject({
      keyVersion: 1,
      oneTimePreKeys: { stored: 0, unchanged: 1, conflicts: [] },
    });
    const rotation = { signedPreKey: keys.signed(2), pqLastResortPreKey: keys.pq(2), ifKeyVersion: 1 };
    const rotated = await client.call('rotateSignedPreKey', rotation);
    expect(rotated.keyVersion).toBe(2);
    expect(await client.call('rotateSignedPreKey', rotation)).toEqual(rotated);
    expect(await client.call('resetKeys', { ifKeyVersion: 2 })).toEqual({ keyVersion: 3 });
    expect(await client.call('resetKeys', { ifKeyVersion: 2 })).toEqual({ keyVersion: 3 });
  });
});

describe('PREKEY_CONFLICT', () => {
  it('is the answer to another key under the active id, of either kind and by either request', async () => {
    const { keys, client } = await stranger();
    await client.call('uploadKeys', keys.keySet({ pqLastResortPreKey: keys.pq(1) }));
    const status = await client.call('keyStatus');
    const refusals = await Promise.all([
      client.refusal('uploadKeys', keys.keySet({ signedPreKey: keys.signed(1) })),
      client.refusal(
        'uploadKeys',
        keys.keySet({ signedPreKey: keys.signed(2), pqLastResortPreKey: keys.pq(1) }),
      ),
      client.refusal('rotateSignedPreKey', { signedPreKey: keys.signed(1) }),
      client.refusal('rotateSignedPreKey', { pqLastResortPreKey: keys.pq(1) }),
      client.refusal('rotateSignedPreKey', { signedPreKey: keys.signed(2), pqLastResortPreKey: keys.pq(1) }),
    ]);
    for (const refused of refusals) {
      expect(refused).toMatchObject({ code: 'PREKEY_CONFLICT', retryable: false });
    }
    expect(await client.call('keyStatus')).toEqual(status);
  });

  it('is the answer to a last-resort prekey that shares all but its first bytes with the active one', async () => {
    const { keys, client } = await stranger();
    const pqLastResortPreKey = keys.pq(1);
    await client.call('uploadKeys', keys.keySet({ pqLastResortPreKey }));
    const bytes = Buffer.from(pqLastResortPreKey.publicKey, 'base64');
    Buffer.from(keys.pq(1).publicKey, 'base64').copy(bytes, 1, 1, 384);
    const alike = keys.signedAgain({ keyId: 1, publicKey: bytes.toString('base64') });
    expect(await client.refusal('rotateSignedPreKey', { pqLastResortPreKey: alike })).toMatchObject({
      code: 'PREKEY_CONFLICT',
    });
  });

  it('is the answer to an id that was retired, also with its own key', async () => {
    const { keys, client } = await stranger();
    const input = keys.keySet({ pqLastResortPreKey: keys.pq(1) });
    await client.call('uploadKeys', input);
    await client.call('rotateSignedPreKey', { signedPreKey: keys.signed(2), pqLastResortPreKey: keys.pq(2) });
    const refusals = async () => [
      await client.refusal('uploadKeys', input),
      await client.refusal('rotateSignedPreKey', { signedPreKey: input.signedPreKey }),
      await client.refusal('rotateSignedPreKey', { signedPreKey: keys.signed(1) }),
      await client.refusal('rotateSignedPreKey', { pqLastResortPreKey: input.pqLastResortPreKey! }),
    ];
    for (const refused of await refusals()) expect(refused.code).toBe('PREKEY_CONFLICT');
    // Retired stays retired over a reset.
    await client.call('resetKeys');
    expect(await client.refusal('uploadKeys', input)).toMatchObject({ code: 'PREKEY_CONFLICT' });
    expect(await client.call('keyStatus')).toMatchObject({ identityKey: null, keyVersion: 3 });
  });

  it('spares the prekey that was active at a reset, as itself only', async () => {
    const { keys, client } = await stranger();
    const input = keys.keySet({ pqLastResortPreKey: keys.pq(1) });
    await client.call('uploadKeys', input);
    await client.call('resetKeys');
    expect(await client.refusal('uploadKeys', { ...input, signedPreKey: keys.signed(1) })).toMatchObject({
      code: 'PREKEY_CONFLICT',
    });
    expect(await client.refusal('uploadKeys', { ...input, pqLastResortPreKey: keys.pq(1) })).toMatchObject({
      code: 'PREKEY_CONFLICT',
    });
    expect(await client.call('uploadKeys', input)).toMatchObject({ keyVersion: 3 });
  });

  it('leaves the key set that was to be replaced as it was', async () => {
    const { keys, client, ...device } = await stranger();
    await client.call('uploadKeys', keys.keySet());
    const other = new KeyMaker();
    const replacement = other.keySet({ oneTimePreKeys: [other.oneTime(1)], replaceIdentity: true });
    await client.call('uploadKeys', replacement);
    const status = await client.call('keyStatus');
    // Back to the first identity, with another key under the id that it had: everything stays.
    const back = keys.keySet({ signedPreKey: keys.signed(1), replaceIdentity: true });
    expect(await client.refusal('uploadKeys', back)).toMatchObject({ code: 'PREKEY_CONFLICT' });
    expect(await client.call('keyStatus')).toEqual(status);
    expect(await claim(device)).toMatchObject({
      identityKey: other.identityKey(),
      oneTimePreKey: replacement.oneTimePreKeys![0],
    });
  });

  it('does not reach over to another identity, whose ids start afresh', async () => {
    const { keys, client } = await stranger();
    await client.call('uploadKeys', keys.keySet({ pqLastResortPreKey: keys.pq(1) }));
    const other = new KeyMaker();
    const replacement = other.keySet({ pqLastResortPreKey: other.pq(1), replaceIdentity: true });
    expect(await client.call('uploadKeys', replacement)).toMatchObject({ keyVersion: 2 });
  });
});

describe('one-time prekey ids', () => {
  it('of an old identity are found used when it comes back', async () => {
    const { keys, client, ...device } = await stranger();
    const input = keys.keySet({
      pqLastResortPreKey: keys.pq(50),
      oneTimePreKeys: ids(1, 4).map((id) => keys.oneTime(id)),
      pqOneTimePreKeys: [keys.pq(1), keys.pq(2)],
    });
    await client.call('uploadKeys', input);
    await claim(device);
    await client.call('withdrawPreKeys', { preKeyIds: [3] });
    const other = new KeyMaker();
    const between = other.keySet({
      oneTimePreKeys: ids(1, 4).map((id) => other.oneTime(id)),
      replaceIdentity: true,
    });
    expect(await client.call('uploadKeys', between)).toMatchObject({
      oneTimePreKeys: { stored: 4, unchanged: 0, conflicts: [] },
    });
    expect((await claim(device)).oneTimePreKey).toEqual(between.oneTimePreKeys![0]);

    expect(await client.call('uploadKeys', { ...input, replaceIdentity: true })).toMatchObject({
      keyVersion: 3,
      oneTimePreKeys: {
        stored: 2,
        unchanged: 0,
        conflicts: [
          { keyId: 1, reason: 'alreadyClaimed' },
          { keyId: 3, reason: 'alreadyClaimed' },
        ],
      },
      pqOneTimePreKeys: { stored: 1, unchanged: 0, conflicts: [{ keyId: 1, reason: 'alreadyClaimed' }] },
    });
    expect(await claimAll(device)).toEqual([2, 4]);
    // And the one in between finds its own.
    const third = await client.call('uploadKeys', between);
    expect(third.oneTimePreKeys.conflicts).toEqual([{ keyId: 1, reason: 'alreadyClaimed' }]);
  });

  it('of a reset key set stay used', async () => {
    const { keys, client, ...device } = await stranger();
    const input = keys.keySet({ oneTimePreKeys: [keys.oneTime(1), keys.oneTime(2)] });
    await client.call('uploadKeys', input);
    await claim(device);
    await client.call('resetKeys');
    expect(await client.call('uploadKeys', input)).toMatchObject({
      oneTimePreKeys: { stored: 1, unchanged: 0, conflicts: [{ keyId: 1, reason: 'alreadyClaimed' }] },
    });
  });

  it('of the elliptic-curve and of the PQ kind are apart', async () => {
    const { keys, client } = await stranger();
    expect(
      await client.call(
        'uploadKeys',
        keys.keySet({
          signedPreKey: keys.signed(1),
          pqLastResortPreKey: keys.pq(1),
          oneTimePreKeys: [keys.oneTime(1)],
          pqOneTimePreKeys: [keys.pq(1)],
        }),
      ),
    ).toMatchObject({ availableCount: 1, pqAvailableCount: 1 });
  });

  it('may be the least and the greatest', async () => {
    const { keys, client, ...device } = await stranger();
    const edges = [keys.oneTime(2 ** 32 - 1), keys.oneTime(0)];
    await client.call(
      'uploadKeys',
      keys.keySet({ signedPreKey: keys.signed(2 ** 32 - 1), oneTimePreKeys: edges }),
    );
    expect(await claim(device)).toMatchObject({
      oneTimePreKey: edges[0],
      signedPreKey: { keyId: 2 ** 32 - 1 },
    });
    expect(await claim(device)).toMatchObject({ oneTimePreKey: edges[1] });
    const { preKeyIdsToDelete } = await client.call('validateKeys', {
      localIdentityKey: keys.identityKey(),
      localSignedPreKeyId: 2 ** 32 - 1,
      localPreKeyIds: [0, 2 ** 32 - 1],
    });
    expect(preKeyIdsToDelete).toEqual([0, 2 ** 32 - 1]);
  });
});

describe('addPreKeys', () => {
  it('answers as uploadKeys does, and hands the keys out after the older ones', async () => {
    const { keys, client, ...device } = await stranger();
    await client.call(
      'uploadKeys',
      keys.keySet({ pqLastResortPreKey: keys.pq(9), oneTimePreKeys: [keys.oneTime(20), keys.oneTime(10)] }),
    );
    const added = await client.call('addPreKeys', {
      oneTimePreKeys: [keys.oneTime(7), keys.oneTime(5), keys.oneTime(6)],
      pqOneTimePreKeys: [keys.pq(1)],
    });
    expect(added).toEqual({
      keyVersion: 1,
      oneTimePreKeys: { stored: 3, unchanged: 0, conflicts: [] },
      pqOneTimePreKeys: { stored: 1, unchanged: 0, conflicts: [] },
      availableCount: 5,
      pqAvailableCount: 1,
      countVersion: 2,
    });
    expect(await claimAll(device)).toEqual([20, 10, 7, 5, 6]);
  });

  it('refuses one-time PQ keys where no last-resort key is stored', async () => {
    const { keys, client } = await stranger();
    await client.call('uploadKeys', keys.keySet());
    expect(await client.refusal('addPreKeys', { pqOneTimePreKeys: [keys.pq(1)] })).toMatchObject({
      code: 'BAD_REQUEST',
      details: { issues: [{ path: ['pqOneTimePreKeys'] }] },
    });
    await client.call('rotateSignedPreKey', { pqLastResortPreKey: keys.pq(2) });
    expect(await client.call('addPreKeys', { pqOneTimePreKeys: [keys.pq(1)] })).toMatchObject({
      pqAvailableCount: 1,
    });
  });

  it('needs a key set, and no list', async () => {
    const { keys, client } = await stranger();
    const more = { oneTimePreKeys: [keys.oneTime(2)] };
    for (const input of [more, {}]) {
      expect(await client.refusal('addPreKeys', input)).toMatchObject({ code: 'KEYS_NOT_UPLOADED' });
    }
    const { countVersion } = await client.call('uploadKeys', keys.keySet());
    expect(await client.call('addPreKeys', {})).toMatchObject({ availableCount: 0, countVersion });
    expect(await client.call('addPreKeys', more)).toMatchObject({ availableCount: 1 });
    await client.call('resetKeys');
    expect(await client.refusal('addPreKeys', more)).toMatchObject({ code: 'KEYS_NOT_UPLOADED' });
  });

  it('verifies each of as many PQ keys as a request may hold', async () => {
    const { keys, client } = await stranger();
    await client.call('uploadKeys', keys.keySet({ pqLastResortPreKey: keys.pq(1) }));
    const bad = { ...keys.pq(1), signature: keys.pq(2).signature };
    const pqOneTimePreKeys = ids(1, 100).map((keyId) => ({ ...bad, keyId }));
    expect(await client.refusal('addPreKeys', { pqOneTimePreKeys })).toMatchObject({
      code: 'SIGNATURE_INVALID',
      details: { keys: ids(1, 100).map((keyId) => ({ kind: 'pqOneTimePreKey', keyId })) },
    });
    expect(await client.call('keyStatus')).toMatchObject({ pqPreKeyCount: 0 });
  });

  it('names every PQ key whose signature fails, and stores none of the request', async () => {
    const { keys, client } = await stranger();
    await client.call('uploadKeys', keys.keySet({ pqLastResortPreKey: keys.pq(1) }));
    const [good, bad, worse] = [keys.pq(2), keys.pq(3), keys.pq(4)];
    const refused = await client.refusal('addPreKeys', {
      oneTimePreKeys: [keys.oneTime(1)],
      pqOneTimePreKeys: [
        { ...bad!, signature: good!.signature },
        good!,
        { ...worse!, signature: good!.signature },
      ],
    });
    expect(refused).toMatchObject({
      code: 'SIGNATURE_INVALID',
      details: {
        keys: [
          { kind: 'pqOneTimePreKey', keyId: 3 },
          { kind: 'pqOneTimePreKey', keyId: 4 },
        ],
      },
    });
    expect(await client.call('keyStatus')).toMatchObject({
      preKeyCount: 0,
      pqPreKeyCount: 0,
      countVersion: 0,
    });
  });
});

describe('withdrawPreKeys', () => {
  it('takes ids out of both pools for good', async () => {
    const { keys, client, ...device } = await stranger();
    const input = keys.keySet({
      pqLastResortPreKey: keys.pq(9),
      oneTimePreKeys: ids(1, 4).map((id) => keys.oneTime(id)),
      pqOneTimePreKeys: [keys.pq(1), keys.pq(2)],
    });
    await client.call('uploadKeys', input);
    expect(await client.call('withdrawPreKeys', { preKeyIds: [1, 3, 77], pqPreKeyIds: [2] })).toEqual({
      withdrawnCount: 3,
      availableCount: 2,
      pqAvailableCount: 1,
      countVersion: 2,
    });
    expect(await client.call('withdrawPreKeys', { preKeyIds: [1, 3], pqPreKeyIds: [2] })).toEqual({
      withdrawnCount: 0,
      availableCount: 2,
      pqAvailableCount: 1,
      countVersion: 2,
    });
    // 77 was never there, and is not to come.
    const again = await client.call('addPreKeys', {
      oneTimePreKeys: [...input.oneTimePreKeys!, keys.oneTime(77)],
      pqOneTimePreKeys: input.pqOneTimePreKeys!,
    });
    expect(again).toMatchObject({
      oneTimePreKeys: {
        stored: 0,
        unchanged: 2,
        conflicts: [1, 3, 77].map((keyId) => ({ keyId, reason: 'alreadyClaimed' })),
      },
      pqOneTimePreKeys: { stored: 0, unchanged: 1, conflicts: [{ keyId: 2, reason: 'alreadyClaimed' }] },
    });
    expect(await claimAll(device)).toEqual([2, 4]);
  });

  it('leaves what was handed out as it was', async () => {
    const { keys, client, ...device } = await stranger();
    await client.call('uploadKeys', keys.keySet({ oneTimePreKeys: [keys.oneTime(1), keys.oneTime(2)] }));
    const claimId = randomUUID();
    const first = await claim(device, claimId);
    expect(await client.call('withdrawPreKeys', { preKeyIds: [1] })).toMatchObject({
      withdrawnCount: 0,
      availableCount: 1,
    });
    expect(await claim(device, claimId)).toEqual(first);
  });

  it('takes ids that were never there only up to a bound, and says which list goes beyond it', async () => {
    const { keys, client } = await stranger();
    await client.call('uploadKeys', keys.keySet({ oneTimePreKeys: [keys.oneTime(1)] }));
    const sparse = (round: number) => ids(0, 1000).map((i) => 2 * (1000 * round + i) + 3);
    for (const round of ids(0, 10)) {
      expect(await client.call('withdrawPreKeys', { pqPreKeyIds: sparse(round) })).toMatchObject({
        withdrawnCount: 0,
      });
    }
    const tooMany = { preKeyIds: [1], pqPreKeyIds: [...sparse(0).slice(1), 2 ** 32 - 1] };
    expect(await client.refusal('withdrawPreKeys', tooMany)).toMatchObject({
      code: 'BAD_REQUEST',
      details: { issues: [{ path: ['pqPreKeyIds'] }] },
    });
    expect(await client.call('withdrawPreKeys', { preKeyIds: [1], pqPreKeyIds: sparse(9) })).toMatchObject({
      withdrawnCount: 1,
    });
  });

  it('does nothing for a device without keys, nor without a list', async () => {
    const { keys, client } = await stranger();
    expect(await client.call('withdrawPreKeys', { preKeyIds: [1] })).toEqual({
      withdrawnCount: 0,
      availableCount: 0,
      pqAvailableCount: 0,
      countVersion: 0,
    });
    const { countVersion } = await client.call(
      'uploadKeys',
      keys.keySet({ oneTimePreKeys: [keys.oneTime(1)] }),
    );
    for (const input of [{}, { preKeyIds: [] }]) {
      expect(await client.call('withdrawPreKeys', input)).toEqual({
        withdrawnCount: 0,
        availableCount: 1,
        pqAvailableCount: 0,
        countVersion,
      });
    }
  });
});

describe('preKeysLow', () => {
  const oneTime = (keys: KeyMaker, from: number, count: number) =>
    ids(from, count).map((id) => keys.oneTime(id));

  it('comes once when a pool falls below the threshold by withdrawal, and once when it is empty', async () => {
    const { keys, client } = await stranger();
    await client.call('uploadKeys', keys.keySet({ oneTimePreKeys: oneTime(keys, 1, 12) }));
    await client.call('withdrawPreKeys', { preKeyIds: [1, 2] });
    const below = await client.call('withdrawPreKeys', { preKeyIds: [3] });
    expect(await client.next('preKeysLow')).toEqual({
      availableCount: 9,
      pqAvailableCount: 0,
      threshold: 10,
      countVersion: below.countVersion,
    });
    await client.call('withdrawPreKeys', { preKeyIds: [4] });
    await client.call('withdrawPreKeys', { preKeyIds: ids(5, 8) });
    expect(await client.next('preKeysLow')).toMatchObject({ availableCount: 0 });
    await client.call('withdrawPreKeys', { preKeyIds: ids(1, 12) });
    await client.call('addPreKeys', { oneTimePreKeys: oneTime(keys, 20, 10) });
    await client.call('withdrawPreKeys', { preKeyIds: [20] });
    expect(await client.next('preKeysLow')).toMatchObject({ availableCount: 9 });
    expect(client.waiting('preKeysLow')).toBe(0);
  });

  it('comes for the PQ pool too where its keys were all withdrawn, and the device lacks them', async () => {
    const { keys, client } = await stranger();
    await client.call('uploadKeys', {
      ...keys.keySet({ oneTimePreKeys: oneTime(keys, 1, 12), pqLastResortPreKey: keys.pq(1) }),
      pqOneTimePreKeys: ids(2, 12).map((id) => keys.pq(id)),
    });
    await client.call('withdrawPreKeys', { pqPreKeyIds: [2, 3, 4] });
    expect(await client.next('preKeysLow')).toMatchObject({ availableCount: 12, pqAvailableCount: 9 });
    const { countVersion } = await client.call('withdrawPreKeys', { pqPreKeyIds: ids(5, 9) });
    expect(await client.next('preKeysLow')).toMatchObject({ pqAvailableCount: 0, countVersion });
    expect(await client.call('checkPreKeys')).toMatchObject({ needsMorePreKeys: true, pqAvailableCount: 0 });
    // Another identity has never offered any.
    const next = new KeyMaker();
    await client.call('uploadKeys', {
      ...next.keySet({ oneTimePreKeys: oneTime(next, 1, 12) }),
      replaceIdentity: true,
    });
    expect(await client.call('checkPreKeys')).toMatchObject({ needsMorePreKeys: false });
  });

  it('comes when another identity’s pool is the smaller one', async () => {
    const { keys, client } = await stranger();
    await client.call('uploadKeys', keys.keySet({ oneTimePreKeys: oneTime(keys, 1, 12) }));
    const next = new KeyMaker();
    const replaced = await client.call('uploadKeys', {
      ...next.keySet({ oneTimePreKeys: oneTime(next, 1, 4) }),
      replaceIdentity: true,
    });
    const { countVersion } = replaced;
    expect(await client.next('preKeysLow')).toMatchObject({ availableCount: 4, countVersion });
  });

  it('comes when a server that was rolled back takes its pools away', async () => {
    const { keys, client } = await stranger();
    await client.call('uploadKeys', keys.keySet({ oneTimePreKeys: oneTime(keys, 1, 12) }));
    const { countVersion } = await client.call('validateKeys', {
      localIdentityKey: keys.identityKey(),
      localSignedPreKeyId: 1,
      lastCountVersion: 40,
    });
    expect(await client.next('preKeysLow')).toMatchObject({ availableCount: 0, countVersion });
  });
});

describe('rotateSignedPreKey', () => {
  it('makes the offered prekeys the ones that bundles carry', async () => {
    const { keys, client, ...device } = await stranger();
    await client.call('uploadKeys', keys.keySet({ pqLastResortPreKey: keys.pq(1) }));
    await clock.advance(1_000);
    const signedPreKey = keys.signed(2);
    const expiresAt = new Date(clock.nowMs() + ROTATION_MS).toISOString();
    expect(await client.call('rotateSignedPreKey', { signedPreKey })).toEqual({
      keyVersion: 2,
      signedPreKeyExpiresAt: expiresAt,
    });
    await clock.advance(1_000);
    const pqLastResortPreKey = keys.pq(2);
    expect(await client.call('rotateSignedPreKey', { pqLastResortPreKey })).toEqual({
      keyVersion: 3,
      signedPreKeyExpiresAt: expiresAt,
    });
    expect(await claim(device)).toMatchObject({
      signedPreKey,
      pqPreKey: { ...pqLastResortPreKey, lastResort: true },
    });
    // Both at once are one change.
    expect(
      await client.call('rotateSignedPreKey', {
        signedPreKey: keys.signed(3),
        pqLastResortPreKey: keys.pq(3),
      }),
    ).toMatchObject({ keyVersion: 4 });
  });

  it('keeps what was answered before under a claimId', async () => {
    const { keys, client, ...device } = await stranger();
    await client.call('uploadKeys', keys.keySet({ pqLastResortPreKey: keys.pq(1) }));
    const claimId = randomUUID();
    const before = await claim(device, claimId);
    await client.call('rotateSignedPreKey', { signedPreKey: keys.signed(2), pqLastResortPreKey: keys.pq(2) });
    expect(await claim(device, claimId)).toEqual(before);
    expect((await claim(device)).signedPreKey.keyId).toBe(2);
  });

  it('needs a key set, one key at least, and signatures by the stored identity', async () => {
    const { keys, client } = await stranger();
    const signedPreKey = keys.signed(2);
    expect(await client.refusal('rotateSignedPreKey', { signedPreKey })).toMatchObject({
      code: 'KEYS_NOT_UPLOADED',
    });
    await client.call('uploadKeys', keys.keySet());
    for (const input of [{}, { ifKeyVersion: 1 }]) {
      expect(await client.refusal('rotateSignedPreKey', input)).toMatchObject({ code: 'BAD_REQUEST' });
    }
    const other = new KeyMaker();
    const foreign = { signedPreKey: other.signed(3), pqLastResortPreKey: other.pq(4) };
    expect(await client.refusal('rotateSignedPreKey', foreign)).toMatchObject({
      code: 'SIGNATURE_INVALID',
      details: {
        keys: [
          { kind: 'signedPreKey', keyId: 3 },
          { kind: 'pqLastResortPreKey', keyId: 4 },
        ],
      },
    });
    expect(await client.call('rotateSignedPreKey', { signedPreKey })).toMatchObject({ keyVersion: 2 });
  });
});

describe('resetKeys', () => {
  it('takes all of the device’s keys, and doing it twice is one reset', async () => {
    const { keys, client, ...device } = await stranger();
    await client.call(
      'uploadKeys',
      keys.keySet({
        pqLastResortPreKey: keys.pq(9),
        oneTimePreKeys: [keys.oneTime(1), keys.oneTime(2)],
        pqOneTimePreKeys: [keys.pq(1)],
      }),
    );
    await claim(device);
    expect(await client.call('resetKeys', { reason: 'the phone fell into the sea 🌊' })).toEqual({
      keyVersion: 2,
    });
    expect(await client.call('resetKeys')).toEqual({ keyVersion: 2 });
    const { countVersion, ...status } = await client.call('keyStatus');
    expect(countVersion).toBeGreaterThan(2);
    expect(status).toEqual({
      identityKey: null,
      signedPreKeyId: null,
      pqLastResortPreKeyId: null,
      preKeyCount: 0,
      pqPreKeyCount: 0,
      keyVersion: 2,
      signedPreKeyExpiresAt: null,
    });
    expect(await client.call('keyStats')).toMatchObject({
      totalPreKeys: 0,
      availablePreKeys: 0,
      consumedPreKeys: 0,
    });
    expect(
      await claimer.refusal('requestBundle', { claimId: randomUUID(), userId: device.userId }),
    ).toMatchObject({ code: 'USER_NOT_FOUND' });
  });

  it('leaves the user’s other devices alone', async () => {
    const { keys, client, userId } = await stranger();
    await client.call('uploadKeys', keys.keySet());
    const second = await connect(userId, 2);
    await second.call('uploadKeys', new KeyMaker().keySet());
    await client.call('resetKeys');
    expect(await claimer.call('listDevices', { userId })).toEqual({
      devices: [{ deviceId: 2, registrationId: 77 }],
    });
  });
});

describe('a signed prekey that stands', () => {
  it('keeps its time, whatever is uploaded or rotated beside it', async () => {
    const { keys, client } = await stranger();
    const input = keys.keySet({ pqLastResortPreKey: keys.pq(1) });
    await client.call('uploadKeys', input);
    const { signedPreKeyExpiresAt } = await client.call('keyStatus');
    await clock.advance(60_000);
    await client.call('uploadKeys', { ...input, oneTimePreKeys: [keys.oneTime(1)] });
    expect(await client.call('keyStatus')).toMatchObject({ signedPreKeyExpiresAt });
    const rotated = await client.call('rotateSignedPreKey', { pqLastResortPreKey: keys.pq(2) });
    expect(rotated).toMatchObject({ keyVersion: 2, signedPreKeyExpiresAt });
    const expiresAt = new Date(clock.nowMs() + ROTATION_MS).toISOString();
    expect(await client.call('rotateSignedPreKey', { signedPreKey: keys.signed(2) })).toMatchObject({
      signedPreKeyExpiresAt: expiresAt,
    });
  });

  it('is of an identity that is given back as it came first, and a validation from before opens the gate', async () => {
    const { keys, client } = await stranger();
    const input = keys.keySet();
    await client.call('uploadKeys', input);
    const local = { localIdentityKey: keys.identityKey(), localSignedPreKeyId: 1 };
    const { validation } = await client.call('validateKeys', local);
    await client.call('uploadKeys', { ...input, identityKey: keys.identityKey('raw') });
    expect(await client.call('keyStatus')).toMatchObject({
      identityKey: keys.identityKey(),
      keyVersion: 1,
    });
    expect(await client.call('clientReady', { validation: validation! })).toMatchObject({ keyVersion: 1 });
  });
});

describe('keyStats and checkPreKeys', () => {
  it('tell when the keys were changed last, by whatever request', async () => {
    const { keys, client } = await stranger();
    const changes = [
      () => client.call('uploadKeys', keys.keySet({ oneTimePreKeys: [keys.oneTime(1)] })),
      () => client.call('addPreKeys', { oneTimePreKeys: [keys.oneTime(2)] }),
      () => client.call('withdrawPreKeys', { preKeyIds: [1] }),
      () => client.call('rotateSignedPreKey', { signedPreKey: keys.signed(2) }),
      () => client.call('resetKeys'),
    ];
    for (const change of changes) {
      await clock.advance(1_000);
      await change();
      const lastUpdated = new Date(clock.nowMs()).toISOString();
      expect(await client.call('keyStats')).toMatchObject({ lastUpdated });
    }
  });

  it('ask for no PQ keys of a device whose next key set offers none, and count what is of it alone', async () => {
    const { keys, client, ...device } = await stranger();
    const oneTimePreKeys = ids(1, 20).map((id) => keys.oneTime(id));
    await client.call(
      'uploadKeys',
      keys.keySet({ pqLastResortPreKey: keys.pq(99), oneTimePreKeys, pqOneTimePreKeys: [keys.pq(1)] }),
    );
    expect(await client.call('checkPreKeys')).toMatchObject({ needsMorePreKeys: true });
    await client.call('resetKeys');
    await client.call('uploadKeys', keys.keySet({ signedPreKey: keys.signed(2), oneTimePreKeys }));
    expect(await client.call('checkPreKeys')).toMatchObject({ needsMorePreKeys: false });
    const lastResort = { pqLastResortPreKey: keys.pq(98), pqOneTimePreKeys: [keys.pq(2)] };
    await client.call('uploadKeys', keys.keySet({ signedPreKey: keys.signed(3), ...lastResort }));
    await claim(device);
    const other = new KeyMaker();
    await client.call(
      'uploadKeys',
      other.keySet({ replaceIdentity: true, oneTimePreKeys: ids(1, 20).map((id) => other.oneTime(id)) }),
    );
    expect(await client.call('checkPreKeys')).toMatchObject({ needsMorePreKeys: false });
    expect(await client.call('keyStats')).toMatchObject({ totalPreKeys: 20, consumedPreKeys: 0 });
  });

  it('count what is there and what was handed out', async () => {
    const { keys, client, ...device } = await stranger();
    await client.call(
      'uploadKeys',
      keys.keySet({ oneTimePreKeys: ids(1, 12).map((id) => keys.oneTime(id)) }),
    );
    await claim(device);
    await claim(device);
    const stats = await client.call('keyStats');
    expect(stats).toEqual({
      totalPreKeys: 12,
      availablePreKeys: 10,
      consumedPreKeys: 2,
      lastUpdated: expect.stringMatching(ISO),
    });
    expect(await client.call('checkPreKeys')).toEqual({
      needsMorePreKeys: false,
      availableCount: 10,
      pqAvailableCount: 0,
      threshold: 10,
      countVersion: 3,
    });
    await claim(device);
    expect(await client.call('checkPreKeys')).toMatchObject({ needsMorePreKeys: true, availableCount: 9 });
  });

  it('ask for PQ keys only of a device that offers them', async () => {
    const { keys, client, ...device } = await stranger();
    await client.call(
      'uploadKeys',
      keys.keySet({
        pqLastResortPreKey: keys.pq(99),
        oneTimePreKeys: ids(1, 20).map((id) => keys.oneTime(id)),
      }),
    );
    expect(await client.call('checkPreKeys')).toMatchObject({
      needsMorePreKeys: false,
      pqAvailableCount: 0,
    });
    await client.call('addPreKeys', { pqOneTimePreKeys: ids(1, 10).map((id) => keys.pq(id)) });
    expect(await client.call('checkPreKeys')).toMatchObject({ needsMorePreKeys: false });
    await claim(device);
    expect(await client.call('checkPreKeys')).toMatchObject({ needsMorePreKeys: true, pqAvailableCount: 9 });
  });
});

describe('validateKeys', () => {
  it('gives a validation where both sides agree, and the encoding of a key does not matter', async () => {
    const { keys, client } = await stranger();
    const input = keys.keySet({
      pqLastResortPreKey: keys.pq(9),
      oneTimePreKeys: [keys.oneTime(1), keys.oneTime(2)],
      pqOneTimePreKeys: [keys.pq(3)],
    });
    await client.call('uploadKeys', input);
    const valid = {
      keysValid: true,
      missingKeys: [],
      preKeyIdsToDelete: [],
      preKeyIdsToUpload: [],
      preKeyIdsNotHeld: [],
      pqPreKeyIdsToDelete: [],
      pqPreKeyIdsToUpload: [],
      pqPreKeyIdsNotHeld: [],
      rotationDue: false,
      keyVersion: 1,
      countVersion: 1,
      validation: expect.any(String),
    };
    const local = {
      localIdentityKey: keys.identityKey(),
      localSignedPreKeyId: 1,
      localSignedPreKeyPublicKey: input.signedPreKey.publicKey,
      localRegistrationId: 77,
      localPqLastResortPreKeyId: 9,
      localPreKeyIds: [2, 1],
      localPqPreKeyIds: [3],
      lastKeyVersion: 1,
      lastCountVersion: 1,
    };
    expect(await client.call('validateKeys', local)).toEqual(valid);
    const raw = Buffer.from(input.signedPreKey.publicKey, 'base64').subarray(1).toString('base64');
    expect(
      await client.call('validateKeys', {
        ...local,
        localIdentityKey: keys.identityKey('raw'),
        localSignedPreKeyPublicKey: raw,
      }),
    ).toEqual(valid);
    // What the client does not say is not compared.
    const { localIdentityKey, localSignedPreKeyId } = local;
    expect(await client.call('validateKeys', { localIdentityKey, localSignedPreKeyId })).toEqual(valid);
  });

  it('lists every fault at once', async () => {
    const { keys, client } = await stranger();
    await client.call('uploadKeys', keys.keySet({ pqLastResortPreKey: keys.pq(9) }));
    const { reason, validation, ...data } = await client.call('validateKeys', {
      localIdentityKey: new KeyMaker().identityKey(),
      localSignedPreKeyId: 2,
      localPqLastResortPreKeyId: 8,
      lastKeyVersion: 5,
    });
    expect(data).toMatchObject({
      keysValid: false,
      missingKeys: ['identity', 'signedPreKey', 'pqLastResortPreKey', 'rolledBack'],
    });
    expect(reason).toMatch(/identity.*signed prekey.*last-resort.*backup/);
    expect(validation).toBeUndefined();
  });

  it('names the fault that there is, and that one only', async () => {
    const { keys, client } = await stranger();
    await client.call('uploadKeys', keys.keySet({ pqLastResortPreKey: keys.pq(9) }));
    const good = {
      localIdentityKey: keys.identityKey(),
      localSignedPreKeyId: 1,
      localRegistrationId: 77,
      localPqLastResortPreKeyId: 9,
    };
    const faultsOf = async (change: Partial<typeof good> & { localSignedPreKeyPublicKey?: string }) => {
      const { keysValid, missingKeys, reason, validation } = await client.call('validateKeys', {
        ...good,
        ...change,
      });
      expect(keysValid).toBe(missingKeys.length === 0);
      expect(reason === undefined).toBe(keysValid);
      expect(validation === undefined).toBe(!keysValid);
      return missingKeys;
    };
    expect(await faultsOf({})).toEqual([]);
    expect(await faultsOf({ localIdentityKey: new KeyMaker().identityKey() })).toEqual(['identity']);
    expect(await faultsOf({ localRegistrationId: 78 })).toEqual(['identity']);
    expect(await faultsOf({ localSignedPreKeyId: 2 })).toEqual(['signedPreKey']);
    expect(await faultsOf({ localSignedPreKeyPublicKey: keys.signed(1).publicKey })).toEqual([
      'signedPreKey',
    ]);
    expect(await faultsOf({ localPqLastResortPreKeyId: 10 })).toEqual(['pqLastResortPreKey']);
  });

  it('compares ids of both kinds, and differences of them don’t make keys invalid', async () => {
    const { keys, client, ...device } = await stranger();
    await client.call(
      'uploadKeys',
      keys.keySet({
        pqLastResortPreKey: keys.pq(99),
        oneTimePreKeys: ids(1, 6).map((id) => keys.oneTime(id)),
        pqOneTimePreKeys: ids(1, 5).map((id) => keys.pq(id)),
      }),
    );
    await claim(device);
    await client.call('withdrawPreKeys', { preKeyIds: [4], pqPreKeyIds: [5] });
    expect(
      await client.call('validateKeys', {
        localIdentityKey: keys.identityKey(),
        localSignedPreKeyId: 1,
        localPreKeyIds: [9, 6, 4, 2, 1, 8],
        localPqPreKeyIds: [1, 2, 5, 6],
      }),
    ).toMatchObject({
      keysValid: true,
      missingKeys: [],
      // Handed out, and withdrawn: neither may be offered again.
      preKeyIdsToDelete: [1, 4],
      preKeyIdsToUpload: [8, 9],
      preKeyIdsNotHeld: [3, 5],
      pqPreKeyIdsToDelete: [1, 5],
      pqPreKeyIdsToUpload: [6],
      pqPreKeyIdsNotHeld: [3, 4],
      validation: expect.any(String),
    });
  });

  it('lists what was handed out within the retention time to a client that only counts', async () => {
    const { keys, client, ...device } = await stranger();
    await client.call(
      'uploadKeys',
      keys.keySet({ oneTimePreKeys: [1005, 1003, 1004].map((id) => keys.oneTime(id)) }),
    );
    const counted = async (by: Client) =>
      await by.call('validateKeys', {
        localIdentityKey: keys.identityKey(),
        localSignedPreKeyId: 1,
        localPreKeyCount: 3,
      });
    expect(await counted(client)).toMatchObject({ keysValid: true, preKeyIdsToDelete: [] });
    await claim(device);
    await letPass(DAY_MS);
    await claim(device);
    const later = await connect(device.userId);
    const { preKeyIdsToDelete, ...rest } = await counted(later);
    expect(new Set(preKeyIdsToDelete)).toEqual(new Set([1005, 1003]));
    expect(rest).toMatchObject({ keysValid: true, preKeyIdsToUpload: [], preKeyIdsNotHeld: [] });

    await letPass(2.5 * DAY_MS);
    expect((await counted(await connect(device.userId))).preKeyIdsToDelete).toEqual([1003]);
  });

  it('compares no ids with those of another identity', async () => {
    const { keys, client, ...device } = await stranger();
    await client.call('uploadKeys', keys.keySet({ oneTimePreKeys: [keys.oneTime(1), keys.oneTime(2)] }));
    await claim(device);
    // A fresh install on the same device: its ids 1 and 3 are keys that nobody has seen.
    const fresh = new KeyMaker();
    expect(
      await client.call('validateKeys', {
        localIdentityKey: fresh.identityKey(),
        localSignedPreKeyId: 1,
        localPreKeyIds: [1, 3],
      }),
    ).toMatchObject({
      missingKeys: ['identity'],
      preKeyIdsToDelete: [],
      preKeyIdsToUpload: [1, 3],
      preKeyIdsNotHeld: [],
    });
    expect(
      await client.call('validateKeys', {
        localIdentityKey: fresh.identityKey(),
        localSignedPreKeyId: 1,
        localPreKeyCount: 2,
      }),
    ).toMatchObject({ missingKeys: ['identity'], preKeyIdsToDelete: [] });
  });

  it('tells ids that were handed out under an identity also when it was reset or replaced', async () => {
    const { keys, client, ...device } = await stranger();
    await client.call(
      'uploadKeys',
      keys.keySet({
        pqLastResortPreKey: keys.pq(9),
        oneTimePreKeys: [keys.oneTime(1), keys.oneTime(2)],
        pqOneTimePreKeys: [keys.pq(5), keys.pq(6)],
      }),
    );
    await claim(device);
    const compared = async () =>
      await client.call('validateKeys', {
        localIdentityKey: keys.identityKey(),
        localSignedPreKeyId: 1,
        localPreKeyIds: [3, 2, 1],
        localPqPreKeyIds: [5, 7],
      });
    const found = {
      preKeyIdsToDelete: [1],
      preKeyIdsToUpload: [2, 3],
      preKeyIdsNotHeld: [],
      pqPreKeyIdsToDelete: [5],
      pqPreKeyIdsToUpload: [7],
      pqPreKeyIdsNotHeld: [],
    };
    await client.call('resetKeys');
    expect(await compared()).toMatchObject({ missingKeys: ['identity', 'signedPreKey'], ...found });
    // Another identity's ids are its own.
    const others = new KeyMaker();
    await client.call(
      'uploadKeys',
      others.keySet({ oneTimePreKeys: [others.oneTime(2), others.oneTime(3)] }),
    );
    await claim(device);
    expect(await compared()).toMatchObject({ missingKeys: ['identity'], ...found });
  });

  it('refuses keys that nobody can have, with their paths', async () => {
    const { keys, client } = await stranger();
    await client.call('uploadKeys', keys.keySet());
    const lowOrder = Buffer.alloc(32).toString('base64');
    const refused = await client.refusal('validateKeys', {
      localIdentityKey: lowOrder,
      localSignedPreKeyId: 1,
      localSignedPreKeyPublicKey: lowOrder,
    });
    expect(refused).toMatchObject({
      code: 'BAD_REQUEST',
      details: { issues: [{ path: ['localIdentityKey'] }, { path: ['localSignedPreKeyPublicKey'] }] },
    });
  });

  it('gives bundles past the expiry of the signed prekey, and says that a rotation is due', async () => {
    const { keys, client, ...device } = await stranger();
    await client.call('uploadKeys', keys.keySet({ oneTimePreKeys: [keys.oneTime(1)] }));
    const local = { localIdentityKey: keys.identityKey(), localSignedPreKeyId: 1 };
    await letPass(ROTATION_MS - 1);
    let later = await connect(device.userId);
    expect(await later.call('validateKeys', local)).toMatchObject({ rotationDue: false });
    await clock.advance(1);
    expect(await later.call('validateKeys', local)).toMatchObject({ rotationDue: true, keysValid: true });
    await letPass(5 * DAY_MS);
    later = await connect(device.userId);
    expect(await claim(device)).toMatchObject({ signedPreKey: { keyId: 1 }, oneTimePreKey: { keyId: 1 } });
    await later.call('rotateSignedPreKey', { signedPreKey: keys.signed(2) });
    expect(await later.call('validateKeys', { ...local, localSignedPreKeyId: 2 })).toMatchObject({
      rotationDue: false,
    });
  });

  describe('on a server that was rolled back', () => {
    it.each(['lastKeyVersion', 'lastCountVersion'] as const)(
      'as %s tells, withdraws the pools at once and is valid again after new keys',
      async (lastSeen) => {
        const { keys, client, ...device } = await stranger();
        await client.call(
          'uploadKeys',
          keys.keySet({
            pqLastResortPreKey: keys.pq(99),
            oneTimePreKeys: ids(1, 3).map((id) => keys.oneTime(id)),
            pqOneTimePreKeys: [keys.pq(1)],
          }),
        );
        const local = {
          localIdentityKey: keys.identityKey(),
          localSignedPreKeyId: 1,
          // 7 was uploaded, and perhaps handed out, in the time that the backup does not know.
          localPreKeyIds: [1, 2, 3, 7],
          localPqPreKeyIds: [1],
        };
        const before = await client.call('validateKeys', local);
        expect(before).toMatchObject({ keysValid: true, keyVersion: 1, countVersion: 1 });
        const ahead = { lastKeyVersion: 1, lastCountVersion: 1, [lastSeen]: 40 };
        const found = await client.call('validateKeys', { ...local, ...ahead });
        expect(found).toMatchObject({
          keysValid: false,
          missingKeys: ['rolledBack'],
          preKeyIdsToDelete: [1, 2, 3, 7],
          preKeyIdsToUpload: [],
          preKeyIdsNotHeld: [],
          pqPreKeyIdsToDelete: [1],
        });
        // The versions never repeat: both are beyond what any side has seen.
        expect(found.countVersion).toBeGreaterThan(ahead.lastCountVersion);
        expect(found.keyVersion).toBeGreaterThanOrEqual(ahead.lastKeyVersion);
        expect(await claim(device)).toMatchObject({ oneTimePreKey: null, pqPreKey: { lastResort: true } });

        // The old ids are refused, for the one that the backup did not know too; new ones are what it wants.
        const refill = [...local.localPreKeyIds, 11, 12].map((id) => keys.oneTime(id));
        expect(await client.call('addPreKeys', { oneTimePreKeys: refill })).toMatchObject({
          oneTimePreKeys: {
            stored: 2,
            unchanged: 0,
            conflicts: local.localPreKeyIds.map((keyId) => ({ keyId, reason: 'alreadyClaimed' })),
          },
        });
        const after = await client.call('validateKeys', {
          ...local,
          localPreKeyIds: [...local.localPreKeyIds, 11, 12],
          lastKeyVersion: found.keyVersion,
          lastCountVersion: found.countVersion,
        });
        expect(after).toMatchObject({
          keysValid: true,
          missingKeys: [],
          preKeyIdsToDelete: [1, 2, 3, 7],
          preKeyIdsToUpload: [],
          preKeyIdsNotHeld: [],
        });
        expect(await client.call('clientReady')).toMatchObject({ keyVersion: after.keyVersion });
      },
    );

    it('to before the device’s first upload, takes its keys again, and no id that may be known', async () => {
      const { keys, client, ...device } = await stranger();
      const local = {
        localIdentityKey: keys.identityKey(),
        localSignedPreKeyId: 1,
        localPreKeyIds: [1, 2],
        lastKeyVersion: 3,
        lastCountVersion: 8,
      };
      expect(await client.call('validateKeys', local)).toMatchObject({
        missingKeys: ['identity', 'signedPreKey', 'rolledBack'],
        preKeyIdsToDelete: [1, 2],
        preKeyIdsToUpload: [],
        keyVersion: 4,
        countVersion: 9,
      });
      const upload = keys.keySet({ oneTimePreKeys: [keys.oneTime(1), keys.oneTime(3)] });
      expect(await client.call('uploadKeys', { ...upload, ifKeyVersion: 4 })).toMatchObject({
        keyVersion: 5,
        oneTimePreKeys: { stored: 1, unchanged: 0, conflicts: [{ keyId: 1, reason: 'alreadyClaimed' }] },
      });
      expect(await claimAll(device)).toEqual([3]);
    });

    it.each(['lastKeyVersion', 'lastCountVersion'] as const)(
      'believes no %s that a device can’t have seen, and changes nothing for it',
      async (field) => {
        const { keys, client } = await stranger();
        await client.call('uploadKeys', keys.keySet({ oneTimePreKeys: [keys.oneTime(1)] }));
        const local = { localIdentityKey: keys.identityKey(), localSignedPreKeyId: 1 };
        // The first is beyond what a restore in this century lifts versions to.
        for (const version of [2 ** 42, 2 ** 48]) {
          expect(await client.refusal('validateKeys', { ...local, [field]: version })).toMatchObject({
            code: 'BAD_REQUEST',
            details: { issues: [{ path: [field] }] },
          });
        }
        expect(await client.call('keyStatus')).toMatchObject({
          preKeyCount: 1,
          keyVersion: 1,
          countVersion: 1,
        });
        const found = await client.call('validateKeys', { ...local, [field]: 2 ** 32 + 1 });
        expect(found.missingKeys).toEqual(['rolledBack']);
      },
    );

    it('keeps the ids of few identities that were never uploaded here, and of the stored one always', async () => {
      const { keys, client } = await stranger();
      await client.call('uploadKeys', keys.keySet());
      let lastCountVersion = 1;
      const rolledBack = async (local: KeyMaker) => {
        const found = await client.call('validateKeys', {
          localIdentityKey: local.identityKey(),
          localSignedPreKeyId: 1,
          localPreKeyIds: [5],
          lastCountVersion: lastCountVersion + 1,
        });
        expect(found).toMatchObject({ preKeyIdsToDelete: [5] });
        lastCountVersion = found.countVersion;
      };
      const others = ids(0, 9).map(() => new KeyMaker());
      for (const other of others) await rolledBack(other);
      await rolledBack(keys);
      const conflictsOf = async (local: KeyMaker) => {
        const upload = local.keySet({ oneTimePreKeys: [local.oneTime(5)] });
        const { oneTimePreKeys } = await client.call('uploadKeys', { ...upload, replaceIdentity: true });
        return oneTimePreKeys.conflicts.length;
      };
      expect(await client.call('addPreKeys', { oneTimePreKeys: [keys.oneTime(5)] })).toMatchObject({
        oneTimePreKeys: { conflicts: [{ keyId: 5, reason: 'alreadyClaimed' }] },
      });
      const conflicts: number[] = [];
      for (const other of others) conflicts.push(await conflictsOf(other));
      expect(conflicts).toEqual([1, 1, 1, 1, 1, 1, 1, 1, 0]);
    });

    it('leaves a server alone whose versions are newer', async () => {
      const { keys, client } = await stranger();
      await client.call('uploadKeys', keys.keySet({ oneTimePreKeys: [keys.oneTime(1)] }));
      await client.call('rotateSignedPreKey', { signedPreKey: keys.signed(2) });
      expect(
        await client.call('validateKeys', {
          localIdentityKey: keys.identityKey(),
          localSignedPreKeyId: 2,
          lastKeyVersion: 1,
          lastCountVersion: 0,
        }),
      ).toMatchObject({ keysValid: true, missingKeys: [], keyVersion: 2 });
      expect(await client.call('checkPreKeys')).toMatchObject({ availableCount: 1 });
    });
  });
});

describe('a validation', () => {
  async function validated(): Promise<{
    keys: KeyMaker;
    client: Client;
    userId: string;
    validation: string;
  }> {
    const { keys, client, userId } = await stranger();
    await client.call('uploadKeys', keys.keySet());
    const { validation } = await client.call('validateKeys', {
      localIdentityKey: keys.identityKey(),
      localSignedPreKeyId: 1,
    });
    return { keys, client, userId, validation: validation! };
  }

  it('opens the gate of the device’s next socket, for ten minutes', async () => {
    const { client, userId, validation } = await validated();
    client.close();
    const second = await connect(userId);
    expect(await second.call('clientReady', { validation })).toEqual({ pendingCount: 0, keyVersion: 1 });
    await clock.advance(10 * 60_000 - 1);
    expect(await second.call('clientReady', { validation })).toMatchObject({ keyVersion: 1 });
    await clock.advance(1);
    expect(await second.refusal('clientReady', { validation })).toMatchObject({ code: 'KEYS_NOT_VALIDATED' });
  });

  it('is good on every node', async () => {
    const { client, userId, validation } = await validated();
    client.close();
    const other = await startGateway({ clock, databaseUrl: gateway.databaseUrl });
    try {
      const elsewhere = await other.connect({ userId, deviceId: 1 });
      expect(await elsewhere.call('clientReady', { validation })).toMatchObject({ keyVersion: 1 });
    } finally {
      await stop(other);
    }
  });

  it('is one device’s, and of one key set', async () => {
    const { keys, client, validation } = await validated();
    const other = await validated();
    expect(await other.client.refusal('clientReady', { validation })).toMatchObject({
      code: 'KEYS_NOT_VALIDATED',
    });
    await client.call('rotateSignedPreKey', { signedPreKey: keys.signed(2) });
    expect(await client.refusal('clientReady', { validation })).toMatchObject({
      code: 'KEYS_OUT_OF_SYNC',
      details: { keyVersion: 2 },
    });
  });

  it('can’t be forged or changed', async () => {
    const { client, validation } = await validated();
    const [payload, seal] = validation.split('.');
    const said = JSON.parse(Buffer.from(payload!, 'base64url').toString());
    const raised = Buffer.from(JSON.stringify({ ...said, keyVersion: 2 })).toString('base64url');
    for (const forged of [
      '',
      '.',
      'x',
      payload!,
      `${payload}.`,
      `.${seal}`,
      `${raised}.${seal}`,
      `${payload}.${seal}.`,
      `${payload}.${Buffer.alloc(32).toString('base64url')}`,
    ]) {
      expect(await client.refusal('clientReady', { validation: forged })).toMatchObject({
        code: 'KEYS_NOT_VALIDATED',
      });
    }
    expect(await client.call('clientReady', { validation })).toMatchObject({ keyVersion: 1 });
  });
});

describe('requestBundle', () => {
  it('gives every device of the user, sorted, and only those with keys', async () => {
    const { keys, client, userId } = await stranger();
    await client.call('uploadKeys', keys.keySet({ oneTimePreKeys: [keys.oneTime(1)] }));
    const makers = new Map<number, KeyMaker>([[1, keys]]);
    for (const deviceId of [127, 3]) {
      const maker = new KeyMaker();
      makers.set(deviceId, maker);
      const device = await connect(userId, deviceId);
      await device.call('uploadKeys', maker.keySet({ oneTimePreKeys: [maker.oneTime(deviceId)] }));
    }
    await connect(userId, 4);
    const { devices, ...rest } = await claimer.call('requestBundle', { claimId: randomUUID(), userId });
    expect(rest).toEqual({ userId });
    expect(
      devices.map(({ deviceId, identityKey, oneTimePreKey }) => [
        deviceId,
        identityKey,
        oneTimePreKey?.keyId,
      ]),
    ).toEqual([1, 3, 127].map((deviceId) => [deviceId, makers.get(deviceId)!.identityKey(), deviceId]));
    // The caller's own device is not among its user's; by name it may be asked for.
    const own = await client.call('requestBundle', { claimId: randomUUID(), userId });
    expect(own.devices.map((device) => device.deviceId)).toEqual([3, 127]);
    expect(await claim({ userId, deviceId: 1 }, randomUUID(), client)).toMatchObject({ deviceId: 1 });
  });

  it('gives no device to the only device of a user', async () => {
    const { keys, client, userId } = await stranger();
    await client.call('uploadKeys', keys.keySet());
    expect(await client.call('requestBundle', { claimId: randomUUID(), userId })).toEqual({
      userId,
      devices: [],
    });
  });

  it('gives the same answer to the same claimId, and spends nothing more', async () => {
    const { keys, client, ...device } = await stranger();
    await client.call(
      'uploadKeys',
      keys.keySet({
        pqLastResortPreKey: keys.pq(9),
        oneTimePreKeys: ids(1, 3).map((id) => keys.oneTime(id)),
        pqOneTimePreKeys: [keys.pq(1), keys.pq(2)],
      }),
    );
    const claimId = randomUUID();
    const first = await claim(device, claimId);
    expect(await claim(device, claimId)).toEqual(first);
    expect(await claim(device, claimId.toUpperCase())).toEqual(first);
    // Asked for as one of all the user's devices, it is the same target device.
    const { devices } = await claimer.call('requestBundle', { claimId, userId: device.userId });
    expect(devices).toEqual([first]);
    expect(await client.call('checkPreKeys')).toMatchObject({ availableCount: 2, pqAvailableCount: 1 });
    // A claimId is the caller's: another caller's is another claim.
    const other = await stranger();
    expect((await claim(device, claimId, other.client)).oneTimePreKey?.keyId).toBe(2);
    // More keys came, and the target rotated: the answer is still the first one.
    await client.call('rotateSignedPreKey', { signedPreKey: keys.signed(2) });
    await letPass(23 * HOUR_MS);
    expect(await claim(device, claimId)).toEqual(first);
  });

  it('makes of one claimId, used at once by three callers and for two targets, a claim for each', async () => {
    const targets = [await stranger(), await stranger()];
    for (const { keys, client } of targets) {
      await client.call(
        'uploadKeys',
        keys.keySet({ oneTimePreKeys: ids(1, 3).map((id) => keys.oneTime(id)) }),
      );
    }
    const claimId = randomUUID();
    const callers = [claimer, await connect('claimer', 2), (await stranger()).client];
    const bundles = await Promise.all(
      targets.map((target) => Promise.all(callers.map((by) => claim(target, claimId, by)))),
    );
    for (const [index, { keys }] of targets.entries()) {
      const given = bundles[index]!;
      expect(given.map(({ identityKey }) => identityKey)).toEqual(callers.map(() => keys.identityKey()));
      expect(given.map(({ oneTimePreKey }) => oneTimePreKey?.keyId).toSorted()).toEqual([1, 2, 3]);
    }
  });

  it('gives the same answer also where it was “none left”', async () => {
    const { keys, client, ...device } = await stranger();
    await client.call('uploadKeys', keys.keySet());
    const claimId = randomUUID();
    const without = await claim(device, claimId);
    expect(without).toMatchObject({ oneTimePreKey: null, oneTimePreKeyAbsent: 'noneLeft' });
    await client.call('addPreKeys', { oneTimePreKeys: [keys.oneTime(1)] });
    expect(await claim(device, claimId)).toEqual(without);
    expect(await claim(device)).toMatchObject({ oneTimePreKey: { keyId: 1 } });
  });

  it('answers a claimId anew where the device has replaced its identity', async () => {
    const { keys, client, ...device } = await stranger();
    await client.call('uploadKeys', keys.keySet({ oneTimePreKeys: [keys.oneTime(1)] }));
    const claimId = randomUUID();
    await claim(device, claimId);
    const fresh = new KeyMaker();
    const replacement = fresh.keySet({ oneTimePreKeys: [fresh.oneTime(1)], replaceIdentity: true });
    await client.call('uploadKeys', replacement);
    const anew = await claim(device, claimId);
    expect(anew).toMatchObject({
      identityKey: fresh.identityKey(),
      signedPreKey: replacement.signedPreKey,
      oneTimePreKey: replacement.oneTimePreKeys![0],
    });
    expect(await claim(device, claimId)).toEqual(anew);
  });

  it('goes on without one-time prekeys, with the last-resort key, which is never consumed', async () => {
    const { keys, client, ...device } = await stranger();
    const lastResort = keys.pq(9);
    await client.call(
      'uploadKeys',
      keys.keySet({
        pqLastResortPreKey: lastResort,
        oneTimePreKeys: [keys.oneTime(1)],
        pqOneTimePreKeys: [keys.pq(1)],
      }),
    );
    const first = await claim(device);
    expect(first.pqPreKey).toMatchObject({ keyId: 1, lastResort: false });
    expect(first).not.toHaveProperty('oneTimePreKeyAbsent');
    for (let round = 0; round < 3; round++) {
      expect(await claim(device)).toMatchObject({
        oneTimePreKey: null,
        oneTimePreKeyAbsent: 'noneLeft',
        pqPreKey: { ...lastResort, lastResort: true },
      });
    }
  });

  it('tells an unknown user from an unknown device', async () => {
    const { keys, client, userId } = await stranger();
    const claimId = randomUUID();
    expect(await claimer.refusal('requestBundle', { claimId, userId })).toMatchObject({
      code: 'USER_NOT_FOUND',
    });
    expect(await claimer.refusal('requestBundle', { claimId, userId, deviceId: 1 })).toMatchObject({
      code: 'USER_NOT_FOUND',
    });
    await client.call('uploadKeys', keys.keySet());
    expect(await claimer.refusal('requestBundle', { claimId, userId, deviceId: 2 })).toMatchObject({
      code: 'DEVICE_NOT_FOUND',
    });
    expect(await claim({ userId, deviceId: 1 }, claimId)).toMatchObject({ deviceId: 1 });
  });
});

describe('listDevices', () => {
  it('lists the devices that have keys, and spends none of them', async () => {
    const { keys, client, userId } = await stranger();
    expect(await claimer.refusal('listDevices', { userId })).toMatchObject({ code: 'USER_NOT_FOUND' });
    await client.call('uploadKeys', keys.keySet({ oneTimePreKeys: [keys.oneTime(1)] }));
    const second = await connect(userId, 2);
    await second.call('uploadKeys', { ...new KeyMaker().keySet(), registrationId: 16383 });
    await connect(userId, 3);
    const both = {
      devices: [
        { deviceId: 1, registrationId: 77 },
        { deviceId: 2, registrationId: 16383 },
      ],
    };
    expect(await claimer.call('listDevices', { userId })).toEqual(both);
    expect(await client.call('listDevices', { userId })).toEqual(both);
    expect(await client.call('checkPreKeys')).toMatchObject({ availableCount: 1 });
    await client.call('resetKeys');
    await second.call('resetKeys');
    expect(await claimer.refusal('listDevices', { userId })).toMatchObject({ code: 'USER_NOT_FOUND' });
  });
});

describe('a device that never uploaded', () => {
  it('has version 0, nulls and zeros', async () => {
    const { client } = await stranger();
    expect(await client.call('keyStatus')).toEqual({
      identityKey: null,
      signedPreKeyId: null,
      pqLastResortPreKeyId: null,
      preKeyCount: 0,
      pqPreKeyCount: 0,
      keyVersion: 0,
      countVersion: 0,
      signedPreKeyExpiresAt: null,
    });
    expect(await client.call('keyStats')).toEqual({
      totalPreKeys: 0,
      availablePreKeys: 0,
      consumedPreKeys: 0,
      lastUpdated: null,
    });
    expect(await client.call('checkPreKeys')).toEqual({
      needsMorePreKeys: true,
      availableCount: 0,
      pqAvailableCount: 0,
      threshold: 10,
      countVersion: 0,
    });
    expect(await client.call('resetKeys')).toEqual({ keyVersion: 0 });
  });

  it('is told by validateKeys what to upload', async () => {
    const { keys, client } = await stranger();
    const { reason, ...data } = await client.call('validateKeys', {
      localIdentityKey: keys.identityKey(),
      localSignedPreKeyId: 1,
      localPreKeyIds: [5, 3],
      localPqPreKeyIds: [8],
    });
    expect(reason).toEqual(expect.any(String));
    expect(data).toEqual({
      keysValid: false,
      missingKeys: ['identity', 'signedPreKey'],
      preKeyIdsToDelete: [],
      preKeyIdsToUpload: [3, 5],
      preKeyIdsNotHeld: [],
      pqPreKeyIdsToDelete: [],
      pqPreKeyIdsToUpload: [8],
      pqPreKeyIdsNotHeld: [],
      rotationDue: false,
      keyVersion: 0,
      countVersion: 0,
    });
  });

  it('gets KEYS_NOT_UPLOADED where keys are needed', async () => {
    const { keys, client } = await stranger();
    const envelope = { deviceId: 1, registrationId: 77, type: 3, content: 'AAAA' };
    const refusals = [
      await client.refusal('addPreKeys', { oneTimePreKeys: [keys.oneTime(1)] }),
      await client.refusal('sendMessages', {
        messageId: randomUUID(),
        userId: 'claimer',
        envelopes: [envelope],
      }),
      await client.refusal('clientReady'),
      await client.refusal('clientReady', { validation: 'x' }),
    ];
    for (const refused of refusals) expect(refused.code).toBe('KEYS_NOT_UPLOADED');
  });
});

describe('an input that holds nothing', () => {
  it('may be left out, or be {}', async () => {
    const { client } = await stranger();
    for (const name of ['keyStatus', 'keyStats', 'checkPreKeys', 'resetKeys'] as const) {
      const alone = await new Promise((resolve) => {
        emit(client, name, resolve);
      });
      expect(alone).toMatchObject({ ok: true });
      expect(await client.ask(name, {})).toEqual(alone);
    }
  });
});
