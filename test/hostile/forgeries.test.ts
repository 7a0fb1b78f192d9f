/** Tokens that nobody should believe, at both doors, and key servers that nobody should wait for. */
import { generateKeyPairSync, type KeyObject } from 'node:crypto';
import { createServer, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { SignJWT } from 'jose';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import { TOKEN_LENGTH_MAX } from '../../src/protocol/limits.ts';
import { createDatabase } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { connectClient, RefusedError, TEST_SECRET } from '../support/gateway.ts';
import { startGatewayProcess } from '../support/gateway-process.ts';
import { createProbe, PEAK_BYTES_MAX } from './probe.ts';
import { BYSTANDER, startTarget, type Target } from './target.ts';

const KEY_ID = 'current';
const AUDIENCE = 'keygate';
const rsa = generateKeyPairSync('rsa', { modulusLength: 2048 });
const strangersKey = generateKeyPairSync('rsa', { modulusLength: 2048 }).privateKey;
const publicPem = rsa.publicKey.export({ type: 'spki', format: 'pem' }).toString();
const keySet = JSON.stringify({
  keys: [{ ...rsa.publicKey.export({ format: 'jwk' }), kid: KEY_ID, alg: 'RS256', use: 'sig' }],
});

type Answer = (response: ServerResponse) => void;
const good: Answer = (response) => void response.end(keySet);

/** A key server whose answers a test chooses, by path. */
const answers = new Map<string, Answer>();
const fetches = new Map<string, number>();
const keyServer = createServer((request, response) => {
  const path = request.url ?? '';
  fetches.set(path, (fetches.get(path) ?? 0) + 1);
  (answers.get(path) ?? good)(response);
});
const keySetUrl = (path: string): string =>
  `http://127.0.0.1:${(keyServer.address() as AddressInfo).port}${path}`;

/** The gateway's tokens are the key set's, not those of a secret. */
const byKeySet = (path: string) => ({
  JWT_SECRET: '',
  JWT_JWKS_URL: keySetUrl(path),
  JWT_AUDIENCE: AUDIENCE,
});

interface Forgery {
  device?: DeviceAddress;
  key?: KeyObject | Uint8Array;
  alg?: string;
  kid?: string;
  audience?: string;
  fromS?: number;
  untilS?: number;
  more?: Record<string, unknown>;
}

/** Good, but for what is asked for. */
async function forge(forgery: Forgery = {}): Promise<string> {
  const { device = BYSTANDER, key = rsa.privateKey, alg = 'RS256', kid = KEY_ID } = forgery;
  const { audience = AUDIENCE, fromS, untilS = 3600, more = {} } = forgery;
  const nowS = Math.floor(Date.now() / 1000);
  const token = new SignJWT({ device_id: device.deviceId, ...more })
    .setProtectedHeader({ alg, kid })
    .setSubject(device.userId)
    .setAudience(audience)
    .setIssuedAt(nowS)
    .setExpirationTime(nowS + untilS);
  if (fromS !== undefined) token.setNotBefore(nowS + fromS);
  return await token.sign(key);
}

const part = (value: object): string => Buffer.from(JSON.stringify(value)).toString('base64url');
const bytes = (text: string): Uint8Array => new TextEncoder().encode(text);

/** The seven, each in the forms that libraries have believed. */
const FORGERIES: Record<string, () => Promise<string[]>> = {
  'alg none': async () => {
    const [, payload] = (await forge()).split('.');
    return ['none', 'None', 'NONE', 'nOnE', ''].flatMap((alg) => [
      `${part({ alg, kid: KEY_ID })}.${payload}.`,
      `${part({ alg, kid: KEY_ID })}.${payload}.AAAA`,
    ]);
  },
  'another audience': async () => [
    await forge({ audience: 'somebody-else' }),
    await forge({ audience: '' }),
    await forge({ audience: AUDIENCE.toUpperCase() }),
    await forge({ audience: `${AUDIENCE} ` }),
  ],
  'the public key as if it were a secret': async () => [
    await forge({ alg: 'HS256', key: bytes(publicPem) }),
    await forge({ alg: 'HS256', key: bytes(publicPem.trim()) }),
    await forge({ alg: 'HS256', key: bytes(keySet) }),
    await forge({ alg: 'HS512', key: bytes(publicPem) }),
    await forge({ alg: 'HS256', key: bytes(TEST_SECRET) }),
  ],
  'a key that is not in the set': async () => [
    await forge({ kid: 'another', key: strangersKey }),
    await forge({ key: strangersKey }),
    await forge({ kid: '../../../../dev/null', key: strangersKey }),
    await forge({ kid: "' OR '1'='1", key: strangersKey }),
    await forge({ kid: '__proto__', key: strangersKey }),
    withHeader(await forge({ key: strangersKey }), { jwk: JSON.parse(keySet).keys[0] }),
    withHeader(await forge({ key: strangersKey }), { jku: keySetUrl('/strangers') }),
    withHeader(await forge({ key: strangersKey }), { x5u: keySetUrl('/strangers') }),
  ],
  'one that ran out': async () => [await forge({ untilS: -1 }), await forge({ untilS: -86_400 })],
  'one before its time': async () => [await forge({ fromS: 60 }), await forge({ fromS: 86_400 })],
  'one that is too large': async () => [
    await forge({ more: { filler: 'x'.repeat(TOKEN_LENGTH_MAX) } }),
    `${'x'.repeat(TOKEN_LENGTH_MAX + 1)}`,
  ],
};

/** Another header over the same payload and signature. */
function withHeader(token: string, more: object): string {
  const [, payload, signature] = token.split('.');
  return `${part({ alg: 'RS256', kid: KEY_ID, ...more })}.${payload}.${signature}`;
}

/** The codes of both doors. */
async function refusals(url: string, token: string): Promise<unknown[]> {
  const bySocket = connectClient(url, token).then(
    (client) => {
      client.close();
      return 'served';
    },
    (error: unknown) => (error instanceof RefusedError ? error.error.code : String(error)),
  );
  const byHttp = fetch(`${url}/api/keys/stats`, { headers: { authorization: `Bearer ${token}` } }).then(
    async (response) =>
      response.ok ? 'served' : ((await response.json()) as { error: { code: string } }).error.code,
  );
  return await Promise.all([bySocket, byHttp]);
}

beforeAll(async () => {
  await new Promise<void>((resolve) => keyServer.listen(0, '127.0.0.1', resolve));
});
afterAll(async () => {
  keyServer.closeAllConnections();
  await new Promise((resolve) => keyServer.close(resolve));
});

describe('a forged token', () => {
  let target: Target;
  beforeAll(async () => {
    target = await startTarget(byKeySet('/good'), (device) => forge({ device }));
  });
  afterAll(() => target?.stop());

  it('is not needed where there is a good one', async () => {
    const device = { userId: 'somebody', deviceId: 1 };
    expect(await refusals(target.gateway.url, await forge({ device }))).toEqual(['served', 'served']);
  });

  it.each(Object.keys(FORGERIES))('%s is refused at both doors', async (name) => {
    await target.attack(`forgery: ${name}`, async () => {
      const expected = name === 'one that ran out' ? 'TOKEN_EXPIRED' : 'UNAUTHENTICATED';
      for (const token of await FORGERIES[name]!()) {
        expect(await refusals(target.gateway.url, token), token.slice(0, 200)).toEqual([expected, expected]);
      }
    });
    expect(fetches.get('/strangers')).toBeUndefined();
  });

  it('of a made-up key id does not make the gateway ask the key server each time', async () => {
    const before = fetches.get('/good') ?? 0;
    await target.attack('500 made-up key ids', async () => {
      for (let round = 0; round < 10; round++) {
        const tokens = await Promise.all(
          Array.from({ length: 50 }, (_, n) => forge({ kid: `made-up-${round}-${n}`, key: strangersKey })),
        );
        await Promise.all(
          tokens.map(async (token) => {
            const response = await fetch(`${target.gateway.url}/api/keys/stats`, {
              headers: { authorization: `Bearer ${token}` },
            });
            expect(response.status).toBe(401);
            await response.arrayBuffer();
          }),
        );
      }
    });
    expect((fetches.get('/good') ?? 0) - before).toBeLessThanOrEqual(1);
  });
});

/** Writes until nobody listens any more. */
const endless: Answer = (response) => {
  const chunk = Buffer.alloc(1024 * 1024, ' ');
  const write = (): void => {
    while (!response.destroyed && response.write(chunk));
    response.once('drain', write);
  };
  write();
};

const BAD_KEY_SERVERS: Record<string, Answer> = {
  silent: () => {},
  endless,
  'not a key server': (response) => void response.end('<html>It works!</html>'),
};

describe('a key server that is', () => {
  it.concurrent.each(Object.entries(BAD_KEY_SERVERS))(
    '%s keeps strangers out, costs little, and is asked again',
    async (name, bad) => {
      const path = `/${name.replaceAll(' ', '-')}`;
      answers.set(path, bad);
      const database = await createDatabase();
      const probe = await createProbe();
      const gateway = await startGatewayProcess(
        { databaseUrl: database.url },
        { ...probe.env, ...byKeySet(path) },
      );
      try {
        await probe.figures(gateway);
        const token = await forge();
        const outcomes = await Promise.all(Array.from({ length: 20 }, () => refusals(gateway.url, token)));
        expect(outcomes).toEqual(outcomes.map(() => ['UNAVAILABLE', 'UNAVAILABLE']));
        expect(fetches.get(path)).toBe(1);
        const { peakBytes, loopDelayMaxMs } = await probe.figures(gateway);
        process.stdout.write(
          `  hostile: a key server that is ${name}: memory at most ${Math.round(peakBytes / 2 ** 20)} MiB, ` +
            `loop delay at most ${loopDelayMaxMs} ms\n`,
        );
        expect(peakBytes).toBeLessThan(PEAK_BYTES_MAX);
        answers.set(path, good);
        await eventually(
          async () => expect(await refusals(gateway.url, token)).toEqual(['served', 'served']),
          { waitMaxMs: 20_000, that: 'the gateway serving again' },
        );
      } finally {
        await gateway.stop();
        await database.drop();
        await probe.remove();
      }
    },
  );
});
