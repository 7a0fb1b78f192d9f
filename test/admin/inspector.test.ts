/** The inspector over whole gateways: what it shows of clients, who may look, and what it never tells. */
import { randomUUID } from 'node:crypto';
import { Redis } from 'ioredis';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { FLUSH_PERIOD_MS } from '../../src/admin/outbox.ts';
import { addressKey } from '../../src/protocol/ids.ts';
import { adminRoutes } from '../../src/protocol/inspector/admin-api.ts';
import type { OverviewSample } from '../../src/protocol/inspector/overview.ts';
import { eventually } from '../support/eventually.ts';
import { FEW_KEYS, gatewayFor, hold, opened, redisFor, someone, undoAfterEach } from '../support/flow.ts';
import {
  connectClient,
  enrol,
  open,
  type Party,
  send,
  startGateway,
  type TestGateway,
} from '../support/gateway.ts';
import { type InspectorClient, login, WITH_INSPECTOR, withCookie } from '../support/inspector.ts';
import { createManualClock } from '../support/manual-clock.ts';

const undo = undoAfterEach();
let shared: TestGateway;
beforeAll(async () => {
  shared = await startGateway({ env: { ...WITH_INSPECTOR, ADMIN_WRITE: 'true' } });
});
afterAll(() => shared.stop());

async function inspector(at: TestGateway = shared): Promise<InspectorClient> {
  const client = await login(at.adminUrl);
  undo.push(() => client.close());
  return client;
}

describe('the stream', () => {
  it('shows a request with its acknowledgement, its claim and its message’s life', async () => {
    const viewer = await inspector();
    const alice = await opened(shared);
    const bob = await opened(shared);
    const stream = await viewer.stream();
    const claimId = randomUUID();
    const bundle = await alice.client.call('requestBundle', { claimId, userId: bob.address.userId });
    const request = await stream.event('request', ({ event }) => event === 'requestBundle');
    expect(request).toMatchObject({
      device: addressKey(alice.address),
      direction: 'in',
      door: 'socket',
      gate: 'open',
      code: null,
      input: { claimId, userId: bob.address.userId },
      answer: {
        devices: [
          { deviceId: 1, identityKey: { bytes: 33, digest: expect.stringMatching(/^[0-9a-f]{10}$/) } },
        ],
      },
    });
    expect(request.bytes).toBeGreaterThan(claimId.length);
    expect(request.latencyMs).toBeGreaterThanOrEqual(0);
    expect(await stream.event('claim')).toMatchObject({
      device: addressKey(bob.address),
      peer: addressKey(alice.address),
      claimId,
      keyId: bundle.devices[0]!.oneTimePreKey!.keyId,
      absent: null,
    });

    const messageId = await send(alice.client, bob, 'hello');
    await stream.event('message', ({ stage }) => stage === 'acknowledged');
    const life = stream.events().filter((event) => event.kind === 'message' && event.messageId === messageId);
    expect(life.map((event) => event.kind === 'message' && event.stage)).toEqual([
      'stored',
      'poked',
      'pushed',
      'acknowledged',
    ]);
    expect(life.every(({ device }) => device === addressKey(bob.address))).toBe(true);
    expect(await stream.event('push', ({ event }) => event === 'messages')).toMatchObject({
      device: addressKey(bob.address),
      acknowledged: true,
      input: { envelopes: [{ kind: 'message', messageId, content: { bytes: 5 } }] },
      answer: { processed: [expect.any(String)] },
    });
  });

  it('shows gates, sockets and refused handshakes, with why', async () => {
    const viewer = await inspector();
    const stream = await viewer.stream();
    const bob = await opened(shared);
    const device = addressKey(bob.address);
    await bob.client.call('resetKeys', {});
    const closed = await stream.event('gate', (event) => event.device === device && event.reason !== null);
    expect(closed).toMatchObject({ from: 'open', to: 'validated', keyVersion: 1, reason: 'keysReset' });
    const steps = stream.events().filter((event) => event.kind === 'gate' && event.device === device);
    expect(steps.map((event) => event.kind === 'gate' && event.to)).toEqual([
      'validated',
      'open',
      'validated',
    ]);
    bob.client.close();
    const opening = await stream.event('socketOpened', (event) => event.device === device);
    expect(await stream.event('socketClosed', (event) => event.device === device)).toMatchObject({
      socket: opening.socket,
      gate: 'validated',
      reason: expect.any(String),
    });
    await shared.connect(bob.address).then((client) => client.close());
    await expect(connectClient(shared.url, 'no token')).rejects.toThrow('UNAUTHENTICATED');
    expect(await stream.event('handshakeRefused')).toMatchObject({ code: 'UNAUTHENTICATED', device: null });
  });

  it('filters on the server, by what the address says', async () => {
    const viewer = await inspector();
    const alice = await opened(shared);
    const bob = await opened(shared);
    const all = await viewer.stream();
    const few = await viewer.stream({
      device: [bob.address.userId],
      event: ['keyStatus', 'claim'],
      code: ['ok'],
    });
    const refused = await viewer.stream({ code: ['USER_NOT_FOUND'] });
    await alice.client.call('keyStatus');
    await bob.client.call('keyStats');
    await bob.client.call('keyStatus');
    await alice.client.refusal('requestBundle', { claimId: randomUUID(), userId: 'nobody' });
    await refused.event('request');
    await few.event('request');
    await eventually(() => expect(all.events().length).toBeGreaterThanOrEqual(4));
    expect(few.events()).toMatchObject([{ device: addressKey(bob.address), event: 'keyStatus' }]);
    expect(refused.events()).toMatchObject([{ device: addressKey(alice.address), code: 'USER_NOT_FOUND' }]);
    expect((await viewer.get('/api/stream?event=nonsense')).body?.error).toMatchObject({
      code: 'BAD_REQUEST',
      message: expect.stringContaining('event'),
    });
  });

  it('shows what was refused before it was read, and the bounce of what nobody can decrypt', async () => {
    const viewer = await inspector();
    const stream = await viewer.stream();
    const alice = await opened(shared);
    const bob = await enrol(shared, someone(), FEW_KEYS);
    await new Promise((resolve) =>
      (alice.client.socket as unknown as { emit(...args: unknown[]): void }).emit('nonsense', {}, resolve),
    );
    expect(await stream.event('request', ({ event }) => event === 'unknown')).toMatchObject({
      code: 'BAD_REQUEST',
      input: null,
    });
    const messageId = await send(alice.client, bob, 'lost');
    await bob.client.call('resetKeys', {});
    const bounced = await stream.event('message', ({ stage }) => stage === 'bounced');
    expect(bounced).toMatchObject({
      messageId,
      device: addressKey(bob.address),
      peer: addressKey(alice.address),
      reason: 'RECIPIENT_KEYS_RESET',
    });
  });
});

describe('the page of a device', () => {
  const kindOf = async (viewer: InspectorClient, { address }: Pick<Party, 'address'>, messageId?: string) =>
    (await viewer.device(addressKey(address), messageId)).diagnoses[0]!.kind;

  it('tells its key set by ids, counts and versions, its claims and what waits', async () => {
    const viewer = await inspector();
    const alice = await opened(shared);
    const bob = await enrol(shared, someone(), { oneTimePreKeys: 3, pqOneTimePreKeys: 1 });
    const claimId = randomUUID();
    const { devices } = await alice.client.call('requestBundle', { claimId, userId: bob.address.userId });
    const [bundle] = devices;
    const messageId = await send(alice.client, bob, 'twelve bytes');
    const status = await bob.client.call('keyStatus');
    expect(await viewer.device(addressKey(bob.address))).toMatchObject({
      state: 'uploaded',
      keyVersion: 1,
      countVersion: status.countVersion,
      keySet: {
        registrationId: bob.device.registrationId,
        signedPreKeyId: status.signedPreKeyId,
        signedPreKeyExpiresAt: status.signedPreKeyExpiresAt,
        pqLastResortPreKeyId: status.pqLastResortPreKeyId,
        availableCount: 2,
        pqAvailableCount: 0,
        claimedCount: 1,
        pqClaimedCount: 1,
      },
      claims: [
        {
          claimer: addressKey(alice.address),
          claimId,
          keyId: bundle!.oneTimePreKey!.keyId,
          pqKeyId: bundle!.pqPreKey!.keyId,
          pqFallback: false,
        },
      ],
      pending: {
        count: 1,
        first: [{ messageId, kind: 'message', peer: addressKey(alice.address), bytes: 12, dueAt: null }],
      },
      sockets: [{ gate: 'connected', windowCount: 0, windowFull: false, paused: false }],
    });
  });

  it('says why nothing is delivered, from the first upload to the acknowledgement', async () => {
    const viewer = await inspector();
    const alice = await opened(shared);
    const bob = { address: someone() };
    expect(await kindOf(viewer, bob)).toBe('neverUploaded');
    const party = await enrol(shared, bob.address, FEW_KEYS);
    expect(await kindOf(viewer, bob)).toBe('neverValidated');
    const messageId = await send(alice.client, party, 'hello');
    expect(await kindOf(viewer, bob, messageId)).toBe('neverValidated');
    await party.client.call('validateKeys', party.device.validateInput());
    expect(await kindOf(viewer, bob)).toBe('notReady');
    await party.client.call('rotateSignedPreKey', { signedPreKey: party.device.newSignedPreKey() });
    expect(await kindOf(viewer, bob, messageId)).toBe('validatedOlderKeySet');

    party.client.onMessages = () => null;
    await open(party);
    await eventually(() => party.client.envelopes.length > 0);
    expect(await kindOf(viewer, bob, messageId)).toBe('notAcknowledged');
    party.client.close();
    await eventually(async () => (await kindOf(viewer, bob, messageId)) === 'noSocket');

    const again = await shared.connect(bob.address);
    again.onMessages = ({ envelopes }) => ({
      processed: [],
      failed: envelopes.map(({ id }) => ({ id, reason: 'temporary' as const })),
    });
    await open({ device: party.device, client: again });
    await eventually(async () => (await kindOf(viewer, bob, messageId)) === 'putOff');
    again.onMessages = ({ envelopes }) => ({ processed: envelopes.map(({ id }) => id) });
    await eventually(async () => (await kindOf(viewer, bob, messageId)) === 'delivered');
    expect(await kindOf(viewer, bob)).toBe('nothingPending');
    expect(await kindOf(viewer, bob, randomUUID())).toBe('neverStored');

    again.close();
    const lost = await send(alice.client, party, 'lost');
    const third = await shared.connect(bob.address);
    await third.call('resetKeys', {});
    await eventually(async () => (await kindOf(viewer, bob, lost)) === 'bounced');
    expect(await kindOf(viewer, bob)).toBe('keysReset');
    await eventually(() => alice.client.envelopes.length > 0);
    expect(await kindOf(viewer, bob, lost)).toBe('bounced');
  });

  it('says that the window is full, and that the token ran out', async () => {
    const clock = createManualClock();
    const gateway = await gatewayFor(undo, { env: WITH_INSPECTOR, clock });
    const viewer = await login(gateway.adminUrl);
    undo.push(() => viewer.close());
    const alice = await opened(gateway);
    const bob = await opened(gateway);
    bob.client.onMessages = () => null;
    await Promise.all(Array.from({ length: 257 }, (_, i) => send(alice.client, bob, String(i))));
    await eventually(() => bob.client.envelopes.length === 256);
    const { diagnoses, sockets } = await viewer.device(addressKey(bob.address));
    expect(diagnoses).toMatchObject([{ kind: 'windowFull', windowCount: 256 }]);
    expect(sockets).toMatchObject([{ windowFull: true, windowCount: 256, oldestPushAt: expect.any(String) }]);

    const carol = await enrol(gateway, someone(), FEW_KEYS);
    // A token ends with a whole second.
    await clock.advance(3_601_000);
    expect(await kindOf(viewer, carol)).toBe('tokenExpired');
  });

  it('refuses what is no device', async () => {
    const viewer = await inspector();
    for (const name of ['alice', 'alice.0', 'alice.128', '%20.1']) {
      expect((await viewer.get(`/api/devices/${name}`)).status, name).toBe(400);
    }
  });
});

describe('sockets', () => {
  it('are listed with their gate’s history, counted beyond the list, and disconnected', async () => {
    const viewer = await inspector();
    const bob = await opened(shared);
    const device = addressKey(bob.address);
    await bob.client.call('rotateSignedPreKey', { signedPreKey: bob.device.newSignedPreKey() });
    const { sockets, total, nodes } = await viewer.sockets({ device: bob.address.userId });
    expect(total).toBe(1);
    expect(nodes).toMatchObject([{ answering: true }]);
    const [socket] = sockets;
    expect(socket).toMatchObject({
      device,
      gate: 'open',
      keyVersion: 2,
      gateHistory: [
        { to: 'validated', keyVersion: 1 },
        { to: 'open', keyVersion: 1 },
        { to: 'open', keyVersion: 2 },
      ],
      bufferedBytes: 0,
      pendingCount: 0,
    });
    expect((await viewer.sockets({ device, gate: 'connected' })).sockets).toEqual([]);

    const target = { node: socket!.node, socket: socket!.socket };
    expect((await viewer.post('/api/sockets/disconnect', target)).body).toEqual({ disconnected: true });
    expect(await bob.client.disconnected).toBe('transport close');
    expect((await viewer.post('/api/sockets/disconnect', target)).body).toEqual({ disconnected: false });
  });
});

describe('a message', () => {
  it('has a timeline of what was seen and what the store remembers', async () => {
    const viewer = await inspector();
    await viewer.stream({ event: ['gate'] });
    const alice = await opened(shared);
    const bob = await opened(shared);
    const messageId = await send(alice.client, bob, 'hello');
    const timeline = await eventually(async () => {
      const found = await viewer.message(messageId);
      expect(found.events).toHaveLength(4);
      return found;
    });
    expect(timeline.events.map((event) => event.kind === 'message' && event.stage)).toEqual([
      'stored',
      'poked',
      'pushed',
      'acknowledged',
    ]);
    const recipients = [
      { device: addressKey(bob.address), sender: addressKey(alice.address), state: 'delivered' },
    ];
    expect(timeline.recipients).toMatchObject(recipients);
    expect((await viewer.message(messageId, bob.address.userId)).recipients).toMatchObject(recipients);
    expect((await viewer.message(messageId, addressKey(bob.address))).recipients).toMatchObject(recipients);
    expect((await viewer.message(randomUUID(), bob.address.userId)).recipients).toEqual([]);
  });

  it('tells of every device that it went to', async () => {
    const viewer = await inspector();
    await viewer.stream({ event: ['gate'] });
    const alice = await opened(shared);
    const phone = await opened(shared);
    const laptop = await opened(shared, { ...phone.address, deviceId: 2 });
    hold(laptop.client);
    const messageId = randomUUID();
    await alice.client.call('sendMessages', {
      messageId,
      userId: phone.address.userId,
      envelopes: [phone, laptop].map(({ address, device }) => ({
        deviceId: address.deviceId,
        registrationId: device.registrationId,
        type: 3,
        content: Buffer.from('to both').toString('base64'),
      })),
    });
    await eventually(async () => {
      const { recipients } = await viewer.message(messageId);
      expect(recipients.map(({ device, state }) => `${device} ${state}`).toSorted()).toEqual([
        `${addressKey(phone.address)} delivered`,
        `${addressKey(laptop.address)} waiting`,
      ]);
    });
  });
});

describe('the overview', () => {
  it('counts each second what happened in it, and names devices that run low', async () => {
    const viewer = await inspector();
    const alice = await opened(shared);
    const bob = await opened(shared);
    const { samples } = await viewer.overview();
    await eventually(() => samples.length > 0);
    await alice.client.call('requestBundle', { claimId: randomUUID(), userId: bob.address.userId });
    await alice.client.call('requestBundle', { claimId: randomUUID(), userId: bob.address.userId });
    await alice.client.refusal('requestBundle', { claimId: randomUUID(), userId: 'nobody' });
    await send(alice.client, bob, 'hello');
    const sum = (of: (sample: OverviewSample) => number) =>
      samples.reduce((total, sample) => total + of(sample), 0);
    await eventually(() => expect(sum((sample) => sample.messages.acknowledged)).toBe(1));
    expect(sum((sample) => sample.preKeys.ec)).toBe(1);
    expect(sum((sample) => sample.preKeys.fallback)).toBe(1);
    expect(sum((sample) => sample.messages.stored)).toBe(1);
    const bundles = samples.flatMap((sample) =>
      sample.requests.filter(({ event }) => event === 'requestBundle'),
    );
    expect(bundles.reduce((total, { count }) => total + count, 0)).toBe(3);
    expect(bundles.reduce((total, { errorCount }) => total + errorCount, 0)).toBe(1);
    const latest = samples.at(-1)!;
    expect(latest.gates.open).toBeGreaterThanOrEqual(2);
    expect(latest.sockets).toBeGreaterThanOrEqual(2);
    await eventually(() =>
      expect(samples.at(-1)!.lowDevices).toContainEqual(
        expect.objectContaining({ device: addressKey(bob.address), pqAvailableCount: 0 }),
      ),
    );
  });
});

describe('who may look', () => {
  it('is nobody where no token is set; health needs none', async () => {
    const gateway = await gatewayFor(undo);
    expect((await fetch(`${gateway.adminUrl}/api/session`)).status).toBe(404);
    expect((await fetch(`${gateway.adminUrl}/readyz`)).status).toBe(200);
    expect((await fetch(`${shared.adminUrl}/livez`)).status).toBe(200);
  });

  it('reads health as it is now, and by GET alone', async () => {
    for (const path of ['/livez', '/readyz']) {
      const { status, headers } = await fetch(`${shared.adminUrl}${path}`);
      expect([status, headers.get('cache-control')]).toEqual([200, 'no-store']);
      expect((await fetch(`${shared.adminUrl}${path}`, { method: 'POST' })).status).toBe(405);
    }
  });

  it('is whoever logged in, until the logout: then the cookie is worth nothing, and its streams end', async () => {
    const answer = await fetch(`${shared.adminUrl}/api/login`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ token: WITH_INSPECTOR.ADMIN_TOKEN }),
    });
    const [cookie, ...attributes] = answer.headers.get('set-cookie')!.split('; ');
    expect(attributes).toEqual(expect.arrayContaining(['HttpOnly', 'SameSite=Strict', 'Path=/']));
    const viewer = withCookie(shared.adminUrl, cookie!);
    const thief = withCookie(shared.adminUrl, cookie!);
    undo.push(() => thief.close());
    expect(adminRoutes.session.answer.parse((await thief.get('/api/session')).body).writable).toBe(true);
    const stream = await thief.stream();
    expect((await viewer.post('/api/logout')).status).toBe(200);
    await stream.ended;
    const paths = ['/api/session', '/api/sockets', '/api/devices/alice.1', '/api/stream', '/api/overview'];
    for (const path of [...paths, `/api/messages/${randomUUID()}`]) {
      const { status, body } = await thief.get(path);
      expect({ path, status, code: body?.error?.code }).toEqual({
        path,
        status: 401,
        code: 'UNAUTHENTICATED',
      });
    }
    const target = { node: 'any', socket: 1 };
    expect((await thief.post('/api/sockets/disconnect', target)).status).toBe(401);
  });

  it('keeps its cookie from plain HTTP where a proxy speaks HTTPS for it', async () => {
    const { headers } = await fetch(`${shared.adminUrl}/api/login`, {
      method: 'POST',
      headers: { 'content-type': 'application/json', 'x-forwarded-proto': 'https' },
      body: JSON.stringify({ token: WITH_INSPECTOR.ADMIN_TOKEN }),
    });
    expect(headers.get('set-cookie')!.split('; ')).toContain('Secure');
  });

  it('opens 32 streams at most, and another when one has ended', async () => {
    const gateway = await gatewayFor(undo, { env: WITH_INSPECTOR });
    const viewer = await login(gateway.adminUrl);
    undo.push(() => viewer.close());
    const streams = await Promise.all(Array.from({ length: 32 }, () => viewer.stream()));
    const { status, body, headers } = await viewer.get('/api/stream');
    expect({ status, code: body?.error?.code }).toEqual({ status: 503, code: 'UNAVAILABLE' });
    expect(headers.get('retry-after')).toBe('5');
    streams[0]!.close();
    await eventually(() => viewer.stream());
  });

  it('may only read unless told otherwise, and only from the page itself', async () => {
    const gateway = await gatewayFor(undo, { env: WITH_INSPECTOR });
    const viewer = await login(gateway.adminUrl);
    const target = { node: 'any', socket: 1 };
    expect((await viewer.post('/api/sockets/disconnect', target)).body?.error?.code).toBe('FORBIDDEN');
    const elsewhere = { origin: 'https://evil.example' };
    expect((await viewer.post('/api/logout', {}, elsewhere)).status).toBe(403);
    expect((await viewer.post('/api/logout', {}, { origin: gateway.adminUrl })).status).toBe(200);
  });

  it('sends a wrong token a thousand times and is made to wait', async () => {
    const clock = createManualClock();
    const gateway = await gatewayFor(undo, { env: WITH_INSPECTOR, clock });
    const statuses = new Map<number, number>();
    for (let round = 0; round < 20; round++) {
      const tries = Array.from({ length: 50 }, async (_, i) => {
        const response =
          i % 2 === 0
            ? await fetch(`${gateway.adminUrl}/api/session`, { headers: { authorization: 'Bearer wrong' } })
            : await fetch(`${gateway.adminUrl}/api/login`, {
                method: 'POST',
                headers: { 'content-type': 'application/json' },
                body: JSON.stringify({ token: 'wrong' }),
              });
        await response.arrayBuffer();
        statuses.set(response.status, (statuses.get(response.status) ?? 0) + 1);
      });
      await Promise.all(tries);
    }
    expect(Object.fromEntries(statuses)).toEqual({ 401: 5, 429: 995 });
    await expect(login(gateway.adminUrl)).rejects.toThrow(/429.*"retryAfterMs":1000/);
    await clock.advance(1_000);
    (await login(gateway.adminUrl)).close();
  });

  it('is protected by headers that let nothing foreign in', async () => {
    const { headers } = await fetch(`${shared.adminUrl}/`);
    expect(headers.get('content-security-policy')).toMatch(/^default-src 'none'; script-src 'self';/);
    expect(headers.get('content-security-policy')).not.toContain('unsafe');
    expect(headers.get('x-content-type-options')).toBe('nosniff');
    expect((await fetch(`${shared.adminUrl}/api/session`)).headers.get('cache-control')).toBe('no-store');
    const viewer = await login(shared.adminUrl);
    const aborting = new AbortController();
    undo.push(() => aborting.abort());
    for (const path of ['/api/stream', '/api/overview']) {
      const init = { headers: { cookie: viewer.cookie }, signal: aborting.signal };
      const stream = await fetch(`${shared.adminUrl}${path}`, init);
      expect(stream.headers.get('x-content-type-options')).toBe('nosniff');
      expect(stream.headers.get('content-security-policy')).toBe(headers.get('content-security-policy'));
    }
  });
});

describe('two nodes', () => {
  it('are one stream, one list of sockets and one timeline, and a socket of either is disconnected', async () => {
    const redis = await redisFor(undo);
    const env = { ...WITH_INSPECTOR, ADMIN_WRITE: 'true' };
    const one = await gatewayFor(undo, { env, redisUrl: redis.url });
    const two = await gatewayFor(undo, { env, redisUrl: redis.url, databaseUrl: one.databaseUrl });
    const viewer = await login(one.adminUrl);
    undo.push(() => viewer.close());
    const stream = await viewer.stream();
    const { samples } = await viewer.overview();
    await eventually(() => stream.frames.some((frame) => frame.type === 'beat' && frame.nodes.length === 2));
    const alice = await opened(one);
    const bob = await opened(two);
    const messageId = await send(alice.client, bob, 'across');
    await stream.event('message', (event) => event.stage === 'acknowledged' && event.messageId === messageId);
    const life = stream.events().filter((event) => event.kind === 'message' && event.messageId === messageId);
    const nodes = new Set(life.map(({ node }) => node));
    expect(nodes.size).toBe(2);
    expect((await viewer.message(messageId)).events).toHaveLength(4);
    await eventually(() => expect(samples.at(-1)!.nodes).toHaveLength(2));
    await eventually(() => expect(samples.at(-1)!.gates.open).toBe(2));

    const { sockets, total } = await viewer.sockets();
    expect(total).toBe(2);
    const far = sockets.find(({ device }) => device === addressKey(bob.address))!;
    expect((await viewer.device(far.device)).diagnoses).toMatchObject([
      { kind: 'nothingPending' },
      { kind: 'otherNode', node: far.node, answering: true },
    ]);
    const target = { node: far.node, socket: far.socket };
    expect((await viewer.post('/api/sockets/disconnect', target)).body).toEqual({ disconnected: true });
    await bob.client.disconnected;
    await stream.event('socketClosed', (event) => event.socket === far.socket);

    // Equal keys have equal digests wherever they are seen.
    const claim = { claimId: randomUUID(), userId: alice.address.userId };
    await alice.client.ask('keyStatus');
    const carol = await opened(two);
    await carol.client.call('requestBundle', claim);
    const bundle = await stream.event('request', ({ event }) => event === 'requestBundle');
    const status = await stream.event('request', ({ event }) => event === 'keyStatus');
    const { identityKey } = status.answer as { identityKey: { digest: string } };
    expect(bundle.node).not.toBe(status.node);
    expect(bundle.answer).toMatchObject({ devices: [{ identityKey }] });
  });

  it('say nothing to each other while nobody looks', async () => {
    const redis = await redisFor(undo);
    const said: string[] = [];
    const [listener, teller] = [new Redis(redis.url), new Redis(redis.url)];
    undo.push(() => listener.disconnect());
    undo.push(() => teller.disconnect());
    await listener.psubscribe('keygate:inspector*');
    listener.on('pmessage', (_pattern, _channel, message: string) => said.push(message));
    const one = await gatewayFor(undo, { env: WITH_INSPECTOR, redisUrl: redis.url });
    const clock = createManualClock();
    const two = await gatewayFor(undo, {
      env: WITH_INSPECTOR,
      redisUrl: redis.url,
      databaseUrl: one.databaseUrl,
      clock,
    });
    const alice = await opened(two);
    /** What was said until now has been heard when a message of ours has. */
    const heardAll = async (): Promise<string[]> => {
      // Events are gathered for so long.
      await clock.advance(FLUSH_PERIOD_MS);
      const marker = `marker ${randomUUID()}`;
      await teller.publish('keygate:inspector:test', marker);
      await eventually(() => said.includes(marker));
      return said.filter((message) => !message.startsWith('marker'));
    };
    await alice.client.call('keyStatus');
    expect(await heardAll()).toEqual([]);
    const viewer = await login(one.adminUrl);
    const stream = await viewer.stream();
    await eventually(() => expect(said.some((message) => message.includes('"answer"'))).toBe(true));
    await alice.client.call('keyStatus');
    expect((await heardAll()).some((message) => message.includes('keyStatus'))).toBe(true);
    stream.close();
    // Answers to what was asked just before may come behind the last question.
    await eventually(() => {
      const [questions, answers] = ['watch', 'answer'].map((say) =>
        said.filter((message) => message.includes(`"say":"${say}"`)),
      );
      expect(questions!.at(-1)).toContain('"viewers":[],"counts":false');
      expect(answers).toHaveLength(questions!.length);
    });
    const before = await heardAll();
    await alice.client.call('keyStatus');
    expect(await heardAll()).toEqual(before);
  });
});
