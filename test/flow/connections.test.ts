/** Whose connection counts: displacement, late ends, several nodes, lost pokes, and what is left of sockets that ended. */
import { createServer, type IncomingMessage, request, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import postgres from 'postgres';
import { io, Manager, type Socket } from 'socket.io-client';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createInProcessRateLimiter } from '../../src/backends/in-process/rate-limiter.ts';
import type { ServedSocket, Session } from '../../src/delivery/session.ts';
import { createSocketDoor, type SocketDoorParts } from '../../src/gateway/server.ts';
import { systemClock } from '../../src/lib/clock.ts';
import { silentLog } from '../../src/lib/log.ts';
import type { MessagesAcknowledgement } from '../../src/protocol/events.ts';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import type { Dispatch } from '../../src/requests/dispatch.ts';
import type { RequestContext } from '../../src/requests/handlers.ts';
import { createLimits } from '../../src/requests/limits.ts';
import { createObserver, type Observer } from '../../src/requests/observe.ts';
import { eventually } from '../support/eventually.ts';
import {
  afterOthersGotTheirs,
  FEW_KEYS,
  gatewayFor,
  hold,
  opened,
  redisFor,
  reopened,
  someone,
  undoAfterEach,
} from '../support/flow.ts';
import {
  type Client,
  connectClient,
  contents,
  enrol,
  open,
  type Party,
  type RefusedError,
  send,
  startGateway,
  type TestGateway,
} from '../support/gateway.ts';
import { SignalDevice } from '../support/libsignal-device.ts';
import { createManualClock } from '../support/manual-clock.ts';

const undo = undoAfterEach();
let shared: TestGateway;

beforeAll(async () => {
  shared = await startGateway();
});
afterAll(() => shared.stop());

/** Two nodes on one PostgreSQL and one Redis. */
async function twoNodes() {
  const redis = await redisFor(undo);
  const first = await gatewayFor(undo, { redisUrl: redis.url });
  const second = await gatewayFor(undo, { redisUrl: redis.url, databaseUrl: first.databaseUrl });
  return { redis, first, second };
}

/** Two nodes that don't hear of each other: every poke and displacement between them is lost. */
async function twoDeafNodes() {
  const clock = createManualClock();
  const first = await gatewayFor(undo, { clock });
  const second = await gatewayFor(undo, { clock, databaseUrl: first.databaseUrl });
  return { clock, first, second };
}

/** A client that reconnects as Socket.IO's client does when it may. */
async function persistent(at: TestGateway, address: { userId: string; deviceId: number }): Promise<Socket> {
  const socket = io(at.url, {
    transports: ['websocket'],
    auth: { token: await at.token(address) },
    forceNew: true,
    reconnectionDelay: 1,
    reconnectionDelayMax: 1,
  });
  undo.push(() => socket.close());
  await new Promise<void>((resolve, reject) => {
    socket.once('connect', resolve);
    socket.once('connect_error', reject);
  });
  return socket;
}

describe('the newest connection of a device', () => {
  it('displaces the older one on its node, which is told so and does not reconnect by itself', async () => {
    const alice = await opened(shared);
    const bob = await enrol(shared, someone(), FEW_KEYS);
    bob.client.close();
    const older = await persistent(shared, bob.address);
    let displaced = 0;
    let connects = 0;
    older.on('displaced', () => {
      displaced += 1;
    });
    older.on('connect', () => {
      connects += 1;
    });
    const ended = new Promise<string>((resolve) => older.once('disconnect', resolve));
    const newer = await reopened(shared, bob);
    expect(await ended).toBe('io server disconnect');
    await send(alice.client, bob, 'for the newer');
    await eventually(() => expect(contents(newer.client)).toEqual(['for the newer']));
    await afterOthersGotTheirs(shared, alice.client);
    expect({ displaced, connects }).toEqual({ displaced: 1, connects: 0 });
    expect(newer.client.waiting('displaced')).toBe(0);
  });

  it('displaces the older one on another node', async () => {
    const { first, second } = await twoNodes();
    const alice = await opened(first);
    const bob = await opened(first);
    const newer = await reopened(second, bob);
    await bob.client.next('displaced');
    expect(await bob.client.disconnected).toBe('io server disconnect');
    await send(alice.client, bob, 'for the newer');
    await eventually(() => expect(contents(newer.client)).toEqual(['for the newer']));
    expect(contents(bob.client)).toEqual([]);
  });

  it('is the only one left of twenty that come at once, and is served', async () => {
    const { first, second } = await twoNodes();
    for (const nodes of [[first], [first, second]]) {
      const alice = await opened(first);
      const bob = await enrol(first, someone(), FEW_KEYS);
      const clients = await Promise.all(
        Array.from({ length: 20 }, (_, i) => nodes[i % nodes.length]!.connect(bob.address)),
      );
      clients.push(bob.client);
      const alive = (): Client[] => clients.filter((client) => client.socket.connected);
      await eventually(() => expect(alive()).toHaveLength(1), { that: 'one connection being left' });
      await open({ client: alive()[0]!, device: bob.device });
      await send(alice.client, bob, 'for the last');
      await eventually(() => expect(contents(alive()[0]!)).toEqual(['for the last']));
      for (const client of clients) expect(client.waiting('displaced')).toBe(client === alive()[0] ? 0 : 1);
    }
  });

  it('immunity 26: stays served when the older one ends late, on one node and across two', async () => {
    const { first, second } = await twoNodes();
    const deaf = await twoDeafNodes();
    for (const [older, newer] of [
      [first, first],
      [first, second],
      [second, first],
      // Here the older one is not told, so that its end comes late indeed.
      [deaf.first, deaf.second],
    ] as const) {
      const alice = await opened(newer);
      const bob = await opened(older);
      const again = await reopened(newer, bob);
      bob.client.close();
      await bob.client.disconnected;
      for (let i = 0; i < 3; i++) {
        await send(alice.client, bob, String(i));
        await eventually(() => expect(contents(again.client)).toHaveLength(i + 1));
      }
      expect(again.client.waiting('displaced')).toBe(0);
    }
  });

  it('gets what the older one was pushed and had not acknowledged, as it was', async () => {
    const { first, second } = await twoNodes();
    const alice = await opened(first);
    const bob = await opened(first);
    hold(bob.client);
    for (const text of ['1', '2', '3']) await send(alice.client, bob, text);
    await eventually(() => expect(bob.client.envelopes).toHaveLength(3));
    const again = await reopened(second, bob);
    await again.client.next('queueEmpty');
    expect(again.client.envelopes).toEqual(bob.client.envelopes);
  });
});

describe('a node that does not know that it was superseded', () => {
  it.each([
    ['deletes nothing', (ids: string[]): MessagesAcknowledgement => ({ processed: ids })],
    [
      'puts nothing off',
      (ids: string[]): MessagesAcknowledgement => ({
        processed: [],
        failed: ids.map((id) => ({ id, reason: 'temporary' })),
      }),
    ],
  ])('%s: its late acknowledgements count no more', async (_, verdict) => {
    const { first, second } = await twoDeafNodes();
    const alice = await opened(second);
    const bob = await opened(first);
    let answer = (): void => {};
    bob.client.onMessages = () => null;
    bob.client.socket.on('messages', (page, acknowledge) => {
      answer = () => acknowledge(verdict(page.envelopes.map((envelope) => envelope.id)));
    });
    await send(alice.client, bob, 'once');
    // The poke is lost between the two nodes: a look of its own finds the message.
    await bob.client.call('clientReady');
    await eventually(() => expect(bob.client.envelopes).toHaveLength(1));

    const newer = await reopened(second, bob, () => null);
    await eventually(() => expect(newer.client.envelopes).toHaveLength(1));
    answer();
    // The look that follows the answer finds the newer connection.
    await bob.client.next('displaced');
    newer.client.close();

    const last = await reopened(second, bob);
    expect(await last.client.next('queueEmpty')).toEqual({ deliveredCount: 1 });
    expect(last.client.envelopes).toEqual(bob.client.envelopes);
  });

  it('reads nothing: what comes is for the newer connection, and the older one is displaced', async () => {
    const { first, second } = await twoDeafNodes();
    const bob = await opened(first);
    const newer = await reopened(second, bob);
    // Sent by way of the first node, whose bus still knows the older connection.
    const alice = await opened(first);
    await send(alice.client, bob, 'for the newer');
    await bob.client.next('displaced');
    expect(contents(bob.client)).toEqual([]);
    await newer.client.call('clientReady');
    await eventually(() => expect(contents(newer.client)).toEqual(['for the newer']));
  });

  it('refuses clientReady, so that the newer connection stays the served one', async () => {
    const { first, second } = await twoDeafNodes();
    const bob = await enrol(first, someone(), FEW_KEYS);
    await bob.client.call('validateKeys', bob.device.validateInput());
    const newer = await reopened(second, bob);
    await expect(bob.client.call('clientReady')).rejects.toThrow('io server disconnect');
    await bob.client.next('displaced');
    const alice = await opened(second);
    await send(alice.client, bob, 'for the newer');
    await eventually(() => expect(contents(newer.client)).toEqual(['for the newer']));
  });

  it.each<[string, (older: Party) => Promise<unknown>]>([
    [
      'replaces no identity',
      ({ client, address }) =>
        client.call('uploadKeys', {
          ...new SignalDevice(address).uploadInput(FEW_KEYS),
          replaceIdentity: true,
        }),
    ],
    ['adds no prekeys', ({ client, device }) => client.call('addPreKeys', device.morePreKeys(1))],
    ['withdraws none', ({ client }) => client.call('withdrawPreKeys', { preKeyIds: [1] })],
    [
      'rotates nothing',
      ({ client, device }) => client.call('rotateSignedPreKey', { signedPreKey: device.newSignedPreKey() }),
    ],
    ['resets nothing', ({ client }) => client.call('resetKeys', { reason: 'late' })],
  ])('%s: what it left behind is carried out too late', async (_, change) => {
    const { first, second } = await twoDeafNodes();
    const bob = await opened(first);
    const newer = await reopened(second, bob);
    const before = await newer.client.call('keyStatus');
    await expect(change(bob)).rejects.toThrow('a newer connection of this device took over');
    expect(await newer.client.call('keyStatus')).toEqual(before);
  });

  it('undoes no change of a newer connection that has not opened its gate yet', async () => {
    const { first, second } = await twoDeafNodes();
    const bob = await opened(first);
    const newer = await second.connect(bob.address);
    const replaced = new SignalDevice(bob.address);
    await newer.call('uploadKeys', { ...replaced.uploadInput(FEW_KEYS), replaceIdentity: true });
    await newer.call('addPreKeys', replaced.morePreKeys(1));
    const before = await newer.call('keyStatus');
    const late = bob.client.call('uploadKeys', {
      ...new SignalDevice(bob.address).uploadInput(FEW_KEYS),
      replaceIdentity: true,
    });
    await expect(late).rejects.toThrow('a newer connection of this device took over');
    expect(await newer.call('keyStatus')).toEqual(before);
    await open({ client: newer, device: replaced });
  });

  it('undoes nothing that a newer connection was told to stand already', async () => {
    const { first, second } = await twoDeafNodes();
    const address = someone();
    const older = await first.connect(address);
    const newer = await second.connect(address);
    expect(await newer.call('resetKeys', { reason: 'to begin afresh' })).toEqual({ keyVersion: 0 });
    const late = older.call('uploadKeys', new SignalDevice(address).uploadInput(FEW_KEYS));
    await expect(late).rejects.toThrow('a newer connection of this device took over');

    const bob = await enrol(first, someone(), FEW_KEYS);
    const again = await second.connect(bob.address);
    const { signedPreKey } = bob.device.uploadInput(FEW_KEYS);
    expect(await again.call('rotateSignedPreKey', { signedPreKey })).toMatchObject({ keyVersion: 1 });
    const rotation = bob.client.call('rotateSignedPreKey', { signedPreKey: bob.device.newSignedPreKey() });
    await expect(rotation).rejects.toThrow('a newer connection of this device took over');
    expect(await again.call('keyStatus')).toMatchObject({ signedPreKeyId: signedPreKey.keyId });
  });
});

/** Two sessions of a gateway's database: one that holds up what the gateway does, and one that sees what waits. */
function sessionsAt({ databaseUrl }: TestGateway) {
  const sql = postgres(databaseUrl, { max: 1 });
  const observer = postgres(databaseUrl, { max: 1 });
  undo.push(
    () => sql.end(),
    () => observer.end(),
  );
  return {
    sql,
    observer,
    /** Resolves when so many sessions wait for a lock. */
    waiting: (count: number) =>
      eventually(async () => {
        const sessions = await observer`
          SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`;
        expect(sessions).toHaveLength(count);
      }),
  };
}

/** A request by HTTP that was let in, and of whose body half has come. */
async function letIn(at: TestGateway, { address }: Party, path: string, body: unknown) {
  const { sql, observer } = sessionsAt(at);
  const busy = () => observer<{ query: string }[]>`
    SELECT query FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'keygate' AND state <> 'idle'`;
  await sql`BEGIN`;
  await sql`LOCK TABLE devices`;
  const bytes = Buffer.from(JSON.stringify(body));
  const token = await at.token(address);
  const asked = request(`${at.url}${path}`, {
    method: 'POST',
    headers: {
      authorization: `Bearer ${token}`,
      'content-type': 'application/json',
      'content-length': bytes.length,
    },
  });
  asked.write(bytes.subarray(0, 10));
  // Whether its token was revoked is asked before its body is read. Its device's own session may look beside it.
  await eventually(async () => {
    expect((await busy()).some(({ query }) => /^SELECT .*revoked_at/s.test(query))).toBe(true);
  });
  await sql`COMMIT`;
  await eventually(async () => expect(await busy()).toHaveLength(0));
  return {
    async finish(): Promise<{ status: number | undefined; body: unknown }> {
      const answer = new Promise<IncomingMessage>((resolve, reject) => {
        asked.once('response', resolve).once('error', reject);
      });
      asked.end(bytes.subarray(10));
      const chunks: Buffer[] = [];
      for await (const chunk of await answer) chunks.push(chunk as Buffer);
      return { status: (await answer).statusCode, body: JSON.parse(Buffer.concat(chunks).toString()) };
    },
  };
}

describe('a change of keys that its socket has left behind', () => {
  it('undoes nothing that its device has asked for by HTTP since', async () => {
    const { first, second } = await twoDeafNodes();
    const other = await opened(first);
    const bob = await opened(first);
    const { sql, waiting } = sessionsAt(first);
    const post = async (at: TestGateway, path: string, body: unknown) =>
      await fetch(`${at.url}${path}`, {
        method: 'POST',
        headers: {
          authorization: `Bearer ${await at.token(bob.address)}`,
          'content-type': 'application/json',
        },
        body: JSON.stringify(body),
      });
    await sql`BEGIN`;
    await sql`SELECT 1 FROM devices WHERE user_id = ${bob.address.userId} FOR UPDATE`;
    // The first waits for the row, and the second for the first.
    const left = [
      bob.client.call('withdrawPreKeys', { preKeyIds: [99] }),
      bob.client.call('resetKeys', { reason: 'left behind' }),
    ];
    await waiting(1);
    // By its answer the reset has begun; by that of the other client, the end has been heard of.
    await bob.client.call('keyStatus');
    bob.client.close();
    for (const answer of await Promise.allSettled(left)) expect(answer.status).toBe('rejected');
    await other.client.call('keyStatus');

    const replaced = new SignalDevice(bob.address);
    const { identityKey, ...rest } = replaced.uploadInput(FEW_KEYS);
    const keyBundle = { ...rest, identityPubKey: identityKey, replaceIdentity: true };
    const newer = post(second, '/api/keys/upload', { keyBundle });
    await waiting(2);
    await sql`COMMIT`;
    expect(await (await newer).json()).toMatchObject({ success: true, keyVersion: 2 });
    // It waits for its turn behind what was left.
    const preKeys = replaced.morePreKeys(1).oneTimePreKeys;
    expect(await (await post(first, '/api/keys/add-prekeys', { preKeys })).json()).toMatchObject({
      success: true,
      keyVersion: 2,
    });
  });
});

describe('a request by HTTP, which no connection numbers', () => {
  it.each<[string, string, (bob: Party) => unknown]>([
    [
      'replaces no identity',
      '/api/keys/upload',
      ({ address }) => {
        const { identityKey, ...rest } = new SignalDevice(address).uploadInput(FEW_KEYS);
        return { keyBundle: { ...rest, identityPubKey: identityKey, replaceIdentity: true } };
      },
    ],
    [
      'adds no prekeys',
      '/api/keys/add-prekeys',
      ({ device }) => ({ preKeys: device.morePreKeys(1).oneTimePreKeys }),
    ],
  ])('%s that came since it did', async (_, path, bodyOf) => {
    const clock = createManualClock();
    const gateway = await gatewayFor(undo, { clock });
    const bob = await opened(gateway);
    const late = await letIn(gateway, bob, path, bodyOf(bob));
    const replaced = new SignalDevice(bob.address);
    await bob.client.call('uploadKeys', { ...replaced.uploadInput(FEW_KEYS), replaceIdentity: true });
    const before = await bob.client.call('keyStatus');
    expect(await late.finish()).toMatchObject({
      status: 409,
      body: { error: { code: 'KEYS_OUT_OF_SYNC', details: { keyVersion: 2 } } },
    });
    expect(await bob.client.call('keyStatus')).toEqual(before);
    await open({ client: bob.client, device: replaced });
  });

  it('stores nothing of a client that has given up: it may hold the private halves no more', async () => {
    const gateway = await gatewayFor(undo);
    const other = await opened(gateway);
    const bob = await opened(gateway);
    const { sql, waiting } = sessionsAt(gateway);
    const add = async (signal?: AbortSignal) =>
      await fetch(`${gateway.url}/api/keys/add-prekeys`, {
        method: 'POST',
        headers: {
          authorization: `Bearer ${await gateway.token(bob.address)}`,
          'content-type': 'application/json',
        },
        body: JSON.stringify({ preKeys: bob.device.morePreKeys(1).oneTimePreKeys }),
        ...(signal === undefined ? {} : { signal }),
      });
    await sql`BEGIN`;
    await sql`SELECT 1 FROM devices WHERE user_id = ${bob.address.userId} FOR UPDATE`;
    const patience = new AbortController();
    const late = add(patience.signal);
    await waiting(1);
    patience.abort();
    await expect(late).rejects.toThrow('aborted');
    // Once it has answered others, the gateway has heard of the end.
    for (let i = 0; i < 2; i++) await other.client.call('keyStatus');
    await sql`COMMIT`;
    // It waits for its turn behind the one that was given up.
    expect(await (await add()).json()).toMatchObject({ success: true, availableCount: 2 });
  });

  it('is carried out where nothing was changed meanwhile, or nothing that it would undo', async () => {
    const clock = createManualClock();
    const gateway = await gatewayFor(undo, { clock });
    const bob = await opened(gateway);
    const preKeys = bob.device.morePreKeys(1).oneTimePreKeys;
    const late = await letIn(gateway, bob, '/api/keys/add-prekeys', { preKeys });
    await bob.client.call('rotateSignedPreKey', { signedPreKey: bob.device.newSignedPreKey() });
    expect(await late.finish()).toMatchObject({ status: 200, body: { availableCount: 2, keyVersion: 2 } });
  });
});

describe('two nodes', () => {
  it('deliver each other’s messages, in order', async () => {
    const { first, second } = await twoNodes();
    const alice = await opened(first);
    const bob = await opened(second);
    const texts = Array.from({ length: 100 }, (_, i) => String(i));
    for (const text of texts) await send(alice.client, bob, text);
    await eventually(() => expect(contents(bob.client)).toEqual(texts));
  });

  it('whose poke was lost: the slow sweep finds the message', async () => {
    const { clock, first, second } = await twoDeafNodes();
    const alice = await opened(first);
    const bob = await opened(second);
    // What his opening still had to look for has been looked for.
    await afterOthersGotTheirs(second, (await opened(second)).client);
    await send(alice.client, bob, 'found');
    await afterOthersGotTheirs(first, alice.client);
    await clock.advance(14_999);
    await afterOthersGotTheirs(first, alice.client);
    expect(contents(bob.client)).toEqual([]);
    await clock.advance(1);
    await eventually(() => expect(contents(bob.client)).toEqual(['found']));
  });

  it('whose Redis was killed: sends succeed, the sweep delivers, and pokes do again when it is back', async () => {
    const redis = await redisFor(undo);
    const clock = createManualClock();
    const first = await gatewayFor(undo, { redisUrl: redis.url, clock });
    const second = await gatewayFor(undo, { redisUrl: redis.url, databaseUrl: first.databaseUrl, clock });
    const alice = await opened(first);
    const bob = await opened(second);
    await send(alice.client, bob, 'before');
    await eventually(() => expect(contents(bob.client)).toEqual(['before']));
    await redis.kill('SIGKILL');
    await send(alice.client, bob, 'without Redis');
    await eventually(async () => {
      await clock.advance(1_000);
      expect(contents(bob.client)).toEqual(['before', 'without Redis']);
    });
    // On its own node, nobody waits for the sweep.
    const carol = await opened(first);
    await send(alice.client, carol, 'same node');
    await eventually(() => expect(contents(carol.client)).toEqual(['same node']));

    await redis.restart();
    await eventually(
      async () => {
        await send(alice.client, bob, 'with Redis');
        expect(contents(bob.client)).toContain('with Redis');
      },
      { waitMaxMs: 20_000 },
    );
  });
});

describe('a socket that ended', () => {
  it('by leaving without closing its transport is cut, and its device is served elsewhere', async () => {
    const alice = await opened(shared);
    const bob = await opened(shared);
    const { engine } = bob.client.socket.io;
    const closed = new Promise((resolve) => engine.once('close', resolve));
    // A Socket.IO DISCONNECT packet, and nothing else.
    engine.write('1');
    await closed;
    await send(alice.client, bob, 'stays');
    await afterOthersGotTheirs(shared, alice.client);
    expect(contents(bob.client)).toEqual([]);
    const again = await reopened(shared, bob);
    await eventually(() => expect(contents(again.client)).toEqual(['stays']));
  });

  it('at any moment of being taken in leaves nothing behind that displaces the one that stayed', async () => {
    const alice = await opened(shared);
    let bob = await opened(shared);
    const token = await shared.token(bob.address);
    for (let round = 0; round < 12; round++) {
      // Each is closed a little later than the one before: while its token is checked, while it is numbered.
      for (let turns = 0; turns < 8; turns++) {
        const leaver = io(shared.url, {
          transports: ['websocket'],
          auth: { token },
          forceNew: true,
          reconnection: false,
        });
        const { engine } = leaver.io;
        await new Promise<void>((resolve) => engine.once('open', () => resolve()));
        for (let turn = 0; turn < turns; turn++) await new Promise((resolve) => setImmediate(resolve));
        engine.close();
      }
      bob = await reopened(shared, bob);
      await send(alice.client, bob, 'served');
      await eventually(() => expect(contents(bob.client)).toEqual(['served']));
      await afterOthersGotTheirs(shared, alice.client);
      expect(bob.client.waiting('displaced')).toBe(0);
    }
  });
});

/** A connection below the client library: what it writes are packets as they are. */
async function openEngine(url: string) {
  const manager = new Manager(url, {
    transports: ['websocket'],
    reconnection: false,
    autoConnect: false,
    forceNew: true,
  });
  await new Promise<void>((resolve, reject) =>
    manager.open((error) => (error === undefined ? resolve() : reject(error))),
  );
  const { engine } = manager;
  undo.push(() => engine.close());
  return { engine };
}

/** Such a connection, admitted. */
async function openWire(at: Pick<TestGateway, 'url' | 'token'>, address: DeviceAddress) {
  const { engine } = await openEngine(at.url);
  const admitted = new Promise<void>((resolve) =>
    engine.on('data', (data: unknown) => {
      if (String(data).startsWith('0')) resolve();
    }),
  );
  engine.write(`0${JSON.stringify({ token: await at.token(address) })}`);
  await admitted;
  return {
    engine,
    /** Leaves in the kernel whatever comes from now on. */
    stopReading: () => (engine.transport as unknown as { ws: { pause(): void } }).ws.pause(),
  };
}

describe('a client that reads nothing', () => {
  it('and keeps asking is cut off before it takes the node’s memory; its messages stay', async () => {
    const alice = await opened(shared);
    const bob = await enrol(shared, someone(), FEW_KEYS);
    bob.client.close();
    await send(alice.client, bob, 'stays');
    const { engine, stopReading } = await openWire(shared, bob.address);
    stopReading();
    // The answer names fifty faults: it is the largest that so small a request gets.
    const faults = Object.fromEntries(Array.from({ length: 50 }, (_, i) => [`${i}`.padEnd(110, 'x'), 1]));
    const request = `21["keyStatus",${JSON.stringify(faults)}]`;
    let asked = 0;
    await eventually(
      () => {
        for (let i = 0; i < 50 && engine.readyState === 'open'; i++, asked++) engine.write(request);
        return engine.readyState === 'closed';
      },
      { that: 'the connection being cut' },
    );
    // Eight MiB, and what the kernel's own buffers hold.
    expect(asked * request.length).toBeLessThan(64 * 1024 * 1024);
    const again = await reopened(shared, bob);
    await eventually(() => expect(contents(again.client)).toEqual(['stays']));
  });
});

function session(more: Partial<Session> = {}): Session {
  return {
    fence: 1,
    gate: () => ({ name: 'connected' }),
    detach() {},
    displace() {},
    ...more,
  } as unknown as Session;
}

function courierOf(attach: (socket: ServedSocket) => Promise<Session>): SocketDoorParts['courier'] {
  return {
    attach: (_: unknown, socket: ServedSocket) => attach(socket),
  } as unknown as SocketDoorParts['courier'];
}

/** TCP connections that are open, whatever rides on them. */
function connectionsOf(server: Server): Promise<number> {
  return new Promise((resolve, reject) => {
    server.getConnections((error, count) => (error === null ? resolve(count) : reject(error)));
  });
}

/** The door by itself: sockets are real, and what stands behind it does as it is told. */
async function openDoor(parts: Partial<SocketDoorParts> = {}) {
  const server = createServer();
  const closed: string[] = [];
  const refused: Parameters<Observer['handshakeRefused']>[0][] = [];
  const door = createSocketDoor({
    server,
    authenticator: {
      authenticate: async () => ({
        device: someone(),
        issuedAtMs: null,
        expiresAtMs: Date.now() + 3_600_000,
      }),
    },
    courier: {
      attach: async () =>
        ({ fence: 1, gate: () => ({ name: 'connected' }), detach() {}, displace() {} }) as unknown as Session,
    } as unknown as SocketDoorParts['courier'],
    dispatch: (async () => ({ ok: true, data: {} })) as unknown as Dispatch,
    observer: {
      ...createObserver(silentLog),
      socketClosed: ({ reason }) => closed.push(reason),
      handshakeRefused: (event) => refused.push(event),
    },
    clock: systemClock,
    isOriginAllowed: () => true,
    clientAddressOf: () => '127.0.0.1',
    limits: createLimits({
      limiter: createInProcessRateLimiter({ limits: [], clock: systemClock }),
      observer: createObserver(silentLog),
    }),
    log: silentLog,
    connectionsMax: null,
    connectionsPerAddressMax: 0,
    framesPerSecondMax: 0,
    isDraining: () => false,
    ...parts,
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  undo.push(async () => {
    await door.close();
    await new Promise((resolve) => server.close(resolve));
  });
  const { port } = server.address() as AddressInfo;
  return { door, server, closed, refused, url: `http://127.0.0.1:${port}` };
}

/** A dispatch whose requests end when they are told to. */
function slowDispatch() {
  const started: unknown[] = [];
  const ends: (() => void)[] = [];
  const dispatch = ((_name: string, input: unknown) =>
    new Promise((resolve) => {
      started.push(input);
      ends.push(() => resolve({ ok: true, data: {} }));
    })) as unknown as Dispatch;
  return { dispatch, started, ends };
}

describe('many requests of one socket at once', () => {
  it('are carried out 32 at a time, in order, and refused beyond those that may wait', async () => {
    const { dispatch, started, ends } = slowDispatch();
    const { url } = await openDoor({ dispatch });
    const client = await connectClient(url, 'any');
    undo.push(() => client.close());
    const replies = Array.from({ length: 32 + 1_024 + 2 }, (_, i) =>
      client.ask('listDevices', { userId: `${i}` }),
    );
    // Those that are refused are answered at once, and tell that all others have come.
    for (const reply of await Promise.all(replies.slice(-2))) {
      expect(reply).toMatchObject({
        ok: false,
        error: { code: 'RATE_LIMITED', retryAfterMs: expect.any(Number) },
      });
    }
    expect(started).toHaveLength(32);
    ends.shift()!();
    await replies[0];
    await eventually(() => expect(started).toHaveLength(33));
    await eventually(() => {
      for (const end of ends.splice(0)) end();
      return started.length === 32 + 1_024;
    });
    for (const end of ends.splice(0)) end();
    expect(await Promise.all(replies.slice(0, -2))).toEqual(
      Array.from({ length: 32 + 1_024 }, () => ({ ok: true, data: {} })),
    );
    expect(started).toEqual(Array.from({ length: 32 + 1_024 }, (_, i) => ({ userId: `${i}` })));
  });

  it('hold at most 16 MiB of frames, and free them when they are answered', async () => {
    const { dispatch, started, ends } = slowDispatch();
    const { url } = await openDoor({ dispatch });
    const client = await connectClient(url, 'any');
    undo.push(() => client.close());
    const large = () => client.ask('listDevices', { userId: 'x'.repeat(1_000_000) });
    const replies = Array.from({ length: 16 }, large);
    expect(await large()).toMatchObject({ ok: false, error: { code: 'RATE_LIMITED' } });
    expect(started).toHaveLength(16);
    for (const end of ends.splice(0)) end();
    await Promise.all(replies);
    void large().catch(() => {});
    await eventually(() => expect(started).toHaveLength(17));
  });
});

describe('a connection', () => {
  it('takes one token: a second one, also while the first is checked, ends it', async () => {
    const asked: (() => void)[] = [];
    const { url, closed } = await openDoor({
      // It stands still: whoever is taken in too late would be cut, too.
      clock: createManualClock(),
      authenticator: {
        authenticate: () =>
          new Promise((resolve) => {
            asked.push(() =>
              resolve({ device: someone(), issuedAtMs: null, expiresAtMs: Date.now() + 3_600_000 }),
            );
          }),
      },
    });
    for (const answersFirst of [true, false]) {
      const { engine } = await openEngine(url);
      const ended = new Promise((resolve) => engine.once('close', resolve));
      engine.write('0{"token":"any"}');
      await eventually(() => asked.length > 0);
      if (answersFirst) asked.shift()!();
      engine.write('0{"token":"any"}');
      await ended;
      expect(asked.length).toBe(answersFirst ? 0 : 1);
    }
    expect(closed).toHaveLength(1);
  });

  it('whose client leaves is over at once, session and timers too', async () => {
    const { url, closed } = await openDoor();
    const { engine } = await openWire({ url, token: async () => 'any' }, someone());
    const ended = new Promise((resolve) => engine.once('close', resolve));
    engine.write('1');
    await ended;
    expect(closed).toEqual(['client namespace disconnect']);
  });

  it('that ended while its token was checked is taken in by nobody', async () => {
    const judge: (() => void)[] = [];
    let attached = 0;
    const { url, server } = await openDoor({
      authenticator: {
        authenticate: () =>
          new Promise((resolve) => {
            judge.push(() =>
              resolve({ device: someone(), issuedAtMs: null, expiresAtMs: Date.now() + 3_600_000 }),
            );
          }),
      },
      courier: courierOf(async () => {
        attached += 1;
        return session();
      }),
    });
    const { engine } = await openEngine(url);
    engine.write('0{"token":"any"}');
    await eventually(() => expect(judge).toHaveLength(1));
    engine.close();
    await eventually(async () => expect(await connectionsOf(server)).toBe(0));
    judge[0]!();
    const next = connectClient(url, 'any');
    await eventually(() => expect(judge).toHaveLength(2));
    judge[1]!();
    (await next).close();
    expect(attached).toBe(1);
  });

  it('that ended while the store was asked leaves no session, and was never open', async () => {
    const attach: ((session: Session) => void)[] = [];
    const opened: unknown[] = [];
    let detached = 0;
    const { url, server } = await openDoor({
      courier: courierOf(() => new Promise((resolve) => attach.push(resolve))),
      observer: { ...createObserver(silentLog), socketOpened: (event) => opened.push(event) },
    });
    const { engine } = await openEngine(url);
    engine.write('0{"token":"any"}');
    await eventually(() => expect(attach).toHaveLength(1));
    engine.close();
    await eventually(async () => expect(await connectionsOf(server)).toBe(0));
    attach[0]!(session({ detach: () => void detached++ }));
    await eventually(() => expect(detached).toBe(1));
    expect(opened).toEqual([]);
  });

  it('that is over answers no push, and what is answered too late is no answer', async () => {
    const clock = createManualClock();
    const told: unknown[] = [];
    let served: ServedSocket | undefined;
    const { url, closed } = await openDoor({
      clock,
      authenticator: {
        authenticate: async () => ({
          device: someone(),
          issuedAtMs: null,
          expiresAtMs: clock.nowMs() + 3_600_000,
        }),
      },
      courier: courierOf(async (socket) => {
        served = socket;
        return session();
      }),
      observer: {
        ...createObserver(silentLog),
        socketClosed: ({ reason }) => closed.push(reason),
        pushSent: () => (answer) => told.push(answer),
      },
    });
    const client = await connectClient(url, 'any');
    undo.push(() => client.close());
    const held = hold(client);
    const page = served!.pushMessages([]);
    await eventually(() => expect(held.pages).toBe(1));
    await clock.advance(30_000);
    expect(await page).toBeNull();
    held.answerAll();
    // By its answer, what came before it was heard.
    await client.call('keyStatus');
    expect(told).toEqual([null]);

    const unanswered = served!.pushMessages([]);
    await eventually(() => expect(held.pages).toBe(1));
    client.close();
    expect(await unanswered).toBeNull();
    await eventually(() => expect(closed).toHaveLength(1));
    expect(await served!.pushMessages([])).toBeNull();
  });

  it('tells why it was ended by the server, where it was', async () => {
    let session: { close(reason: string): void } | undefined;
    const { url, closed } = await openDoor({
      courier: {
        attach: async (_: unknown, socket: ServedSocket) => {
          session = socket;
          return { fence: 1, gate: () => ({ name: 'connected' }), detach() {}, displace() {} };
        },
      } as unknown as SocketDoorParts['courier'],
    });
    const client = await connectClient(url, 'any');
    session!.close('a push was not acknowledged in time');
    await client.disconnected;
    const reader = await connectClient(url, 'any');
    reader.close();
    await eventually(() =>
      expect(closed).toEqual(['a push was not acknowledged in time', 'client namespace disconnect']),
    );
  });
});

describe('a refused handshake', () => {
  it('by a fault of the server bears the id that the log has', async () => {
    const { url, refused } = await openDoor({
      authenticator: { authenticate: () => Promise.reject(new Error('a fault')) },
    });
    const { error } = (await connectClient(url, 'any').catch((refusal) => refusal)) as RefusedError;
    expect(error).toMatchObject({ code: 'INTERNAL', details: { errorId: expect.any(String) } });
    const { errorId } = error.details as { errorId: string };
    const logged: unknown[] = [];
    createObserver({ ...silentLog, error: (fields) => logged.push(fields) }).handshakeRefused(refused[0]!);
    expect(logged).toEqual([{ errorId, error: new Error('a fault') }]);
  });

  it('of other namespaces is given sixteen times, and then no more', async () => {
    const { url } = await openDoor();
    const { engine } = await openWire({ url, token: async () => 'any' }, someone());
    const refusals: unknown[] = [];
    engine.on('data', (data: unknown) => {
      if (String(data).startsWith('4/')) refusals.push(data);
    });
    const ended = new Promise((resolve) => engine.once('close', resolve));
    for (let i = 0; i < 16; i++) engine.write(`0/${i},`);
    await eventually(() => expect(refusals).toHaveLength(16));
    expect(engine.readyState).toBe('open');
    engine.write('0/more,');
    await ended;
  });

  it('of another namespace says so with an error object', async () => {
    const { url } = await openDoor();
    const socket = io(`${url}/admin`, { transports: ['websocket'], forceNew: true, reconnection: false });
    undo.push(() => socket.close());
    const error = await new Promise((resolve) => socket.once('connect_error', resolve));
    expect(error).toMatchObject({
      message: 'Invalid namespace',
      data: {
        code: 'BAD_REQUEST',
        details: { issues: [{ path: [], message: 'there is one namespace, /' }] },
      },
    });
  });
});

it('a socket that is taken in while the node drains is sent away to come back by itself', async () => {
  let isDraining = false;
  let takeIn = (): void => {};
  const attached = new Promise<Session>((resolve) => {
    takeIn = () =>
      resolve({
        fence: 1,
        gate: () => ({ name: 'connected' }),
        detach() {},
        displace() {},
      } as unknown as Session);
  });
  let asked = (): void => {};
  const isAsked = new Promise<void>((resolve) => {
    asked = resolve;
  });
  const courier = {
    attach: () => {
      asked();
      return attached;
    },
  } as unknown as SocketDoorParts['courier'];
  const { door, url } = await openDoor({ courier, isDraining: () => isDraining });
  const socket: Socket = io(url, { transports: ['websocket'], auth: { token: 'good' } });
  undo.push(() => {
    socket.disconnect();
  });
  const ended = new Promise((resolve) => socket.once('disconnect', resolve));
  await isAsked;
  isDraining = true;
  await door.drain(0);
  takeIn();
  expect(await ended).toBe('transport close');
  expect(socket.active).toBe(true);
});

describe('a node that drains', () => {
  it('takes in nobody and carries out nothing more, and says that it passes', async () => {
    let isDraining = false;
    const slow = slowDispatch();
    const { url } = await openDoor({ dispatch: slow.dispatch, isDraining: () => isDraining });
    const client = await connectClient(url, 'any');
    undo.push(() => client.close());
    isDraining = true;
    const unavailable = { code: 'UNAVAILABLE', retryable: true, retryAfterMs: expect.any(Number) };
    expect(await client.refusal('keyStatus')).toMatchObject(unavailable);
    expect(slow.started).toEqual([]);
    const { error } = (await connectClient(url, 'any').catch((refused) => refused)) as RefusedError;
    expect(error).toMatchObject(unavailable);
  });

  it('tells each client when to come back, spread, and ends its connection no sooner', async () => {
    const clock = createManualClock();
    const { door, url, closed } = await openDoor({ clock });
    const clients: Client[] = [];
    for (let i = 0; i < 4; i++) clients.push(await connectClient(url, 'any'));
    undo.push(() => clients.forEach((client) => void client.close()));
    const drained = door.drain(1_000);
    const told = await Promise.all(clients.map((client) => client.next('serverDraining')));
    expect(told.map(({ retryAfterMs }) => retryAfterMs)).toEqual([0, 250, 500, 750]);
    for (const [ended, waitMs] of [0, 250, 250, 250].entries()) {
      if (waitMs > 0) await clock.advance(waitMs - 1);
      expect(closed).toHaveLength(ended);
      await clock.advance(waitMs > 0 ? 1 : 0);
      expect(closed).toHaveLength(ended + 1);
    }
    await drained;
  });
});

describe('requests that are under way when the node drains', () => {
  it('are answered before their connection ends', async () => {
    const slow = slowDispatch();
    const { door, url } = await openDoor({ dispatch: slow.dispatch });
    const client = await connectClient(url, 'any');
    undo.push(() => client.close());
    const replies = Array.from({ length: 40 }, () => client.ask('keyStatus', {}));
    await eventually(() => expect(slow.started).toHaveLength(32));
    const drained = door.drain(0);
    await client.next('serverDraining');
    // Those that waited for the first 32 are under way too.
    await eventually(() => {
      for (const end of slow.ends.splice(0)) end();
      expect(slow.started).toHaveLength(40);
    });
    for (const end of slow.ends.splice(0)) end();
    expect(await Promise.all(replies)).toEqual(replies.map(() => ({ ok: true, data: {} })));
    await client.disconnected;
    await drained;
  });

  it('hold up nobody where there are none', async () => {
    const clock = createManualClock();
    const { door, url, closed } = await openDoor({ clock });
    const client = await connectClient(url, 'any');
    undo.push(() => client.close());
    await client.call('keyStatus');
    const drained = door.drain(0);
    await clock.advance(0);
    await drained;
    expect(closed).toEqual(['the node drains']);
    await client.disconnected;
  });

  it('of a connection that ends meanwhile hold it up no longer', async () => {
    const slow = slowDispatch();
    const clock = createManualClock();
    const { door, url } = await openDoor({ dispatch: slow.dispatch, clock });
    const client = await connectClient(url, 'any');
    void client.ask('keyStatus', {}).catch(() => {});
    await eventually(() => expect(slow.started).toHaveLength(1));
    const drained = door.drain(0);
    await clock.advance(0);
    client.close();
    await drained;
  });

  it('of a connection that has ended before its turn do not hold it up', async () => {
    const slow = slowDispatch();
    const clock = createManualClock();
    const { door, url, closed } = await openDoor({ dispatch: slow.dispatch, clock });
    const first = await connectClient(url, 'any');
    const second = await connectClient(url, 'any');
    undo.push(() => first.close());
    void second.ask('keyStatus', {}).catch(() => {});
    await eventually(() => expect(slow.started).toHaveLength(1));
    const drained = door.drain(1_000);
    await clock.advance(0);
    second.close();
    await eventually(() => expect(closed).toHaveLength(2));
    await clock.advance(500);
    await drained;
  });

  it('hold it up for five seconds at most', async () => {
    const slow = slowDispatch();
    const clock = createManualClock();
    const { door, url, closed } = await openDoor({ dispatch: slow.dispatch, clock });
    const client = await connectClient(url, 'any');
    undo.push(() => client.close());
    void client.ask('keyStatus', {}).catch(() => {});
    await eventually(() => expect(slow.started).toHaveLength(1));
    const drained = door.drain(0);
    await clock.advance(4_999);
    expect(closed).toEqual([]);
    await clock.advance(1);
    await drained;
    expect(closed).toEqual(['the node drains']);
    await client.disconnected;
  });
});

it('a socket that ended while its newer token was looked at leaves no timer behind', async () => {
  const clock = createManualClock();
  const expiresAtMs = clock.nowMs() + 3_600_000;
  const device = someone();
  const slow = slowDispatch();
  let extend = (): void => {};
  const dispatch = ((name: never, input: never, context: RequestContext) => {
    extend = () => context.connection!.extend({ device, issuedAtMs: null, expiresAtMs: expiresAtMs + 1_000 });
    return slow.dispatch(name, input, context);
  }) as Dispatch;
  const { url, closed } = await openDoor({
    clock,
    dispatch,
    authenticator: { authenticate: async () => ({ device, issuedAtMs: null, expiresAtMs }) },
  });
  const before = clock.timerCount();
  const socket: Socket = io(url, { transports: ['websocket'], auth: { token: 'good' } });
  await new Promise((resolve) => socket.once('connect', resolve as () => void));
  socket.emit('refreshToken', { token: 'newer' }, () => {});
  await eventually(() => expect(slow.started).toHaveLength(1));
  socket.disconnect();
  await eventually(() => expect(closed).toHaveLength(1));
  // Its end has a timer of its own, of two seconds.
  await clock.advance(2_000);
  await eventually(() => expect(clock.timerCount()).toBe(before));
  extend();
  expect(clock.timerCount()).toBe(before);
});
