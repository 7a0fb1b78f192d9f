/** The environment as a typed, checked object: the only reader of environment variables besides main. */
import { resolve } from 'node:path';
import type { z } from 'zod';
import { environment, type VariableName } from './config/environment.ts';
import { unknownVariables } from './config/unknown-variables.ts';
import { isLoopback } from './config/values.ts';
import type { LogLevel } from './logger.ts';
import { PUBLIC_KEY_ALGORITHMS, type TokenKeys } from './requests/authenticate.ts';
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

const SHOWN_VALUE_LENGTH_MAX = 60;

function problemLine(name: string, message: string, given: ReadonlyMap<string, string>): string {
  if (SECRET_VARIABLES.has(name)) return `${name} ${message}`;
  const value = JSON.stringify((given.get(name) ?? '').slice(0, SHOWN_VALUE_LENGTH_MAX));
  return `${name} ${message}; it is ${value}`;
}
