/** Tokens on sockets: who is let in, and what happens when the time of a live connection runs out. */
import { io, type Socket } from 'socket.io-client';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { ErrorObject } from '../../src/protocol/errors.ts';
import { signToken } from '../../src/requests/authenticate.ts';
import { eventually } from '../support/eventually.ts';
import {
  afterOthersGotTheirs,
  FEW_KEYS,
  gatewayFor,
  heard,
  opened,
  someone,
  undoAfterEach,
} from '../support/flow.ts';
import {
  type Client,
  connectClient,
  contents,
  enrol,
  open,
  RefusedError,
  send,
  startGateway,
  type TestGateway,
  tokenFor,
} from '../support/gateway.ts';
import { createManualClock } from '../support/manual-clock.ts';
import { refusedUpgrade } from '../support/upgrade.ts';

const MINUTE_MS = 60_000;
const undo = undoAfterEach();
let shared: TestGateway;

beforeAll(async () => {
  shared = await startGateway();
});
afterAll(() => shared.stop());

async function refusedHandshake(at: TestGateway, token: unknown): Promise<ErrorObject> {
  const refusal = await connectClient(at.url, token as string).then(
    () => 'it connected',
    (error: unknown) => error,
  );
  expect(refusal).toBeInstanceOf(RefusedError);
  return (refusal as RefusedError).error;
}

describe('a handshake', () => {
  it('is refused with an error object where the token is missing, malformed, forged or another’s', async () => {
    const good = await shared.token(someone());
    const forged = await signToken({
      secret: new TextEncoder().encode('x'.repeat(32)),
      device: someone(),
      ttlMs: MINUTE_MS,
      clock: { nowMs: Date.now, after: () => ({ cancel() {} }) },
    });
    const unsigned = `${Buffer.from('{"alg":"none"}').toString('base64url')}.${good.split('.')[1]}.`;
    for (const token of [
      undefined,
      null,
      '',
      1,
      {},
      [good],
      'garbage',
      'a.b.c',
      good.slice(0, -2),
      forged,
      unsigned,
    ]) {
      expect(await refusedHandshake(shared, token), String(token)).toEqual({
        code: 'UNAUTHENTICATED',
        message: expect.any(String),
        retryable: false,
      });
    }
    const client = await shared.connect(someone());
    expect(await client.call('keyStatus')).toMatchObject({ keyVersion: 0 });
  });

  it('says nothing of the token that it refuses', async () => {
    const token = `${await shared.token(someone())}x`;
    const refusal = JSON.stringify(await refusedHandshake(shared, token));
    for (const part of token.split('.')) expect(refusal).not.toContain(part);
  });

  it.each([
    ['a reserved user id', { userId: 'stats', deviceId: 1 }],
    ['a user id with a slash', { userId: 'a/b', deviceId: 1 }],
    ['device 0', { userId: 'alice', deviceId: 0 }],
    ['device 128', { userId: 'alice', deviceId: 128 }],
    ['device 1.5', { userId: 'alice', deviceId: 1.5 }],
  ])('is refused for %s, however well it is signed', async (_, device) => {
    expect(await refusedHandshake(shared, await tokenFor(device))).toMatchObject({ code: 'UNAUTHENTICATED' });
  });

  it('is TOKEN_EXPIRED for a genuine token that ran out', async () => {
    expect(await refusedHandshake(shared, await tokenFor(someone(), { ttlMs: -5_000 }))).toMatchObject({
      code: 'TOKEN_EXPIRED',
    });
  });

  it('is no more than a WebSocket: long polling is refused', async () => {
    const socket: Socket = io(shared.url, {
      transports: ['polling'],
      auth: { token: await shared.token(someone()) },
      reconnection: false,
      forceNew: true,
    });
    const error = await new Promise((resolve) => socket.once('connect_error', resolve));
    expect(error).toBeInstanceOf(Error);
    expect(socket.connected).toBe(false);
    socket.close();
    const response = await fetch(`${shared.url}/socket.io/?EIO=4&transport=polling`);
    expect(response.status).toBe(400);
    await response.text();
  });

  it('is refused to web pages of other origins, and open to those that are listed and to clients without one', async () => {
    const at = await gatewayFor(undo, { env: { ALLOWED_ORIGINS: 'https://chat.example' } });
    const from = async (origin: string | undefined): Promise<boolean> => {
      const socket: Socket = io(at.url, {
        transports: ['websocket'],
        auth: { token: await at.token(someone()) },
        reconnection: false,
        forceNew: true,
        ...(origin === undefined ? {} : { extraHeaders: { origin } }),
      });
      const connects = await new Promise<boolean>((resolve) => {
        socket.once('connect', () => resolve(true));
        socket.once('connect_error', () => resolve(false));
      });
      socket.close();
      return connects;
    };
    expect(await from('https://chat.example')).toBe(true);
    expect(await from(undefined)).toBe(true);
    for (const origin of [
      'https://evil.example',
      'http://chat.example',
      'https://chat.example.evil',
      'null',
    ]) {
      expect(await from(origin), origin).toBe(false);
      // No page can read it; a person who looks at the network can.
      expect(await refusedUpgrade(at.url, { origin }), origin).toMatchObject({
        status: 403,
        body: { success: false, error: { code: 'FORBIDDEN', retryable: false } },
      });
    }
  });
});

/** A gateway with a clock that stands still, and two people with open gates whose tokens last ten minutes and a day. */
async function withShortToken() {
  const clock = createManualClock();
  const at = await gatewayFor(undo, { clock });
  const token = (device = bobAddress, ttlMs = 10 * MINUTE_MS) => at.token(device, ttlMs);
  const bobAddress = someone();
  const bob = await opened({ connect: async (device) => connect(await token(device)) }, bobAddress);
  const alice = await opened({ connect: async (device) => connect(await at.token(device, 86_400_000)) });
  async function connect(withToken: string): Promise<Client> {
    const client = await connectClient(at.url, withToken);
    undo.push(() => client.close());
    return client;
  }
  // Signed in whole seconds, rounded up.
  const expiresAtMs = Date.parse((await bob.client.call('refreshToken', { token: await token() })).expiresAt);
  const others = {
    connect: async (device: typeof bobAddress) => connect(await at.token(device, 86_400_000)),
  };
  return { at, clock, alice, bob, token, expiresAtMs, others };
}

describe('a live socket', () => {
  it('is told a minute before its token runs out', async () => {
    const { clock, bob, expiresAtMs } = await withShortToken();
    await clock.advance(expiresAtMs - MINUTE_MS - clock.nowMs() - 1);
    await bob.client.call('keyStatus');
    expect(bob.client.waiting('tokenExpiring')).toBe(0);
    await clock.advance(1);
    expect(await bob.client.next('tokenExpiring')).toEqual({
      expiresAt: new Date(expiresAtMs).toISOString(),
    });
  });

  it.each([
    [
      'a minute before its end, where its token is good for a day',
      86_400_000,
      (leftMs: number) => leftMs - 60_000,
    ],
    ['at nine tenths, where it is good for two minutes', 120_000, (leftMs: number) => leftMs * 0.9],
  ])('is told %s', async (_, ttlMs, noticeOf) => {
    const clock = createManualClock();
    const at = await gatewayFor(undo, { clock });
    const token = await at.token(someone(), ttlMs);
    const client = await connectClient(at.url, token);
    undo.push(() => client.close());
    const { exp } = JSON.parse(Buffer.from(token.split('.')[1]!, 'base64url').toString());
    await clock.advance(noticeOf(exp * 1000 - clock.nowMs()) - 1);
    await client.call('keyStatus');
    expect(client.waiting('tokenExpiring')).toBe(0);
    await clock.advance(1);
    expect(await client.next('tokenExpiring')).toEqual({ expiresAt: new Date(exp * 1000).toISOString() });
  });

  it('whose token has run out is refused everything but refreshToken, and is pushed nothing', async () => {
    const { clock, alice, bob, token, expiresAtMs, others } = await withShortToken();
    await clock.advance(expiresAtMs - clock.nowMs() - 1);
    await bob.client.call('keyStatus');
    await clock.advance(1);
    expect(await bob.client.refusal('keyStatus')).toMatchObject({ code: 'TOKEN_EXPIRED' });
    expect(await bob.client.refusal('clientReady')).toMatchObject({ code: 'TOKEN_EXPIRED' });
    await send(alice.client, bob, 'held');
    await afterOthersGotTheirs(others, alice.client);
    await clock.advance(15_000);
    await afterOthersGotTheirs(others, alice.client);
    expect(contents(bob.client)).toEqual([]);

    const { expiresAt } = await bob.client.call('refreshToken', { token: await token() });
    expect(Date.parse(expiresAt)).toBeGreaterThan(clock.nowMs() + 9 * MINUTE_MS);
    await eventually(() => expect(contents(bob.client)).toEqual(['held']));
    await bob.client.call('keyStatus');
    // The grace of the old token is no concern of the new one.
    await clock.advance(MINUTE_MS);
    await send(alice.client, bob, 'live');
    await eventually(() => expect(contents(bob.client)).toEqual(['held', 'live']));
  });

  it('goes on without a break where the token is refreshed in time', async () => {
    const { clock, alice, bob, token } = await withShortToken();
    for (let i = 0; i < 5; i++) {
      await clock.advance(9 * MINUTE_MS);
      await bob.client.call('refreshToken', { token: await token() });
      await send(alice.client, bob, String(i));
      await eventually(() => expect(contents(bob.client)).toHaveLength(i + 1));
      await heard(bob.client);
    }
    expect(bob.client.socket.connected).toBe(true);
  });

  it('is not carried on by a token of another device or user, nor by a bad or expired one', async () => {
    const { clock, bob, token, expiresAtMs } = await withShortToken();
    const expired = await token(bob.address, 1_000);
    await clock.advance(expiresAtMs - clock.nowMs());
    for (const other of [someone(), { ...bob.address, deviceId: 2 }]) {
      expect(await bob.client.refusal('refreshToken', { token: await token(other) })).toMatchObject({
        code: 'FORBIDDEN',
      });
    }
    expect(await bob.client.refusal('refreshToken', { token: 'garbage' })).toMatchObject({
      code: 'UNAUTHENTICATED',
    });
    expect(await bob.client.refusal('refreshToken', { token: expired })).toMatchObject({
      code: 'TOKEN_EXPIRED',
    });
    expect(await bob.client.refusal('keyStatus')).toMatchObject({ code: 'TOKEN_EXPIRED' });
    await clock.advance(30_000);
    expect(await bob.client.disconnected).toBe('transport close');
  });

  it('is closed when the grace of 30 seconds is over; what waits comes with the next token', async () => {
    const { at, clock, alice, bob, expiresAtMs } = await withShortToken();
    await clock.advance(expiresAtMs - clock.nowMs());
    await send(alice.client, bob, 'held');
    await clock.advance(29_999);
    expect(await bob.client.refusal('keyStatus')).toMatchObject({ code: 'TOKEN_EXPIRED' });
    await clock.advance(1);
    expect(await bob.client.disconnected).toBe('transport close');
    const again = await at.connect(bob.address);
    await open({ client: again, device: bob.device });
    await eventually(() => expect(contents(again)).toEqual(['held']));
  });

  it('may still acknowledge what it was pushed before its token ran out', async () => {
    const { clock, alice, bob, token, expiresAtMs } = await withShortToken();
    let answer: (() => void) | undefined;
    bob.client.onMessages = () => null;
    bob.client.socket.on('messages', (page, acknowledge) => {
      answer = () => acknowledge({ processed: page.envelopes.map((envelope) => envelope.id) });
    });
    await clock.advance(expiresAtMs - clock.nowMs() - 10_000);
    await send(alice.client, bob, 'in flight');
    await eventually(() => expect(answer).toBeDefined());
    await clock.advance(10_000);
    answer!();
    await bob.client.call('refreshToken', { token: await token() });
    await eventually(async () => expect(await open(bob)).toMatchObject({ pendingCount: 0 }));
  });
});

describe('refreshToken', () => {
  it('answers with the new end, also long before the old one', async () => {
    const bob = await enrol(shared, someone(), FEW_KEYS);
    const token = await shared.token(bob.address, 7 * 86_400_000);
    const { expiresAt } = await bob.client.call('refreshToken', { token });
    const { exp } = JSON.parse(Buffer.from(token.split('.')[1]!, 'base64url').toString());
    expect(Date.parse(expiresAt)).toBe(exp * 1000);
  });
});
