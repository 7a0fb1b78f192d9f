/**
 * Links to Redis that come back by themselves, fail at once rather than queue, and never end the process.
 * The truth is in PostgreSQL: whoever asks Redis would rather hear "no" now than "yes" later.
 */
import { type Cluster, Redis, type RedisOptions } from 'ioredis';
import type { Clock } from '../../lib/clock.ts';
import type { Log } from '../../lib/log.ts';

/** What the backends of this room work with; a Cluster's must have `enableAutoPipelining`, see `scripts.ts`. */
export type RedisLink = Redis | Cluster;

const CONNECT_WAIT_MAX_MS = 2_000;
/** A connection that owes an answer and says nothing for so long is closed; its commands fail. */
const SILENCE_MAX_MS = 2_000;
const GOODBYE_WAIT_MAX_MS = 500;
const RETRY_DELAY_MIN_MS = 50;

export interface RedisLinkOptions {
  /** `redis://` or, for TLS, `rediss://`. */
  url: string;
  /** Shown by Redis's `CLIENT LIST`. */
  name: string;
  log: Log;
  /** Whether the commands of one turn go out in one write, at its end. */
  isPipelined?: boolean;
  /** The longest pause between two attempts to connect. */
  retryDelayMaxMs?: number;
}

/**
 * Opens a link; returns at once, and never throws for a Redis that is away. Every command settles within about
 * SILENCE_MAX_MS: those sent while there is no connection fail at once.
 */
export function connectRedis(options: RedisLinkOptions): Redis {
  const { url, name, log, isPipelined = false, retryDelayMaxMs = 2_000 } = options;
  const link = new Redis(url, {
    ...linkOptions({ name, retryDelayMaxMs }),
    enableAutoPipelining: isPipelined,
  });
  let isTroubleLogged = false;
  // Without a listener, ioredis prints every attempt. An error object isn't logged as a whole: it carries the
  // command's arguments, for a refused log-in the password.
  link.on('error', (error: Error) => {
    if (isTroubleLogged) return;
    isTroubleLogged = true;
    log.warn({ link: name, error: error.message }, 'the link to Redis is broken');
  });
  link.on('ready', () => {
    if (isTroubleLogged) log.info({ link: name }, 'the link to Redis works again');
    isTroubleLogged = false;
  });
  return link;
}

function linkOptions({ name, retryDelayMaxMs }: { name: string; retryDelayMaxMs: number }) {
  return {
    connectionName: `keygate-${name}`,
    connectTimeout: CONNECT_WAIT_MAX_MS,
    socketTimeout: SILENCE_MAX_MS,
    disconnectTimeout: GOODBYE_WAIT_MAX_MS,
    enableOfflineQueue: false,
    // What a closed connection left unanswered fails at once. Left to the default, it waits for 20 attempts.
    maxRetriesPerRequest: 0,
    autoResendUnfulfilledCommands: false,
    // ioredis doesn't look at the outcome of its own resubscription: one that fails, after some 75 s of outage,
    // is an unhandled rejection and ends the process. The bus subscribes again itself.
    autoResubscribe: false,
    // After a failover, the old master answers so until the connection is renewed.
    reconnectOnError: (error: Error) => error.message.startsWith('READONLY'),
    retryStrategy: (attempt: number) =>
      Math.min(RETRY_DELAY_MIN_MS * 2 ** Math.min(attempt - 1, 10), retryDelayMaxMs) *
      (0.5 + Math.random() / 2),
  } satisfies RedisOptions;
}

export function isUp(link: RedisLink): boolean {
  return link.status === 'ready';
}

/** Closes a connection that looks alive and isn't, or wakes a link that gave up; it comes back by itself. */
export function recycle(link: RedisLink): void {
  if (link.status === 'end') link.connect().catch(() => {});
  if (link.status === 'ready' || link.status === 'connect') link.disconnect(true);
}

export class TooLateError extends Error {
  override readonly name = 'TooLateError';
}

/** @throws TooLateError where the answer takes longer; a failure that comes later is swallowed */
export function within<T>(answer: Promise<T>, limitMs: number, clock: Clock): Promise<T> {
  return new Promise((resolve, reject) => {
    const timer = clock.after(limitMs, () => {
      // After a stall of this process the timer fires before the answer that has long arrived is read: read first.
      setImmediate(() => reject(new TooLateError(`no answer within ${limitMs} ms`)));
    });
    answer.then(resolve, reject).finally(() => timer.cancel());
  });
}
