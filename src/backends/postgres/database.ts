/**
 * The way to PostgreSQL: two pools over one address, every query bounded in time, and the whole replaced by a fresh
 * one when a connection has gone bad.
 */
import { type SQL, sql } from 'drizzle-orm';
import { PgDialect } from 'drizzle-orm/pg-core';
import type { PostgresJsDatabase } from 'drizzle-orm/postgres-js';
import type { Clock } from '../../lib/clock.ts';
import type { Log } from '../../lib/log.ts';
import { reasonOf } from '../../lib/reason.ts';
import { createSlots, NoSlotError } from '../../lib/slots.ts';
import { APPLICATION_NAME, type PostgresAddress } from './connect.ts';
import {
  codeOf,
  explained,
  IN_FAILED_TRANSACTION,
  isOutage,
  READ_ONLY_TRANSACTION,
  STATEMENT_TIMED_OUT,
  TOO_MANY_CONNECTIONS,
  unavailable,
} from './faults.ts';
import { createGivenConnections } from './given-connections.ts';
import {
  CLIENT_CONNECTIONS,
  endPools,
  endWithLastUser,
  enter,
  HOT_CONNECTIONS,
  leave,
  openClient,
  openHot,
  openPools,
  type PoolName,
  type Pools,
} from './pools.ts';
import { HOT_PLAN_SETTINGS, QUERY_TIMEOUT_MS } from './settings.ts';

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
/** What counts, or withdraws, all that there is. */
const PATIENCE_MS = 15 * 60_000;
/** Hot statements that share a connection at once. */
const HOT_PIPELINE = 16;
/** Where one pool of the two has no connection, the other gives some of its own up no more often. */
const MAKE_ROOM_PERIOD_MS = 5_000;
/** Each refusal leaves one fewer to be tried: who is refused as often as there are connections finds none, and room is made. */
const CONNECTION_TRIES_MAX = Math.max(CLIENT_CONNECTIONS, HOT_CONNECTIONS) + 3;
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

/** What is sent behind its end would be done outside of it, by whoever has the connection then. */
const ended = new WeakSet<Queryable>();
/** Why a transaction failed: the statements that were sent behind that one fail for no other reason. */
const failures = new WeakMap<Queryable, unknown>();

/**
 * Runs a hot statement where other queries are run, in a transaction say; of those that are asked for at once, one after
 * the other, where the first that fails says why all behind it do.
 */
export async function prepared<Row>(
  db: Queryable,
  statement: HotStatement<Row>,
  values: Readonly<Record<string, unknown>>,
): Promise<Row[]> {
  if (ended.has(db)) throw new Error('a statement of a transaction that has ended');
  const query = { sql: statement.text, params: statement.bind(values) };
  try {
    // Any name has the driver prepare it, under one of its own.
    return (await db._.session.prepareQuery(query, undefined, 'hot', false).execute()) as Row[];
  } catch (error) {
    if (codeOf(error) === IN_FAILED_TRANSACTION) throw failures.get(db) ?? error;
    failures.set(db, error);
    throw error;
  }
}

/** @param setting what is set for it first */
async function inTransaction<Result>(
  db: PostgresJsDatabase,
  action: (tx: Transaction) => Promise<Result>,
  setting?: string,
): Promise<Result> {
  return await db.transaction(async (tx) => {
    try {
      if (setting !== undefined) await tx.execute(sql.raw(`SET LOCAL ${setting}`));
      return await action(tx);
    } finally {
      ended.add(tx);
    }
  });
}

const planStatement = hotStatement(
  sql`SELECT ${sql.join(
    Object.entries(HOT_PLAN_SETTINGS).map(([name, value]) =>
      sql.raw(`set_config('${name}', '${value}', true)`),
    ),
    sql`, `,
  )}`,
);

/** Until `tx` ends, its statements are planned as the hot ones are: once, and right for any day's tables. */
export async function planAsHot(tx: Transaction): Promise<void> {
  await prepared(tx, planStatement, {});
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
    client: createSlots({ clock, slotCount: CLIENT_CONNECTIONS, ...LINE }),
    hot: createSlots({ clock, slotCount: HOT_CONNECTIONS * HOT_PIPELINE, ...LINE }),
  };
  const given = {
    client: createGivenConnections({
      ...{ clock, slots: slots.client },
      ...{ connectionsMax: CLIENT_CONNECTIONS, slotCount: CLIENT_CONNECTIONS },
    }),
    hot: createGivenConnections({
      ...{ clock, slots: slots.hot },
      ...{ connectionsMax: HOT_CONNECTIONS, slotCount: HOT_CONNECTIONS * HOT_PIPELINE },
    }),
  };

  async function bounded<Result>(
    pool: PoolName,
    work: (current: Pools) => PromiseLike<Result>,
    limitMs = QUERY_TIMEOUT_MS,
  ): Promise<Result> {
    try {
      return await connected(pool, work, limitMs);
    } catch (error) {
      // It may have waited for rows that nobody will ever release.
      if (codeOf(error) === STATEMENT_TIMED_OUT) void endStalled();
      const told = explained(error);
      if (!(error instanceof NoSlotError || isOutage(error))) throw told;
      reportOutage(told);
      if (codeOf(error) === READ_ONLY_TRANSACTION) leaveReadOnly();
      throw unavailable(told);
    }
  }

  /**
   * PostgreSQL may give a node fewer connections than its pools ask for. Who is refused one has sent nothing yet, and
   * takes one of the others when it comes free.
   */
  async function connected<Result>(
    pool: PoolName,
    work: (current: Pools) => PromiseLike<Result>,
    limitMs: number,
  ): Promise<Result> {
    for (let triesLeft = CONNECTION_TRIES_MAX; ; triesLeft--) {
      try {
        return await slots[pool].run(async () => await inTime(pool, work, limitMs));
      } catch (error) {
        if (codeOf(error) !== TOO_MANY_CONNECTIONS) throw error;
        const hasNone = given[pool].refused();
        if (triesLeft === 1) throw error;
        reportOutage(error);
        if (hasNone) await makeRoomFor(pool);
      }
    }
  }

  const roomsMade = new Map<PoolName, Promise<void>>();

  /**
   * The other pool keeps open what it was given: it ends that when it is done with it, and begins anew with one.
   *
   * @returns when it has ended, or takes too long
   */
  async function makeRoomFor(pool: PoolName): Promise<void> {
    const made = roomsMade.get(pool);
    if (closed || made !== undefined) return await made;
    const other = pool === 'hot' ? 'client' : 'hot';
    log.warn({ pool, other }, 'one pool was given no PostgreSQL connection: the other gives some up');
    given[other].beginAnew();
    const old = pools[other];
    pools = { ...pools, ...(other === 'hot' ? openHot(address) : openClient(address)) };
    const tooLate = new Promise<void>((resolve) => clock.after(MAKE_ROOM_PERIOD_MS, resolve));
    const room = Promise.race([endWithLastUser(old), tooLate]);
    roomsMade.set(pool, room);
    void tooLate.then(() => roomsMade.delete(pool));
    await room;
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
      const ended = await pools.client.sql`
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
    name: PoolName,
    work: (current: Pools) => PromiseLike<Result>,
    limitMs: number,
  ): Promise<Result> {
    const used = pools;
    enter(used[name]);
    let timer: ReturnType<Clock['after']> | undefined;
    try {
      return await Promise.race([
        work(used),
        new Promise<never>((_, reject) => {
          timer = clock.after(limitMs, () => {
            // The server itself gives up before: a connection that says nothing is dead, and stays so.
            if (pools[name] === used[name]) recycle('a query did not end in time');
            reject(unavailable(new Error('the query did not end in time')));
          });
        }),
      ]);
    } finally {
      timer?.cancel();
      leave(used[name]);
    }
  }

  return {
    transaction: (action) => bounded('client', (current) => inTransaction(current.drizzle, action)),
    upkeep: (action) =>
      bounded('client', (current) => inTransaction(current.drizzle, action, 'synchronous_commit = off')),
    patient: (action) =>
      bounded(
        'client',
        (current) => inTransaction(current.drizzle, action, `statement_timeout = ${PATIENCE_MS}`),
        PATIENCE_MS + QUERY_TIMEOUT_MS,
      ),
    soon: (limitMs, action) =>
      bounded('client', async (current) => {
        try {
          return await inTransaction(current.drizzle, action, `statement_timeout = ${limitMs}`);
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
          current.hot.sql.unsafe(statement.text, statement.bind(values) as never[], {
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
