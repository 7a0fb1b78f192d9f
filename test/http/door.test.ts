import { randomUUID } from 'node:crypto';
import { Agent, request } from 'node:http';
import { type AddressInfo, connect } from 'node:net';
import { json } from 'node:stream/consumers';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { createHttpDoor, type HttpDoor, type HttpDoorParts } from '../../src/http/door.ts';
import { systemClock } from '../../src/lib/clock.ts';
import { silentLog } from '../../src/lib/log.ts';
import { type ErrorObject, GatewayError } from '../../src/protocol/errors.ts';
import type { Reply } from '../../src/protocol/events.ts';
import { httpRoutes } from '../../src/protocol/http-routes.ts';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import { FRAME_BYTES_MAX, ISSUES_MAX, VALIDATE_PRE_KEYS_MAX } from '../../src/protocol/limits.ts';
import { createObserver } from '../../src/requests/observe.ts';
import { openWebSocketPeer, upgradeRequest } from '../hostile/raw-peer.ts';
import { startGateway, type TestGateway, tokenFor } from '../support/gateway.ts';
import { SignalDevice } from '../support/libsignal-device.ts';
import { createManualClock } from '../support/manual-clock.ts';

const ORIGIN = 'https://chat.example.org';
const paths = Object.values(httpRoutes).map(({ method, path }) => ({
  method,
  path: path.replace(':userId', 'bob'),
}));

let gateway: TestGateway;
/** Nobody shares a user with another test. */
let alice: DeviceAddress;
let bob: DeviceAddress;

beforeAll(async () => {
  gateway = await startGateway({ env: { ALLOWED_ORIGINS: ORIGIN } });
});
afterAll(() => gateway.stop());
beforeEach(() => {
  alice = { userId: `alice-${randomUUID()}`, deviceId: 1 };
  bob = { userId: `bob-${randomUUID()}`, deviceId: 1 };
});

interface Asked {
  /** Null sends no token. */
  as?: DeviceAddress | null;
  /** A string is sent as it is. */
  body?: unknown;
  headers?: Record<string, string>;
}

interface Answered {
  status: number;
  headers: Headers;
  // biome-ignore lint/suspicious/noExplicitAny: what came over the wire is what is looked at
  body: any;
}

/** Every answer is also looked at for what all of them must have. */
async function ask(method: string, path: string, asked: Asked = {}, url = gateway.url): Promise<Answered> {
  const { as = alice, body } = asked;
  const response = await fetch(url + path, {
    method,
    headers: {
      ...(as === null ? {} : { authorization: `Bearer ${await tokenFor(as)}` }),
      ...(body === undefined ? {} : { 'content-type': 'application/json' }),
      ...asked.headers,
    },
    ...(body === undefined ? {} : { body: typeof body === 'string' ? body : JSON.stringify(body) }),
  });
  const text = await response.text();
  expect(response.headers.get('cache-control')).toBe('no-store');
  expect(response.headers.get('x-content-type-options')).toBe('nosniff');
  expect(response.headers.get('vary')).toContain('Origin');
  expect(response.headers.get('referrer-policy')).toBe('no-referrer');
  expect(response.headers.get('content-security-policy')).toBe("default-src 'none'; frame-ancestors 'none'");
  return {
    status: response.status,
    headers: response.headers,
    body: text === '' ? null : JSON.parse(text),
  };
}

async function refused(
  method: string,
  path: string,
  asked?: Asked,
): Promise<ErrorObject & { status: number }> {
  const { status, body } = await ask(method, path, asked);
  expect(body.success).toBe(false);
  return { status, ...body.error };
}

/** The upload of a device, as HTTP clients write it. */
function keyBundleOf(device: SignalDevice, count = 3) {
  const { identityKey, ...rest } = device.uploadInput({ oneTimePreKeys: count, pqOneTimePreKeys: 1 });
  return { ...rest, identityPubKey: identityKey };
}

async function uploaded(address: DeviceAddress, count = 3): Promise<SignalDevice> {
  const device = new SignalDevice(address);
  const { status } = await ask('POST', '/api/keys/upload', {
    as: address,
    body: { keyBundle: keyBundleOf(device, count) },
  });
  expect(status).toBe(200);
  return device;
}

async function availableCount(address: DeviceAddress): Promise<number> {
  return (await ask('GET', '/api/keys/check-prekeys', { as: address })).body.availableCount;
}

/** `keyBundle.oneTimePreKeys.0.keyId`, one for each fault. */
function faults({ details }: ErrorObject): string[] {
  return details !== undefined && 'issues' in details ? details.issues.map(({ path }) => path.join('.')) : [];
}

/** What the server answers to these bytes, until it closes the connection. */
function raw(url: string, ...texts: (string | Promise<string>)[]): Promise<string> {
  const { hostname, port } = new URL(url);
  return new Promise((resolve, reject) => {
    const socket = connect(Number(port), hostname, async () => {
      for (const text of texts) socket.write(await text);
    });
    let answer = '';
    socket.on('data', (chunk) => {
      answer += chunk;
    });
    socket.on('error', reject);
    socket.on('close', () => resolve(answer));
  });
}

describe('uploading by HTTP', () => {
  it('stores a key set and tells what became of each prekey', async () => {
    const device = new SignalDevice(bob);
    const { status, body } = await ask('POST', '/api/keys/upload', {
      as: bob,
      body: { keyBundle: keyBundleOf(device) },
    });
    expect(status).toBe(200);
    expect(body).toMatchObject({
      success: true,
      keyVersion: 1,
      oneTimePreKeys: { stored: 3, unchanged: 0, conflicts: [] },
      pqOneTimePreKeys: { stored: 1 },
      availableCount: 3,
    });
  });

  it('refuses another identity key until it is told to replace', async () => {
    await uploaded(bob);
    const keyBundle = keyBundleOf(new SignalDevice(bob));
    const refusal = await refused('POST', '/api/keys/upload', { as: bob, body: { keyBundle } });
    expect(refusal).toMatchObject({ status: 409, code: 'IDENTITY_MISMATCH' });
    const { body } = await ask('POST', '/api/keys/upload', {
      as: bob,
      body: { keyBundle: { ...keyBundle, replaceIdentity: true } },
    });
    expect(body).toMatchObject({ success: true, keyVersion: 2 });
  });

  it('names each key whose signature fails', async () => {
    const keyBundle = keyBundleOf(new SignalDevice(bob));
    keyBundle.signedPreKey = keyBundleOf(new SignalDevice(bob)).signedPreKey;
    const refusal = await refused('POST', '/api/keys/upload', { as: bob, body: { keyBundle } });
    expect(refusal).toMatchObject({
      status: 422,
      code: 'SIGNATURE_INVALID',
      details: { keys: [{ kind: 'signedPreKey', keyId: keyBundle.signedPreKey.keyId }] },
    });
    expect((await ask('GET', '/signal/status/minimal', { as: bob })).body.keyVersion).toBe(0);
  });

  it('names faults as the client wrote its fields', async () => {
    const good = keyBundleOf(new SignalDevice(bob));
    const [first, second] = good.oneTimePreKeys;
    const { identityPubKey, ...nameless } = good;
    const cases: [unknown, string[]][] = [
      [{ keyBundle: { ...good, identityPubKey: 'x' } }, ['keyBundle.identityPubKey']],
      [{ keyBundle: nameless }, ['keyBundle.identityPubKey']],
      [{ keyBundle: { ...nameless, identityKey: identityPubKey } }, ['keyBundle.identityKey']],
      [{ keyBundle: { ...good, identityKey: identityPubKey } }, ['keyBundle.identityKey']],
      [
        { keyBundle: { ...good, oneTimePreKeys: [first, { ...second, keyId: -1 }] } },
        ['keyBundle.oneTimePreKeys.1.keyId'],
      ],
      [{ keyBundle: { ...good, oneTimePreKeys: [first, first] } }, ['keyBundle.oneTimePreKeys.1.keyId']],
      [
        {
          keyBundle: { ...good, oneTimePreKeys: Array.from({ length: VALIDATE_PRE_KEYS_MAX + 1 }, () => 0) },
        },
        ['keyBundle.oneTimePreKeys'],
      ],
      [
        { keyBundle: { ...good, signedPreKey: { ...good.signedPreKey, privateKey: 'x' } } },
        ['keyBundle.signedPreKey.privateKey'],
      ],
      [{ keyBundle: [good] }, ['keyBundle']],
      [{ keyBundle: null }, ['keyBundle']],
      [{}, ['keyBundle']],
      [{ keyBundle: good, userId: 'eve' }, ['userId']],
      [good, expect.arrayContaining(['registrationId', 'identityPubKey']) as never],
      [[], ['']],
      ['null', ['']],
    ];
    for (const [body, paths] of cases) {
      const refusal = await refused('POST', '/api/keys/upload', { as: bob, body });
      expect(refusal).toMatchObject({ status: 400, code: 'BAD_REQUEST' });
      expect(faults(refusal)).toEqual(paths);
      expect(refusal.message).toContain(faults(refusal)[0]);
    }
    expect((await ask('GET', '/signal/status/minimal', { as: bob })).body.keyVersion).toBe(0);
  });

  it('lists no more unknown fields than it must, and none at full length', async () => {
    const body = Object.fromEntries(Array.from({ length: 200 }, (_, index) => ['x'.repeat(300) + index, 1]));
    const refusal = await refused('POST', '/api/keys/upload', { as: bob, body });
    expect(faults(refusal).length).toBe(ISSUES_MAX);
    expect(Math.max(...faults(refusal).map((path) => path.length))).toBeLessThan(130);
  });
});

describe('a bundle by HTTP', () => {
  it('has the shape of its route and one one-time prekey', async () => {
    const device = await uploaded(bob);
    const { status, body } = await ask('GET', `/api/keys/${bob.userId}?deviceId=1`);
    expect(status).toBe(200);
    expect(httpRoutes.requestBundle.answer.shape.keyBundle.strict().parse(body.keyBundle)).toEqual(
      body.keyBundle,
    );
    expect(Object.keys(body)).toEqual(['success', 'keyBundle']);
    expect(body.keyBundle).toMatchObject({
      deviceId: 1,
      registrationId: device.registrationId,
      identityPubKey: device.identityKey,
      oneTimePreKeys: [{ keyId: 1 }],
    });
    expect(await availableCount(bob)).toBe(2);
  });

  it('starts a session of a real client', async () => {
    const peer = await uploaded(bob);
    const { body } = await ask('GET', `/api/keys/${bob.userId}`);
    const { identityPubKey, oneTimePreKeys, ...rest } = body.keyBundle;
    const device = new SignalDevice(alice);
    const bundle = { userId: bob.userId, identityKey: identityPubKey, oneTimePreKey: oneTimePreKeys[0] };
    await device.establishSession({ ...rest, ...bundle });
    const envelope = await device.encrypt(bob, 'hello');
    expect(await peer.decrypt({ sender: alice, ...envelope })).toBe('hello');
  });

  it('comes without a one-time prekey where none is left', async () => {
    await uploaded(bob, 1);
    await ask('GET', `/api/keys/${bob.userId}`);
    const { status, body } = await ask('GET', `/api/keys/${bob.userId}`);
    expect(status).toBe(200);
    expect(body.keyBundle.oneTimePreKeys).toEqual([]);
    // By HTTP the empty list says it all.
    expect(body.keyBundle).not.toHaveProperty('oneTimePreKeyAbsent');
    expect(body.keyBundle.pqPreKey.lastResort).toBe(true);
  });

  it('is that of the lowest device where none is named, and of the named one otherwise', async () => {
    await uploaded({ ...bob, deviceId: 12 });
    await uploaded({ ...bob, deviceId: 5 });
    expect((await ask('GET', `/api/keys/${bob.userId}`)).body.keyBundle.deviceId).toBe(5);
    expect((await ask('GET', `/api/keys/${bob.userId}?deviceId=12`)).body.keyBundle.deviceId).toBe(12);
  });

  it('repeats its answer for the same Idempotency-Key and spends one key', async () => {
    await uploaded(bob);
    const headers = { 'idempotency-key': randomUUID() };
    const answers = await Promise.all(
      Array.from({ length: 8 }, () => ask('GET', `/api/keys/${bob.userId}`, { headers })),
    );
    answers.push(
      await ask('GET', `/api/keys/${bob.userId}`, {
        headers: { 'idempotency-key': headers['idempotency-key'].toUpperCase() },
      }),
    );
    expect(new Set(answers.map(({ body }) => JSON.stringify(body))).size).toBe(1);
    expect(await availableCount(bob)).toBe(2);
    await ask('GET', `/api/keys/${bob.userId}`, { headers: { 'idempotency-key': randomUUID() } });
    expect(await availableCount(bob)).toBe(1);
  });

  it('claims with every call that has no Idempotency-Key', async () => {
    await uploaded(bob);
    const answers = await Promise.all([1, 2, 3].map(() => ask('GET', `/api/keys/${bob.userId}`)));
    const ids = answers.map(({ body }) => body.keyBundle.oneTimePreKeys[0].keyId);
    expect(ids.sort()).toEqual([1, 2, 3]);
  });

  it('is refused for whom there is none, and where the request is malformed; nothing is claimed', async () => {
    await uploaded(bob);
    const address = `/api/keys/${bob.userId}`;
    const cases: [string, Record<string, string>, number, string, string[]][] = [
      ['/api/keys/nobody', {}, 404, 'USER_NOT_FOUND', []],
      ['/api/keys/nobody?deviceId=1', {}, 404, 'USER_NOT_FOUND', []],
      [`${address}?deviceId=2`, {}, 404, 'DEVICE_NOT_FOUND', []],
      [`${address}?deviceId=127`, {}, 404, 'DEVICE_NOT_FOUND', []],
      [`${address}?deviceId=0`, {}, 400, 'BAD_REQUEST', ['deviceId']],
      [`${address}?deviceId=128`, {}, 400, 'BAD_REQUEST', ['deviceId']],
      [`${address}?deviceId=01`, {}, 400, 'BAD_REQUEST', ['deviceId']],
      [`${address}?deviceId=1e0`, {}, 400, 'BAD_REQUEST', ['deviceId']],
      [`${address}?deviceId=`, {}, 400, 'BAD_REQUEST', ['deviceId']],
      [`${address}?deviceId=1&deviceId=2`, {}, 400, 'BAD_REQUEST', ['deviceId']],
      [`${address}?device=1`, {}, 400, 'BAD_REQUEST', ['device']],
      [`${address}?__proto__=1`, {}, 400, 'BAD_REQUEST', ['__proto__']],
      [address, { 'idempotency-key': 'again' }, 400, 'BAD_REQUEST', ['Idempotency-Key']],
      ['/api/keys/', {}, 400, 'BAD_REQUEST', ['userId']],
      ['/api/keys/%2e', {}, 400, 'BAD_REQUEST', ['userId']],
      [`/api/keys/${'x'.repeat(129)}`, {}, 400, 'BAD_REQUEST', ['userId']],
      [`/api/keys/${'x'.repeat(400)}`, {}, 400, 'BAD_REQUEST', ['']],
      ['/api/keys/%zz', {}, 400, 'BAD_REQUEST', ['']],
    ];
    for (const [path, headers, status, code, paths] of cases) {
      const refusal = await refused('GET', path, { headers });
      expect({ path, status: refusal.status, code: refusal.code }).toEqual({ path, status, code });
      expect(faults(refusal)).toEqual(paths);
    }
    expect(await availableCount(bob)).toBe(3);
  });

  it('finds a user whose name must be written with percent signs', async () => {
    const user = { userId: `@${'a:b'.repeat(42)}`.replace('@', 'u@'), deviceId: 1 };
    expect(user.userId.length).toBe(128);
    await uploaded(user);
    const encoded = [...user.userId].map((letter) => `%${letter.charCodeAt(0).toString(16)}`).join('');
    expect((await ask('GET', `/api/keys/${encoded}`)).body).toMatchObject({ success: true });
  });
});

describe('the other routes', () => {
  it('add prekeys', async () => {
    const device = await uploaded(bob, 1);
    const { oneTimePreKeys: preKeys } = device.morePreKeys(2);
    const { status, body } = await ask('POST', '/api/keys/add-prekeys', { as: bob, body: { preKeys } });
    expect(status).toBe(200);
    expect(body).toMatchObject({ success: true, oneTimePreKeys: { stored: 2 }, availableCount: 3 });
  });

  it('refuse bad prekeys by their place in the list, and prekeys of a device without keys', async () => {
    const preKeys = new SignalDevice(bob).morePreKeys(2).oneTimePreKeys!;
    const noKeys = await refused('POST', '/api/keys/add-prekeys', { as: bob, body: { preKeys } });
    expect(noKeys).toMatchObject({ status: 409, code: 'KEYS_NOT_UPLOADED' });
    const cases: [unknown, string[]][] = [
      [{ preKeys: [{ ...preKeys[0], keyId: 2 ** 32 }] }, ['preKeys.0.keyId']],
      [{ preKeys: [preKeys[0], { ...preKeys[1], publicKey: 'x' }] }, ['preKeys.1.publicKey']],
      [{ preKeys: {} }, ['preKeys']],
      [{ preKeys: null }, ['preKeys']],
      [{}, ['preKeys']],
      [{ oneTimePreKeys: preKeys }, ['oneTimePreKeys']],
    ];
    for (const [body, paths] of cases) {
      const refusal = await refused('POST', '/api/keys/add-prekeys', { as: bob, body });
      expect(refusal).toMatchObject({ status: 400, code: 'BAD_REQUEST' });
      expect(faults(refusal)).toEqual(paths);
    }
  });

  it('tell what is left, what was used and what is stored', async () => {
    const device = await uploaded(bob);
    await ask('GET', `/api/keys/${bob.userId}`);
    expect((await ask('GET', '/api/keys/check-prekeys', { as: bob })).body).toMatchObject({
      success: true,
      needsMorePreKeys: true,
      availableCount: 2,
      threshold: 10,
    });
    expect((await ask('GET', '/api/keys/stats', { as: bob })).body).toMatchObject({
      success: true,
      totalPreKeys: 3,
      availablePreKeys: 2,
      consumedPreKeys: 1,
      lastUpdated: expect.any(String),
    });
    expect((await ask('GET', '/signal/status/minimal', { as: bob })).body).toMatchObject({
      success: true,
      identityKey: device.identityKey,
      signedPreKeyId: 1,
      preKeyCount: 2,
      keyVersion: 1,
    });
  });

  it('have nulls and zeros for a device that never uploaded', async () => {
    expect((await ask('GET', '/signal/status/minimal')).body).toMatchObject({
      success: true,
      identityKey: null,
      signedPreKeyId: null,
      preKeyCount: 0,
      keyVersion: 0,
    });
    expect((await ask('GET', '/api/keys/stats')).body).toMatchObject({ totalPreKeys: 0, lastUpdated: null });
  });

  it('compare what a client holds, to the same verdict as by socket', async () => {
    const device = await uploaded(bob);
    const input = device.validateInput();
    const { body } = await ask('POST', '/signal/validate-and-sync', { as: bob, body: input });
    const { validation, ...rest } = body;
    expect(rest).toMatchObject({ success: true, keysValid: true, missingKeys: [], keyVersion: 1 });
    expect(validation).toEqual(expect.any(String));
    const client = await gateway.connect(bob);
    expect(await client.call('clientReady', { validation })).toMatchObject({ keyVersion: 1 });

    const other = await ask('POST', '/signal/validate-and-sync', {
      as: bob,
      body: { ...input, localSignedPreKeyId: 77 },
    });
    expect(other.status).toBe(200);
    expect(other.body).toMatchObject({ keysValid: false, missingKeys: ['signedPreKey'] });
    const refusal = await refused('POST', '/signal/validate-and-sync', { as: bob, body: { localKeys: 1 } });
    expect(faults(refusal)).toEqual(expect.arrayContaining(['localIdentityKey', 'localKeys']));
  });

  it.each(paths)('$method $path takes no query parameter that it doesn’t have', async ({ method, path }) => {
    const body = method === 'POST' ? {} : undefined;
    const refusal = await refused(method, `${path}?verbose=1`, { body });
    expect(refusal).toMatchObject({ status: 400, code: 'BAD_REQUEST' });
    expect(faults(refusal)).toEqual(['verbose']);
  });
});

describe('who may come in', () => {
  it.each(paths)('$method $path wants a token', async ({ method, path }) => {
    for (const authorization of [
      undefined,
      'Bearer',
      'Bearer x.y.z',
      'Basic YTpi',
      `Bearer ${'x'.repeat(9000)}`,
    ]) {
      const { status, headers, body } = await ask(method, path, {
        as: null,
        headers: authorization === undefined ? {} : { authorization },
      });
      expect(status).toBe(401);
      expect(headers.get('www-authenticate')).toBe('Bearer');
      expect(body).toMatchObject({ success: false, error: { code: 'UNAUTHENTICATED', retryable: false } });
    }
  });

  it('is told when a token ran out', async () => {
    const authorization = `Bearer ${await tokenFor(alice, { ttlMs: -5_000 })}`;
    const { status, headers, body } = await ask('GET', '/api/keys/stats', {
      as: null,
      headers: { authorization },
    });
    expect({ status, code: body.error.code }).toEqual({ status: 401, code: 'TOKEN_EXPIRED' });
    expect(headers.get('www-authenticate')).toBe('Bearer');
  });

  it('shows one token and nothing behind it', async () => {
    const authorization = `Bearer ${await tokenFor(alice)} more`;
    expect((await ask('GET', '/api/keys/stats', { as: null, headers: { authorization } })).status).toBe(401);
  });

  it('may write the scheme in small letters', async () => {
    const authorization = `bearer ${await tokenFor(alice)}`;
    expect((await ask('GET', '/api/keys/stats', { as: null, headers: { authorization } })).status).toBe(200);
  });

  it('is asked for the token before the body is read', async () => {
    const { status } = await ask('POST', '/api/keys/upload', { as: null, body: '{ no json' });
    expect(status).toBe(401);
  });
});

describe('bodies', () => {
  const post = (body: string, headers: Record<string, string> = {}) =>
    refused('POST', '/api/keys/upload', { body, headers });

  it.each([
    ['not JSON', '{'],
    ['empty', ''],
    ['poisoned', '{"keyBundle":{"__proto__":{"registrationId":1}}}'],
    ['poisoned by escapes', '{"keyBundle":{"\\u005f_proto__":{"registrationId":1}}}'],
    ['poisoned by a constructor', '{"constructor":{"prototype":{"a":1}}}'],
    ['nested without end', '['.repeat(500_000)],
  ])('that are %s are BAD_REQUEST', async (_, body) => {
    expect(await post(body)).toMatchObject({
      status: 400,
      code: 'BAD_REQUEST',
      details: { issues: [{ path: [] }] },
    });
  });

  it.each(['text/plain', 'application/x-www-form-urlencoded', 'application/xml', 'nonsense'])(
    'of the type %s are BAD_REQUEST',
    async (type) => {
      expect(await post('{"keyBundle":{}}', { 'content-type': type })).toMatchObject({
        status: 400,
        code: 'BAD_REQUEST',
        message: 'the body must be application/json',
      });
    },
  );

  it('that are missing are BAD_REQUEST', async () => {
    for (const path of ['/api/keys/upload', '/api/keys/add-prekeys', '/signal/validate-and-sync']) {
      expect(await refused('POST', path)).toMatchObject({ status: 400, code: 'BAD_REQUEST' });
    }
  });

  it('may say how their letters are encoded', async () => {
    const { status } = await ask('POST', '/api/keys/upload', {
      body: { keyBundle: keyBundleOf(new SignalDevice(alice)) },
      headers: { 'content-type': 'application/json; charset=utf-8' },
    });
    expect(status).toBe(200);
  });

  it('of the full size are read, and larger ones are PAYLOAD_TOO_LARGE', async () => {
    const frame = JSON.stringify({ x: '' }).length;
    expect(await post(JSON.stringify({ x: 'x'.repeat(FRAME_BYTES_MAX - frame) }))).toMatchObject({
      status: 400,
      code: 'BAD_REQUEST',
    });
    expect(await post(JSON.stringify({ x: 'x'.repeat(FRAME_BYTES_MAX - frame + 1) }))).toMatchObject({
      status: 413,
      code: 'PAYLOAD_TOO_LARGE',
    });
  });

  it('that grow too large without saying so are PAYLOAD_TOO_LARGE', async () => {
    const chunk = new Uint8Array(64 * 1024).fill(32);
    let left = FRAME_BYTES_MAX + chunk.length;
    const body = new ReadableStream({
      pull(controller) {
        if (left <= 0) return controller.close();
        controller.enqueue(chunk);
        left -= chunk.length;
      },
    });
    const response = await fetch(`${gateway.url}/api/keys/upload`, {
      method: 'POST',
      headers: {
        authorization: `Bearer ${await tokenFor(alice)}`,
        'content-type': 'application/json',
      },
      body,
      duplex: 'half',
    } as RequestInit);
    expect(response.status).toBe(413);
    expect(response.headers.get('cache-control')).toBe('no-store');
    expect(await response.json()).toMatchObject({ success: false, error: { code: 'PAYLOAD_TOO_LARGE' } });
  });
});

describe('methods and addresses', () => {
  it('claim nothing by HEAD', async () => {
    await uploaded(bob);
    const { status, headers, body } = await ask('HEAD', `/api/keys/${bob.userId}`);
    expect({ status, body }).toEqual({ status: 405, body: null });
    expect(headers.get('allow')).toBe('GET, OPTIONS');
    expect(await availableCount(bob)).toBe(3);
  });

  it.each([...paths.map(({ path }) => path), '/', '/api/keys', '/nowhere'])(
    'HEAD %s is not allowed',
    async (path) => {
      expect((await ask('HEAD', path)).status).toBe(405);
      expect((await ask('HEAD', path, { as: null })).status).toBe(405);
    },
  );

  it.each(paths)('$path has no other method than $method', async ({ method, path }) => {
    for (const other of ['GET', 'POST', 'PUT', 'PATCH', 'DELETE', 'PROPFIND']) {
      if (other === method) continue;
      const body = other === 'GET' ? undefined : '{ no json';
      const { status, headers, body: answer } = await ask(other, path, { body, as: null });
      expect({ other, status }).toEqual({ other, status: 405 });
      expect(headers.get('allow')).toBe(`${method}, OPTIONS`);
      expect(answer).toMatchObject({ success: false, error: { code: 'BAD_REQUEST' } });
    }
  });

  it.each([
    '/',
    '/api/keys',
    '/api/keys/bob/',
    '/api/keys/bob/1',
    '/API/keys/stats',
    '/signal/status',
    '/livez',
  ])('%s is no address', async (path) => {
    for (const method of ['GET', 'POST', 'OPTIONS']) {
      const body = method === 'POST' ? '{ no json' : undefined;
      expect(await refused(method, path, { body })).toMatchObject({ status: 404, code: 'BAD_REQUEST' });
    }
  });

  it('that are no HTTP are answered and cut', async () => {
    const answer = await raw(gateway.url, 'NONSENSE\r\n\r\n');
    expect(answer).toMatch(/^HTTP\/1\.1 400 Bad Request\r\n/);
    expect(answer).toContain('cache-control: no-store');
    expect(answer).toContain('"code":"BAD_REQUEST"');
    const flooded = await raw(gateway.url, `GET / HTTP/1.1\r\nhost: x\r\nx: ${'x'.repeat(20_000)}\r\n\r\n`);
    expect(flooded).toMatch(/^HTTP\/1\.1 431 /);
    expect(flooded).toContain('"code":"PAYLOAD_TOO_LARGE"');
  });
});

describe('browsers', () => {
  it('from an allowed origin may ask first, and read the answers', async () => {
    for (const { method, path } of paths) {
      const { status, headers, body } = await ask('OPTIONS', path, {
        as: null,
        headers: {
          origin: ORIGIN,
          'access-control-request-method': method,
          'access-control-request-headers': 'authorization,content-type,idempotency-key',
        },
      });
      expect({ status, body }).toEqual({ status: 204, body: null });
      expect(headers.get('access-control-allow-origin')).toBe(ORIGIN);
      expect(headers.get('access-control-allow-methods')).toBe(method);
      expect(headers.get('allow')).toBe(`${method}, OPTIONS`);
      expect(headers.get('access-control-max-age')).toBe('600');
      expect(headers.get('access-control-allow-headers')).toBe(
        'Authorization, Content-Type, Idempotency-Key',
      );
    }
    const read = await ask('GET', '/api/keys/stats', { headers: { origin: ORIGIN } });
    expect(read.status).toBe(200);
    expect(read.headers.get('access-control-allow-origin')).toBe(ORIGIN);
    const error = await ask('GET', '/api/keys/stats', { as: null, headers: { origin: ORIGIN } });
    expect(error.status).toBe(401);
    expect(error.headers.get('access-control-allow-origin')).toBe(ORIGIN);
    // When to come back, and by what scheme, a page reads only where it is told that it may.
    expect(error.headers.get('access-control-expose-headers')).toBe('Retry-After, WWW-Authenticate');
    expect(error.headers.has('access-control-allow-credentials')).toBe(false);
  });

  it.each(['https://evil.example', 'http://localhost:5173', 'null'])(
    'from %s are refused, and nothing is claimed',
    async (origin) => {
      await uploaded(bob);
      for (const method of ['OPTIONS', 'GET']) {
        const { status, headers, body } = await ask(method, `/api/keys/${bob.userId}`, {
          headers: { origin },
        });
        expect({ status, code: body.error.code }).toEqual({ status: 403, code: 'FORBIDDEN' });
        expect(headers.has('access-control-allow-origin')).toBe(false);
      }
      expect(await availableCount(bob)).toBe(3);
    },
  );
});

describe('beside Socket.IO', () => {
  it('both doors see the same keys, and the other’s addresses stay its own', async () => {
    await uploaded(bob);
    const client = await gateway.connect(alice);
    const { devices } = await client.call('requestBundle', { claimId: randomUUID(), userId: bob.userId });
    expect(devices[0]?.oneTimePreKey?.keyId).toBe(1);
    expect((await ask('GET', `/api/keys/${bob.userId}`)).body.keyBundle.oneTimePreKeys[0].keyId).toBe(2);
    expect((await client.call('keyStatus')).keyVersion).toBe(0);
  });

  it.each(['', 'EIO=3&', 'EIO=44&'])(
    'refuses an upgrade with "%s" before it is answered',
    async (protocol) => {
      const asked = [
        `GET /socket.io/?${protocol}transport=websocket HTTP/1.1`,
        'Host: x',
        'Upgrade: websocket',
        'Connection: Upgrade',
        'Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==',
        'Sec-WebSocket-Version: 13',
      ];
      const answer = await raw(gateway.url, `${asked.join('\r\n')}\r\n\r\n`);
      expect(answer).toMatch(/^HTTP\/1\.1 400 /);
      expect(answer).toContain('protocol 4 of Engine.IO');
    },
  );

  it('overlooks an upgrade to what it does not speak, as clients of Java offer it with every request', async () => {
    const { oneTimePreKeys: preKeys } = (await uploaded(bob, 1)).morePreKeys(2);
    const token = await tokenFor(bob);
    const agent = new Agent({ keepAlive: true, maxSockets: 1 });
    const offer = (method: string, path: string, body?: object): Promise<unknown[]> =>
      new Promise((resolve, reject) => {
        const headers = {
          authorization: `Bearer ${token}`,
          connection: 'Upgrade, HTTP2-Settings',
          upgrade: 'h2c',
          'http2-settings': 'AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA',
          ...(body !== undefined && { 'content-type': 'application/json' }),
        };
        const asking = request(`${gateway.url}${path}`, { method, headers, agent }, async (response) => {
          resolve([response.statusCode, await json(response), asking.reusedSocket]);
        });
        asking.on('error', reject);
        asking.end(body === undefined ? undefined : JSON.stringify(body));
      });
    const total = (totalPreKeys: number) => expect.objectContaining({ success: true, totalPreKeys });
    const refused = expect.objectContaining({ success: false });
    expect(await offer('GET', '/api/keys/stats')).toEqual([200, total(1), false]);
    expect((await offer('POST', '/api/keys/add-prekeys', { preKeys }))[0]).toBe(200);
    expect(await offer('GET', '/nowhere')).toEqual([404, refused, true]);
    expect(await offer('GET', '/api/keys/stats')).toEqual([200, total(3), true]);
    agent.destroy();
  });

  it('says where sockets are opened to a WebSocket of another address', async () => {
    const asked = upgradeRequest(gateway.url).replace('/socket.io/', '/ws');
    const answer = await raw(gateway.url, asked);
    expect(answer).toMatch(/^HTTP\/1\.1 404 /);
    expect(answer).toMatch(/\r\ncache-control: no-store\r\n/);
    expect(JSON.parse(answer.split('\r\n\r\n')[1]!)).toMatchObject({
      success: false,
      error: { code: 'BAD_REQUEST', details: { issues: [{ message: 'sockets are opened at /socket.io/' }] } },
    });
  });

  it('lets nobody keep the answer to an upgrade', async () => {
    const peer = await openWebSocketPeer(gateway.url);
    expect(peer.received).toMatch(/^HTTP\/1\.1 101 .*\r\ncache-control: no-store\r\n/is);
    peer.destroy();
  });

  it('tells a client that polls how a socket is opened', async () => {
    for (const [method, status] of [
      ['GET', 400],
      ['POST', 400],
      ['HEAD', 405],
    ] as const) {
      const poll = await fetch(`${gateway.url}/socket.io/?EIO=4&transport=polling`, { method });
      expect([poll.status, poll.headers.get('cache-control')]).toEqual([status, 'no-store']);
      const text = await poll.text();
      if (method === 'HEAD') continue;
      expect(JSON.parse(text)).toMatchObject({
        success: false,
        error: { code: 'BAD_REQUEST', message: expect.stringContaining("transports: ['websocket']") },
      });
    }
  });
});

describe('a door in trouble', () => {
  const device = { userId: 'alice', deviceId: 1 };
  let door: HttpDoor | null = null;
  const seen: unknown[] = [];
  const note = (event: unknown) => void seen.push(event);

  afterEach(async () => {
    await door?.close();
    door = null;
    seen.length = 0;
  });

  async function openDoor(parts: Partial<HttpDoorParts>, host: string | null = '127.0.0.1'): Promise<string> {
    door = await createHttpDoor({
      dispatch: async () => ({ ok: true, data: {} }) as unknown as Reply<never>,
      authenticator: {
        authenticate: async () => ({ device, issuedAtMs: null, expiresAtMs: Number.MAX_SAFE_INTEGER }),
      },
      refuseRevoked: async () => ({ keyVersion: 0, identityVersion: 0 }),
      limits: { chargeArrival: async () => {} },
      origins: { listed: [ORIGIN], loopback: false },
      clock: systemClock,
      observer: {
        ...createObserver(silentLog),
        requestEnded: note,
        requestFailed: note,
        socketOpened: note,
        socketClosed: note,
        handshakeRefused: note,
        limitHit: note,
      },
      isDraining: () => false,
      ...parts,
    });
    return await door.listen(host, 0);
  }

  it('says while it drains that it is, in a way that browsers can read, and keeps no connection', async () => {
    const url = await openDoor({ isDraining: () => true });
    const headers = { origin: ORIGIN };
    const { status, headers: answered, body } = await ask('GET', '/api/keys/stats', { headers }, url);
    expect(status).toBe(503);
    expect(body.error).toMatchObject({ code: 'UNAVAILABLE', retryable: true, retryAfterMs: 2000 });
    expect(answered.get('connection')).toBe('close');
    expect(answered.get('retry-after')).toBe('2');
    expect(answered.get('access-control-allow-origin')).toBe(ORIGIN);
    expect((await ask('OPTIONS', '/api/keys/stats', { headers }, url)).status).toBe(204);
  });

  it('rounds the time to wait up to a second', async () => {
    const error = new GatewayError('RATE_LIMITED', undefined, { retryAfterMs: 1_200 }).toObject();
    const url = await openDoor({ dispatch: async () => ({ ok: false, error }) });
    const { status, headers, body } = await ask('GET', '/api/keys/stats', {}, url);
    expect(status).toBe(429);
    expect(headers.get('retry-after')).toBe('2');
    expect(body.error).toEqual(error);
  });

  it('answers INTERNAL with an id that the observer has, and nothing of the fault', async () => {
    const fault = new Error('the secret of the house');
    const url = await openDoor({
      dispatch: () => {
        throw fault;
      },
    });
    const { status, body } = await ask('GET', '/api/keys/stats', {}, url);
    expect(status).toBe(500);
    expect(body.error).toMatchObject({ code: 'INTERNAL', details: { errorId: expect.any(String) } });
    expect(JSON.stringify(body)).not.toContain('secret');
    expect(seen).toEqual([
      { name: 'keyStats', device, errorId: body.error.details.errorId, error: fault },
      { door: 'http', device, name: 'keyStats', code: 'INTERNAL', durationMs: expect.any(Number) },
    ]);
  });

  it('does the same where tokens can’t be judged', async () => {
    const fault = new Error('the secret of the house');
    const url = await openDoor({
      authenticator: {
        authenticate: () => {
          throw fault;
        },
      },
    });
    const { status, body } = await ask('GET', '/api/keys/stats', {}, url);
    expect(status).toBe(500);
    expect(JSON.stringify(body)).not.toContain('secret');
    expect(seen).toEqual([
      { door: 'http', code: 'INTERNAL', errorId: body.error.details.errorId, error: fault },
    ]);
  });

  it('tells the observer of what it refuses before dispatch, and how long that took', async () => {
    const clock = createManualClock();
    const url = await openDoor({ clock, limits: { chargeArrival: () => clock.advance(70) } });
    await ask('POST', '/api/keys/upload', { body: '{' }, url);
    await ask('POST', '/api/keys/add-prekeys', { body: {} }, url);
    expect(seen).toEqual(
      ['uploadKeys', 'addPreKeys'].map((name) => ({
        door: 'http',
        device,
        name,
        code: 'BAD_REQUEST',
        durationMs: 70,
      })),
    );
  });

  it('tells the observer whose request was beyond a limit, or whose token was revoked', async () => {
    for (const [code, parts] of [
      ['RATE_LIMITED', { limits: { chargeArrival: () => Promise.reject(new GatewayError('RATE_LIMITED')) } }],
      ['FORBIDDEN', { refuseRevoked: () => Promise.reject(new GatewayError('FORBIDDEN')) }],
    ] as const) {
      const url = await openDoor(parts);
      await ask('GET', '/api/keys/stats', {}, url);
      expect(seen.splice(0)).toEqual([
        { door: 'http', device, name: 'keyStats', code, durationMs: expect.any(Number) },
      ]);
      await door!.close();
    }
  });

  it('charges what turns out to be revoked, too', async () => {
    const charged: unknown[] = [];
    const url = await openDoor({
      limits: { chargeArrival: async (_, name) => void charged.push(name) },
      refuseRevoked: () => Promise.reject(new GatewayError('FORBIDDEN')),
    });
    expect((await ask('GET', '/api/keys/stats', {}, url)).status).toBe(403);
    expect(charged).toEqual(['keyStats']);
  });

  it('answers what is under way before it closes, and what comes after with UNAVAILABLE', async () => {
    const asked = deferred<void>();
    const reply = deferred<Reply<never>>();
    const url = await openDoor({
      dispatch: () => {
        asked.resolve();
        return reply.promise;
      },
    });
    const request = 'GET /api/keys/stats HTTP/1.1\r\nhost: x\r\n\r\n';
    const closed = asked.promise.then(() => {
      // The first is answered when the second has come in.
      door!.server.once('request', () => reply.resolve({ ok: true, data: { done: true } } as never));
      return door!.close();
    });
    const answer = await raw(
      url,
      request,
      asked.promise.then(() => request),
    );
    const [, first, second] = answer.split('HTTP/1.1 ');
    expect(first).toMatch(/^200 .*"done":true/s);
    expect(second).toMatch(/^503 .*connection: close.*"code":"UNAVAILABLE"/is);
    await closed;
    await expect(fetch(url)).rejects.toThrow();
  });

  it('closes in time although a client never ends its request', async () => {
    const url = await openDoor({
      // Graces pass at once.
      clock: { nowMs: () => 0, after: (_, action) => systemClock.after(0, action) },
    });
    const { hostname, port } = new URL(url);
    const socket = connect(Number(port), hostname);
    socket.on('error', () => {});
    const ended = new Promise((resolve) => socket.once('close', resolve));
    await new Promise<void>((resolve) =>
      socket.write('POST /api/keys/upload HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n', () => resolve()),
    );
    await door!.close();
    await ended;
  });

  it('listens on every address where none is given', async () => {
    const { port } = new URL(await openDoor({}, null));
    expect(['::', '0.0.0.0']).toContain((door!.server.address() as AddressInfo).address);
    expect((await fetch(`http://127.0.0.1:${port}/api/keys/stats`)).status).toBe(200);
  });

  function deferred<Value>(): { promise: Promise<Value>; resolve(value: Value): void } {
    let resolve: (value: Value) => void = () => {};
    const promise = new Promise<Value>((settle) => {
      resolve = settle;
    });
    return { promise, resolve };
  }
});
