import { generateKeyPairSync } from 'node:crypto';
import { resolve } from 'node:path';
import { describe, expect, it } from 'vitest';
import { ConfigError, parseConfig } from '../src/config.ts';

const DATABASE_URL = 'postgres://keygate:hunter2@db/keygate';
const JWT_SECRET = 's'.repeat(32);
const PUBLIC_KEY = generateKeyPairSync('ed25519')
  .publicKey.export({ type: 'spki', format: 'pem' })
  .toString();

function problemsOf(env: NodeJS.ProcessEnv): readonly string[] {
  try {
    parseConfig(env);
  } catch (error) {
    if (error instanceof ConfigError) return error.problems;
    throw error;
  }
  return [];
}

describe('configuration', () => {
  it('is embedded, on loopback, for pages of this machine, where nothing is set', () => {
    expect(parseConfig({ PATH: '/bin', LANG: 'C' })).toEqual({
      store: { kind: 'embedded', dataDir: resolve('data') },
      redisUrl: null,
      tokens: { keys: { kind: 'secretFile', dataDir: resolve('data') }, issuer: null, audience: null },
      listen: { host: '127.0.0.1', port: 3000 },
      admin: {
        host: '127.0.0.1',
        port: 3001,
        token: { kind: 'file', dataDir: resolve('data') },
        writable: false,
      },
      origins: { listed: [], loopback: true },
      trustedProxies: [],
      privateDirectory: false,
      limits: {
        requests: 1_200,
        uploads: 60,
        bundlesPerPair: 20,
        bundlesPerTarget: 30,
        messagesPerPair: 600,
        bytesPerRecipient: 268_435_456,
        connectsPerDevice: 60,
        connectsPerUser: 600,
        handshakesPerAddress: 3_000,
        connections: 0,
        connectionsPerAddress: 5_000,
        framesPerSocket: 1_000,
      },
      preKeys: {
        lowThreshold: 10,
        poolMax: 1000,
        drainAlarmClaims: 20,
        signedPreKeyLifetimeMs: 720 * 3_600_000,
        claimedRetentionMs: 30 * 86_400_000,
        idleDeviceRetentionMs: 0,
      },
      messages: { queueMax: 10_000, lifetimeMs: 30 * 86_400_000 },
      logLevel: 'info',
      warnings: [],
    });
  });

  it('listens everywhere and lets no page in unless listed, where there is a database', () => {
    const config = parseConfig({
      DATABASE_URL,
      REDIS_URL: 'redis://cache:6379',
      JWT_SECRET,
      ALLOWED_ORIGINS: 'https://chat.example.org, http://localhost:5173,capacitor://localhost',
      PORT: '0',
      ADMIN_PORT: '0',
    });
    expect(config).toMatchObject({
      store: { kind: 'url', url: DATABASE_URL },
      redisUrl: 'redis://cache:6379',
      tokens: { keys: { kind: 'secret', secret: new TextEncoder().encode(JWT_SECRET) } },
      listen: { host: null, port: 0 },
      admin: { host: '127.0.0.1', port: 0 },
      origins: {
        listed: ['https://chat.example.org', 'http://localhost:5173', 'capacitor://localhost'],
        loopback: false,
      },
      warnings: [],
    });
  });

  it('takes an empty variable for an absent one', () => {
    expect(parseConfig({ PORT: '', DATABASE_URL: '', JWT_ISSUER: '' })).toEqual(parseConfig({}));
  });

  it('refuses a shared bus over a private store', () => {
    expect(problemsOf({ REDIS_URL: 'redis://cache' })).toEqual([
      'REDIS_URL is set without DATABASE_URL: a shared bus over a private store would lie',
    ]);
  });

  it('allows a database without Redis, and says that it is one node only', () => {
    expect(parseConfig({ DATABASE_URL, JWT_SECRET }).warnings).toEqual([
      'REDIS_URL is not set: this must be the only gateway on its database',
    ]);
  });

  it('wants exactly one way to verify tokens', () => {
    const url = 'https://idp.example.org/jwks';
    expect(problemsOf({ DATABASE_URL })).toEqual([
      'one of JWT_SECRET, JWT_PUBLIC_KEY, JWT_JWKS_URL must be set with DATABASE_URL',
    ]);
    expect(problemsOf({ JWT_SECRET, JWT_JWKS_URL: url })).toEqual([
      'JWT_SECRET and JWT_JWKS_URL are set: tokens are verified in one way only',
    ]);
    expect(parseConfig({ DATABASE_URL, JWT_PUBLIC_KEY: PUBLIC_KEY }).tokens.keys.kind).toBe('publicKey');
    expect(parseConfig({ JWT_JWKS_URL: url }).tokens.keys).toMatchObject({ kind: 'jwks', url: new URL(url) });
  });

  it('lets algorithms be narrowed for a key set, to those of public keys', () => {
    const keys = { JWT_JWKS_URL: 'https://idp.example.org/jwks' };
    expect(parseConfig({ ...keys, JWT_ALGORITHMS: 'ES256, EdDSA' }).tokens.keys).toMatchObject({
      algorithms: ['ES256', 'EdDSA'],
    });
    for (const names of ['none', 'HS256', 'ES256,HS256', ',']) {
      expect(problemsOf({ ...keys, JWT_ALGORITHMS: names })).toHaveLength(1);
    }
    expect(problemsOf({ JWT_SECRET, JWT_ALGORITHMS: 'ES256' })).toEqual([
      'JWT_ALGORITHMS goes with JWT_JWKS_URL only: a single key has one algorithm',
    ]);
  });

  it('warns where tokens may be meant for others, or come over an open way', () => {
    expect(parseConfig({ JWT_JWKS_URL: 'http://idp.example.org/jwks' }).warnings).toHaveLength(2);
    expect(
      parseConfig({ JWT_JWKS_URL: 'https://idp.example.org/jwks', JWT_AUDIENCE: 'chat' }).warnings,
    ).toEqual([]);
  });

  it.each([
    ['PORT', 'http'],
    ['PORT', '65536'],
    ['PORT', '-1'],
    ['PORT', '3000.5'],
    ['PORT', '0x10'],
    ['ADMIN_PORT', '70000'],
    ['HOST', 'http://host'],
    ['ADMIN_HOST', 'a b'],
    ['DATABASE_URL', 'mysql://db'],
    ['DATABASE_URL', 'postgres://keygate:half#half@db/keygate'],
    ['DATABASE_URL', 'postgres://db/keygate?prepare=maybe'],
    ['DATABASE_URL', 'postgres://db/keygate?sslmode=require&prepare='],
    ['REDIS_URL', 'http://cache'],
    ['REDIS_URL', 'redis://one:6379,,two:6379'],
    ['REDIS_URL', 'redis://one:port,two'],
    ['REDIS_URL', 'redis://cache/x'],
    ['REDIS_URL', 'redis://cache/1/2'],
    ['REDIS_URL', 'redis://cache/-1'],
    ['REDIS_URL', 'redis://cache/1#2'],
    ['REDIS_URL', 'redis://cache?db=x'],
    ['REDIS_URL', 'redis://cache?cluster=yes'],
    ['REDIS_URL', 'redis://cache/?cluster='],
    ['REDIS_URL', 'redis://cache/1?cluster=true'],
    ['REDIS_URL', 'redis://cache?tls=true'],
    ['REDIS_URL', 'redis://cache?enableOfflineQueue=true'],
    ['REDIS_URL', 'redis://cache?family=5'],
    ['REDIS_URL', 'redis://one:6379,two:6379/1'],
    ['REDIS_URL', 'redis://one:6379,two:6379?db=1'],
    ['JWT_SECRET', 'short'],
    ['JWT_SECRET', `${JWT_SECRET}\n`],
    ['JWT_PUBLIC_KEY', 'nonsense'],
    ['JWT_JWKS_URL', 'idp.example.org'],
    ['JWT_JWKS_URL', 'file:///etc/passwd'],
    ['ALLOWED_ORIGINS', '*'],
    ['ALLOWED_ORIGINS', 'https://chat.example.org/'],
    ['ALLOWED_ORIGINS', 'https://chat.example.org,chat.example.org'],
    ['ADMIN_TOKEN', 'short'],
    ['ADMIN_TOKEN', 'long enough, but with spaces'],
    ['PREKEY_LOW_THRESHOLD', 'ten'],
    ['PREKEY_POOL_MAX', '0'],
    ['QUEUE_MAX', '0'],
    ['SIGNED_PREKEY_ROTATION_HOURS', '0'],
    ['CLAIMED_PREKEY_RETENTION_DAYS', '0'],
    ['IDLE_DEVICE_RETENTION_DAYS', '-1'],
    ['MESSAGE_TTL_DAYS', '1e3'],
    ['LOG_LEVEL', 'loud'],
  ])('refuses %s=%j in a line that names it', (name, value) => {
    const url = { DATABASE_URL: 'postgres://db/keygate', JWT_SECRET };
    const env = name === 'DATABASE_URL' ? { JWT_SECRET } : name === 'REDIS_URL' ? url : {};
    expect(problemsOf({ ...env, [name]: value })).toEqual([expect.stringMatching(`^${name} `)]);
  });

  it.each([
    'redis://cache',
    'redis://cache/',
    'redis://cache:6379/15',
    'redis://:a,b@cache:6379/1',
    'rediss://user:p%2Fw@cache:6379/1?cluster=false',
    'redis://[::1]:6379/2',
    'redis://cache?cluster=true',
    'redis://cache?family=6&db=1',
    'redis://one:6379,two:6379/0',
  ])('takes REDIS_URL=%j', (url) => {
    expect(parseConfig({ DATABASE_URL, JWT_SECRET, REDIS_URL: url }).redisUrl).toBe(url);
  });

  it('says what may stand in the URLs of the engines, and repeats none of what stands there', () => {
    const wrong = { JWT_SECRET, DATABASE_URL: `${DATABASE_URL}?prepare=no` };
    expect(problemsOf({ ...wrong, REDIS_URL: 'redis://:hunter2@cache/hunter2' })).toEqual([
      'DATABASE_URL may say ?prepare=true or ?prepare=false, nothing else of prepare',
      'REDIS_URL must have the number of a database after the host, as in redis://host:6379/1, or nothing',
    ]);
    expect(problemsOf({ ...wrong, DATABASE_URL, REDIS_URL: 'redis://one,two/1' })).toEqual([
      'REDIS_URL must name no database but 0: a Redis Cluster has no other',
    ]);
    for (const prepare of ['true', 'false']) {
      const url = `${DATABASE_URL}?prepare=${prepare}`;
      expect(parseConfig({ JWT_SECRET, DATABASE_URL: url }).store).toEqual({ kind: 'url', url });
    }
  });

  it('takes one PostgreSQL, and says so of several', () => {
    const url = 'postgres://keygate:a,b@db:5432/keygate';
    expect(parseConfig({ JWT_SECRET, DATABASE_URL: url }).store).toEqual({ kind: 'url', url });
    for (const hosts of ['one:5432,two:5433', 'one,two', '[::1],two', 'one,two/keygate?sslmode=require']) {
      expect(problemsOf({ JWT_SECRET, DATABASE_URL: `postgres://keygate:a@${hosts}` })).toEqual([
        'DATABASE_URL must name one host: an address, a name or a proxy that leads to the primary',
      ]);
    }
  });

  it('names what another client’s DATABASE_URL has, which PostgreSQL would refuse', () => {
    const url = `${DATABASE_URL}?sslmode=verify-full&channel_binding=require&sslrootcert=/etc/ca.pem`;
    expect(problemsOf({ JWT_SECRET, DATABASE_URL: url })).toEqual([
      'DATABASE_URL must not have channel_binding, which another client of PostgreSQL understands and this one does not: take it out',
      'DATABASE_URL must not have sslrootcert, which NODE_EXTRA_CA_CERTS stands for here: take it out',
    ]);
    const ours = `${DATABASE_URL}?sslmode=verify-full&sslrootcert=system`;
    expect(parseConfig({ JWT_SECRET, DATABASE_URL: ours }).store).toEqual({ kind: 'url', url: ours });
  });

  it('tells every problem at once, and repeats no secret', () => {
    const problems = problemsOf({
      PORT: 'x',
      LOG_LEVEL: 'loud',
      REDIS_URL: 'http://:hunter2@cache',
      JWT_SECRET: 'hunter2',
      JWT_PUBLIC_KEY: 'hunter2',
      ADMIN_TOKEN: 'hunter2',
      JWT_AUDIENC: 'chat',
    });
    expect(problems).toHaveLength(9);
    expect(problems.join('\n')).not.toContain('hunter2');
    expect(problems.join('\n')).toContain('PORT must be a whole number from 0 to 65535; it is "x"');
  });

  it('refuses values that can not go together', () => {
    expect(problemsOf({ PORT: '4000', ADMIN_PORT: '4000' })).toHaveLength(1);
    expect(problemsOf({ PREKEY_LOW_THRESHOLD: '50', PREKEY_POOL_MAX: '40' })).toHaveLength(1);
  });

  it.each([
    ['JWT_SECRTE', 'JWT_SECRET'],
    ['JWT_JWKS_URI', 'JWT_JWKS_URL'],
    ['PREKEY_LOW_THRESHHOLD', 'PREKEY_LOW_THRESHOLD'],
    ['MESSAGE_TTL', 'MESSAGE_TTL_DAYS'],
    ['KEYGATE_PORT_', 'PORT'],
    ['KEYGATE_REDIS_URL', 'REDIS_URL'],
    ['REDIS_URI', 'REDIS_URL'],
    ['DATABSE_URL', 'DATABASE_URL'],
    ['LOG_LEVLE', 'LOG_LEVEL'],
    ['LIMIT_UPLAODS', 'LIMIT_UPLOADS'],
    ['IDLE_DEVICE_RETENTION', 'IDLE_DEVICE_RETENTION_DAYS'],
    ['SIGNED_PREKEY_ROTATION', 'SIGNED_PREKEY_ROTATION_HOURS'],
    ['PREKEY_LOW', 'PREKEY_LOW_THRESHOLD'],
    ['JWT_SECRET_FILE', 'JWT_SECRET'],
  ])('takes %s for a misspelt %s', (name, meant) => {
    expect(problemsOf({ [name]: 'x' })).toEqual([`${name} is unknown; did you mean ${meant}?`]);
  });

  it.each([
    'CLAIMED_RETENTION',
    'SIGNED_ROTATION',
    'LIMIT_FOO',
    'KEYGATE_X',
    'ADMIN_PASSWORD',
    'JWT_',
    'QUEUE_LENGTH',
  ])('proposes nothing for %s, which is like no variable', (name) => {
    expect(problemsOf({ [name]: 'x' })).toEqual([
      `${name} is unknown; keygate config-reference lists every variable`,
    ]);
  });

  it('leaves the variables of others alone', () => {
    const others = {
      HOSTNAME: 'x',
      npm_config_user_agent: 'x',
      PGHOST: 'x',
      REDIS_PASSWORD: 'x',
      DATABASE_HOST: 'x',
      KEYGATE_SERVICE_HOST: '10.0.0.1',
      KEYGATE_SERVICE_PORT_HTTP: '3000',
      KEYGATE_PORT: 'tcp://10.0.0.1:3000',
      KEYGATE_PORT_3000_TCP_ADDR: '10.0.0.1',
    };
    expect(parseConfig(others)).toEqual(parseConfig({}));
  });
});
