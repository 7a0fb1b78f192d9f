/** A revoked device: shut out by every door and on every node, its keys gone, its messages returned. */
import { execFile } from 'node:child_process';
import { promisify } from 'node:util';
import { SignJWT } from 'jose';
import postgres from 'postgres';
import { describe, expect, it } from 'vitest';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import { eventually } from '../support/eventually.ts';
import { FEW_KEYS, gatewayFor, hold, opened, redisFor, someone, undoAfterEach } from '../support/flow.ts';
import {
  connectClient,
  contents,
  enrol,
  open,
  RefusedError,
  send,
  TEST_SECRET,
  type TestGateway,
  testEnvironment,
} from '../support/gateway.ts';
import { SignalDevice } from '../support/libsignal-device.ts';
import { createManualClock } from '../support/manual-clock.ts';
import { KEYGATE } from '../support/program.ts';

const SWEEP_PERIOD_MS = 15_000;
const undo = undoAfterEach();

/** `keygate revoke`, as an operator runs it beside the gateways. */
async function revoke(at: TestGateway, device: DeviceAddress) {
  const { stdout } = await promisify(execFile)(
    process.execPath,
    [KEYGATE, 'revoke', '--user', device.userId, '--device', String(device.deviceId), '--json'],
    {
      env: {
        PATH: process.env.PATH,
        ...testEnvironment({ databaseUrl: at.databaseUrl, redisUrl: at.config.redisUrl ?? undefined }),
      },
    },
  );
  return JSON.parse(stdout) as { keyVersion: number; revokedAt: string; hadKeys: boolean };
}

/** A token that was issued then, or that does not say when. */
async function tokenOf(device: DeviceAddress, issuedAtMs: number | null): Promise<string> {
  const token = new SignJWT({ device_id: device.deviceId })
    .setProtectedHeader({ alg: 'HS256' })
    .setSubject(device.userId)
    .setExpirationTime(Math.floor(Date.now() / 1000) + 3_600);
  if (issuedAtMs !== null) token.setIssuedAt(Math.floor(issuedAtMs / 1000));
  return await token.sign(new TextEncoder().encode(TEST_SECRET));
}

async function refusedHandshake(at: TestGateway, token: string) {
  const refusal = await connectClient(at.url, token).then(
    () => 'it connected',
    (error: unknown) => error,
  );
  expect(refusal).toBeInstanceOf(RefusedError);
  return (refusal as RefusedError).error;
}

const httpStatusOf = async (at: TestGateway, token: string): Promise<number> =>
  (await fetch(`${at.url}/api/keys/stats`, { headers: { authorization: `Bearer ${token}` } })).status;

describe('keygate revoke', () => {
  it('shuts a device out on every node at once, and lets it start afresh with a later token', async () => {
    const redis = await redisFor(undo);
    const one = await gatewayFor(undo, { redisUrl: redis.url });
    const other = await gatewayFor(undo, { redisUrl: redis.url, databaseUrl: one.databaseUrl });
    const alice = await opened(one);
    const stolen = await opened(other);
    const { address } = stolen;
    const sibling = await opened(other, { ...address, deviceId: 2 });
    hold(stolen.client);
    await alice.client.call('sendMessages', {
      messageId: '5d1b9f3e-0d8a-4d67-9c3a-0a7a3f6b3c11',
      userId: address.userId,
      envelopes: [stolen, sibling].map((party) => ({
        deviceId: party.address.deviceId,
        registrationId: party.device.registrationId,
        type: 3,
        content: Buffer.from('pending').toString('base64'),
      })),
    });
    const before = await stolen.client.call('keyStatus');
    const closed = stolen.client.next('gateClosed');

    const revoked = await revoke(one, address);
    expect(revoked).toMatchObject({ hadKeys: true, keyVersion: before.keyVersion + 1 });
    expect(await closed).toEqual({ reason: 'deviceRevoked', keyVersion: before.keyVersion + 1 });
    await stolen.client.disconnected;
    await eventually(() => expect(contents(alice.client)).toEqual(['DEVICE_REVOKED']));
    await eventually(() => expect(contents(sibling.client)).toEqual(['pending']));

    const revokedAtMs = Date.parse(revoked.revokedAt);
    for (const at of [one, other]) {
      for (const issuedAtMs of [revokedAtMs, revokedAtMs - 86_400_000, null]) {
        const token = await tokenOf(address, issuedAtMs);
        expect(await refusedHandshake(at, token)).toMatchObject({ code: 'FORBIDDEN', retryable: false });
        expect(await httpStatusOf(at, token)).toBe(403);
      }
    }
    const { devices } = await alice.client.call('listDevices', { userId: address.userId });
    expect(devices.map((device) => device.deviceId)).toEqual([2]);
    await sibling.client.call('keyStatus');

    const later = await tokenOf(address, revokedAtMs + 1_000);
    expect(await httpStatusOf(one, later)).toBe(200);
    const client = await connectClient(one.url, later);
    undo.push(() => client.close());
    const upload = new SignalDevice(address).uploadInput(FEW_KEYS);
    expect((await client.call('uploadKeys', upload)).keyVersion).toBeGreaterThan(revoked.keyVersion);
  });

  it('never lets the ids come back that the device had handed out', async () => {
    const at = await gatewayFor(undo);
    const bob = await enrol(at, someone(), { oneTimePreKeys: 3, pqOneTimePreKeys: 0 });
    const alice = await enrol(at, someone(), FEW_KEYS);
    const { devices } = await alice.client.call('requestBundle', {
      claimId: '0d0ffb0e-3f9d-4b7e-8a7c-7f3a1c1d9a01',
      userId: bob.address.userId,
    });
    const keyId = devices[0]!.oneTimePreKey!.keyId;
    const { revokedAt } = await revoke(at, bob.address);
    const client = await connectClient(at.url, await tokenOf(bob.address, Date.parse(revokedAt) + 1_000));
    undo.push(() => client.close());
    const upload = bob.device.uploadInput({ oneTimePreKeys: 0, pqOneTimePreKeys: 0 });
    const again = await client.call('uploadKeys', {
      ...upload,
      oneTimePreKeys: [{ keyId, publicKey: devices[0]!.oneTimePreKey!.publicKey }],
    });
    expect(again.oneTimePreKeys.conflicts).toEqual([{ keyId, reason: 'alreadyClaimed' }]);
  });

  it('leaves nothing of the device but its versions and its used ids, as a reset does', async () => {
    const at = await gatewayFor(undo);
    const alice = await enrol(at, someone(), FEW_KEYS);
    const parties = [await enrol(at, someone()), await enrol(at, someone())];
    for (const { address, client } of parties) {
      await alice.client.call('requestBundle', {
        claimId: '0d0ffb0e-3f9d-4b7e-8a7c-7f3a1c1d9a02',
        userId: address.userId,
      });
      await client.call('keyStatus');
    }
    const [wiped, revoked] = parties as [(typeof parties)[0], (typeof parties)[0]];
    await send(alice.client, wiped, 'waits');
    await send(alice.client, revoked, 'waits');
    await wiped.client.call('resetKeys');
    await revoke(at, revoked.address);
    const sql = postgres(at.databaseUrl, { max: 1, onnotice: () => {} });
    undo.push(() => sql.end());
    const tables = await sql<{ name: string }[]>`
      SELECT table_name AS name FROM information_schema.columns
      WHERE table_schema = 'public' AND column_name = 'user_id' ORDER BY 1`;
    expect(tables.length).toBeGreaterThan(5);
    for (const { address } of parties) {
      await eventually(async () => {
        const left: Record<string, number> = {};
        for (const { name } of tables) {
          const [row] =
            await sql`SELECT count(*)::int4 AS n FROM ${sql(name)} WHERE user_id = ${address.userId}`;
          if (row!.n > 0) left[name] = row!.n;
        }
        // A receipt is the id of a message that is not to be stored twice; a day later it is swept.
        expect(Object.keys(left)).toEqual(['devices', 'message_receipts', 'used_prekey_ids']);
      });
      const [device] = await sql`SELECT * FROM devices WHERE user_id = ${address.userId}`;
      const kept = Object.entries(device!).filter(([, value]) => value instanceof Uint8Array);
      expect(kept).toEqual([]);
      expect(device).toMatchObject({ registration_id: null, signed_prekey_id: null, ec_available: 0 });
      const [used] = await sql`
        SELECT bool_and(wiped_key_digest IS NULL OR length(wiped_key_digest) = 32) AS digests
        FROM used_prekey_ids WHERE user_id = ${address.userId}`;
      expect(used!.digests).toBe(true);
    }
  });

  it('is found out by a gateway that no poke reaches', async () => {
    const clock = createManualClock();
    const at = await gatewayFor(undo, { clock });
    const stolen = await enrol(at, someone(), FEW_KEYS);
    const { keyVersion } = await revoke(at, stolen.address);
    expect(stolen.client.waiting('gateClosed')).toBe(0);
    // No Redis here: the sweep looks by itself.
    await clock.advance(SWEEP_PERIOD_MS);
    expect(await stolen.client.next('gateClosed')).toEqual({ reason: 'deviceRevoked', keyVersion });
    await stolen.client.disconnected;
  });

  it('is found out by a gateway that stood still meanwhile, or had no store, for longer than it looks back', async () => {
    const moved = createManualClock();
    let stoodStillMs = 0;
    const clock = { ...moved, nowMs: () => moved.nowMs() + stoodStillMs };
    const at = await gatewayFor(undo, { clock });
    const stolen = await enrol(at, someone(), FEW_KEYS);
    const { keyVersion } = await revoke(at, stolen.address);
    stoodStillMs = 30 * 60_000;
    await clock.advance(SWEEP_PERIOD_MS);
    expect(await stolen.client.next('gateClosed')).toEqual({ reason: 'deviceRevoked', keyVersion });
    await stolen.client.disconnected;
  });

  it.each(['uploadKeys', 'withdrawPreKeys'] as const)(
    'lets no socket that has not heard of it change the device’s keys by %s',
    async (request) => {
      const at = await gatewayFor(undo, { clock: createManualClock() });
      const stolen = await enrol(at, someone(), FEW_KEYS);
      const { keyVersion } = await revoke(at, stolen.address);
      const input =
        request === 'withdrawPreKeys'
          ? { preKeyIds: [1] }
          : new SignalDevice(stolen.address).uploadInput(FEW_KEYS);
      const closed = stolen.client.next('gateClosed');
      expect(await stolen.client.refusal(request, input)).toMatchObject({ code: 'FORBIDDEN' });
      // No sweep is due: what was refused has made the socket look.
      expect(await closed).toEqual({ reason: 'deviceRevoked', keyVersion });
      await stolen.client.disconnected;
    },
  );

  it('lets no request give the device keys again that was let in before', async () => {
    const at = await gatewayFor(undo);
    const stolen = await enrol(at, someone(), FEW_KEYS);
    const { userId, deviceId } = stolen.address;
    const sql = postgres(at.databaseUrl, { max: 2, onnotice: () => {} });
    undo.push(() => sql.end());
    const waiting = async (): Promise<number> =>
      (
        await sql`SELECT 1 FROM pg_stat_activity
                  WHERE datname = current_database() AND wait_event_type = 'Lock'`
      ).length;
    const blocker = await sql.reserve();
    await blocker`BEGIN`;
    await blocker`SELECT 1 FROM devices WHERE user_id = ${userId} AND device_id = ${deviceId} FOR UPDATE`;
    // Both wait for the device's row, the revocation before the upload.
    const revoked = revoke(at, stolen.address);
    await eventually(async () => expect(await waiting()).toBe(1));
    const { identityKey: identityPubKey, ...keys } = new SignalDevice(stolen.address).uploadInput(FEW_KEYS);
    const uploaded = fetch(`${at.url}/api/keys/upload`, {
      method: 'POST',
      headers: {
        authorization: `Bearer ${await at.token(stolen.address)}`,
        'content-type': 'application/json',
      },
      body: JSON.stringify({ keyBundle: { identityPubKey, ...keys } }),
    });
    await eventually(async () => expect(await waiting()).toBe(2));
    await blocker`COMMIT`;
    blocker.release();
    expect((await revoked).hadKeys).toBe(true);
    const answer = await uploaded;
    expect(answer.status).toBe(403);
    expect(await answer.json()).toMatchObject({ success: false, error: { code: 'FORBIDDEN' } });
  });

  it('lets a device start afresh by HTTP, too, with a later token', async () => {
    const at = await gatewayFor(undo);
    const bob = await enrol(at, someone(), FEW_KEYS);
    const { revokedAt, keyVersion } = await revoke(at, bob.address);
    const { identityKey: identityPubKey, ...keys } = new SignalDevice(bob.address).uploadInput(FEW_KEYS);
    const uploaded = await fetch(`${at.url}/api/keys/upload`, {
      method: 'POST',
      headers: {
        authorization: `Bearer ${await tokenOf(bob.address, Date.parse(revokedAt) + 1_000)}`,
        'content-type': 'application/json',
      },
      body: JSON.stringify({ keyBundle: { identityPubKey, ...keys } }),
    });
    expect(await uploaded.json()).toMatchObject({ success: true, keyVersion: keyVersion + 1 });
  });

  it('also stops a device that has never uploaded', async () => {
    const at = await gatewayFor(undo);
    const device = someone();
    const { revokedAt, ...revoked } = await revoke(at, device);
    expect(revoked).toMatchObject({ hadKeys: false, keyVersion: 0 });
    const token = await tokenOf(device, Date.parse(revokedAt));
    expect(await refusedHandshake(at, token)).toMatchObject({ code: 'FORBIDDEN' });
  });

  it('does not close a socket that has taken a later token', async () => {
    const clock = createManualClock();
    const at = await gatewayFor(undo, { clock });
    const bob = await opened(at);
    const { revokedAt } = await revoke(at, bob.address);
    await clock.advance(SWEEP_PERIOD_MS);
    await bob.client.disconnected;
    const later = await connectClient(at.url, await tokenOf(bob.address, Date.parse(revokedAt) + 1_000));
    undo.push(() => later.close());
    await later.call('uploadKeys', bob.device.uploadInput({ oneTimePreKeys: 0, pqOneTimePreKeys: 0 }));
    await open({ client: later, device: bob.device });
    await later.next('queueEmpty');
    await clock.advance(2 * SWEEP_PERIOD_MS);
    await later.call('keyStatus');
  });

  it('refuses to go on under a revoked token, and the socket goes on under its own', async () => {
    const at = await gatewayFor(undo);
    const device = someone();
    const { revokedAt } = await revoke(at, device);
    const client = await connectClient(at.url, await tokenOf(device, Date.parse(revokedAt) + 1_000));
    undo.push(() => client.close());
    for (const issuedAtMs of [Date.parse(revokedAt), null]) {
      const token = await tokenOf(device, issuedAtMs);
      expect(await client.refusal('refreshToken', { token })).toMatchObject({ code: 'FORBIDDEN' });
    }
    await client.call('uploadKeys', new SignalDevice(device).uploadInput(FEW_KEYS));
  });
});
