/** Whose keys are stored is what the token says, whatever else a request says: nobody plants keys for another. */
import { createHmac } from 'node:crypto';
import { request as httpRequest } from 'node:http';
import { io } from 'socket.io-client';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { RequestName } from '../../src/protocol/events.ts';
import { eventually } from '../support/eventually.ts';
import { type Client, connectClient, TEST_SECRET, tokenFor } from '../support/gateway.ts';
import { KeyMaker } from '../support/key-maker.ts';
import { openPeer } from './raw-peer.ts';
import { type Path, placesOf, samples, withFieldAt } from './registry.ts';
import { startTarget, type Target } from './target.ts';

const VICTIM = { userId: 'victim', deviceId: 1 };
/** Has no keys yet: planted ones would be taken for its own. */
const NEWBORN = { userId: 'newborn', deviceId: 1 };
const ATTACKER = { userId: 'planter', deviceId: 2 };

const victimKeys = new KeyMaker();
const attackerKeys = new KeyMaker();

let target: Target;
let attacker: Client;
let victim: Client;
let newborn: Client;
let token: string;
let before: unknown;

/** All that the victims' devices can learn of their keys, and others of them. */
async function ofVictims(): Promise<unknown> {
  const { totalPreKeys, consumedPreKeys } = await victim.call('keyStats');
  return {
    victim: await victim.call('keyStatus'),
    totalPreKeys,
    consumedPreKeys,
    newborn: await newborn.call('keyStatus'),
    devices: await attacker.call('listDevices', { userId: VICTIM.userId }),
    ofNewborn: (await attacker.refusal('listDevices', { userId: NEWBORN.userId })).code,
  };
}

beforeAll(async () => {
  target = await startTarget();
  const { gateway } = target;
  victim = await gateway.connect(VICTIM);
  newborn = await gateway.connect(NEWBORN);
  attacker = await gateway.connect(ATTACKER);
  await victim.call('uploadKeys', victimKeys.keySet({ oneTimePreKeys: [victimKeys.oneTime(1)] }));
  await attacker.call('uploadKeys', attackerKeys.keySet());
  token = await tokenFor(ATTACKER);
  before = await ofVictims();
});
afterAll(() => target?.stop());

const OWNERS: [name: string, value: (device: typeof VICTIM) => unknown][] = [
  ...[
    'userId',
    'user',
    'user_id',
    'sub',
    'owner',
    'ownerId',
    'uid',
    'username',
    'for',
    'to',
    'target',
    'sender',
    'from',
    'as',
    'onBehalfOf',
  ].map((name): [string, (device: typeof VICTIM) => unknown] => [name, (device) => device.userId]),
  ...['deviceId', 'device_id', 'deviceID', 'localDeviceId'].map(
    (name): [string, (device: typeof VICTIM) => unknown] => [name, (device) => device.deviceId],
  ),
  ...['device', 'address', 'owner', 'caller', 'identity', 'context', 'auth', 'token'].map(
    (name): [string, (device: typeof VICTIM) => unknown] => [name, (device) => device],
  ),
  ...['__proto__', 'constructor', 'prototype'].map((name): [string, (device: typeof VICTIM) => unknown] => [
    name,
    (device) => ({ ...device, device, sub: device.userId, device_id: device.deviceId }),
  ]),
];

const WRITES: RequestName[] = [
  'uploadKeys',
  'addPreKeys',
  'withdrawPreKeys',
  'rotateSignedPreKey',
  'resetKeys',
];

describe('by socket', () => {
  it('a field that names an owner is refused, in every object of every request that writes', async () => {
    const attempts = WRITES.flatMap((name) =>
      placesOf(samples.get(name)).objects.flatMap((path: Path) =>
        OWNERS.flatMap(([field, value]) =>
          [VICTIM, NEWBORN].map((device) => ({
            name,
            input: withFieldAt(samples.get(name), path, field, value(device)),
          })),
        ),
      ),
    );
    await target.attack(`${attempts.length} uploads that name an owner`, async () => {
      const replies = [];
      for (let start = 0; start < attempts.length; start += 50) {
        const batch = attempts.slice(start, start + 50);
        replies.push(
          ...(await Promise.all(batch.map(({ name, input }) => attacker.ask(name, input as never)))),
        );
      }
      expect(new Set(replies.map((reply) => (reply.ok ? 'stored' : reply.error.code)))).toEqual(
        new Set(['BAD_REQUEST']),
      );
    });
    expect(await ofVictims()).toEqual(before);
  });

  it('what a handshake says beside its token counts for nothing', async () => {
    const other = await tokenFor({ ...ATTACKER, deviceId: 3 });
    for (const device of [VICTIM, NEWBORN]) {
      const socket = io(target.gateway.url, {
        transports: ['websocket'],
        forceNew: true,
        reconnection: false,
        auth: { token: other, ...device, sub: device.userId, device_id: device.deviceId, device },
        query: { ...device, sub: device.userId, device_id: device.deviceId, token: 'x' },
        extraHeaders: headersOf(device),
      });
      const reply = await socket.emitWithAck('keyStatus', {});
      expect(reply).toMatchObject({ ok: true, data: { identityKey: null, keyVersion: 0 } });
      socket.close();
      expect([victim, newborn].every((client) => client.socket.connected)).toBe(true);
    }
    expect(await ofVictims()).toEqual(before);
  });

  it('a token whose claims stand twice, or in another form, is of one device at most', async () => {
    expect((await attacker.refusal('refreshToken', { token: await tokenFor(VICTIM) })).code).toBe(
      'FORBIDDEN',
    );
    const oddClaims = [
      '"sub":"planter","device_id":"1"',
      '"sub":["victim"],"device_id":1',
      '"sub":{"toString":"victim"},"device_id":1',
      '"sub":"victim\\u0000","device_id":1',
      '"sub":"victim ","device_id":1',
      '"sub":"\\uff56ictim","device_id":1',
      '"sub":"victim","device_id":1.5',
      '"sub":"victim","device_id":[1]',
      '"sub":"victim","device_id":true',
      '"sub":"victim","device_id":"1"',
      '"sub":"victim","deviceId":1',
      '"userId":"victim","device_id":1',
      '"__proto__":{"sub":"victim","device_id":1}',
    ];
    for (const claims of oddClaims) {
      await expect(connectClient(target.gateway.url, tokenWith(claims)), claims).rejects.toThrow(
        'UNAUTHENTICATED',
      );
    }
    // The last of two counts, as for everybody who reads JSON: the victim is not even displaced.
    const twice = tokenWith('"sub":"victim","device_id":1,"sub":"planter","device_id":4');
    const client = await connectClient(target.gateway.url, twice);
    expect(await client.call('keyStatus')).toMatchObject({ keyVersion: 0 });
    client.close();
    expect(victim.waiting('displaced')).toBe(0);
    expect(await ofVictims()).toEqual(before);
  });
});

/** Signed by the issuer, over claims as they are written here. */
function tokenWith(claims: string): string {
  const encoded = (text: string): string => Buffer.from(text).toString('base64url');
  const signed = `${encoded('{"alg":"HS256"}')}.${encoded(`{${claims},"exp":${Math.floor(Date.now() / 1000) + 3600}}`)}`;
  return `${signed}.${createHmac('sha256', TEST_SECRET).update(signed).digest('base64url')}`;
}

/** What proxies and frameworks have been known to take for the caller. */
function headersOf(device: typeof VICTIM): Record<string, string> {
  const { userId, deviceId } = device;
  return {
    'x-user': userId,
    'x-user-id': userId,
    'x-device-id': String(deviceId),
    'x-forwarded-user': userId,
    'x-remote-user': userId,
    'remote-user': userId,
    'x-authenticated-userid': userId,
    'x-original-url': `/api/keys/${userId}`,
    'x-rewrite-url': `/api/keys/${userId}`,
    'x-http-method-override': 'PUT',
    'x-amzn-oidc-identity': userId,
    'idempotency-key': '00000000-0000-4000-8000-000000000000',
    cookie: `token=${userId}; userId=${userId}; sub=${userId}; deviceId=${deviceId}`,
    from: userId,
  };
}

function post(
  path: string,
  body: unknown,
  headers: Record<string, string> = {},
  method = 'POST',
): Promise<number> {
  const { hostname, port } = new URL(target.gateway.url);
  return new Promise((resolve, reject) => {
    const request = httpRequest({
      hostname,
      port,
      path,
      method,
      headers: { ...headers, authorization: `Bearer ${token}`, 'content-type': 'application/json' },
    });
    request.once('error', reject);
    request.once('response', (response) => {
      response.resume();
      response.once('end', () => resolve(response.statusCode ?? 0));
    });
    request.end(JSON.stringify(body));
  });
}

describe('by HTTP', () => {
  const planted = new KeyMaker();
  const { identityKey, ...rest } = planted.keySet({ oneTimePreKeys: [planted.oneTime(9)] });
  const keyBundle = { ...rest, identityPubKey: identityKey };

  it('a field of the body, of the query or of the path that names an owner is refused', async () => {
    await target.attack('owners in body, query and path', async () => {
      for (const device of [VICTIM, NEWBORN]) {
        const { userId, deviceId } = device;
        for (const [name, value] of OWNERS) {
          const bodies = [
            withFieldAt({ keyBundle }, [], name, value(device)),
            withFieldAt({ keyBundle }, ['keyBundle'], name, value(device)),
            withFieldAt({ keyBundle }, ['keyBundle', 'signedPreKey'], name, value(device)),
            withFieldAt({ keyBundle }, ['keyBundle', 'oneTimePreKeys', 0], name, value(device)),
          ];
          for (const body of bodies) expect(await post('/api/keys/upload', body), name).toBe(400);
          const query = `${encodeURIComponent(name)}=${encodeURIComponent(String(value(device)))}`;
          expect(await post(`/api/keys/upload?${query}`, { keyBundle })).toBe(400);
        }
        for (const path of [
          `/api/keys/upload/${userId}`,
          `/api/keys/${userId}/upload`,
          `/api/keys/${userId}`,
          `/api/keys/${userId}/${deviceId}`,
          `/api/keys/${userId}/../upload`,
          `/api/keys/upload;userId=${userId}`,
          `/api/keys/upload%2f${userId}`,
          `//${userId}/api/keys/upload`,
        ]) {
          for (const method of ['POST', 'PUT', 'PATCH', 'DELETE']) {
            expect(await post(path, { keyBundle }, {}, method), `${method} ${path}`).toBeGreaterThanOrEqual(
              400,
            );
          }
        }
      }
    });
    expect(await ofVictims()).toEqual(before);
  });

  it('a header that names an owner counts for nothing: the keys are the caller’s own', async () => {
    for (const device of [VICTIM, NEWBORN]) {
      const preKeys = [attackerKeys.oneTime(device === VICTIM ? 100 : 101)];
      expect(await post('/api/keys/add-prekeys', { preKeys }, headersOf(device))).toBe(200);
    }
    expect((await attacker.call('keyStatus')).preKeyCount).toBe(2);
    expect(await ofVictims()).toEqual(before);
  });

  it('a second Authorization line is no second caller', async () => {
    const victimsToken = await tokenFor(VICTIM);
    for (const [first, second] of [
      [token, `${victimsToken.slice(0, -4)}AAAA`],
      [`${victimsToken.slice(0, -4)}AAAA`, token],
    ]) {
      const peer = await openPeer(target.gateway.url);
      const body = JSON.stringify({ keyBundle });
      await peer.write(
        `POST /api/keys/upload HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ${first}\r\nAuthorization: Bearer ${second}\r\n` +
          `Content-Type: application/json\r\nContent-Length: ${Buffer.byteLength(body)}\r\nConnection: close\r\n\r\n${body}`,
      );
      await eventually(() => peer.received.includes('\r\n\r\n'), { that: 'an answer' });
      // Either the first line alone counts, and the attacker meets his own other identity; or nobody is believed.
      expect(peer.received.slice(0, 12)).toMatch(/^HTTP\/1\.1 (?:40[01]|409)/);
      peer.destroy();
    }
    expect(await ofVictims()).toEqual(before);
  });

  it('two requests in one, by a length that lies, are no request of somebody else', async () => {
    const body = JSON.stringify({ preKeys: [] });
    for (const lengths of [
      `Content-Length: ${body.length}\r\nContent-Length: 0`,
      `Content-Length: ${body.length}\r\nTransfer-Encoding: chunked`,
      'Transfer-Encoding: chunked\r\nTransfer-Encoding: identity',
      'Transfer-Encoding: xchunked',
      'Content-Length: +5',
      'Content-Length: -1',
    ]) {
      const peer = await openPeer(target.gateway.url);
      await peer.write(
        `POST /api/keys/add-prekeys HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ${token}\r\n` +
          `Content-Type: application/json\r\n${lengths}\r\n\r\n${body}GET /api/keys/victim HTTP/1.1\r\nHost: x\r\n\r\n`,
      );
      await peer.closed;
      expect(peer.received, lengths).toMatch(/^HTTP\/1\.1 400/);
    }
    expect(await ofVictims()).toEqual(before);
  });
});

it('and the victim’s bundle is still what it uploaded', async () => {
  const { devices } = await attacker.call('requestBundle', {
    claimId: crypto.randomUUID(),
    userId: VICTIM.userId,
  });
  expect(devices).toMatchObject([{ identityKey: victimKeys.identityKey(), oneTimePreKey: { keyId: 1 } }]);
});
