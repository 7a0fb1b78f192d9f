/** Limits as clients meet them: each is refused with a time to come back, and harms nobody else. */
import { randomUUID } from 'node:crypto';
import { io, type Socket } from 'socket.io-client';
import { describe, expect, it } from 'vitest';
import type { RequestInput, RequestName } from '../../src/protocol/events.ts';
import { openWebSocketPeer } from '../hostile/raw-peer.ts';
import { eventually } from '../support/eventually.ts';
import { FEW_KEYS, gatewayFor, opened, someone, undoAfterEach } from '../support/flow.ts';
import {
  type Client,
  connectClient,
  enrol,
  type Party,
  RefusedError,
  type TestGateway,
} from '../support/gateway.ts';
import { createManualClock } from '../support/manual-clock.ts';
import { refusedUpgrade } from '../support/upgrade.ts';

const MINUTE_MS = 60_000;
const HOUR_MS = 60 * MINUTE_MS;
const undo = undoAfterEach();

async function limited(env: Record<string, string>) {
  // A token's hour is rounded up to a second: begun on a whole one, it would end with the hour that a test lets pass.
  const clock = createManualClock(Math.floor(Date.now() / 1_000) * 1_000 + 1);
  const at = await gatewayFor(undo, { clock, env });
  return { at, clock };
}

/** The codes of so many requests, one after the other. */
async function codesOf<Name extends RequestName>(
  client: Client,
  times: number,
  name: Name,
  input: () => RequestInput<Name>,
): Promise<string[]> {
  const codes: string[] = [];
  for (let i = 0; i < times; i++) {
    const reply = await client.ask(name, input());
    codes.push(reply.ok ? 'ok' : reply.error.code);
  }
  return codes;
}

/** How often the node has told that something was beyond this limit. */
async function hitsOf(at: TestGateway, limit: string): Promise<number> {
  const text = await (await fetch(`${at.adminUrl}/metrics`)).text();
  return Number(new RegExp(`^keygate_limits_hit_total\\{limit="${limit}"\\} (\\d+)$`, 'm').exec(text)?.[1]);
}

const letterTo = (to: Party, bytes = 10) => ({
  messageId: randomUUID(),
  userId: to.address.userId,
  envelopes: [
    {
      deviceId: to.address.deviceId,
      registrationId: to.device.registrationId,
      type: 3,
      content: Buffer.alloc(bytes).toString('base64'),
    },
  ],
});

describe('requests of one name by one device', () => {
  it('are limited, with a time to come back, and others go on', async () => {
    const { at, clock } = await limited({ LIMIT_REQUESTS: '5' });
    const [alice, bob] = [await at.connect(someone()), await at.connect(someone())];
    const codes = await codesOf(alice, 7, 'keyStatus', () => ({}));
    expect(codes).toEqual([...Array(5).fill('ok'), 'RATE_LIMITED', 'RATE_LIMITED']);
    const refusal = await alice.refusal('keyStatus');
    expect(refusal).toMatchObject({ code: 'RATE_LIMITED', retryable: true });
    expect(refusal.retryAfterMs).toBeGreaterThan(0);
    expect(refusal.retryAfterMs).toBeLessThanOrEqual(MINUTE_MS);
    await alice.call('keyStats');
    await bob.call('keyStatus');
    await clock.advance(refusal.retryAfterMs!);
    await alice.call('keyStatus');
  });

  it('count where they can not be read, too', async () => {
    const { at } = await limited({ LIMIT_REQUESTS: '3' });
    const alice = await at.connect(someone());
    const codes = await codesOf(alice, 5, 'listDevices', () => ({ userId: '' }));
    expect(codes).toEqual([...Array(3).fill('BAD_REQUEST'), 'RATE_LIMITED', 'RATE_LIMITED']);
  });

  it('count together over both doors, and HTTP says when to come back', async () => {
    const { at } = await limited({ LIMIT_REQUESTS: '2' });
    const device = someone();
    const alice = await at.connect(device);
    await codesOf(alice, 2, 'keyStats', () => ({}));
    const response = await fetch(`${at.url}/api/keys/stats`, {
      headers: { authorization: `Bearer ${await at.token(device)}` },
    });
    expect(response.status).toBe(429);
    expect(Number(response.headers.get('retry-after'))).toBeGreaterThan(0);
    expect(await response.json()).toMatchObject({ success: false, error: { code: 'RATE_LIMITED' } });
  });

  it('count by HTTP, too, where the body can not be read or the fields are not those of the route', async () => {
    const { at } = await limited({ LIMIT_REQUESTS: '3' });
    const headers = {
      authorization: `Bearer ${await at.token(someone())}`,
      'content-type': 'application/json',
    };
    const statuses: number[] = [];
    for (const body of ['{', '[]', '{"other":1}', '{', '{"preKeys":[]}']) {
      statuses.push(
        (await fetch(`${at.url}/api/keys/add-prekeys`, { method: 'POST', headers, body })).status,
      );
    }
    expect(statuses).toEqual([400, 400, 400, 429, 429]);
  });

  it('by HTTP count once', async () => {
    const { at } = await limited({ LIMIT_REQUESTS: '2' });
    const headers = { authorization: `Bearer ${await at.token(someone())}` };
    const statuses: number[] = [];
    for (let i = 0; i < 3; i++) statuses.push((await fetch(`${at.url}/api/keys/stats`, { headers })).status);
    expect(statuses).toEqual([200, 200, 429]);
  });

  it('by HTTP count also where one asks for another', async () => {
    const { at } = await limited({ LIMIT_REQUESTS: '2' });
    const { userId } = (await enrol(at, someone(), FEW_KEYS)).address;
    const address = someone();
    const headers = { authorization: `Bearer ${await at.token(address)}` };
    // Where no device is named, the list of them is looked at.
    for (let i = 0; i < 2; i++) {
      expect((await fetch(`${at.url}/api/keys/${userId}`, { headers })).status).toBe(200);
    }
    const client = await at.connect(address);
    expect(await client.refusal('listDevices', { userId })).toMatchObject({ code: 'RATE_LIMITED' });
  });

  it('are not limited where 0 says so', async () => {
    const { at } = await limited({ LIMIT_REQUESTS: '0' });
    const alice = await at.connect(someone());
    expect(new Set(await codesOf(alice, 300, 'keyStats', () => ({})))).toEqual(new Set(['ok']));
  });
});

describe('changes of keys', () => {
  it('are limited together', async () => {
    const { at } = await limited({ LIMIT_UPLOADS: '4' });
    const { client, device } = await enrol(at, someone(), FEW_KEYS);
    await client.call('rotateSignedPreKey', { signedPreKey: device.newSignedPreKey() });
    await client.call('addPreKeys', device.morePreKeys(1));
    await client.call('withdrawPreKeys', { preKeyIds: [999] });
    expect(await client.refusal('resetKeys')).toMatchObject({ code: 'RATE_LIMITED' });
    await client.call('keyStatus');
  });
});

describe('clients that loop on a conflict', () => {
  it('immunity 4: 50 of them are told when to come back, pile nothing up, and keep nobody waiting', async () => {
    const { at } = await limited({ LIMIT_UPLOADS: '10' });
    const looping = await Promise.all(Array.from({ length: 50 }, () => enrol(at, someone(), FEW_KEYS)));
    const bystander = await at.connect(someone());
    const heapBytesBefore = process.memoryUsage().heapUsed;
    let isOver = false;
    const loops = looping.map(async ({ client, device }) => {
      const { oneTimePreKeys } = device.morePreKeys(1);
      const taken = device.uploadInput({ oneTimePreKeys: 0, pqOneTimePreKeys: 0 });
      const conflict = { oneTimePreKeys: [{ ...oneTimePreKeys![0]!, keyId: taken.signedPreKey.keyId }] };
      const replies = [];
      for (let i = 0; i < 60; i++) replies.push(await client.ask('addPreKeys', conflict));
      return replies;
    });
    let answeredMeanwhile = 0;
    const honest = (async () => {
      for (; !isOver; answeredMeanwhile++) await bystander.call('keyStatus');
    })();
    for (const replies of await Promise.all(loops)) {
      // The upload of its keys was the first of ten.
      expect(replies.filter(({ ok }) => ok)).toHaveLength(9);
      for (const reply of replies.slice(9)) {
        expect(reply).toMatchObject({
          ok: false,
          error: { code: 'RATE_LIMITED', retryable: true, retryAfterMs: expect.any(Number) },
        });
      }
    }
    isOver = true;
    await honest;
    expect(answeredMeanwhile).toBeGreaterThan(10);
    expect(process.memoryUsage().heapUsed - heapBytesBefore).toBeLessThan(128 * 1024 * 1024);
  });
});

describe('bundles', () => {
  it('are limited between two users, whatever devices they use', async () => {
    const { at, clock } = await limited({ LIMIT_BUNDLES_PER_PAIR: '3' });
    const { userId } = (await enrol(at, someone(), FEW_KEYS)).address;
    const attacker = someone();
    const ask = () => ({ claimId: randomUUID(), userId });
    expect(await codesOf(await at.connect(attacker), 2, 'requestBundle', ask)).toEqual(['ok', 'ok']);
    const second = await at.connect({ ...attacker, deviceId: 2 });
    expect(await codesOf(second, 2, 'requestBundle', ask)).toEqual(['ok', 'RATE_LIMITED']);
    const friend = await at.connect(someone());
    await friend.call('requestBundle', ask());
    await clock.advance(MINUTE_MS);
    await second.call('requestBundle', ask());
  });

  it('immunity 13: nobody can use up a device’s one-time prekeys, and it stays reachable', async () => {
    const { at, clock } = await limited({ LIMIT_BUNDLES_PER_TARGET: '5' });
    const victim = await enrol(at, someone(), { oneTimePreKeys: 20, pqOneTimePreKeys: 20 });
    const { userId } = victim.address;
    const attackers = await Promise.all(Array.from({ length: 20 }, () => at.connect(someone())));
    const claimIds = attackers.map(() => randomUUID());
    const claimAll = () =>
      Promise.all(
        attackers.map((attacker, i) =>
          attacker
            .call('requestBundle', { claimId: claimIds[i]!, userId })
            .then(({ devices }) => devices[0]!),
        ),
      );
    const bundles = await claimAll();
    expect(bundles.filter((bundle) => bundle.oneTimePreKey !== null)).toHaveLength(5);
    for (const bundle of bundles.filter(({ oneTimePreKey }) => oneTimePreKey === null)) {
      expect(bundle).toMatchObject({ oneTimePreKeyAbsent: 'limited', pqPreKey: { lastResort: true } });
    }
    expect(await victim.client.call('checkPreKeys')).toMatchObject({
      availableCount: 15,
      pqAvailableCount: 15,
    });
    // A retry gets its first answer, also when the limit would allow a key again, and costs none.
    await clock.advance(HOUR_MS);
    expect(await claimAll()).toEqual(bundles);
    expect(await victim.client.call('checkPreKeys')).toMatchObject({ availableCount: 15 });

    const friend = await enrol(at, someone(), FEW_KEYS);
    await clock.advance(HOUR_MS);
    const [bundle] = (await friend.client.call('requestBundle', { claimId: randomUUID(), userId })).devices;
    expect(bundle!.oneTimePreKey).not.toBeNull();
  });

  it('are limited between two users also when their target is spared', async () => {
    const { at } = await limited({
      LIMIT_BUNDLES_PER_TARGET: '2',
      LIMIT_BUNDLES_PER_PAIR: '5',
      LIMIT_REQUESTS: '9',
    });
    const { userId } = (await enrol(at, someone(), FEW_KEYS)).address;
    const other = (await enrol(at, someone(), FEW_KEYS)).address;
    const attacker = await at.connect(someone());
    const codes = await codesOf(attacker, 8, 'requestBundle', () => ({ claimId: randomUUID(), userId }));
    expect(codes).toEqual([...Array(5).fill('ok'), ...Array(3).fill('RATE_LIMITED')]);
    const more = await codesOf(attacker, 6, 'requestBundle', () => ({
      claimId: randomUUID(),
      userId: other.userId,
    }));
    expect(more).toEqual([...Array(4).fill('ok'), ...Array(2).fill('RATE_LIMITED')]);
  });

  it('that go out without a one-time prekey can be written to', async () => {
    const { at } = await limited({ LIMIT_BUNDLES_PER_TARGET: '1' });
    const [alice, bob] = [await opened(at), await opened(at)];
    const ask = async () => {
      const { devices } = await alice.client.call('requestBundle', {
        claimId: randomUUID(),
        userId: bob.address.userId,
      });
      return devices[0]!;
    };
    await ask();
    const bundle = await ask();
    expect(bundle.oneTimePreKeyAbsent).toBe('limited');
    await alice.device.establishSession({ userId: bob.address.userId, ...bundle });
    const envelope = await alice.device.encrypt(bob.address, 'hello all the same');
    await alice.client.call('sendMessages', {
      messageId: randomUUID(),
      userId: bob.address.userId,
      envelopes: [envelope],
    });
    await eventually(() => expect(bob.client.envelopes).toHaveLength(1));
    const [got] = bob.client.envelopes;
    if (got?.kind !== 'message') throw new Error('no message came');
    expect(await bob.device.decrypt(got)).toBe('hello all the same');
  });

  it('immunity 22: an empty peer’s answer is a usable bundle, and claims of it for every message are limited', async () => {
    const { at } = await limited({ LIMIT_BUNDLES_PER_PAIR: '10' });
    const bob = await enrol(at, someone(), { oneTimePreKeys: 0, pqOneTimePreKeys: 0 });
    const alice = await enrol(at, someone(), FEW_KEYS);
    const ask = () => ({ claimId: randomUUID(), userId: bob.address.userId });
    const { devices } = await alice.client.call('requestBundle', ask());
    expect(devices).toMatchObject([
      { oneTimePreKey: null, oneTimePreKeyAbsent: 'noneLeft', pqPreKey: { lastResort: true } },
    ]);
    await alice.client.call('sendMessages', letterTo(bob));
    const codes = await codesOf(alice.client, 30, 'requestBundle', ask);
    expect(codes.filter((code) => code === 'ok')).toHaveLength(9);
    expect(codes.at(-1)).toBe('RATE_LIMITED');
  });
});

describe('what is beyond its measure', () => {
  it('shows in the metrics: limits by name, and a device whose keys somebody drains', async () => {
    const { at } = await limited({ LIMIT_BUNDLES_PER_PAIR: '6', PREKEY_DRAIN_ALARM: '5' });
    const { userId } = (await enrol(at, someone(), FEW_KEYS)).address;
    const alice = await at.connect(someone());
    const metrics = async () => (await fetch(`${at.adminUrl}/metrics`)).text();
    await codesOf(alice, 4, 'requestBundle', () => ({ claimId: randomUUID(), userId }));
    expect(await metrics()).toContain('keygate_drains_suspected_total 0');
    await codesOf(alice, 4, 'requestBundle', () => ({ claimId: randomUUID(), userId }));
    const text = await metrics();
    expect(text).toContain('keygate_drains_suspected_total 1');
    expect(text).toContain('keygate_limits_hit_total{limit="bundlesPerPair"} 2');
    expect(text).not.toContain(userId);
  });
});

describe('messages', () => {
  it('are limited from one user to another', async () => {
    const { at, clock } = await limited({ LIMIT_MESSAGES_PER_PAIR: '4' });
    const [alice, bob, carol] = [await opened(at), await opened(at), await opened(at)];
    const codes = await codesOf(alice.client, 6, 'sendMessages', () => letterTo(bob));
    expect(codes).toEqual([...Array(4).fill('ok'), 'RATE_LIMITED', 'RATE_LIMITED']);
    await alice.client.call('sendMessages', letterTo(carol));
    await carol.client.call('sendMessages', letterTo(bob));
    await clock.advance(MINUTE_MS);
    await alice.client.call('sendMessages', letterTo(bob));
  });

  it('are limited in their bytes by recipient, whoever sends', async () => {
    const { at, clock } = await limited({ LIMIT_BYTES_PER_RECIPIENT: '1000' });
    const [alice, bob, carol] = [await opened(at), await opened(at), await opened(at)];
    await alice.client.call('sendMessages', letterTo(bob, 600));
    expect(await carol.client.refusal('sendMessages', letterTo(bob, 600))).toMatchObject({
      code: 'RATE_LIMITED',
    });
    await carol.client.call('sendMessages', letterTo(bob, 400));
    await carol.client.call('sendMessages', letterTo(alice, 600));
    await clock.advance(HOUR_MS);
    await carol.client.call('sendMessages', letterTo(bob, 600));
  });

  it('that are beyond several limits are told to come back when the last of them has room', async () => {
    const { at } = await limited({ LIMIT_MESSAGES_PER_PAIR: '1', LIMIT_BYTES_PER_RECIPIENT: '1000' });
    const [alice, bob, carol] = [await opened(at), await opened(at), await opened(at)];
    await alice.client.call('sendMessages', letterTo(bob, 600));
    const waitOf = async (bytes: number) =>
      (await alice.client.refusal('sendMessages', letterTo(bob, bytes))).retryAfterMs;
    expect(await waitOf(100)).toBeLessThanOrEqual(MINUTE_MS);
    await carol.client.call('sendMessages', letterTo(bob, 400));
    expect(await waitOf(600)).toBeGreaterThan(MINUTE_MS);
  });
});

describe('what stores nothing', () => {
  it('costs the recipient none of its bytes: no stranger keeps the others from writing to it', async () => {
    const { at } = await limited({ LIMIT_BYTES_PER_RECIPIENT: '1000' });
    const [alice, bob, mallory] = [await opened(at), await opened(at), await opened(at)];
    const letter = letterTo(bob, 900);
    const astray = { ...letter.envelopes[0]!, deviceId: 99 };
    for (let i = 0; i < 3; i++) {
      expect(
        await mallory.client.refusal('sendMessages', {
          ...letter,
          messageId: randomUUID(),
          envelopes: [astray],
        }),
      ).toMatchObject({ code: 'DEVICES_MISMATCHED' });
    }
    const short = letterTo(bob, 100);
    const besides = { ...short, envelopes: [...short.envelopes, astray], onMismatch: 'sendAnyway' as const };
    await mallory.client.call('sendMessages', besides);
    for (let i = 0; i < 3; i++) await mallory.client.call('sendMessages', short);
    await alice.client.call('sendMessages', letter);
    expect(await alice.client.refusal('sendMessages', letterTo(bob, 100))).toMatchObject({
      code: 'RATE_LIMITED',
    });
  });
});

describe('connections', () => {
  const refusedBy = async (connecting: Promise<Client>) => {
    const refusal = await connecting.then(
      () => 'it connected',
      (error: unknown) => error,
    );
    expect(refusal).toBeInstanceOf(RefusedError);
    return (refusal as RefusedError).error;
  };

  it('of one device are limited', async () => {
    const { at, clock } = await limited({ LIMIT_CONNECTS_PER_DEVICE: '2' });
    const device = someone();
    await at.connect(device);
    const second = await at.connect(device);
    const refusal = await refusedBy(at.connect(device));
    expect(refusal).toMatchObject({ code: 'RATE_LIMITED', retryAfterMs: expect.any(Number) });
    // Who is refused displaces nobody.
    await second.call('keyStatus');
    await at.connect({ ...device, deviceId: 2 });
    await clock.advance(refusal.retryAfterMs!);
    await at.connect(device);
  });

  it('of one user’s devices are limited', async () => {
    const { at } = await limited({ LIMIT_CONNECTS_PER_USER: '2' });
    const device = someone();
    await at.connect(device);
    await at.connect({ ...device, deviceId: 2 });
    expect(await refusedBy(at.connect({ ...device, deviceId: 3 }))).toMatchObject({ code: 'RATE_LIMITED' });
    await at.connect(someone());
  });

  it('from one address are limited in their number, and room is made when one ends', async () => {
    const { at } = await limited({ LIMIT_CONNECTIONS_PER_ADDRESS: '2', TRUSTED_PROXIES: '127.0.0.1' });
    const first = await at.connect(someone());
    const second = await openWebSocketPeer(at.url);
    expect(await refusedUpgrade(at.url)).toMatchObject({
      status: 429,
      headers: { 'retry-after': '10', 'cache-control': 'no-store' },
      body: { success: false, error: { code: 'RATE_LIMITED', retryable: true } },
    });
    expect(await hitsOf(at, 'connectionsPerAddress')).toBe(1);
    await expect(refusedUpgrade(at.url, { 'x-forwarded-for': '198.51.100.1' })).rejects.toThrow(
      'it became a WebSocket',
    );
    // By one that leaves, and by one that is cut off.
    for (const end of [() => first.close(), () => second.socket.resetAndDestroy()]) {
      end();
      await eventually(async () => (await at.connect(someone()).catch(() => null)) !== null, {
        that: 'room being made',
      });
      // For one.
      expect((await refusedUpgrade(at.url)).status).toBe(429);
    }
  });

  it('from one address are forgotten with the last of them', async () => {
    const { at } = await limited({ LIMIT_CONNECTIONS_PER_ADDRESS: '1' });
    for (let round = 0; round < 3; round++) {
      const client = await eventually(() => at.connect(someone()), { that: 'room being made' });
      expect((await refusedUpgrade(at.url)).status).toBe(429);
      client.close();
    }
  });

  it('from one address are limited in their rate, before a token is looked at', async () => {
    const { at, clock } = await limited({ LIMIT_HANDSHAKES_PER_ADDRESS: '3' });
    for (let i = 0; i < 3; i++) {
      expect(await refusedBy(connectClient(at.url, 'garbage'))).toMatchObject({ code: 'UNAUTHENTICATED' });
    }
    const refusal = await refusedUpgrade(at.url);
    expect(refusal).toMatchObject({ status: 429, body: { error: { code: 'RATE_LIMITED' } } });
    // Nobody gets another address by claiming one.
    expect((await refusedUpgrade(at.url, { 'x-forwarded-for': '198.51.100.1' })).status).toBe(429);
    await clock.advance(MINUTE_MS);
    await at.connect(someone());
  });
});

describe('a connection that brings too many frames', () => {
  it('is cut, and its device may come back', async () => {
    const { at } = await limited({ LIMIT_FRAMES_PER_SOCKET: '10' });
    const device = someone();
    const flooding = await at.connect(device);
    const calm = await at.connect(someone());
    const disconnected = flooding.disconnected;
    for (let i = 0; i < 200; i++) (flooding.socket as unknown as Socket).emit('no such event', i);
    expect(await disconnected).toMatch(/transport (close|error)/);
    await calm.call('keyStatus');
    // However many frames more had come by then.
    expect(await hitsOf(at, 'framesPerSocket')).toBe(1);
    await (await at.connect(device)).call('keyStatus');
  });

  it('is not cut for a burst within ten seconds’ worth, nor for what comes later', async () => {
    const { at, clock } = await limited({ LIMIT_FRAMES_PER_SOCKET: '10' });
    const client = await at.connect(someone());
    for (let round = 0; round < 3; round++) {
      await Promise.all(Array.from({ length: 90 }, () => client.call('keyStats')));
      await clock.advance(10_000);
    }
    expect(client.socket.connected).toBe(true);
  });

  it('is cut also where it has shown no token', async () => {
    const { at } = await limited({ LIMIT_FRAMES_PER_SOCKET: '10' });
    const socket = io(at.url, { transports: ['websocket'], autoConnect: false, reconnection: false });
    undo.push(() => socket.close());
    const closed = new Promise<string>((resolve) => {
      socket.io.engine?.on('close', resolve);
      socket.io.on('close', resolve);
    });
    socket.io.connect();
    await new Promise<void>((resolve) => socket.io.once('open', () => resolve()));
    for (let i = 0; i < 200; i++) socket.io.engine.write('9');
    expect(await closed).toMatch(/transport (close|error)/);
  });
});
