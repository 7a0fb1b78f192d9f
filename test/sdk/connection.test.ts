/** The kit's connection: tokens, coming back, and what waits meanwhile. */
import { randomUUID } from 'node:crypto';
import { createServer, type Server as HttpServer } from 'node:http';
import { Server, type Socket as ServerSocket } from 'socket.io';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import { FRAME_BYTES_MAX } from '../../src/protocol/limits.ts';
import { connect, type KeygateClient, type KitClock, type TokenReason } from '../../src/sdk/index.ts';
import { redisUrl } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { stopMoving } from '../support/flow.ts';
import { startGateway, type TestGateway, tokenFor } from '../support/gateway.ts';
import { createManualClock, type ManualClock } from '../support/manual-clock.ts';
import { Disk, LibsignalKeys } from '../support/sdk-keys.ts';
import { startTcpProxy, type TcpProxy } from '../support/tcp-proxy.ts';
import { closePhones, enrolPhone, hurriedClock, installPhone } from './phone.ts';

let gateway: TestGateway;
let proxy: TcpProxy;
let bob: DeviceAddress;
let alice: DeviceAddress;

beforeAll(async () => {
  gateway = await startGateway({ redisUrl: redisUrl() });
  proxy = await startTcpProxy(gateway.url);
});
afterAll(async () => {
  await proxy.stop();
  await gateway.stop();
});
beforeEach(() => {
  const run = randomUUID().slice(0, 8);
  bob = { userId: `bob-${run}`, deviceId: 1 };
  alice = { userId: `alice-${run}`, deviceId: 1 };
});
afterEach(() => {
  proxy.plugIn();
  closePhones();
});

/** A kit clock that stands still, and writes down what it is asked to wait for. */
function standingClock(random: () => number): { time: ManualClock; clock: KitClock; delays: number[] } {
  const time = createManualClock();
  const delays: number[] = [];
  return {
    time,
    delays,
    clock: {
      nowMs: time.nowMs,
      random,
      after(delayMs, action) {
        delays.push(delayMs);
        const timer = time.after(delayMs, action);
        return () => timer.cancel();
      },
    },
  };
}

async function openClient(url: string, options: { clock?: KitClock; getToken?: () => Promise<string> } = {}) {
  return await connect({
    url,
    getToken: () => tokenFor(bob),
    keys: new LibsignalKeys(new Disk(), bob),
    onMessage: async () => {},
    ...options,
  });
}

/** What is told apart from the bound on an attempt, which is 20 s itself. */
async function backOffs(
  client: KeygateClient,
  { time, delays }: { time: ManualClock; delays: number[] },
  count: number,
): Promise<number[]> {
  const found: number[] = [];
  while (found.length < count) {
    await eventually(() => expect(client.state).toBe('offline'));
    const delayMs = delays.at(-1)!;
    found.push(delayMs);
    await time.advance(delayMs - 1);
    expect(client.state).toBe('offline');
    await time.advance(1);
  }
  return found;
}

describe('back-off', () => {
  it.each([
    ['least', () => 0, [500, 1_000, 2_000, 4_000, 8_000, 10_000, 10_000]],
    ['most', () => 1, [1_000, 2_000, 4_000, 8_000, 16_000, 20_000, 20_000]],
  ])('grows from half a second to twenty, jittered: at the %s', async (_, random, expected) => {
    const nowhere = await startTcpProxy(gateway.url);
    nowhere.unplug();
    const standing = standingClock(random);
    const client = await openClient(nowhere.url, { clock: standing.clock });
    expect(await backOffs(client, standing, expected.length)).toEqual(expected);
    client.close();
    await nowhere.stop();
  });

  it('begins anew once a gateway has served', async () => {
    const standing = standingClock(() => 0);
    const client = await openClient(proxy.url, { clock: standing.clock });
    await client.call('keyStatus', {});
    proxy.unplug();
    expect(await backOffs(client, standing, 3)).toEqual([500, 1_000, 2_000]);
    await eventually(() => expect(client.state).toBe('offline'));
    proxy.plugIn();
    await standing.time.advance(4_000);
    await client.call('keyStatus', {});
    proxy.unplug();
    expect(await backOffs(client, standing, 1)).toEqual([500]);
    client.close();
  });

  it('waits as long as a refusal asks for, and asks for another token where that was the reason', async () => {
    const refusals = [
      { code: 'UNAVAILABLE', message: 'draining', retryable: true, retryAfterMs: 7_000 },
      { code: 'TOKEN_EXPIRED', message: 'it ran out', retryable: false },
    ];
    const fake = await startFakeGateway((next) => {
      const data = refusals.shift();
      next(data && Object.assign(new Error(data.code), { data }));
    });
    const standing = standingClock(() => 0);
    const reasons: TokenReason[] = [];
    const client = await connect({
      url: fake.url,
      getToken: async (reason) => {
        reasons.push(reason);
        return 'a token';
      },
      keys: new LibsignalKeys(new Disk(), bob),
      onMessage: async () => {},
      clock: standing.clock,
    });
    await eventually(() => expect(client.state).toBe('offline'));
    expect(client.snapshot().trouble).toEqual({ code: 'UNAVAILABLE', message: 'draining' });
    expect(await backOffs(client, standing, 2)).toEqual([7_000, 1_000]);
    await eventually(() => expect(client.snapshot().trouble).toBeNull());
    expect(reasons).toEqual(['connect', 'connect', 'refused']);
    client.close();
    await fake.stop();
  });

  it.each([
    ['least', () => 0, 12_000],
    ['most', () => 1, 12_500],
  ])('waits as long as a draining server asks for, jittered: at the %s', async (_, random, waitMs) => {
    const fake = await startFakeGateway((next) => next());
    const standing = standingClock(random);
    const client = await openClient(fake.url, { clock: standing.clock });
    const said = new Promise((resolve) => client.on('serverDraining', resolve));
    await eventually(() => expect(fake.io.sockets.sockets.size).toBe(1));
    fake.io.emit('serverDraining', { retryAfterMs: 12_000 });
    expect(await said).toEqual({ retryAfterMs: 12_000 });
    for (const socket of fake.io.sockets.sockets.values()) socket.conn.close();
    expect(await backOffs(client, standing, 1)).toEqual([waitMs]);
    client.close();
    await fake.stop();
  });

  it('grows also where each connection is taken, and ends before anything was answered', async () => {
    const fake = await startFakeGateway((next) => next());
    fake.io.on('connection', (socket) => socket.conn.close());
    const standing = standingClock(() => 0);
    const client = await openClient(fake.url, { clock: standing.clock });
    for (const [index, delayMs] of [500, 1_000, 2_000].entries()) {
      await eventually(() => expect(fake.handshakes()).toBe(index + 1));
      expect(await backOffs(client, standing, 1)).toEqual([delayMs]);
    }
    client.close();
    await fake.stop();
  });

  it('tells why a token is asked for: a refusal counts until a connection is taken, and no longer', async () => {
    const fake = await startFakeGateway((next) => {
      const data = { code: 'UNAUTHENTICATED', message: 'it is none', retryable: false };
      next(fake.handshakes() === 1 ? Object.assign(new Error(data.code), { data }) : undefined);
    });
    const line = await startTcpProxy(fake.url);
    const standing = standingClock(() => 0);
    const reasons: TokenReason[] = [];
    const getToken = async (reason: TokenReason) => {
      reasons.push(reason);
      return 'a token';
    };
    const client = await openClient(line.url, { clock: standing.clock, getToken: getToken as never });
    await eventually(() => expect(client.state).toBe('offline'));
    line.unplug();
    expect(await backOffs(client, standing, 1)).toEqual([500]);
    await eventually(() => expect(client.snapshot().trouble?.code).toBe('UNREACHABLE'));
    line.plugIn();
    expect(await backOffs(client, standing, 1)).toEqual([1_000]);
    await eventually(() => expect(fake.io.sockets.sockets.size).toBe(1));
    await eventually(() => expect(client.snapshot().trouble).toBeNull());
    line.cut();
    expect(await backOffs(client, standing, 1)).toEqual([2_000]);
    expect(reasons).toEqual(['connect', 'refused', 'refused', 'connect']);
    client.close();
    await line.stop();
    await fake.stop();
  });

  it.each(['resolves', 'rejects'])(
    'heeds no token of an attempt that was given up, which %s late',
    async (how) => {
      const fake = await startFakeGateway((next) => next());
      const tokens: unknown[] = [];
      fake.io.on('connection', (socket) => tokens.push(socket.handshake.auth.token));
      const standing = standingClock(() => 0);
      const asked: { resolve(token: string): void; reject(error: Error): void }[] = [];
      const client = await openClient(fake.url, {
        clock: standing.clock,
        getToken: () => new Promise((resolve, reject) => asked.push({ resolve, reject })),
      });
      await standing.time.advance(20_000);
      expect(await backOffs(client, standing, 1)).toEqual([500]);
      expect(asked).toHaveLength(2);
      if (how === 'resolves') asked[0]!.resolve('the late one');
      else asked[0]!.reject(new Error('too late'));
      // Whoever connects now comes behind it.
      const other = await openClient(fake.url, { getToken: async () => 'of another' });
      await eventually(() => expect(tokens).toContain('of another'));
      other.close();
      expect(client.state).toBe('connecting');
      asked[1]!.resolve('the next one');
      await eventually(() => expect(tokens).toEqual(['of another', 'the next one']));
      client.close();
      await fake.stop();
    },
  );

  it('is over with the client that is closed', async () => {
    const standing = standingClock(() => 0);
    const client = await openClient('http://127.0.0.1:1', { clock: standing.clock });
    await eventually(() => expect(client.state).toBe('offline'));
    client.close();
    await standing.time.advance(60_000);
    expect(client.state).toBe('closed');
  });

  it('gives up an attempt that is never answered', async () => {
    const fake = await startFakeGateway(() => {
      // Neither taken nor refused.
    });
    const standing = standingClock(() => 0);
    const client = await openClient(fake.url, { clock: standing.clock });
    await eventually(() => expect(fake.handshakes()).toBe(1));
    await standing.time.advance(20_000);
    expect(await backOffs(client, standing, 1)).toEqual([500]);
    client.close();
    await fake.stop();
  });

  it('leaves a connection over which a request is never answered', async () => {
    const fake = await startFakeGateway((next) => next());
    const standing = standingClock(() => 0);
    const client = await openClient(fake.url, { clock: standing.clock });
    let asked = 0;
    fake.io.on('connection', (socket) => {
      socket.on('keyStatus', (_, acknowledge) => {
        asked += 1;
        if (asked === 2) acknowledge({ ok: true, data: { keyVersion: 7 } });
      });
    });
    const answer = client.call('keyStatus', {});
    await eventually(() => expect(asked).toBe(1));
    await standing.time.advance(20_000);
    expect(await backOffs(client, standing, 1)).toEqual([500]);
    expect(await answer).toEqual({ keyVersion: 7 });
    client.close();
    await fake.stop();
  });

  it('is as long as a draining server asked for once, whatever becomes of the clock', async () => {
    const fake = await startFakeGateway((next) => next());
    const standing = standingClock(() => 0);
    let setBackMs = 0;
    const nowMs = (): number => standing.time.nowMs() - setBackMs;
    const client = await openClient(fake.url, { clock: { ...standing.clock, nowMs } });
    const said = new Promise((resolve) => client.on('serverDraining', resolve));
    await eventually(() => expect(fake.io.sockets.sockets.size).toBe(1));
    fake.io.emit('serverDraining', { retryAfterMs: 12_000 });
    await said;
    const leave = async (): Promise<void> => {
      for (const socket of fake.io.sockets.sockets.values()) socket.conn.close();
      await eventually(() => expect(client.state).toBe('offline'));
    };
    await leave();
    await standing.time.advance(12_000);
    await eventually(() => expect(fake.io.sockets.sockets.size).toBe(1));
    await eventually(() => expect(client.state).not.toBe('offline'));
    setBackMs = 3_600_000;
    await leave();
    expect(standing.delays.at(-1)).toBeLessThan(20_000);
    client.close();
    await fake.stop();
  });

  it('is not for a client that was displaced: it stays away', async () => {
    const standing = standingClock(() => 0);
    const client = await openClient(gateway.url, { clock: standing.clock });
    await client.call('keyStatus', {});
    const newer = await gateway.connect(bob);
    await eventually(() => expect(client.state).toBe('displaced'));
    await standing.time.advance(120_000);
    expect(client.state).toBe('displaced');
    await expect(client.call('keyStatus', {})).rejects.toMatchObject({ code: 'DISPLACED' });
    await expect(client.start()).rejects.toMatchObject({ code: 'DISPLACED' });
    expect(await newer.call('keyStatus')).toMatchObject({ keyVersion: 0 });
    client.close();
  });
});

it('an acknowledgement that comes after its connection has ended goes nowhere', async () => {
  const fake = await startFakeGateway((next) => next());
  const acknowledged: string[] = [];
  fake.io.on('connection', (socket) => {
    socket.conn.on('packet', ({ data }: { data?: string }) => {
      if (data?.startsWith('3')) acknowledged.push(data);
    });
  });
  let finish = (): void => {};
  const client = await connect({
    url: fake.url,
    getToken: () => tokenFor(bob),
    keys: new LibsignalKeys(new Disk(), bob),
    onMessage: () =>
      new Promise<void>((resolve) => {
        finish = resolve;
      }),
    clock: hurriedClock,
  });
  client.start().catch(() => {});
  const page = (id: string) => ({
    envelopes: [{ id, kind: 'message', messageId: id, sender: alice, type: 2, content: '', storedAt: '' }],
  });
  const socketOf = async (): Promise<ServerSocket> => {
    await eventually(() => expect(fake.io.sockets.sockets.size).toBe(1));
    return [...fake.io.sockets.sockets.values()][0]!;
  };
  const first = await socketOf();
  first.emit('messages', page('one'), () => {});
  const handedOver = finish;
  await eventually(() => expect(finish).not.toBe(handedOver));
  first.conn.close();
  await eventually(() => expect(fake.handshakes()).toBe(2));
  await eventually(() => expect(client.metrics().reconnects).toBe(1));
  finish();
  // A server that was started again counts from the beginning: it would take it for the answer to another page.
  const second = await socketOf();
  second.emit('messages', page('one'), () => {});
  await eventually(() => expect(acknowledged).toHaveLength(1));
  expect(client.metrics().duplicatesDropped).toBe(1);
  client.close();
  await fake.stop();
});

/** A Socket.IO server that says what a test wants said. */
async function startFakeGateway(
  admit: (next: (error?: Error) => void) => void,
): Promise<{ url: string; io: Server; handshakes(): number; stop(): Promise<void> }> {
  const http: HttpServer = createServer();
  const io = new Server(http, { transports: ['websocket'] });
  let handshakes = 0;
  io.use((_, next) => {
    handshakes += 1;
    admit(next);
  });
  await new Promise<void>((resolve) => http.listen(0, '127.0.0.1', resolve));
  const address = http.address();
  const port = typeof address === 'object' ? address?.port : 0;
  return {
    url: `http://127.0.0.1:${port}`,
    io,
    handshakes: () => handshakes,
    stop: () => io.close(),
  };
}

describe('a request', () => {
  it('that no frame could hold, or that is no JSON, is refused at once and keeps nothing behind it', async () => {
    const phone = await enrolPhone(gateway.url, bob);
    const friend = await enrolPhone(gateway.url, alice);
    const letter = (content: unknown) => ({
      messageId: randomUUID(),
      userId: alice.userId,
      envelopes: [{ deviceId: 1, registrationId: 1, type: 3, content: content as string }],
    });
    const reconnects = () => phone.client.metrics().reconnects;
    const before = reconnects();
    await expect(
      phone.client.call('sendMessages', letter('x'.repeat(FRAME_BYTES_MAX))),
    ).rejects.toMatchObject({ code: 'PAYLOAD_TOO_LARGE', retryable: false });
    await expect(phone.client.call('sendMessages', letter(1n))).rejects.toThrow(TypeError);
    const roomBytes = FRAME_BYTES_MAX - 256 - JSON.stringify(letter('')).length;
    const tooLong = /^sendMessages: \d+ bytes are more than a frame may hold$/;
    for (const content of ['x'.repeat(roomBytes + 1), 'é'.repeat(Math.ceil((roomBytes + 1) / 2))]) {
      await expect(phone.client.call('sendMessages', letter(content))).rejects.toThrow(tooLong);
    }
    // A frame holds it: that it is too long for a message is for the gateway to say.
    await expect(phone.client.call('sendMessages', letter('x'.repeat(roomBytes)))).rejects.toMatchObject({
      code: 'PAYLOAD_TOO_LARGE',
      message: 'larger than the wire allows',
    });
    await phone.say(alice.userId, 'goes through');
    await eventually(() => expect(friend.shown).toHaveLength(1));
    expect(phone.client.snapshot().outboxLength).toBe(0);
    expect(reconnects()).toBe(before);
  });

  it.each([
    ['least', () => 0, 1_000],
    ['most', () => 1, 1_500],
  ])(
    'that stays refused for the time being is thrown after 8 more tries: pauses at the %s',
    async (_, random, pauseMs) => {
      const fake = await startFakeGateway((next) => next());
      const standing = standingClock(random);
      const client = await openClient(fake.url, { clock: standing.clock });
      const messageIds: string[] = [];
      fake.io.on('connection', (socket) => {
        socket.on('sendMessages', ({ messageId }, acknowledge) => {
          messageIds.push(messageId);
          const error = { code: 'UNAVAILABLE', message: 'no store', retryable: true, retryAfterMs: 1_000 };
          acknowledge({ ok: false, error });
        });
      });
      const messageId = randomUUID();
      const input = { messageId, userId: 'bob', envelopes: [] };
      const thrown = expect(client.call('sendMessages', input)).rejects.toMatchObject({
        code: 'UNAVAILABLE',
      });
      for (let retry = 1; retry <= 8; retry++) {
        // The first wait of a request is for its answer, and lasts 20 s at most.
        await eventually(() => expect(standing.delays.at(-1)).toBe(pauseMs));
        expect(messageIds).toHaveLength(retry);
        standing.delays.pop();
        await standing.time.advance(pauseMs);
      }
      await thrown;
      expect(messageIds).toEqual(Array(9).fill(messageId));
      client.close();
      await fake.stop();
    },
  );

  it('to one user waits for the one before it, which was put off for as long as the gateway asks', async () => {
    const fake = await startFakeGateway((next) => next());
    const standing = standingClock(() => 0);
    const client = await openClient(fake.url, { clock: standing.clock });
    const asked: string[] = [];
    fake.io.on('connection', (socket) => {
      socket.on('sendMessages', ({ messageId }, acknowledge) => {
        asked.push(messageId);
        const error = { code: 'RATE_LIMITED', message: 'wait', retryable: true, retryAfterMs: 3_000 };
        if (asked.length === 1) acknowledge({ ok: false, error });
        else acknowledge({ ok: true, data: { storedAt: messageId, accepted: [], rejected: [] } });
      });
    });
    const write = (userId: string, messageId: string) =>
      client.call('sendMessages', { messageId, userId, envelopes: [] });
    const [first, second] = [write('bob', 'first'), write('bob', 'second')];
    expect(await write('carol', 'to another')).toMatchObject({ storedAt: 'to another' });
    expect(asked).toEqual(['first', 'to another']);
    await eventually(() => expect(standing.delays).toContain(3_000));
    await standing.time.advance(2_999);
    expect(asked).toHaveLength(2);
    await standing.time.advance(1);
    expect([await first, await second]).toMatchObject([{ storedAt: 'first' }, { storedAt: 'second' }]);
    expect(asked).toEqual(['first', 'to another', 'first', 'second']);
    client.close();
    await fake.stop();
  });

  it('that is refused because the token ran out is asked again by another connection, with another token', async () => {
    const fake = await startFakeGateway((next) => next());
    const standing = standingClock(() => 0);
    let tokens = 0;
    const getToken = async () => `token ${++tokens}`;
    const client = await openClient(fake.url, { clock: standing.clock, getToken });
    fake.io.on('connection', (socket) => {
      socket.on('keyStatus', (_, acknowledge) => {
        const { token } = socket.handshake.auth;
        const error = { code: 'TOKEN_EXPIRED', message: 'it ran out', retryable: false };
        if (token === 'token 1') acknowledge({ ok: false, error });
        else acknowledge({ ok: true, data: { identityKey: token } });
      });
    });
    const answer = client.call('keyStatus', {});
    expect(await backOffs(client, standing, 1)).toEqual([500]);
    expect(await answer).toEqual({ identityKey: 'token 2' });
    client.close();
    await fake.stop();
  });

  it('by which the next token is refused does not end the connection, whose own token may be good', async () => {
    const fake = await startFakeGateway((next) => next());
    const client = await openClient(fake.url, { clock: standingClock(() => 0).clock });
    fake.io.on('connection', (socket) => {
      socket.on('keyStatus', (_, acknowledge) => acknowledge({ ok: true, data: { keyVersion: 7 } }));
    });
    await eventually(() => expect(fake.io.sockets.sockets.size).toBe(1));
    const [socket] = fake.io.sockets.sockets.values();
    const refused = new Promise<void>((resolve) => {
      socket!.on('refreshToken', (_, acknowledge) => {
        const error = { code: 'TOKEN_EXPIRED', message: 'it ran out', retryable: false };
        acknowledge({ ok: false, error });
        resolve();
      });
    });
    socket!.emit('tokenExpiring', { expiresAt: '' });
    await refused;
    expect(await client.call('keyStatus', {})).toEqual({ keyVersion: 7 });
    expect(fake.handshakes()).toBe(1);
    client.close();
    await fake.stop();
  });

  it('of one connection that was refused for the time being is asked again over the next', async () => {
    const fake = await startFakeGateway((next) => next());
    const standing = standingClock(() => 0);
    const client = await openClient(fake.url, { clock: standing.clock });
    let asked = 0;
    fake.io.on('connection', (socket) => {
      socket.on('resetKeys', (_, acknowledge) => {
        asked += 1;
        if (asked === 1) {
          const error = { code: 'UNAVAILABLE', message: 'draining', retryable: true, retryAfterMs: 60_000 };
          acknowledge({ ok: false, error });
          socket.conn.close();
        } else acknowledge({ ok: true, data: { keyVersion: 3 } });
      });
    });
    const answer = client.call('resetKeys', {});
    await eventually(() => expect(client.state).toBe('offline'));
    expect(await backOffs(client, standing, 1)).toEqual([500]);
    expect(await answer).toEqual({ keyVersion: 3 });
    expect(asked).toBe(2);
    client.close();
    await fake.stop();
  });
});

describe('a gate', () => {
  it.each(['before', 'behind'])(
    'that closes in the very read that brings its opening, %s it, is opened again',
    async (place) => {
      const fake = await startFakeGateway((next) => next());
      const keys = new LibsignalKeys(new Disk(), bob);
      await keys.createIdentity();
      await keys.signedPreKey.generate(1);
      await keys.pqLastResortPreKey.generate(1);
      const identity = (await keys.identity())!;
      let asked = 0;
      let keyVersion = 2;
      fake.io.on('connection', (socket) => {
        const status = {
          ...identity,
          signedPreKeyId: 1,
          pqLastResortPreKeyId: 1,
          preKeyCount: 9,
          countVersion: 1,
        };
        socket.on('keyStatus', (_, acknowledge) =>
          acknowledge({ ok: true, data: { ...status, keyVersion } }),
        );
        socket.on('validateKeys', (_, acknowledge) => {
          const lists = {
            missingKeys: [],
            preKeyIdsToDelete: [],
            preKeyIdsToUpload: [],
            preKeyIdsNotHeld: [],
          };
          const ids = { pqPreKeyIdsToDelete: [], pqPreKeyIdsToUpload: [], pqPreKeyIdsNotHeld: [] };
          acknowledge({
            ok: true,
            data: {
              ...lists,
              ...ids,
              keysValid: true,
              keyVersion,
              countVersion: 1,
              validation: `of ${keyVersion}`,
            },
          });
        });
        socket.on('clientReady', (_, acknowledge) => {
          asked += 1;
          const opened = keyVersion;
          if (asked === 1) keyVersion += 1;
          const close = (): void => {
            if (asked === 1) socket.emit('gateClosed', { reason: 'keysRotated', keyVersion });
          };
          // Both frames leave in one write.
          if (place === 'before') close();
          acknowledge({ ok: true, data: { pendingCount: 0, keyVersion: opened } });
          if (place === 'behind') close();
        });
      });
      const client = await connect({
        url: fake.url,
        getToken: async () => 'a token',
        keys,
        onMessage: async () => {},
        clock: hurriedClock,
      });
      expect(await client.start()).toBe('ready');
      await eventually(() => expect(asked).toBe(2));
      await eventually(() => expect(client.state).toBe('ready'));
      client.close();
      await fake.stop();
    },
  );
});

describe('the path to an open gate', () => {
  /** A device with keys, at a gateway that answers as it is told, and has the same keys. */
  async function prepare(random: () => number) {
    const fake = await startFakeGateway((next) => next());
    const standing = standingClock(random);
    const keys = new LibsignalKeys(new Disk(), bob);
    await keys.createIdentity();
    await keys.signedPreKey.generate(1);
    await keys.pqLastResortPreKey.generate(1);
    const versions = { keyVersion: 2, countVersion: 1 };
    const slots = { signedPreKeyId: 1, pqLastResortPreKeyId: 1 };
    const ec = { missingKeys: [], preKeyIdsToDelete: [], preKeyIdsToUpload: [], preKeyIdsNotHeld: [] };
    const pq = { pqPreKeyIdsToDelete: [], pqPreKeyIdsToUpload: [], pqPreKeyIdsNotHeld: [] };
    const data: Record<string, object> = {
      keyStatus: { ...(await keys.identity()), ...slots, ...versions },
      validateKeys: { ...ec, ...pq, ...versions, keysValid: true, validation: 'it is good' },
      clientReady: { pendingCount: 0, keyVersion: 2 },
      checkPreKeys: { availableCount: 100, pqAvailableCount: 100, threshold: 10, countVersion: 1 },
    };
    /** How each request is refused; those that are not in here are answered. */
    const refusals: Record<string, { code: string; retryable: boolean }> = {};
    const asked: string[] = [];
    fake.io.on('connection', (socket) => {
      for (const name of Object.keys(data)) {
        socket.on(name, (_, acknowledge) => {
          asked.push(name);
          const refusal = refusals[name];
          if (refusal === undefined) acknowledge({ ok: true, data: data[name] });
          else acknowledge({ ok: false, error: { ...refusal, message: refusal.code } });
        });
      }
    });
    const client = await connect({
      ...{ url: fake.url, getToken: async () => 'a token', keys, onMessage: async () => {} },
      clock: standing.clock,
    });
    return {
      ...{ client, standing, data, refusals },
      count: (name: string) => asked.filter((each) => each === name).length,
      push: (name: string, payload: object) => fake.io.emit(name, payload),
      async stop() {
        client.close();
        await fake.stop();
      },
    };
  }

  it.each([
    ['least', () => 0, [1_000, 2_000, 4_000, 8_000, 16_000, 20_000, 20_000]],
    ['most', () => 1, [1_500, 3_000, 6_000, 12_000, 24_000, 30_000, 30_000]],
  ])(
    'is gone again after a fault of the gateway, at growing pauses: at the %s',
    async (_, random, pauses) => {
      const { client, standing, refusals, count, stop } = await prepare(random);
      refusals.validateKeys = { code: 'INTERNAL', retryable: false };
      const started = client.start();
      for (const [index, pauseMs] of pauses.entries()) {
        await eventually(() => expect(count('validateKeys')).toBe(index + 1));
        await eventually(() => expect(client.snapshot().trouble?.code).toBe('INTERNAL'));
        // That of the attempt, and in each round those for two answers, as long as the longest pause, and a pause.
        await eventually(() => expect(standing.delays).toHaveLength(1 + 3 * (index + 1)));
        expect(standing.delays.at(-1)).toBe(pauseMs);
        await standing.time.advance(pauseMs - 1);
        expect(count('validateKeys')).toBe(index + 1);
        if (index === pauses.length - 1) delete refusals.validateKeys;
        await standing.time.advance(1);
      }
      expect(await started).toBe('ready');
      expect(client.snapshot().trouble).toBeNull();
      await stop();
    },
  );

  it('is not gone again for a notice that comes late, of an older gate or of older counts', async () => {
    const { client, count, push, stop } = await prepare(() => 0);
    expect(await client.start()).toBe('ready');
    push('queueEmpty', { deliveredCount: 0 });
    await eventually(() => expect(count('checkPreKeys')).toBe(1));
    push('gateClosed', { reason: 'keysRotated', keyVersion: 2 });
    push('preKeysLow', { availableCount: 3, pqAvailableCount: 3, threshold: 10, countVersion: 0 });
    // It says nothing of now, and is asked for instead.
    await eventually(() => expect(count('checkPreKeys')).toBe(2));
    // The check waits for its turn.
    await client.checkKeys();
    expect([client.state, count('validateKeys')]).toEqual(['ready', 1]);
    await stop();
  });

  it('is left where the client is closed in such a pause', async () => {
    const { client, refusals, stop } = await prepare(() => 0);
    refusals.validateKeys = { code: 'INTERNAL', retryable: false };
    const started = client.start();
    await eventually(() => expect(client.snapshot().trouble?.code).toBe('INTERNAL'));
    client.close();
    await expect(started).rejects.toMatchObject({ code: 'CLOSED' });
    await stop();
  });

  it.each(['KEYS_OUT_OF_SYNC', 'KEYS_NOT_VALIDATED', 'KEYS_NOT_UPLOADED', 'IDENTITY_MISMATCH'])(
    'is given up when five rounds ended in %s',
    async (code) => {
      const { client, refusals, count, stop } = await prepare(() => 0);
      refusals.clientReady = { code, retryable: false };
      await expect(client.start()).rejects.toMatchObject({ code: 'NO_AGREEMENT' });
      // A validation that was refused is not brought again.
      expect([count('validateKeys'), count('clientReady')]).toEqual([5, 5]);
      expect(client.snapshot().trouble?.code).toBe('NO_AGREEMENT');
      // Whoever calls it again begins anew.
      delete refusals.clientReady;
      expect(await client.start()).toBe('ready');
      await stop();
    },
  );

  it('is given up when five validations found nothing to mend, and were none', async () => {
    const { client, data, count, stop } = await prepare(() => 0);
    data.validateKeys = { ...data.validateKeys, validation: undefined };
    await expect(client.start()).rejects.toMatchObject({ code: 'NO_AGREEMENT' });
    expect([count('validateKeys'), count('clientReady')]).toEqual([5, 0]);
    await stop();
  });

  it('ends at a refusal that does not pass', async () => {
    const { client, refusals, count, stop } = await prepare(() => 0);
    refusals.validateKeys = { code: 'FORBIDDEN', retryable: false };
    await expect(client.start()).rejects.toMatchObject({ code: 'FORBIDDEN' });
    expect(count('validateKeys')).toBe(1);
    expect(client.snapshot().trouble).toEqual({ code: 'FORBIDDEN', message: 'FORBIDDEN' });
    await stop();
  });
});

describe('trouble', () => {
  const troubleOf = async (client: KeygateClient) =>
    await eventually(() => {
      const { trouble } = client.snapshot();
      expect(trouble).not.toBeNull();
      return trouble;
    });

  it('tells why getToken gave none, also to subscribers, and is over with the connection', async () => {
    const standing = standingClock(() => 0);
    const getToken = [
      () => {
        throw new Error('the login is down');
      },
      () => Promise.reject(new Error('not signed in')),
      () => tokenFor(bob),
    ];
    const client = await openClient(gateway.url, {
      clock: standing.clock,
      getToken: () => getToken.shift()!(),
    });
    const told: unknown[] = [];
    client.subscribe(({ state, trouble }) => told.push([state, trouble]));
    const started = client.start();
    expect(await troubleOf(client)).toEqual({ code: 'NO_TOKEN', message: 'getToken: the login is down' });
    expect(await backOffs(client, standing, 1)).toEqual([500]);
    await eventually(() => expect(client.state).toBe('offline'));
    await standing.time.advance(1_000);
    expect(await started).toBe('needsSetup');
    expect(client.snapshot().trouble).toBeNull();
    expect(told).toContainEqual(['offline', { code: 'NO_TOKEN', message: 'getToken: not signed in' }]);
    expect(told.at(-1)).toEqual(['needsSetup', null]);
    client.close();
  });

  it('shows no token that the text of such an error holds', async () => {
    const token = await tokenFor(bob);
    const texts = [`Unexpected token 'e', "${token}" is not valid JSON`, `401 for Bearer ${randomUUID()}`];
    for (const text of texts) {
      const client = await openClient(gateway.url, { getToken: () => Promise.reject(new Error(text)) });
      const message = text.replace(/ey\w+\.[\w-]+\.[\w-]+|Bearer .*/, '(a token)');
      expect(await troubleOf(client)).toEqual({ code: 'NO_TOKEN', message: `getToken: ${message}` });
      client.close();
    }
  });

  it('tells that nothing listens at the url, or something else than a gateway', async () => {
    const dead = await openClient('http://127.0.0.1:1');
    expect(await troubleOf(dead)).toEqual({
      code: 'UNREACHABLE',
      message: 'the gateway can’t be reached: connect ECONNREFUSED 127.0.0.1:1',
    });
    dead.close();
    const inspector = await openClient(gateway.adminUrl);
    expect(await troubleOf(inspector)).toEqual({
      code: 'UNREACHABLE',
      message: 'the gateway can’t be reached: Unexpected server response: 404',
    });
    inspector.close();
  });

  it('tells who left an attempt unanswered: the gateway, or getToken', async () => {
    const fake = await startFakeGateway(() => {
      // Neither taken nor refused.
    });
    const standing = standingClock(() => 0);
    const client = await openClient(fake.url, { clock: standing.clock });
    await eventually(() => expect(fake.handshakes()).toBe(1));
    await standing.time.advance(20_000);
    expect(client.snapshot().trouble).toEqual({
      code: 'UNREACHABLE',
      message: 'the gateway can’t be reached: no answer within 20 s',
    });
    client.close();
    await fake.stop();
    const waiting = await openClient(gateway.url, {
      clock: standing.clock,
      getToken: () => new Promise(() => {}),
    });
    await standing.time.advance(20_000);
    expect(waiting.snapshot().trouble).toEqual({
      code: 'NO_TOKEN',
      message: 'getToken: no answer within 20 s',
    });
    waiting.close();
  });

  it('tells the code of a refusal, until an attempt fails for another reason', async () => {
    const standing = standingClock(() => 0);
    let asked = 0;
    const client = await openClient(gateway.url, {
      clock: standing.clock,
      async getToken() {
        asked += 1;
        if (asked === 1) return 'nonsense';
        throw new Error('signed out');
      },
    });
    expect(await troubleOf(client)).toMatchObject({ code: 'UNAUTHENTICATED' });
    expect(await backOffs(client, standing, 1)).toEqual([500]);
    await eventually(() => expect(client.state).toBe('offline'));
    expect(client.snapshot().trouble).toEqual({ code: 'NO_TOKEN', message: 'getToken: signed out' });
    client.close();
  });

  it.each(['nonsense', '', 'localhost:3000', 'ftp://127.0.0.1', 'http://', undefined, 3000])(
    'is no matter of waiting where the url is %o: connect throws',
    async (url) => {
      await expect(openClient(url as string)).rejects.toThrow(
        new TypeError('connect: url must be an http, https, ws or wss URL, as https://keys.example.org'),
      );
    },
  );

  it.each([undefined, null, 'a token'])(
    'is no matter of waiting where getToken is %o: connect throws',
    async (getToken) => {
      await expect(openClient(gateway.url, { getToken: getToken as never })).rejects.toThrow(
        new TypeError('connect: getToken must be a function that resolves to a token'),
      );
    },
  );
});

describe('tokens', () => {
  it('are asked for at connecting and when one runs out, and the connection goes on', async () => {
    // It stands still: however long a set-up takes, no token runs out meanwhile.
    const clock = createManualClock();
    const own = await startGateway({ clock });
    const reasons: TokenReason[] = [];
    const phone = await installPhone(own.url, bob, {
      async getToken(reason) {
        reasons.push(reason);
        return await own.token(bob, reasons.length === 1 ? 600_000 : 3_600_000);
      },
    });
    const expiring = new Promise<{ expiresAt: string }>((resolve) =>
      phone.client.on('tokenExpiring', resolve),
    );
    expect(await phone.client.start()).toBe('needsSetup');
    expect(await phone.client.setUp()).toBe('ready');
    const friend = await enrolPhone(own.url, alice, { getToken: () => own.token(alice) });
    // A minute before its end, which is a whole second.
    await clock.advance(541_000);
    const { expiresAt } = await expiring;
    await clock.advance(Date.parse(expiresAt) - clock.nowMs());
    // The first one's time is over, and then its grace, and its connection still serves.
    await friend.say(bob.userId, 'still there?');
    await eventually(() => expect(phone.shown).toHaveLength(1));
    // Answered behind the acknowledgement: nothing else is waited for.
    await phone.client.call('keyStatus', {});
    await clock.advance(30_000);
    await friend.say(bob.userId, 'and now?');
    await eventually(() => expect(phone.shown).toHaveLength(2));
    expect(reasons).toEqual(['connect', 'expiring']);
    expect(phone.client.metrics().reconnects).toBe(0);
    closePhones();
    await stopMoving(own, clock);
  });

  it('that are refused are asked for again, until one is good', async () => {
    const reasons: TokenReason[] = [];
    const phone = await installPhone(gateway.url, bob, {
      async getToken(reason) {
        reasons.push(reason);
        if (reasons.length === 1) return 'nonsense';
        if (reasons.length === 2) throw new Error('the token service is down');
        if (reasons.length === 3) return await tokenFor(bob, { ttlMs: -1_000 });
        return await tokenFor(bob);
      },
    });
    expect(await phone.client.start()).toBe('needsSetup');
    expect(reasons).toEqual(['connect', 'refused', 'refused', 'refused']);
  });
});

describe('the outbox', () => {
  it('keeps what is sent while offline, shows its length, and sends it in order', async () => {
    const friend = await enrolPhone(gateway.url, alice);
    const phone = await enrolPhone(proxy.url, bob);
    await phone.say(alice.userId, 'message 0');
    proxy.unplug();
    await eventually(() => expect(phone.client.state).not.toBe('ready'));
    const sent = [];
    for (let index = 1; index <= 10; index++) {
      const envelopes = [await phone.keys.encrypt(alice, `message ${index}`)];
      const input = { messageId: randomUUID(), userId: alice.userId, envelopes };
      sent.push(phone.client.call('sendMessages', input));
    }
    expect(phone.client.snapshot().outboxLength).toBe(10);
    proxy.plugIn();
    await Promise.all(sent);
    expect(phone.client.snapshot().outboxLength).toBe(0);
    await eventually(() => expect(friend.shown).toHaveLength(11));
    expect(friend.shown.map((line) => Number(line.split(' ').at(-1)))).toEqual(
      Array.from({ length: 11 }, (_, index) => index),
    );
  });

  it('that is full refuses one more with a clear error, and does not keep the kit itself from coming back', async () => {
    const phone = await enrolPhone(proxy.url, bob, { outboxMax: 5 });
    proxy.unplug();
    await eventually(() => expect(phone.client.state).not.toBe('ready'));
    const waiting = Array.from({ length: 5 }, () => phone.client.call('keyStats', {}));
    await expect(phone.client.call('keyStats', {})).rejects.toMatchObject({
      code: 'OUTBOX_FULL',
      message: '5 requests wait for an answer already',
    });
    expect(phone.client.snapshot().outboxLength).toBe(5);
    proxy.plugIn();
    const [answer] = await Promise.all(waiting);
    await eventually(() => expect(phone.client.state).toBe('ready'));
    expect(await phone.client.call('keyStats', {})).toEqual(answer);
  });

  it('holds 256 requests where nothing else is asked for', async () => {
    const client = await openClient('http://127.0.0.1:1', { clock: standingClock(() => 0).clock });
    const ends = Array.from({ length: 257 }, () => client.call('keyStats', {}).catch(({ code }) => code));
    expect(await ends[256]).toBe('OUTBOX_FULL');
    expect(client.snapshot().outboxLength).toBe(256);
    client.close();
    expect(new Set(await Promise.all(ends.slice(0, 256)))).toEqual(new Set(['CLOSED']));
  });

  it('is emptied with an error when the client is closed', async () => {
    const phone = await enrolPhone(proxy.url, bob);
    proxy.unplug();
    await eventually(() => expect(phone.client.state).not.toBe('ready'));
    const waiting = phone.client.call('keyStats', {});
    const refused = expect(waiting).rejects.toMatchObject({ code: 'CLOSED' });
    phone.client.close();
    await refused;
    expect(phone.client.state).toBe('closed');
    await expect(phone.client.start()).rejects.toMatchObject({ code: 'CLOSED' });
  });
});
