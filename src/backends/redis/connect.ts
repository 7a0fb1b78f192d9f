/**
 * Links to Redis that come back by themselves, fail at once rather than queue, and never end the process.
 * The truth is in PostgreSQL: whoever asks Redis would rather hear "no" now than "yes" later.
 */
import { connect as connectTcp } from 'node:net';
import { connect as connectTls } from 'node:tls';
import { AbstractConnector, Cluster, Redis, type RedisOptions, ReplyError } from 'ioredis';
import { type Clock, steadyClock } from '../../lib/clock.ts';
import type { Log } from '../../lib/log.ts';

/** One Redis, or a Cluster of them. */
export type RedisLink = Redis | Cluster;

const CONNECT_WAIT_MAX_MS = 2_000;
/** For what the bus asks of Redis, however many devices it is about: beyond, the link counts as gone. */
export const CALL_WAIT_MAX_MS = 2_000;
/** A connection that owes an answer and says nothing for so long is closed; its commands fail. */
const SILENCE_MAX_MS = 2_000;
const GOODBYE_WAIT_MAX_MS = 500;
const RETRY_DELAY_MIN_MS = 50;
/** A connection is renewed no sooner because its Redis takes no changes. */
const LEAVE_READ_ONLY_PERIOD_MS = 5_000;
/** How soon a Cluster's new division of the slots, and a node that is back, are noticed. */
const SLOTS_LOOK_PERIOD_MS = 2_000;
const DEFAULT_PORT = 6379;

export interface RedisLinkOptions {
  /**
   * `redis://` or, for TLS, `rediss://`. Several hosts, separated by commas, are nodes of a Cluster, which tell of the
   * others; so is a single one with `?cluster=true`.
   */
  url: string;
  /** Shown by Redis's `CLIENT LIST`. */
  name: string;
  log: Log;
  /** The longest pause between two attempts to connect. */
  retryDelayMaxMs?: number;
}

/**
 * Opens a link for commands; returns at once, and never throws for a Redis that is away. Every command settles within
 * about SILENCE_MAX_MS: those sent while there is no connection fail at once.
 *
 * @param link.isPipelined whether the commands of one turn go out in one write, at its end; to a Cluster they always do
 */
export function connectRedis(link: RedisLinkOptions & { isPipelined?: boolean }): RedisLink {
  const { url, name, log, isPipelined = false, retryDelayMaxMs = 2_000 } = link;
  const { nodes, options } = readUrl(url);
  if (nodes === null) {
    const single = { ...linkOptions({ name, retryDelayMaxMs }), enableAutoPipelining: isPipelined };
    return reporting(new Redis(url, single), { name, log });
  }
  const { retryStrategy, enableOfflineQueue, ...perNode } = linkOptions({ name, retryDelayMaxMs });
  const cluster = new Cluster(nodes, {
    redisOptions: { ...perNode, ...options },
    enableOfflineQueue,
    clusterRetryStrategy: retryStrategy,
    slotsRefreshInterval: SLOTS_LOOK_PERIOD_MS,
    // What was sent in one tick goes in one write to each node.
    enableAutoPipelining: true,
    // A message has no slot: any node that is there passes it on.
    autoPipeliningIgnoredCommands: ['publish'],
    // A node that is away is away: its part of a batch fails now, and the others' parts are answered.
    retryDelayOnFailover: 0,
    retryDelayOnClusterDown: 0,
  });
  return reporting(cluster, { name, log });
}

/**
 * Opens a link to subscribe on. In a Cluster it leads to one of the nodes, which pass all messages on, and to the next
 * one when that is lost. Its loss shows, as ioredis's own change of nodes would not.
 */
export function connectSubscriber({ url, name, log, retryDelayMaxMs = 2_000 }: RedisLinkOptions): Redis {
  const { nodes, options } = readUrl(url);
  const common = linkOptions({ name, retryDelayMaxMs });
  const link =
    nodes === null
      ? new Redis(url, common)
      : new Redis({ ...common, ...options, Connector: inTurn(nodes, options.tls) });
  return reporting(link, { name, log });
}

interface Node {
  host: string;
  port: number;
}

/** `nodes` is null for one Redis, whose URL ioredis reads itself. @throws Error where it names no host */
function readUrl(url: string): {
  nodes: Node[] | null;
  options: Pick<RedisOptions, 'username' | 'password' | 'tls'>;
} {
  const [, scheme, credentials, hosts, query] =
    /^(rediss?):\/\/(?:([^@/]*)@)?([^/?]+)\/?\d*(\?.*)?$/.exec(url) ?? [];
  const isCluster = hosts?.includes(',') || new URLSearchParams(query).get('cluster') === 'true';
  if (hosts === undefined || !isCluster) return { nodes: null, options: {} };
  const { username, password } = new URL(`redis://${credentials ?? ''}@host`);
  return {
    nodes: hosts.split(',').map((host) => {
      const { hostname, port } = new URL(`redis://${host}`);
      return { host: hostname.replace(/^\[|\]$/g, ''), port: port === '' ? DEFAULT_PORT : Number(port) };
    }),
    options: {
      ...(username === '' ? {} : { username: decodeURIComponent(username) }),
      ...(password === '' ? {} : { password: decodeURIComponent(password) }),
      ...(scheme === 'rediss' ? { tls: {} } : {}),
    },
  };
}

/** Each attempt to connect goes to the next node. */
function inTurn(nodes: readonly Node[], tls: RedisOptions['tls']): NonNullable<RedisOptions['Connector']> {
  let turn = Math.floor(Math.random() * nodes.length);
  return class extends AbstractConnector {
    constructor() {
      super(GOODBYE_WAIT_MAX_MS);
    }

    override async connect() {
      this.connecting = true;
      const node = nodes[turn++ % nodes.length]!;
      const stream = tls === undefined ? connectTcp(node) : connectTls({ ...node, ...tls });
      stream.once('error', (error) => {
        this.firstError = error;
      });
      this.stream = stream;
      return stream;
    }
  };
}

/** Reasons may differ in a number, say, without an end. */
const REASONS_TOLD_MAX = 8;

/** Redis has no such database, or none for this user: it would refuse it again. */
export class RefusedDatabaseError extends Error {
  override readonly name = 'RefusedDatabaseError';
}

const refusals = new WeakMap<RedisLink, Promise<never>>();

/** @returns what never resolves, and rejects with a RefusedDatabaseError where Redis refuses the URL's database */
export function refusalOf(link: RedisLink): Promise<never> {
  return refusals.get(link)!;
}

/** Says why a link is broken, and once that it works again; one without its database never works. */
function reporting<Link extends RedisLink>(link: Link, { name, log }: { name: string; log: Log }): Link {
  /** What was said since it last worked: each reason once, however often it is tried. */
  const told = new Set<string>();
  let refuse: (error: RefusedDatabaseError) => void = () => {};
  const refusal = new Promise<never>((_, reject) => {
    refuse = reject;
  });
  refusal.catch(() => {});
  refusals.set(link, refusal);
  // Without a listener, ioredis prints every attempt. An error object isn't logged as a whole: it carries the
  // command's arguments, for a refused log-in the password.
  link.on('error', (error: Error) => {
    const reason = linkFault(error);
    const { command } = error as { command?: { name: string; args: unknown[] } };
    if (command?.name === 'select') {
      // ioredis would go on in database 0, which is another deployment's.
      link.disconnect(true);
      if (/^(ERR|NOPERM)\b/.test(reason)) {
        refuse(new RefusedDatabaseError(`Redis refuses database ${command.args[0]} of REDIS_URL: ${reason}`));
      }
    }
    if (told.has(reason) || told.size === REASONS_TOLD_MAX) return;
    told.add(reason);
    log.warn({ link: name, error: reason }, 'the link to Redis is broken');
  });
  link.on('ready', () => {
    if (told.size > 0) log.info({ link: name }, 'the link to Redis works again');
    told.clear();
  });
  return link;
}

/** What a link complains of, in its own words, without what was sent. */
export function linkFault(error: Error): string {
  // A Cluster says only that it found no node that answers.
  const { lastNodeError } = error as { lastNodeError?: unknown };
  const { message } = lastNodeError instanceof Error ? lastNodeError : error;
  // What knows no HELLO repeats it with the password.
  const fault = message.replace(/,? *with args beginning with.*/s, '');
  // Every Redis knows these.
  return /^ERR unknown command .?(time|evalsha|eval)\b/i.test(fault)
    ? `${fault} (as a Sentinel answers: REDIS_URL must name the Redis itself)`
    : fault;
}

/** Whether Redis has answered, with a refusal. */
export function isRefusal(error: unknown): error is Error {
  return error instanceof ReplyError;
}

function linkOptions({ name, retryDelayMaxMs }: { name: string; retryDelayMaxMs: number }) {
  let leftReadOnlyMs = Number.NEGATIVE_INFINITY;
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
    reconnectOnError: (error: Error) => {
      // After a failover, the old master answers so until the connection is renewed; a replica answers so for ever.
      const leaves =
        error.message.startsWith('READONLY') &&
        steadyClock.nowMs() - leftReadOnlyMs >= LEAVE_READ_ONLY_PERIOD_MS;
      if (leaves) leftReadOnlyMs = steadyClock.nowMs();
      return leaves;
    },
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
