/**
 * The way to PostgreSQL: two pools over one address, every query bounded in time, and the whole replaced by a fresh
 * one when a connection has gone bad.
 */
import { isIP } from 'node:net';
import { type SQL, sql } from 'drizzle-orm';
import { PgDialect } from 'drizzle-orm/pg-core';
import { drizzle, type PostgresJsDatabase } from 'drizzle-orm/postgres-js';
import postgres from 'postgres';
import type { Clock } from '../../lib/clock.ts';
import type { Log } from '../../lib/log.ts';
import { reasonOf } from '../../lib/reason.ts';
import { createSlots, NoSlotError } from '../../lib/slots.ts';
import { GatewayError } from '../../protocol/errors.ts';
import { HOT_PLAN_SETTINGS, QUERY_TIMEOUT_MS, SETTINGS } from './settings.ts';

/** Where PostgreSQL is: a URL, or the socket folder of the embedded one. */
export type PostgresAddress =
  | { kind: 'url'; url: string }
  | { kind: 'socket'; socketDir: string; port: number; user: string; database: string };

/** A statement of the hot path: prepared once per connection under its text. */
export interface HotStatement<Row> {
  readonly text: string;
  /** The values, in the order in which the text numbers them. */
  bind(values: Readonly<Record<string, unknown>>): unknown[];
  /** Never there: it carries the row's type. */
  readonly row?: Row;
}

export interface Database {
  /** Runs `action` in one transaction, READ COMMITTED. @throws GatewayError UNAVAILABLE when the store can't be reached in time */
  transaction<Result>(action: (tx: Transaction) => Promise<Result>): Promise<Result>;
  /**
   * Runs `action` in a transaction whose locks wait for no disk at its end. A crash may undo it as a whole, so it must
   * be nothing but what is found and done again; whoever commits after it has put it on disk too.
   *
   * @throws GatewayError UNAVAILABLE when the store can't be reached in time
   */
  upkeep<Result>(action: (tx: Transaction) => Promise<Result>): Promise<Result>;
  /**
   * Runs `action` in a transaction that may take minutes. For an operator who waits, never for a request: it holds its
   * connection, and the rows that it changes, for as long.
   *
   * @throws GatewayError UNAVAILABLE when the store can't be reached, or is not done in {@link PATIENCE_MS}
   */
  patient<Result>(action: (tx: Transaction) => Promise<Result>): Promise<Result>;
  /**
   * Runs `action` in a transaction that may just as well not be done.
   *
   * @returns null where a statement of it took longer than `limitMs`
   * @throws GatewayError UNAVAILABLE when the store can't be reached in time
   */
  soon<Result>(limitMs: number, action: (tx: Transaction) => Promise<Result>): Promise<Result | null>;
  /** Runs queries that are no hot path. @throws GatewayError UNAVAILABLE when the store can't be reached in time */
  run<Result>(action: (db: PostgresJsDatabase) => Promise<Result>): Promise<Result>;
  /** Runs one prepared statement, pipelined. @throws GatewayError UNAVAILABLE when the store can't be reached in time */
  hot<Row>(statement: HotStatement<Row>, values: Readonly<Record<string, unknown>>): Promise<Row[]>;
  /** False where the URL says that nothing is prepared, and nothing set at connecting. */
  readonly isPrepared: boolean;
  /** Queries that wait for a connection. */
  waitingCount(): number;
  /** Replaces both pools: what hangs on the old ones fails. */
  recycle(reason: string): void;
  close(): Promise<void>;
}

export type Transaction = Parameters<Parameters<PostgresJsDatabase['transaction']>[0]>[0];
/** What a query can be sent to, inside a transaction or outside. */
export type Queryable = PostgresJsDatabase | Transaction;

/** By which PostgreSQL knows our sessions. */
const APPLICATION_NAME = 'keygate';
/** One cause is logged so often, however many requests it fails. */
const OUTAGE_REPORT_PERIOD_MS = 15_000;
/** New connections are no better where the server itself is read-only: they are not made at every request. */
const LEAVE_READ_ONLY_PERIOD_MS = 5_000;
/**
 * Between the two halves of a statement that is new to its connection PostgreSQL waits for the client, holds the
 * transaction's rows, and heeds neither of the time-outs above. A session that has waited there for so long is a frozen
 * process's.
 */
const STALLED_AFTER_S = 3;
const CONNECT_TIMEOUT_S = 5;
/** What counts, or withdraws, all that there is. */
const PATIENCE_MS = 15 * 60_000;
const RETRY_AFTER_MS = 1_000;
const POOL_CONNECTIONS = 6;
const HOT_CONNECTIONS = 6;
/** Hot statements that share a connection at once. */
const HOT_PIPELINE = 16;
/** Once would do where one is free: a burst may find it taken again. */
const CONNECTION_TRIES_MAX = 5;
/** Who waits longer for a connection is told to come back: nothing was begun for it. */
const LINE = { waitingMax: 10_000, waitMaxMs: 5_000 };

const dialect = new PgDialect();

/**
 * Names a hot statement. It is written with Drizzle's columns and `sql.placeholder`s, and sent by its text, because
 * Drizzle itself would send raw SQL unprepared.
 */
export function hotStatement<Row>(statement: SQL): HotStatement<Row> {
  const { sql: text, params } = dialect.sqlToQuery(statement);
  const names = params.map((param) => (param as { name: string }).name);
  return {
    text,
    bind: (values) => names.map((name) => values[name]),
  };
}

/** Raw SQL with the rows' type said once, where the statement is. */
export async function select<Row>(db: Queryable, statement: SQL): Promise<Row[]> {
  return (await db.execute(statement)) as unknown as Row[];
}

/**
 * Opens the pools; connections are made when they are first needed.
 *
 * @param address with `?prepare=false` in its URL, nothing is prepared and no setting is made at connecting, as a
 *   pooler requires
 */
export function openDatabase(options: { address: PostgresAddress; clock: Clock; log: Log }): Database {
  const { address, clock, log } = options;
  let pools = openPools(address);
  let closed = false;

  function recycle(reason: string): void {
    if (closed) return;
    log.warn({ reason }, 'replacing the PostgreSQL connections');
    const old = pools;
    pools = openPools(address);
    void endPools(old, 0);
  }

  /** One line for each pool: the time of a query is counted from when a connection is there for it. */
  const slots = {
    client: createSlots({ clock, slotCount: POOL_CONNECTIONS, ...LINE }),
    hot: createSlots({ clock, slotCount: HOT_CONNECTIONS * HOT_PIPELINE, ...LINE }),
  };

  async function bounded<Result>(
    pool: keyof typeof slots,
    work: (current: Pools) => PromiseLike<Result>,
    limitMs = QUERY_TIMEOUT_MS,
  ): Promise<Result> {
    try {
      return await connected(pool, work, limitMs);
    } catch (error) {
      // It may have waited for rows that nobody will ever release.
      if (codeOf(error) === STATEMENT_TIMED_OUT) void endStalled();
      if (!(error instanceof NoSlotError || isOutage(error))) throw explained(error);
      reportOutage(error);
      if (codeOf(error) === READ_ONLY_TRANSACTION) leaveReadOnly();
      throw unavailable(explained(error));
    }
  }

  /**
   * PostgreSQL may give a node fewer connections than its pools ask for. Who is refused one has sent nothing yet, and
   * takes one of the others when it comes free.
   */
  async function connected<Result>(
    pool: keyof typeof slots,
    work: (current: Pools) => PromiseLike<Result>,
    limitMs: number,
  ): Promise<Result> {
    for (let triesLeft = CONNECTION_TRIES_MAX; ; triesLeft--) {
      try {
        return await slots[pool].run(async () => await inTime(work, limitMs));
      } catch (error) {
        if (codeOf(error) !== TOO_MANY_CONNECTIONS || triesLeft === 1) throw error;
        reportOutage(error);
      }
    }
  }

  /** Codes, of PostgreSQL or the driver, that were reported within the period. Timers end it: a clock may be set back. */
  const reported = new Set<string>();

  /** Clients are told to try again; whoever runs the gateway has to know what stands in the way. */
  function reportOutage(error: unknown): void {
    const code = codeOf(error) ?? 'none';
    if (closed || reported.has(code)) return;
    reported.add(code);
    clock.after(OUTAGE_REPORT_PERIOD_MS, () => reported.delete(code));
    log.warn({ code, reason: reasonOf(error) }, 'PostgreSQL did not do what it was asked');
  }

  let hasLeftReadOnly = false;

  /** After a failover its address may lead to another server, while these connections stay with the one that was fenced. */
  function leaveReadOnly(): void {
    if (hasLeftReadOnly) return;
    hasLeftReadOnly = true;
    clock.after(LEAVE_READ_ONLY_PERIOD_MS, () => {
      hasLeftReadOnly = false;
    });
    recycle('PostgreSQL is read-only');
  }

  let endingStalled = false;

  /** Ends this role's sessions, of whatever process, that hold a transaction open and will not go on. */
  async function endStalled(): Promise<void> {
    if (endingStalled || closed) return;
    endingStalled = true;
    try {
      const ended = await pools.client`
        SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE datname = current_database() AND usename = session_user AND application_name = ${APPLICATION_NAME}
          AND state = 'active' AND wait_event = 'ClientRead'
          AND query_start < clock_timestamp() - make_interval(secs => ${STALLED_AFTER_S})`;
      if (ended.length > 0)
        log.warn({ count: ended.length }, 'ended sessions that stood still in a transaction');
    } catch (error) {
      log.warn({ error: error as Error }, 'sessions that stand still were not looked for');
    } finally {
      endingStalled = false;
    }
  }

  async function inTime<Result>(
    work: (current: Pools) => PromiseLike<Result>,
    limitMs: number,
  ): Promise<Result> {
    const used = pools;
    let timer: ReturnType<Clock['after']> | undefined;
    try {
      return await Promise.race([
        work(used),
        new Promise<never>((_, reject) => {
          timer = clock.after(limitMs, () => {
            // The server itself gives up before: a connection that says nothing is dead, and stays so.
            if (pools === used) recycle('a query did not end in time');
            reject(unavailable(new Error('the query did not end in time')));
          });
        }),
      ]);
    } finally {
      timer?.cancel();
    }
  }

  return {
    transaction: (action) => bounded('client', (current) => current.drizzle.transaction(action)),
    upkeep: (action) =>
      bounded('client', (current) =>
        current.drizzle.transaction(async (tx) => {
          await tx.execute(sql`SET LOCAL synchronous_commit = off`);
          return await action(tx);
        }),
      ),
    patient: (action) =>
      bounded(
        'client',
        (current) =>
          current.drizzle.transaction(async (tx) => {
            await tx.execute(sql.raw(`SET LOCAL statement_timeout = ${PATIENCE_MS}`));
            return await action(tx);
          }),
        PATIENCE_MS + QUERY_TIMEOUT_MS,
      ),
    soon: (limitMs, action) =>
      bounded('client', async (current) => {
        try {
          return await current.drizzle.transaction(async (tx) => {
            await tx.execute(sql.raw(`SET LOCAL statement_timeout = ${limitMs}`));
            return await action(tx);
          });
        } catch (error) {
          if (codeOf(error) === STATEMENT_TIMED_OUT) return null;
          throw error;
        }
      }),
    run: (action) => bounded('client', (current) => action(current.drizzle)),
    hot: (statement, values) =>
      bounded(
        'hot',
        (current) =>
          current.hot.unsafe(statement.text, statement.bind(values) as never[], {
            prepare: current.prepare,
          }) as unknown as Promise<never[]>,
      ),
    isPrepared: pools.prepare,
    waitingCount: () => slots.client.waitingCount() + slots.hot.waitingCount(),
    recycle,
    async close() {
      closed = true;
      await endPools(pools, 5);
    },
  };
}

interface Pools {
  drizzle: PostgresJsDatabase;
  client: postgres.Sql;
  hot: postgres.Sql;
  prepare: boolean;
}

/** Behind a pooler nothing is: its URL says so. */
export function isPrepared(address: PostgresAddress): boolean {
  return !(address.kind === 'url' && new URL(address.url).searchParams.get('prepare') === 'false');
}

function openPools(address: PostgresAddress): Pools {
  const prepare = isPrepared(address);
  const settings = Object.fromEntries(Object.entries(SETTINGS).map(([name, { value }]) => [name, value]));
  // Drizzle changes how its client parses dates: the hot statements get one of their own.
  const client = connect(address, { max: POOL_CONNECTIONS, prepare, connection: prepare ? settings : {} });
  const hot = connect(address, {
    max: HOT_CONNECTIONS,
    prepare,
    connection: prepare
      ? {
          ...settings,
          ...HOT_PLAN_SETTINGS,
        }
      : {},
  });
  return { drizzle: drizzle(client), client, hot, prepare };
}

async function endPools(pools: Pools, timeoutS: number): Promise<void> {
  await Promise.allSettled([pools.client.end({ timeout: timeoutS }), pools.hot.end({ timeout: timeoutS })]);
}

export function connect(
  address: PostgresAddress,
  options: { max: number; prepare?: boolean; connection: Record<string, string | number> },
): postgres.Sql {
  const common: postgres.Options<Record<string, postgres.PostgresType>> = {
    max: options.max,
    prepare: options.prepare ?? true,
    connect_timeout: CONNECT_TIMEOUT_S,
    connection: { application_name: APPLICATION_NAME, ...options.connection } as Record<string, string>,
    onnotice: () => {},
    // Array parameters are cast where they stand; asking the server for its types costs a query per connection.
    fetch_types: false,
    types: {
      int8: { to: 20, from: [20], serialize: String, parse: Number },
      int4Array: { to: 1007, from: [1007], serialize: String, parse: parseNumbers },
      int8Array: { to: 1016, from: [1016], serialize: String, parse: parseNumbers },
    },
    // A failing server is asked again soon but never in a storm.
    backoff: (attempt) => Math.min(2, 0.05 * 2 ** attempt) * (0.5 + Math.random() / 2),
  };
  if (address.kind === 'socket') {
    return postgres({
      ...common,
      ssl: false,
      host: address.socketDir,
      port: address.port,
      user: address.user,
      database: address.database,
    });
  }
  const url = new URL(address.url);
  // The driver would send all of it to PostgreSQL, and let it win over what is set here.
  for (const name of [...url.searchParams.keys()]) {
    if (SET_HERE.has(name.toLowerCase())) url.searchParams.delete(name);
  }
  return postgres(url.toString(), { ...common, ...addressV6(url), ...tlsByAddress(url) });
}

const SET_HERE = new Set([
  ...['prepare', 'application_name'],
  ...Object.keys({ ...SETTINGS, ...HOT_PLAN_SETTINGS }),
]);

/** The driver cuts a host at its first colon, and takes lists as they are, which its types don't know. */
function addressV6({ hostname, port }: URL): { host?: string; port?: number } {
  const [, host] = /^\[(.*)\]$/.exec(hostname) ?? [];
  if (host === undefined) return {};
  return { host: [host], port: [Number(port) || 5432] } as unknown as { host: string; port: number };
}

/** What `sslmode` says where no certificate is looked at. */
const UNVERIFIED = new Set([null, 'disable', 'false', 'allow', 'prefer', 'require']);

/** The driver names only hosts that have a name: the certificate of an address would be compared with `localhost`. */
function tlsByAddress({ hostname, searchParams }: URL): { ssl?: { host: string } } {
  const host = hostname.replace(/^\[(.*)\]$/, '$1');
  const asked = searchParams.get('sslmode') ?? searchParams.get('ssl');
  const mode = searchParams.get('sslrootcert') === 'system' ? 'verify-full' : asked;
  return isIP(host) === 0 || UNVERIFIED.has(mode) ? {} : { ssl: { host } };
}

/** `{1,2}` */
function parseNumbers(literal: string): number[] {
  return literal === '{}' ? [] : literal.slice(1, -1).split(',').map(Number);
}

function unavailable(cause: unknown): GatewayError {
  return new GatewayError('UNAVAILABLE', 'the store can’t be reached; nothing is lost, try again', {
    retryAfterMs: RETRY_AFTER_MS,
    cause,
  });
}

/** What becomes of settings at connecting is of use to nobody in the words of PostgreSQL, or of a pooler. */
export function explained(error: unknown): unknown {
  // It came with 14.
  if (codeOf(error) === UNKNOWN_PARAMETER && reasonOf(error).includes('idle_session_timeout')) {
    return new Error('PostgreSQL is older than 14, the first that will do', { cause: error });
  }
  if (codeOf(error) !== PROTOCOL_VIOLATED || !reasonOf(error).includes('startup parameter')) return error;
  const isOurs = Object.keys({ ...SETTINGS, ...HOT_PLAN_SETTINGS }).some((name) =>
    reasonOf(error).includes(name),
  );
  const advice = isOurs
    ? 'add ?prepare=false to it'
    : 'take the parameter out of it, and give it to the role';
  return new Error(`${SETTINGS_KEPT_OUT} (${reasonOf(error)}): ${advice}`, { cause: error });
}

export const SETTINGS_KEPT_OUT =
  'what a connection sets does not reach PostgreSQL: a pooler answers at DATABASE_URL';

const PROTOCOL_VIOLATED = '08P01';
const UNKNOWN_PARAMETER = '42704';
const TOO_MANY_CONNECTIONS = '53300';
const STATEMENT_TIMED_OUT = '57014';
export const READ_ONLY_TRANSACTION = '25006';
const OUTAGE_CODES = new Set([
  'CONNECTION_CLOSED',
  'CONNECTION_ENDED',
  'CONNECTION_DESTROYED',
  'CONNECT_TIMEOUT',
  'ECONNREFUSED',
  'ECONNRESET',
  'ENOENT',
  'EPIPE',
  'ETIMEDOUT',
  'EHOSTUNREACH',
  'ENETUNREACH',
  'ENOTFOUND',
  'EAI_AGAIN',
  STATEMENT_TIMED_OUT,
  // A standby, or made so.
  READ_ONLY_TRANSACTION,
  // The database takes no connections.
  '55000',
  // A transaction took longer than its role may.
  '25P04',
  // Deadlock; serialization; lock not available.
  '40P01',
  '40001',
  '55P03',
]);
/**
 * Classes: connection exception, refused login, no such database, insufficient resources (disk full, too many
 * connections), operator intervention, system error.
 */
const OUTAGE_CLASSES = ['08', '28', '3D', '53', '57', '58'];

/** Whether `error` says that the store is away rather than that the statement is wrong. */
function isOutage(error: unknown): boolean {
  const code = codeOf(error);
  if (code === null) return false;
  return OUTAGE_CODES.has(code) || (code.length === 5 && OUTAGE_CLASSES.includes(code.slice(0, 2)));
}

/** What the driver or the server named the failure; Drizzle wraps it. */
export function codeOf(error: unknown): string | null {
  for (let at: unknown = error; at instanceof Error; at = at.cause) {
    const code = (at as { code?: unknown }).code;
    if (typeof code === 'string') return code;
  }
  return null;
}

/**
 * Whether an uncaught exception is the driver's known fault: it writes to a connection that is gone from a timer, where
 * no caller can catch it (porsager/postgres 1154, 1208). The process may go on after `recycle`.
 */
export function isDriverWriteFault(error: unknown): boolean {
  return (
    error instanceof TypeError &&
    /null/.test(error.message) &&
    /postgres[\\/](?:src|cjs[\\/]src)[\\/]connection\.js/.test(error.stack ?? '')
  );
}
