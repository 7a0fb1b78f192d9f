/** Every variable: its check, its default, and what it is for. README's table and the reference are made from it. */
import { z } from 'zod';
import { LOG_LEVELS } from '../logger.ts';
import { CLAIM_MEMORY_MS, VALIDATE_PRE_KEYS_MAX } from '../protocol/limits.ts';
import { PUBLIC_KEY_ALGORITHMS, readPublicKey, SECRET_BYTES_MIN } from '../requests/authenticate.ts';
import { trustedNetworks } from '../requests/client-address.ts';
import { databaseUrl, redisUrl } from './engine-urls.ts';
import {
  algorithms,
  hostName,
  listOf,
  optional,
  orIssue,
  origin,
  secret,
  webAddress,
  wholeNumber,
} from './values.ts';

const DAY_MS = 24 * 3_600_000;
const ADMIN_TOKEN_LENGTH_MIN = 16;
const LIMIT_MAX = 999_999_999;

declare module 'zod' {
  interface GlobalMeta {
    /** What a variable is for, as the generated table tells it. */
    meaning?: string;
    /** What a variable amounts to that is not set, where no single value says it. */
    unset?: string;
  }
}

/**
 * Every variable with its check, its default and its meaning. A default of null means "not set"; what that stands for
 * may depend on the others.
 */
export const environment = z.object({
  DATABASE_URL: optional(databaseUrl()).meta({
    meaning:
      '`postgres://…`, PostgreSQL 14 or newer; with `?prepare=false` where a pooler (PgBouncer) is between',
    unset: 'not set: embedded',
  }),
  REDIS_URL: optional(redisUrl()).meta({
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
    .meta({ meaning: '`true` lets the inspector disconnect sockets', unset: '`false`' }),
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
    'bundles that are asked of one user, an hour; beyond it they go out without one-time prekeys, so that nobody can use up a user’s keys',
  ),
  LIMIT_MESSAGES_PER_PAIR: limit(600, 'messages of one user to another, a minute'),
  LIMIT_BYTES_PER_RECIPIENT: limit(268_435_456, 'bytes of ciphertext stored for one user, an hour'),
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

export type VariableName = keyof typeof environment.shape;

function limit(byDefault: number, meaning: string) {
  return wholeNumber({ min: 0, max: LIMIT_MAX, byDefault }).meta({ meaning: `${meaning}; 0 is no limit` });
}
