import { generateKeyPairSync, type KeyObject, randomBytes } from 'node:crypto';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { exportJWK, SignJWT } from 'jose';
import { afterEach, describe, expect, it, onTestFinished, vi } from 'vitest';
import type { Clock } from '../../src/lib/clock.ts';
import { GatewayError } from '../../src/protocol/errors.ts';
import { TOKEN_LENGTH_MAX } from '../../src/protocol/limits.ts';
import {
  type Authenticator,
  createAuthenticator,
  PUBLIC_KEY_ALGORITHMS,
  readPublicKey,
  signToken,
  type TokenKeys,
} from '../../src/requests/authenticate.ts';
import { createManualClock } from '../support/manual-clock.ts';

const NOW_MS = Date.UTC(2026, 0, 2, 3, 4, 5);
const NOW_S = NOW_MS / 1000;
const clock: Clock = { nowMs: () => NOW_MS, after: () => ({ cancel() {} }) };
const secret = randomBytes(32);
const alice = { userId: 'alice', deviceId: 1 };

const ed25519 = generateKeyPairSync('ed25519');
const p256 = generateKeyPairSync('ec', { namedCurve: 'P-256' });
const rsa = generateKeyPairSync('rsa', { modulusLength: 2048 });

function authenticator(keys: TokenKeys, demands: { issuer?: string; audience?: string } = {}) {
  return createAuthenticator({
    keys,
    issuer: demands.issuer ?? null,
    audience: demands.audience ?? null,
    clock,
  });
}

function pem(key: KeyObject): string {
  return key.export({ type: 'spki', format: 'pem' }).toString();
}

/** A token that differs from a good one in what is given here only. */
function forge(
  changes: {
    payload?: Record<string, unknown>;
    header?: { alg?: string; kid?: string };
    key?: KeyObject | Uint8Array;
  } = {},
) {
  const payload = { sub: 'alice', device_id: 1, iat: NOW_S, exp: NOW_S + 60, ...changes.payload };
  return new SignJWT(payload)
    .setProtectedHeader({ alg: 'HS256', ...changes.header })
    .sign(changes.key ?? secret);
}

async function refusalOf(door: Authenticator, token: unknown): Promise<GatewayError> {
  const outcome = await door.authenticate(token).then(
    () => null,
    (error: unknown) => error,
  );
  if (!(outcome instanceof GatewayError)) throw new Error('the token was not refused as it should be');
  if (typeof token === 'string' && token.length > 20) expect(JSON.stringify(outcome)).not.toContain(token);
  return outcome;
}

describe('authenticate, by a secret', () => {
  it('takes user, device, and both times from a token that it can verify', async () => {
    const door = await authenticator({ kind: 'secret', secret });
    expect(await door.authenticate(await signToken({ secret, device: alice, ttlMs: 60_000, clock }))).toEqual(
      {
        device: alice,
        issuedAtMs: NOW_MS,
        expiresAtMs: NOW_MS + 60_000,
      },
    );
  });

  it('accepts a token without iat, and says that it has none', async () => {
    const door = await authenticator({ kind: 'secret', secret });
    const caller = await door.authenticate(await forge({ payload: { iat: undefined } }));
    expect(caller.issuedAtMs).toBeNull();
  });

  it('refuses a token that nobody signed (alg none)', async () => {
    const door = await authenticator({ kind: 'secret', secret });
    const [, payload] = (await forge()).split('.');
    for (const alg of ['none', 'None', 'NONE']) {
      const header = Buffer.from(JSON.stringify({ alg })).toString('base64url');
      expect((await refusalOf(door, `${header}.${payload}.`)).code).toBe('UNAUTHENTICATED');
    }
  });

  it('refuses another secret, and a signature or a payload that was tampered with', async () => {
    const door = await authenticator({ kind: 'secret', secret });
    expect((await refusalOf(door, await forge({ key: randomBytes(32) }))).code).toBe('UNAUTHENTICATED');
    const [header, , signature] = (await forge()).split('.');
    const mallory = Buffer.from(JSON.stringify({ sub: 'bob', device_id: 1, exp: NOW_S + 60 }));
    const swapped = `${header}.${mallory.toString('base64url')}.${signature}`;
    expect((await refusalOf(door, swapped)).code).toBe('UNAUTHENTICATED');
  });

  it('refuses other algorithms of the same secret', async () => {
    const door = await authenticator({ kind: 'secret', secret });
    const strong = randomBytes(64);
    const longDoor = await authenticator({ kind: 'secret', secret: strong });
    expect((await refusalOf(longDoor, await forge({ key: strong, header: { alg: 'HS512' } }))).code).toBe(
      'UNAUTHENTICATED',
    );
    expect((await door.authenticate(await forge())).device).toEqual(alice);
  });

  it('says TOKEN_EXPIRED of a genuine token from the very millisecond on that it runs out', async () => {
    let nowMs = NOW_MS;
    const door = await createAuthenticator({
      keys: { kind: 'secret', secret },
      issuer: null,
      audience: null,
      clock: { ...clock, nowMs: () => nowMs },
    });
    const token = await forge({ payload: { exp: NOW_S + 60.5 } });
    nowMs = NOW_MS + 60_499;
    expect((await door.authenticate(token)).expiresAtMs).toBe(NOW_MS + 60_500);
    nowMs = NOW_MS + 60_500;
    expect((await refusalOf(door, token)).code).toBe('TOKEN_EXPIRED');
    nowMs = NOW_MS + 3_600_000;
    expect((await refusalOf(door, token)).code).toBe('TOKEN_EXPIRED');
  });

  it('does not tell a forger that his token ran out', async () => {
    const door = await authenticator({ kind: 'secret', secret });
    const token = await forge({ key: randomBytes(32), payload: { exp: NOW_S - 1 } });
    expect((await refusalOf(door, token)).code).toBe('UNAUTHENTICATED');
  });

  it('refuses a token before its time, and accepts it from then on', async () => {
    const door = await authenticator({ kind: 'secret', secret });
    expect((await refusalOf(door, await forge({ payload: { nbf: NOW_S + 1 } }))).code).toBe(
      'UNAUTHENTICATED',
    );
    expect((await door.authenticate(await forge({ payload: { nbf: NOW_S } }))).device).toEqual(alice);
  });

  it('demands an expiry that a date can hold', async () => {
    const door = await authenticator({ kind: 'secret', secret });
    for (const exp of [undefined, 1e300, 253_402_300_800]) {
      expect((await refusalOf(door, await forge({ payload: { exp } }))).code).toBe('UNAUTHENTICATED');
    }
    expect((await door.authenticate(await forge({ payload: { exp: 253_402_300_799 } }))).device).toEqual(
      alice,
    );
  });

  it('refuses what is too long before it reads any of it', async () => {
    const door = await authenticator({ kind: 'secret', secret });
    const padded = await forge({ payload: { padding: 'x'.repeat(TOKEN_LENGTH_MAX) } });
    expect((await refusalOf(door, padded)).message).toBe('the token is too long');
    const wide = await forge({ payload: { padding: 'x'.repeat(TOKEN_LENGTH_MAX / 2) } });
    expect((await door.authenticate(wide)).device).toEqual(alice);
  });

  it.each([
    ['absent', undefined],
    ['empty', ''],
    ['a path', '../alice'],
    ['with a NUL', 'alice\0'],
    ['with a line break', 'alice\n'],
    ['too long', 'a'.repeat(129)],
    ['reserved', 'check-prekeys'],
    ['a number', 7],
    ['a list', ['alice']],
  ])('refuses a sub that is %s', async (_, sub) => {
    const door = await authenticator({ kind: 'secret', secret });
    const token = await forge({ payload: { sub } });
    expect((await refusalOf(door, token)).code).toBe('UNAUTHENTICATED');
  });

  it.each([
    ['absent', undefined],
    ['0', 0],
    ['128', 128],
    ['a fraction', 1.5],
    ['a string', '1'],
    ['null', null],
    ['a list', [1]],
  ])('refuses a device_id that is %s', async (_, device_id) => {
    const door = await authenticator({ kind: 'secret', secret });
    expect((await refusalOf(door, await forge({ payload: { device_id } }))).code).toBe('UNAUTHENTICATED');
  });

  it('accepts the highest device id', async () => {
    const door = await authenticator({ kind: 'secret', secret });
    expect((await door.authenticate(await forge({ payload: { device_id: 127 } }))).device.deviceId).toBe(127);
  });

  it('refuses whatever is no token at all', async () => {
    const door = await authenticator({ kind: 'secret', secret });
    const garbage = [
      undefined,
      null,
      7,
      {},
      [],
      '',
      '.',
      '..',
      'a.b',
      'a.b.c',
      '....',
      'é.é.é',
      'bnVsbA.bnVsbA.',
      'W10.W10.W10',
      'IiI.IiI.IiI',
      'x'.repeat(5000),
    ];
    for (const token of garbage) expect((await refusalOf(door, token)).code).toBe('UNAUTHENTICATED');
  });

  it('is not made with a secret that could be guessed', async () => {
    await expect(authenticator({ kind: 'secret', secret: randomBytes(31) })).rejects.toThrow('32 bytes');
  });

  it('demands issuer and audience where they are configured', async () => {
    const door = await authenticator({ kind: 'secret', secret }, { issuer: 'idp', audience: 'chat' });
    const good = await signToken({
      secret,
      device: alice,
      ttlMs: 1000,
      issuer: 'idp',
      audience: 'chat',
      clock,
    });
    expect((await door.authenticate(good)).device).toEqual(alice);
    expect(
      (await door.authenticate(await forge({ payload: { iss: 'idp', aud: ['a', 'chat'] } }))).device,
    ).toEqual(alice);
    for (const payload of [
      {},
      { iss: 'idp' },
      { aud: 'chat' },
      { iss: 'other', aud: 'chat' },
      { iss: 'idp', aud: 'other' },
    ]) {
      expect((await refusalOf(door, await forge({ payload }))).code).toBe('UNAUTHENTICATED');
    }
  });
});

describe('authenticate, by a public key', () => {
  it.each([
    ['EdDSA', ed25519],
    ['Ed25519', ed25519],
    ['ES256', p256],
    ['RS256', rsa],
  ] as const)('accepts %s', async (alg, pair) => {
    const door = await authenticator(readPublicKey(pem(pair.publicKey)));
    const token = await forge({ key: pair.privateKey, header: { alg } });
    expect((await door.authenticate(token)).device).toEqual(alice);
  });

  it('reads a JWK, and PEM whose line breaks an environment file has escaped', async () => {
    const token = await forge({ key: ed25519.privateKey, header: { alg: 'EdDSA' } });
    const spellings = [
      JSON.stringify(await exportJWK(ed25519.publicKey)),
      pem(ed25519.publicKey).replaceAll('\n', '\\n'),
    ];
    for (const text of spellings) {
      const door = await authenticator(readPublicKey(text));
      expect((await door.authenticate(token)).device).toEqual(alice);
    }
  });

  it('refuses a token that was signed with the public key as if it were a secret', async () => {
    for (const pair of [ed25519, p256, rsa]) {
      const text = pem(pair.publicKey);
      const door = await authenticator(readPublicKey(text));
      for (const key of [text, text.trim(), pair.publicKey.export({ type: 'spki', format: 'der' })]) {
        const token = await forge({ key: Buffer.from(key) });
        expect((await refusalOf(door, token)).code).toBe('UNAUTHENTICATED');
      }
    }
  });

  it('refuses the algorithm of another kind of key, though its signature holds', async () => {
    const door = await authenticator(readPublicKey(pem(rsa.publicKey)));
    const stranger = await forge({ key: p256.privateKey, header: { alg: 'ES256' } });
    expect((await refusalOf(door, stranger)).code).toBe('UNAUTHENTICATED');
    const padded = await forge({ key: rsa.privateKey, header: { alg: 'PS256' } });
    expect((await refusalOf(door, padded)).code).toBe('UNAUTHENTICATED');
  });

  it('does not start with a private key, a weak key, or no key', async () => {
    const weak = generateKeyPairSync('rsa', { modulusLength: 1024 }).publicKey;
    const otherCurve = generateKeyPairSync('ec', { namedCurve: 'P-384' }).publicKey;
    const privatePem = ed25519.privateKey.export({ type: 'pkcs8', format: 'pem' }).toString();
    expect(() => readPublicKey(privatePem)).toThrow('private');
    expect(() => readPublicKey(JSON.stringify(ed25519.privateKey.export({ format: 'jwk' })))).toThrow(
      'private',
    );
    expect(() => readPublicKey('{"kty":"oct","k":"c2VjcmV0"}')).toThrow('secret');
    expect(() => readPublicKey(pem(weak))).toThrow('2048 bits');
    expect(() => readPublicKey(pem(otherCurve))).toThrow('P-256');
    expect(() => readPublicKey(pem(generateKeyPairSync('x25519').publicKey))).toThrow('Ed25519');
    for (const text of ['', 'hunter2', '{', '{}', '{"keys":[]}']) {
      expect(() => readPublicKey(text)).toThrow('must be a public key as PEM or JWK');
    }
  });
});

describe('authenticate, by a key set that is fetched', () => {
  const servers: Server[] = [];
  afterEach(() => {
    for (const server of servers.splice(0)) {
      server.closeAllConnections();
      server.close();
    }
  });

  /** `answer` null never answers. */
  async function keyServer(answer: () => { status: number; body: string } | null) {
    const seen = { fetches: 0 };
    const server = createServer((_, response) => {
      seen.fetches++;
      const given = answer();
      if (given !== null) response.writeHead(given.status).end(given.body);
    });
    servers.push(server);
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    return { seen, url: new URL(`http://127.0.0.1:${(server.address() as AddressInfo).port}/jwks`) };
  }

  function jwks(url: URL, times: { timeoutMs?: number; coolDownMs?: number } = {}): TokenKeys {
    return { kind: 'jwks', url, algorithms: PUBLIC_KEY_ALGORITHMS, ...times };
  }

  async function keySet(keys: Record<string, KeyObject>): Promise<string> {
    const list = Object.entries(keys).map(async ([kid, key]) => ({ ...(await exportJWK(key)), kid }));
    return JSON.stringify({ keys: await Promise.all(list) });
  }

  it('finds the key by its id, fetching once', async () => {
    const body = await keySet({ a: ed25519.publicKey, b: p256.publicKey, c: rsa.publicKey });
    const { url, seen } = await keyServer(() => ({ status: 200, body }));
    const door = await authenticator(jwks(url));
    for (const [kid, alg, pair] of [
      ['a', 'EdDSA', ed25519],
      ['b', 'ES256', p256],
      ['c', 'RS256', rsa],
    ] as const) {
      const token = await forge({ key: pair.privateKey, header: { alg, kid } });
      expect((await door.authenticate(token)).device).toEqual(alice);
    }
    expect(seen.fetches).toBe(1);
  });

  it('refuses an unknown key id, without fetching again for each', async () => {
    const body = await keySet({ a: ed25519.publicKey });
    const { url, seen } = await keyServer(() => ({ status: 200, body }));
    const door = await authenticator(jwks(url));
    for (let attempt = 0; attempt < 20; attempt++) {
      const token = await forge({
        key: ed25519.privateKey,
        header: { alg: 'EdDSA', kid: `made-up-${attempt}` },
      });
      expect((await refusalOf(door, token)).code).toBe('UNAUTHENTICATED');
    }
    expect(seen.fetches).toBe(1);
  });

  it('learns a key that was added since, once it has cooled down', async () => {
    let body = await keySet({ a: ed25519.publicKey });
    const { url } = await keyServer(() => ({ status: 200, body }));
    const door = await authenticator(jwks(url, { coolDownMs: 0 }));
    const token = await forge({ key: p256.privateKey, header: { alg: 'ES256', kid: 'b' } });
    expect((await refusalOf(door, token)).code).toBe('UNAUTHENTICATED');
    body = await keySet({ a: ed25519.publicKey, b: p256.publicKey });
    expect((await door.authenticate(token)).device).toEqual(alice);
  });

  it('refuses a token that was signed with a key of the set as if it were a secret', async () => {
    const body = await keySet({ c: rsa.publicKey });
    const { url } = await keyServer(() => ({ status: 200, body }));
    const door = await authenticator(jwks(url));
    const token = await forge({ key: Buffer.from(pem(rsa.publicKey)), header: { kid: 'c' } });
    expect((await refusalOf(door, token)).code).toBe('UNAUTHENTICATED');
  });

  it.each([
    ['an error', { status: 500, body: '' }],
    ['no JSON', { status: 200, body: '<html>' }],
    ['no key set', { status: 200, body: '{}' }],
  ])('is UNAVAILABLE, retryable, where the key server answers with %s', async (_, answer) => {
    const { url } = await keyServer(() => answer);
    const door = await authenticator(jwks(url));
    const token = await forge({ key: ed25519.privateKey, header: { alg: 'EdDSA', kid: 'a' } });
    expect((await refusalOf(door, token)).toObject()).toMatchObject({ code: 'UNAVAILABLE', retryable: true });
  });

  it('waits for a silent key server no longer than it may, and then leaves it alone', async () => {
    const { url, seen } = await keyServer(() => null);
    const door = await authenticator(jwks(url, { timeoutMs: 50 }));
    const token = await forge({ key: ed25519.privateKey, header: { alg: 'EdDSA', kid: 'a' } });
    for (let attempt = 0; attempt < 5; attempt++) {
      expect((await refusalOf(door, token)).code).toBe('UNAVAILABLE');
    }
    // None, where this process was held up for the 50 ms: it gave up before its request had left.
    expect(seen.fetches).toBeLessThanOrEqual(1);
  });

  it('goes by the keys that it knows, for hours, while the key server is away, and says that it is', async () => {
    vi.useFakeTimers({ toFake: ['Date'], now: NOW_MS });
    onTestFinished(() => void vi.useRealTimers());
    const body = await keySet({ a: ed25519.publicKey });
    let answer = { status: 200, body };
    const { url, seen } = await keyServer(() => answer);
    const clock = createManualClock(NOW_MS);
    const door = await createAuthenticator({ keys: jwks(url), issuer: null, audience: null, clock });
    const lapse = async (ms: number): Promise<void> => {
      await clock.advance(ms);
      // jose looks at the system's clock for the age of the set.
      vi.setSystemTime(clock.nowMs());
    };
    const payload = { exp: NOW_S + 86_400 };
    const token = await forge({ payload, key: ed25519.privateKey, header: { alg: 'EdDSA', kid: 'a' } });
    expect((await door.authenticate(token)).device).toEqual(alice);
    expect(door.trouble()).toBeNull();

    for (const broken of [
      { status: 503, body: '' },
      { status: 200, body: '{}' },
    ]) {
      answer = broken;
      await lapse(11 * 60_000);
      expect((await door.authenticate(token)).device).toEqual(alice);
      expect(door.trouble()).toMatch(/^the key set of JWT_JWKS_URL can not be fetched: /);
    }
    const unknown = await forge({ payload, key: p256.privateKey, header: { alg: 'ES256', kid: 'b' } });
    expect((await refusalOf(door, unknown)).code).toBe('UNAVAILABLE');
    const { privateKey } = generateKeyPairSync('ed25519');
    const forged = await forge({ payload, key: privateKey, header: { alg: 'EdDSA', kid: 'a' } });
    expect((await refusalOf(door, forged)).code).toBe('UNAUTHENTICATED');
    expect(seen.fetches).toBe(3);

    await lapse(6 * 3_600_000);
    expect((await refusalOf(door, token)).code).toBe('UNAVAILABLE');
    answer = { status: 200, body };
    await lapse(10_000);
    expect((await door.authenticate(token)).device).toEqual(alice);
    expect(door.trouble()).toBeNull();
  });

  it('learns new keys, and asks a key server that is back, also after the clock was set back by hours', async () => {
    vi.useFakeTimers({ toFake: ['Date'], now: NOW_MS + 3 * 3_600_000 });
    onTestFinished(() => void vi.useRealTimers());
    const clock: Clock = { nowMs: () => Date.now(), after: () => ({ cancel() {} }) };
    let answer = { status: 200, body: await keySet({ a: ed25519.publicKey }) };
    const { url } = await keyServer(() => answer);
    const away = await keyServer(() => ({ ...answer, status: answer.body.includes('"b"') ? 200 : 503 }));
    const doors = [jwks(url), jwks(away.url)].map((keys) =>
      createAuthenticator({ keys, issuer: null, audience: null, clock }),
    );
    const payload = { exp: NOW_S + 86_400 };
    const [known, added] = await Promise.all([
      forge({ payload, key: ed25519.privateKey, header: { alg: 'EdDSA', kid: 'a' } }),
      forge({ payload, key: p256.privateKey, header: { alg: 'ES256', kid: 'b' } }),
    ]);
    expect((await (await doors[0]!).authenticate(known)).device).toEqual(alice);
    expect((await refusalOf(await doors[1]!, known)).code).toBe('UNAVAILABLE');
    answer = { status: 200, body: await keySet({ a: ed25519.publicKey, b: p256.publicKey }) };
    vi.setSystemTime(NOW_MS);
    for (const door of doors) expect((await (await door).authenticate(added)).device).toEqual(alice);
  });

  it('serves again when the key server is back', async () => {
    const body = await keySet({ a: ed25519.publicKey });
    let up = false;
    const { url } = await keyServer(() => (up ? { status: 200, body } : { status: 503, body: '' }));
    const door = await authenticator(jwks(url, { coolDownMs: 0 }));
    const token = await forge({ key: ed25519.privateKey, header: { alg: 'EdDSA', kid: 'a' } });
    expect((await refusalOf(door, token)).code).toBe('UNAVAILABLE');
    up = true;
    expect((await door.authenticate(token)).device).toEqual(alice);
  });
});
