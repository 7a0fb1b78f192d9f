/** The environment as a typed, checked object: the only reader of environment variables besides main. */
import { resolve } from 'node:path';
import { z } from 'zod';
import { LOG_LEVELS, type LogLevel } from './logger.ts';
import { CLAIM_MEMORY_MS, VALIDATE_PRE_KEYS_MAX } from './protocol/limits.ts';
import {
  PUBLIC_KEY_ALGORITHMS,
  type PublicKeyAlgorithm,
  readPublicKey,
  SECRET_BYTES_MIN,
  type TokenKeys,
} from './requests/authenticate.ts';
import { trustedNetworks } from './requests/client-address.ts';
import type { LimitName } from './requests/limits.ts';

export interface Config {
  /** `embedded`: a private PostgreSQL that the gateway starts on `dataDir`. */
  store: { kind: 'embedded'; dataDir: string } | { kind: 'url'; url: string };
  /** Null: bus, locks and limits live in this process, which is the only node then. */
  redisUrl: string | null;
  tokens: {
    /** `secretFile`: the secret that is made once in `dataDir`; only with the embedded store. */
    keys: TokenKeys | { kind: 'secretFile'; dataDir: string };
    issuer: string | null;
    audience: string | null;
  };
  /** Host null is every address of the machine; port 0 is any free one. */
  listen: { host: string | null; port: number };
  admin: {
    host: string;
    port: number;
    /** `file`: made once in `dataDir`; only with the embedded store. Null: there is no inspector. */
    token: { kind: 'token'; token: string } | { kind: 'file'; dataDir: string } | null;
    /** Whether the inspector may change anything. */
    writable: boolean;
  };
  /** Browser origins that may connect. `loopback`: pages of this machine too, on any port. */
  origins: { listed: readonly string[]; loopback: boolean };
  /** Whose `X-Forwarded-For` is believed. */
  trustedProxies: readonly string[];
  /** Whether strangers are to learn nothing of who is here. */
  privateDirectory: boolean;
  /** What may be done in its time; 0 is no limit. */
  limits: Readonly<Record<LimitName, number>>;
  preKeys: {
    /** A pool below it is low. */
    lowThreshold: number;
    /** Unclaimed one-time prekeys of one kind that a device may have. */
    poolMax: number;
    /** Claims of one device in ten minutes that may be an alarm; 0 for none ever. */
    drainAlarmClaims: number;
    signedPreKeyLifetimeMs: number;
    claimedRetentionMs: number;
    /** After which time without use a device loses its keys; 0 for never. */
    idleDeviceRetentionMs: number;
  };
  messages: {
    /** Pending messages of one device. */
    queueMax: number;
    lifetimeMs: number;
  };
  logLevel: LogLevel;
  /** What is allowed and deserves a line in the log at the start. */
  warnings: readonly string[];
}

/** What a command needs that sees no token. */
export type StoreConfig = Omit<Config, 'tokens'>;

/** Every fault of the environment at once; a line names its variable and never repeats a secret. */
export class ConfigError extends Error {
  readonly problems: readonly string[];

  constructor(problems: readonly string[]) {
    super(problems.join('\n'));
    this.name = 'ConfigError';
    this.problems = problems;
  }
}

const HOUR_MS = 3_600_000;
const DAY_MS = 24 * HOUR_MS;
const ADMIN_TOKEN_LENGTH_MIN = 16;
const LIMIT_MAX = 999_999_999;
/** Credentials, hosts with their ports, and what ioredis takes besides. */
const REDIS_HOSTS =
  /^[^:]*:\/\/(?:[^@\s/]*@)?(?:\[[\da-fA-F:.]+\]|[\w.-]+)(?::\d{1,5})?(?:,(?:\[[\da-fA-F:.]+\]|[\w.-]+)(?::\d{1,5})?)*(?:[/?]\S*)?$/;

declare module 'zod' {
  interface GlobalMeta {
    /** What a variable is for, as the generated table tells it. */
    meaning?: string;
    /** What a variable amounts to that is not set, where no single value says it. */
    unset?: string;
  }
}

const OF_ANOTHER_CLIENT = 'another client of PostgreSQL understands and this one does not';

/** What stands in URLs that were made for other clients: PostgreSQL would refuse it without saying where it came from. */
const FOREIGN_PARAMETERS: Readonly<Record<string, string>> = {
  channel_binding: OF_ANOTHER_CLIENT,
  gssencmode: OF_ANOTHER_CLIENT,
  keepalives: OF_ANOTHER_CLIENT,
  keepalives_idle: OF_ANOTHER_CLIENT,
  keepalives_interval: OF_ANOTHER_CLIENT,
  keepalives_count: OF_ANOTHER_CLIENT,
  tcp_user_timeout: OF_ANOTHER_CLIENT,
  pgbouncer: OF_ANOTHER_CLIENT,
  connection_limit: OF_ANOTHER_CLIENT,
  pool_timeout: OF_ANOTHER_CLIENT,
  schema: OF_ANOTHER_CLIENT,
  sslcert: OF_ANOTHER_CLIENT,
  sslkey: OF_ANOTHER_CLIENT,
  sslrootcert: 'NODE_EXTRA_CA_CERTS stands for here',
};
/** The authorities of the system, which are asked anyway. */
const SYSTEM_AUTHORITIES = 'system';

/**
 * Every variable with its check, its default and its meaning. A default of null means "not set"; what that stands for
 * may depend on the others.
 */
export const environment = z.object({
  DATABASE_URL: optional(
    z
      .string()
      .regex(/^postgres(ql)?:\/\/\S+$/, {
        error: 'must begin with postgres:// or postgresql://',
        abort: true,
      })
      .refine(URL.canParse, {
        error: 'is no URL: in a password, write # as %23, / as %2F, ? as %3F and @ as %40',
        abort: true,
      })
      .refine(
        (url) => areSwitches(new URL(url).searchParams, 'prepare'),
        'may say ?prepare=true or ?prepare=false, nothing else of prepare',
      )
      .superRefine((url, context) => {
        for (const [name, value] of new URL(url).searchParams) {
          const advice = FOREIGN_PARAMETERS[name];
          if (advice !== undefined && value !== SYSTEM_AUTHORITIES)
            context.addIssue(`must not have ${name}, which ${advice}: take it out`);
        }
      }),
  ).meta({
    meaning:
      '`postgres://…`, PostgreSQL 14 or newer; with `?prepare=false` where a pooler (PgBouncer) is between',
    unset: 'not set: embedded',
  }),
  REDIS_URL: optional(
    z
      .string()
      .regex(/^rediss?:\/\/\S+$/, { error: 'must begin with redis:// or rediss://', abort: true })
      .regex(REDIS_HOSTS, {
        error: 'must name a host, or several separated by commas, as in redis://one:6379,two:6379',
        abort: true,
      })
      .superRefine((url, context) => {
        const fault = redisPathFault(url);
        if (fault !== null) context.addIssue(fault);
      }),
  ).meta({
    meaning:
      '`redis://…` or `rediss://…`, Redis 6.2 or newer; nodes of a Redis Cluster separated by commas (`redis://one:6379,two:6379`), or one of them with `?cluster=true`; needs `DATABASE_URL`',
    unset: 'not set: one node',
  }),
  DATA_DIR: z
    .string()
    .default('data')
    .meta({ meaning: 'folder of the embedded PostgreSQL and of the secret file' }),
  PORT: wholeNumber({ min: 0, max: 65_535, byDefault: 3000 }).meta({
    meaning: 'port of the gateway; 0 takes a free one',
  }),
  HOST: optional(hostName()).meta({
    meaning: 'where the gateway listens',
    unset: 'embedded: `127.0.0.1`; with `DATABASE_URL`: every address',
  }),
  ALLOWED_ORIGINS: z
    .string()
    .transform(orIssue((text) => listOf(text).map(origin)))
    .default([])
    .meta({
      meaning:
        'browser origins that may connect, separated by commas; embedded, pages of this machine may anyway',
    }),
  JWT_SECRET: optional(
    secret().refine(
      (text) => Buffer.byteLength(text) >= SECRET_BYTES_MIN,
      `must have at least ${SECRET_BYTES_MIN} bytes`,
    ),
  ).meta({
    meaning: `verifies HS256 tokens; at least ${SECRET_BYTES_MIN} bytes`,
    unset: 'not set: secret file',
  }),
  JWT_PUBLIC_KEY: optional(z.string().transform(orIssue(readPublicKey))).meta({
    meaning:
      'verifies tokens by an Ed25519, P-256 or RSA public key, PEM or JWK; the algorithm follows from the key',
  }),
  JWT_JWKS_URL: optional(z.string().transform(orIssue(webAddress))).meta({
    meaning: 'verifies tokens by the key set at this address',
  }),
  JWT_ALGORITHMS: optional(z.string().transform(orIssue(algorithms))).meta({
    meaning: 'what keys of `JWT_JWKS_URL` may be used with',
    unset: `\`${PUBLIC_KEY_ALGORITHMS.join(',')}\``,
  }),
  JWT_ISSUER: optional(z.string()).meta({
    meaning: 'the `iss` that a token must have',
    unset: 'not set: any',
  }),
  JWT_AUDIENCE: optional(z.string()).meta({
    meaning: 'the `aud` that a token must have',
    unset: 'not set: any',
  }),
  ADMIN_PORT: wholeNumber({ min: 0, max: 65_535, byDefault: 3001 }).meta({
    meaning:
      'port of the second listener, for health, metrics, the reference and the inspector; 0 takes a free one',
  }),
  ADMIN_HOST: hostName().default('127.0.0.1').meta({ meaning: 'where the second listener listens' }),
  ADMIN_TOKEN: optional(
    secret()
      .min(ADMIN_TOKEN_LENGTH_MIN, `must have at least ${ADMIN_TOKEN_LENGTH_MIN} characters`)
      // It travels in a header.
      .regex(/^[!-~]*$/, 'must hold only ASCII letters, digits and signs'),
  ).meta({
    meaning: `opens the inspector, which is off without it; at least ${ADMIN_TOKEN_LENGTH_MIN} characters`,
    unset: 'not set; embedded: a file',
  }),
  ADMIN_WRITE: z
    .enum(['true', 'false'], 'must be true or false')
    .default('false')
    .transform((text) => text === 'true')
    .meta({ meaning: '`true` lets the inspector disconnect sockets' }),
  PREKEY_LOW_THRESHOLD: wholeNumber({ min: 0, max: 10_000, byDefault: 10 }).meta({
    meaning: 'a pool of one-time prekeys below it is low, and its owner is told',
  }),
  // A device lists the ids that it holds when it validates: its pool and what was handed out of it must fit.
  PREKEY_POOL_MAX: wholeNumber({
    min: 1,
    max: VALIDATE_PRE_KEYS_MAX,
    byDefault: VALIDATE_PRE_KEYS_MAX / 2,
  }).meta({
    meaning: `unclaimed one-time prekeys of one kind that a device may have, at most ${VALIDATE_PRE_KEYS_MAX}`,
  }),
  PREKEY_DRAIN_ALARM: wholeNumber({ min: 0, max: LIMIT_MAX, byDefault: 20 }).meta({
    meaning:
      'bundles of one device in ten minutes, if they are ten times what is usual for it, that the log warns of; 0 never warns',
  }),
  SIGNED_PREKEY_ROTATION_HOURS: wholeNumber({ min: 1, max: 24 * 365, byDefault: 720 }).meta({
    meaning: 'age at which a signed prekey is due to be rotated',
  }),
  // Claims are what a repeated claimId is answered from.
  CLAIMED_PREKEY_RETENTION_DAYS: wholeNumber({
    min: CLAIM_MEMORY_MS / DAY_MS,
    max: 3650,
    byDefault: 30,
  }).meta({ meaning: 'how long claims are kept, at least a day; their ids stay used for ever' }),
  IDLE_DEVICE_RETENTION_DAYS: wholeNumber({ min: 0, max: 3650, byDefault: 0 }).meta({
    meaning:
      'after this time without an open gate or a change of its keys a device loses them, as by a reset; 0 never takes them',
  }),
  TRUSTED_PROXIES: z
    .string()
    .transform(
      orIssue((text) => {
        const list = listOf(text);
        trustedNetworks(list);
        return list;
      }),
    )
    .default([])
    .meta({
      meaning:
        'addresses and networks, separated by commas, whose `X-Forwarded-For` is believed; without it callers are counted by the address of their connection',
      unset: 'not set: none',
    }),
  PRIVATE_DIRECTORY: z
    .enum(['true', 'false'], 'must be true or false')
    .default('false')
    .transform((text) => text === 'true')
    .meta({
      meaning:
        '`true`: a user that is unknown, one without keys, and one without the device asked for are told apart neither by the answer (`USER_NOT_FOUND`) nor by its time',
      unset: '`false`',
    }),
  LIMIT_REQUESTS: limit(1_200, 'requests of one name by one device, a minute'),
  LIMIT_UPLOADS: limit(60, 'changes of one device’s keys, a minute: uploads, rotations, withdrawals, resets'),
  LIMIT_BUNDLES_PER_PAIR: limit(20, 'bundles that one user may ask of another, a minute'),
  LIMIT_BUNDLES_PER_TARGET: limit(
    30,
    'bundles of one user that spend one-time prekeys, an hour; beyond it they go out without, so that nobody can use up a user’s keys',
  ),
  LIMIT_MESSAGES_PER_PAIR: limit(600, 'messages of one user to another, a minute'),
  LIMIT_BYTES_PER_RECIPIENT: limit(268_435_456, 'bytes of ciphertext for one user, an hour'),
  LIMIT_CONNECTS_PER_DEVICE: limit(60, 'connections that one device makes, a minute'),
  LIMIT_CONNECTS_PER_USER: limit(600, 'connections that one user’s devices make, a minute'),
  LIMIT_HANDSHAKES_PER_ADDRESS: limit(
    3_000,
    'connections from one address, a minute; an IPv6 network of 64 bits is one',
  ),
  LIMIT_CONNECTIONS: limit(
    0,
    'connections that are open at once on one node, those of HTTP with them; beyond it new ones are closed unread, as they are anyway where too few file descriptors would be left',
  ),
  LIMIT_CONNECTIONS_PER_ADDRESS: limit(5_000, 'sockets from one address that are open at once on one node'),
  LIMIT_FRAMES_PER_SOCKET: limit(
    1_000,
    'frames of one connection a second, over ten seconds; beyond it the connection is cut',
  ),
  // What empties a queue with its keys is one statement, which has to end in time.
  QUEUE_MAX: wholeNumber({ min: 1, max: 100_000, byDefault: 10_000 }).meta({
    meaning: 'pending messages of one device, 100,000 at most',
  }),
  MESSAGE_TTL_DAYS: wholeNumber({ min: 1, max: 3650, byDefault: 30 }).meta({
    meaning: 'after this time a pending message bounces',
  }),
  LOG_LEVEL: z
    .enum(LOG_LEVELS, `must be one of ${LOG_LEVELS.join(', ')}`)
    .default('info')
    .meta({ meaning: '`debug`, `info`, `warn`, `error` or `silent`' }),
});

type VariableName = keyof typeof environment.shape;
const variableNames = Object.keys(environment.shape) as VariableName[];

/** Values that never stand in a problem line. */
const SECRET_VARIABLES: ReadonlySet<string> = new Set<VariableName>([
  'DATABASE_URL',
  'REDIS_URL',
  'JWT_SECRET',
  'JWT_PUBLIC_KEY',
  'ADMIN_TOKEN',
]);

const KEY_VARIABLES = ['JWT_SECRET', 'JWT_PUBLIC_KEY', 'JWT_JWKS_URL'] as const satisfies VariableName[];

/**
 * Reads the configuration. An empty variable counts as absent, as compose files hand them in.
 *
 * @throws ConfigError with one line for each problem
 */
export function parseConfig(env: NodeJS.ProcessEnv): Config {
  return read(env, { verifiesTokens: true });
}

/** The same for what works on the store alone: whoever only migrates, say, need not be given the key to every device. */
export function parseStoreConfig(env: NodeJS.ProcessEnv): StoreConfig {
  return read(env, { verifiesTokens: false });
}

function read(env: NodeJS.ProcessEnv, { verifiesTokens }: { verifiesTokens: boolean }): Config {
  const given = new Map<string, string>();
  for (const [name, value] of Object.entries(env)) {
    if (value !== undefined && value !== '') given.set(name, value);
  }
  const parsed = environment.safeParse(Object.fromEntries(given));
  const problems = [
    ...(parsed.error?.issues ?? []).map((issue) => problemLine(String(issue.path[0]), issue.message, given)),
    ...contradictions(given),
    ...(verifiesTokens ? tokenContradictions(given) : []),
    ...unknownVariables(given),
  ];
  if (parsed.data !== undefined) problems.push(...collisions(parsed.data));
  if (parsed.data === undefined || problems.length > 0) throw new ConfigError(problems);
  return configOf(parsed.data);
}

function configOf(values: z.output<typeof environment>): Config {
  const dataDir = resolve(values.DATA_DIR);
  const embedded = values.DATABASE_URL === null;
  const config = {
    store:
      values.DATABASE_URL === null
        ? { kind: 'embedded' as const, dataDir }
        : { kind: 'url' as const, url: values.DATABASE_URL },
    redisUrl: values.REDIS_URL,
    tokens: { keys: tokenKeys(values), issuer: values.JWT_ISSUER, audience: values.JWT_AUDIENCE },
    listen: { host: values.HOST ?? (embedded ? '127.0.0.1' : null), port: values.PORT },
    admin: {
      host: values.ADMIN_HOST,
      port: values.ADMIN_PORT,
      token: adminToken(values),
      writable: values.ADMIN_WRITE,
    },
    origins: { listed: values.ALLOWED_ORIGINS, loopback: embedded },
    trustedProxies: values.TRUSTED_PROXIES,
    privateDirectory: values.PRIVATE_DIRECTORY,
    limits: {
      requests: values.LIMIT_REQUESTS,
      uploads: values.LIMIT_UPLOADS,
      bundlesPerPair: values.LIMIT_BUNDLES_PER_PAIR,
      bundlesPerTarget: values.LIMIT_BUNDLES_PER_TARGET,
      messagesPerPair: values.LIMIT_MESSAGES_PER_PAIR,
      bytesPerRecipient: values.LIMIT_BYTES_PER_RECIPIENT,
      connectsPerDevice: values.LIMIT_CONNECTS_PER_DEVICE,
      connectsPerUser: values.LIMIT_CONNECTS_PER_USER,
      handshakesPerAddress: values.LIMIT_HANDSHAKES_PER_ADDRESS,
      connections: values.LIMIT_CONNECTIONS,
      connectionsPerAddress: values.LIMIT_CONNECTIONS_PER_ADDRESS,
      framesPerSocket: values.LIMIT_FRAMES_PER_SOCKET,
    },
    preKeys: {
      lowThreshold: values.PREKEY_LOW_THRESHOLD,
      poolMax: values.PREKEY_POOL_MAX,
      drainAlarmClaims: values.PREKEY_DRAIN_ALARM,
      signedPreKeyLifetimeMs: values.SIGNED_PREKEY_ROTATION_HOURS * HOUR_MS,
      claimedRetentionMs: values.CLAIMED_PREKEY_RETENTION_DAYS * DAY_MS,
      idleDeviceRetentionMs: values.IDLE_DEVICE_RETENTION_DAYS * DAY_MS,
    },
    messages: { queueMax: values.QUEUE_MAX, lifetimeMs: values.MESSAGE_TTL_DAYS * DAY_MS },
    logLevel: values.LOG_LEVEL,
  };
  return { ...config, warnings: warningsOf(config) };
}

function adminToken(values: z.output<typeof environment>): Config['admin']['token'] {
  if (values.ADMIN_TOKEN !== null) return { kind: 'token', token: values.ADMIN_TOKEN };
  return values.DATABASE_URL === null ? { kind: 'file', dataDir: resolve(values.DATA_DIR) } : null;
}

function tokenKeys(values: z.output<typeof environment>): Config['tokens']['keys'] {
  if (values.JWT_SECRET !== null) {
    return { kind: 'secret', secret: new TextEncoder().encode(values.JWT_SECRET) };
  }
  if (values.JWT_PUBLIC_KEY !== null) return values.JWT_PUBLIC_KEY;
  if (values.JWT_JWKS_URL !== null) {
    return {
      kind: 'jwks',
      url: values.JWT_JWKS_URL,
      algorithms: values.JWT_ALGORITHMS ?? PUBLIC_KEY_ALGORITHMS,
    };
  }
  return { kind: 'secretFile', dataDir: resolve(values.DATA_DIR) };
}

/** As PostgreSQL's own clients do, these take any certificate. */
const UNVERIFIED_TLS = /[?&]sslmode=(require|prefer|allow)\b/;

function warningsOf(config: Omit<Config, 'warnings'>): string[] {
  const warnings: string[] = [];
  const { keys, audience } = config.tokens;
  if (config.store.kind === 'url' && UNVERIFIED_TLS.test(config.store.url)) {
    warnings.push('DATABASE_URL encrypts but looks at no certificate: sslmode=verify-full does');
  }
  if (config.store.kind === 'url' && config.redisUrl === null) {
    warnings.push('REDIS_URL is not set: this must be the only gateway on its database');
  }
  if ((keys.kind === 'publicKey' || keys.kind === 'jwks') && audience === null) {
    warnings.push('JWT_AUDIENCE is not set: tokens that the issuer made for other services are accepted');
  }
  if (keys.kind === 'jwks' && keys.url.protocol === 'http:' && !isLoopback(keys.url.hostname)) {
    warnings.push('JWT_JWKS_URL is not https: whoever sits on the way can make tokens');
  }
  return warnings;
}

/** Which variables go together: judged by their presence, so that a bad value hides no further problem. */
function contradictions(given: ReadonlyMap<string, string>): string[] {
  const problems: string[] = [];
  if (given.has('REDIS_URL') && !given.has('DATABASE_URL')) {
    problems.push('REDIS_URL is set without DATABASE_URL: a shared bus over a private store would lie');
  }
  return problems;
}

/** Of the variables that say how tokens are verified. */
function tokenContradictions(given: ReadonlyMap<string, string>): string[] {
  const problems: string[] = [];
  const keySources = KEY_VARIABLES.filter((name) => given.has(name));
  if (keySources.length > 1) {
    problems.push(`${keySources.join(' and ')} are set: tokens are verified in one way only`);
  }
  if (keySources.length === 0 && given.has('DATABASE_URL')) {
    problems.push(`one of ${KEY_VARIABLES.join(', ')} must be set with DATABASE_URL`);
  }
  if (given.has('JWT_ALGORITHMS') && !given.has('JWT_JWKS_URL')) {
    problems.push('JWT_ALGORITHMS goes with JWT_JWKS_URL only: a single key has one algorithm');
  }
  return problems;
}

function collisions(values: z.output<typeof environment>): string[] {
  const problems: string[] = [];
  if (values.PORT !== 0 && values.PORT === values.ADMIN_PORT) {
    problems.push('PORT and ADMIN_PORT are the same');
  }
  if (values.PREKEY_LOW_THRESHOLD > values.PREKEY_POOL_MAX) {
    problems.push('PREKEY_LOW_THRESHOLD is above PREKEY_POOL_MAX: every pool would be low for ever');
  }
  return problems;
}

/** A variable that begins like ours is taken for ours. */
const FAMILIES = [
  'JWT_',
  'PREKEY_',
  'SIGNED_PREKEY_',
  'CLAIMED_PREKEY_',
  'MESSAGE_',
  'QUEUE_',
  'ADMIN_',
  'ALLOWED_',
  'TRUSTED_',
  'PRIVATE_',
  'LIMIT_',
  'KEYGATE_',
];

/** Kubernetes sets such names for every service; one that is called "keygate" must not stop the gateway. */
const SERVICE_LINK = /^[A-Z0-9_]+_(SERVICE_(HOST|PORT)(_[A-Z0-9_]+)?|PORT(_\d+_(TCP|UDP|SCTP)(_[A-Z]+)?)?)$/;

/** Shorter names are too near to too many words. */
const TYPO_NAME_LENGTH_MIN = 8;

/** A misspelling leaves most letters as they are. */
const LETTERS_PER_MISTAKE = 4;

function unknownVariables(given: ReadonlyMap<string, string>): string[] {
  const problems: string[] = [];
  for (const name of given.keys()) {
    if (Object.hasOwn(environment.shape, name) || SERVICE_LINK.test(name)) continue;
    const isOurs = FAMILIES.some((family) => name.startsWith(family));
    const isTypo =
      name.length >= TYPO_NAME_LENGTH_MIN &&
      variableNames.some((candidate) => editDistance(name, candidate) === 1);
    if (!isOurs && !isTypo) continue;
    const meant = meantName(name.replace(/^KEYGATE_/, ''));
    problems.push(
      `${name} is unknown; ${meant === null ? 'keygate config-reference lists every variable' : `did you mean ${meant}?`}`,
    );
  }
  return problems;
}

/** The nearest name that `name` may be a misspelling, a beginning or a lengthening of; null where there is none. */
function meantName(name: string): VariableName | null {
  const mistakesMax = Math.max(1, Math.floor(name.length / LETTERS_PER_MISTAKE));
  let nearest: { candidate: VariableName; distance: number } | null = null;
  for (const candidate of variableNames) {
    const distance = editDistance(name, candidate);
    const isPart = candidate.startsWith(`${name}_`) || name.startsWith(`${candidate}_`);
    if (!isPart && distance > mistakesMax) continue;
    if (nearest === null || distance < nearest.distance) nearest = { candidate, distance };
  }
  return nearest?.candidate ?? null;
}

/** Letters to insert, delete, replace, or swap with their neighbour. */
function editDistance(a: string, b: string): number {
  const rows: number[][] = [Array.from({ length: b.length + 1 }, (_, column) => column)];
  for (let i = 1; i <= a.length; i++) {
    const row = [i];
    for (let j = 1; j <= b.length; j++) {
      const replaced = rows[i - 1]![j - 1]! + (a[i - 1] === b[j - 1] ? 0 : 1);
      let best = Math.min(rows[i - 1]![j]! + 1, row[j - 1]! + 1, replaced);
      if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) {
        best = Math.min(best, rows[i - 2]![j - 2]! + 1);
      }
      row.push(best);
    }
    rows.push(row);
  }
  return rows[a.length]![b.length]!;
}

const SHOWN_VALUE_LENGTH_MAX = 60;

function problemLine(name: string, message: string, given: ReadonlyMap<string, string>): string {
  if (SECRET_VARIABLES.has(name)) return `${name} ${message}`;
  const value = JSON.stringify((given.get(name) ?? '').slice(0, SHOWN_VALUE_LENGTH_MAX));
  return `${name} ${message}; it is ${value}`;
}

function optional<Schema extends z.ZodType>(schema: Schema) {
  return schema.nullable().default(null);
}

function wholeNumber({ min, max, byDefault }: { min: number; max: number; byDefault: number }) {
  return z
    .string()
    .refine(
      (text) => /^\d{1,9}$/.test(text) && Number(text) >= min && Number(text) <= max,
      `must be a whole number from ${min} to ${max}`,
    )
    .transform(Number)
    .default(byDefault);
}

function limit(byDefault: number, meaning: string) {
  return wholeNumber({ min: 0, max: LIMIT_MAX, byDefault }).meta({ meaning: `${meaning}; 0 is no limit` });
}

function secret() {
  // A line break at the end comes with reading a file, and makes another secret than the issuer has.
  return z.string().refine((text) => text.trim() === text, 'begins or ends with white space');
}

function hostName() {
  return z.string().regex(/^[A-Za-z0-9.:%_-]+$/, 'must be a host name or an address, without a port');
}

/** Turns what `read` throws into an issue of the variable. */
function orIssue<Value>(read: (text: string) => Value) {
  return (text: string, context: z.RefinementCtx<string>): Value => {
    try {
      return read(text);
    } catch (error) {
      context.addIssue({ code: 'custom', message: error instanceof Error ? error.message : String(error) });
      return z.NEVER;
    }
  };
}

function listOf(text: string): string[] {
  return text
    .split(',')
    .map((item) => item.trim())
    .filter((item) => item !== '');
}

/** Whether `name`, as often as it is given, is `true` or `false`. */
function areSwitches(query: URLSearchParams, name: string): boolean {
  return query.getAll(name).every((value) => value === 'true' || value === 'false');
}

/** What comes after the hosts: a database and a query. The text of a fault repeats none of it. */
function redisPathFault(url: string): string | null {
  const [, hosts = '', path = '', search] = /^[^:]*:\/\/(?:[^@/]*@)?([^/?]*)([^?]*)(.*)$/.exec(url) ?? [];
  const query = new URLSearchParams(search);
  const databases = [path.replace(/^\//, '') || '0', ...query.getAll('db')];
  if (databases.some((database) => !/^\d{1,9}$/.test(database))) {
    return 'must have the number of a database after the host, as in redis://host:6379/1, or nothing';
  }
  if (!areSwitches(query, 'cluster')) {
    return 'may say ?cluster=true or ?cluster=false, nothing else of cluster';
  }
  const isCluster = hosts.includes(',') || query.get('cluster') === 'true';
  if (isCluster && databases.some((database) => Number(database) !== 0)) {
    return 'must name no database but 0: a Redis Cluster has no other';
  }
  return null;
}

function webAddress(text: string): URL {
  const url = URL.canParse(text) ? new URL(text) : null;
  if (url === null || !/^https?:$/.test(url.protocol)) {
    throw new Error('must be an address that begins with https:// or http://');
  }
  return url;
}

function algorithms(text: string): PublicKeyAlgorithm[] {
  const known: readonly string[] = PUBLIC_KEY_ALGORITHMS;
  const names = listOf(text);
  if (names.length === 0 || names.some((name) => !known.includes(name))) {
    throw new Error(`must list some of ${known.join(', ')}`);
  }
  return names as PublicKeyAlgorithm[];
}

/** Compared byte for byte with what browsers send, so only their own spelling is of use. */
function origin(text: string): string {
  if (text === '*') throw new Error('must name each origin; * is not accepted');
  const url = URL.canParse(text) ? new URL(text) : null;
  const isWeb = url !== null && /^https?:$/.test(url.protocol);
  if (isWeb && url.origin !== text) throw new Error(`must be written as browsers do: ${url.origin}`);
  if (!isWeb && !/^[a-z][a-z0-9+.-]*:\/\/[a-z0-9.-]+$/.test(text)) {
    throw new Error('must list origins such as https://chat.example.org, separated by commas');
  }
  return text;
}

export function isLoopback(host: string): boolean {
  return host === 'localhost' || host === '::1' || host === '[::1]' || /^127(\.\d+){3}$/.test(host);
}
