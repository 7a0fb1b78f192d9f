/** The composition root: the only file that knows every room. */

import { randomBytes } from 'node:crypto';
import { hostname } from 'node:os';
import { type Admin, type Probe, startAdmin } from './admin/health.ts';
import { createInspector } from './admin/inspector.ts';
import { createMetrics } from './admin/metrics.ts';
import { referencePages } from './admin/reference.ts';
import { createInProcessBus } from './backends/in-process/bus.ts';
import { createInProcessLocks } from './backends/in-process/locks.ts';
import { createInProcessRateLimiter } from './backends/in-process/rate-limiter.ts';
import { createInProcessRelay } from './backends/in-process/relay.ts';
import {
  type Database,
  isDriverWriteFault,
  openDatabase,
  type PostgresAddress,
} from './backends/postgres/database.ts';
import { FolderInUseError, isEmbeddedMade, startEmbeddedPostgres } from './backends/postgres/embedded.ts';
import {
  examinePostgres,
  inALine,
  shortcomingsOfPostgres,
  troublesOfPostgres,
} from './backends/postgres/examine.ts';
import { createInspectionStore } from './backends/postgres/inspection.ts';
import { createKeyStore } from './backends/postgres/key-store.ts';
import { createMaintenance } from './backends/postgres/maintenance.ts';
import { createMessageStore } from './backends/postgres/message-store.ts';
import { migrateDatabase as migrate, missingMigrations } from './backends/postgres/migrations.ts';
import { createStatistics } from './backends/postgres/statistics.ts';
import { createRedisBus, type RedisBusTiming } from './backends/redis/bus.ts';
import { connectRedis, connectSubscriber } from './backends/redis/connect.ts';
import { examineRedis } from './backends/redis/examine.ts';
import { createRedisLocks } from './backends/redis/locks.ts';
import { createRedisRateLimiter } from './backends/redis/rate-limiter.ts';
import { createRedisRelay } from './backends/redis/relay.ts';
import type { Config, StoreConfig } from './config.ts';
import { configReference } from './config-reference.ts';
import { type Bounces, createBounces } from './delivery/bounce.ts';
import { createCourier } from './delivery/courier.ts';
import { noReports } from './delivery/reports.ts';
import { sweepMessages } from './delivery/retention.ts';
import { embeddedSecret, embeddedSecretFile } from './embedded-secret.ts';
import { connectionsMax } from './gateway/bound-connections.ts';
import { createSocketDoor } from './gateway/server.ts';
import { createHttpDoor } from './http/door.ts';
import { createBundleClaims } from './keys/claim-bundle.ts';
import { createDrainAlarm } from './keys/drain-alarm.ts';
import { createIdleSweep } from './keys/idle.ts';
import { sweepKeys } from './keys/retention.ts';
import { revokeDevice } from './keys/revoke.ts';
import { createValidationProofs } from './keys/validation.ts';
import { type Clock, every, systemClock } from './lib/clock.ts';
import { type Log, silentLog } from './lib/log.ts';
import { openFilesMax } from './lib/open-files.ts';
import { packageVersion } from './package-version.ts';
import type { Bus } from './ports/bus.ts';
import type { KeyStore } from './ports/key-store.ts';
import type { DeviceLocks } from './ports/lock.ts';
import type { Maintenance } from './ports/maintenance.ts';
import type { MessageStore } from './ports/message-store.ts';
import type { Limit, RateLimiter } from './ports/rate-limiter.ts';
import type { Relay } from './ports/relay.ts';
import type { DeviceAddress } from './protocol/ids.ts';
import { createAuthenticator, refuseRevoked, type TokenKeys } from './requests/authenticate.ts';
import { createClientAddressOf } from './requests/client-address.ts';
import { createDirectory } from './requests/directory.ts';
import { createDispatch } from './requests/dispatch.ts';
import { createHandlers } from './requests/handlers.ts';
import { createLimits, LIMIT_WINDOWS_MS, type RateName } from './requests/limits.ts';
import { createObserver } from './requests/observe.ts';
import { isOriginAllowed } from './requests/origins.ts';
import { surviveFaults } from './uncaught.ts';

export interface Gateway {
  /** Where clients connect. */
  url: string;
  /** Where `/livez` and `/readyz` are. */
  adminUrl: string;
  /** Drains and ends everything that was started; resolves when it has. Idempotent. */
  stop(): Promise<void>;
}

/** How soon nodes find what a lost poke left, and give up on each other; absent ones are as in production. */
export interface NodeTiming {
  bus?: Partial<RedisBusTiming>;
  sweepPeriodMs?: number;
}

/** PostgreSQL 14, as it numbers itself. */
const POSTGRES_VERSION_MIN = 140_000;
const REDIS_VERSION_MIN = '6.2';

const RETENTION_PERIOD_MS = 60_000;
/** Clients of a draining node come back spread over this time, two milliseconds each. */
const DRAIN_SPREAD_MAX_MS = 5_000;
const DRAIN_SPREAD_PER_SOCKET_MS = 2;
/** Tokens and validations bear less; no retention time is so short that it would matter. */
const SWEEP_CLOCK_DIFFERENCE_MAX_MS = 5 * 60_000;
/** A user id can't be empty: no device is locked by this. */
const RETENTION_LOCK = { userId: '', deviceId: 0 };

/**
 * Starts a gateway; it serves when the promise resolves. What was started is ended again where a later part fails.
 *
 * @param parts.clock the time of the rules; how long an engine may take to answer is measured by the system's
 * @param parts.comparesClock whether what expires is left to nodes whose clock agrees with PostgreSQL's; not by itself
 *   where a clock is handed in
 * @param parts.timing for tests that break nodes and can't wait as long as production does
 * @throws Error with one sentence for the operator
 */
export async function createGateway(
  config: Config,
  parts: { clock?: Clock; comparesClock?: boolean; log?: Log; timing?: NodeTiming } = {},
): Promise<Gateway> {
  const { clock = systemClock, log = silentLog, timing = {} } = parts;
  const { comparesClock = clock === systemClock } = parts;
  const undo: (() => Promise<void> | void)[] = [];
  const stop = once(async () => {
    for (const step of undo.reverse()) {
      try {
        await step();
      } catch (error) {
        // The rest must end all the same: the embedded store is the last of them.
        log.error({ error: error as Error }, 'a part did not end as it should');
      }
    }
  });
  try {
    return await start(config, { clock, comparesClock, log, timing, undo, stop });
  } catch (error) {
    await stop();
    throw error;
  }
}

/** Brings the schema of the configured store up to date, starting the embedded one for it. */
export async function migrateDatabase(config: StoreConfig): Promise<void> {
  const { store } = config;
  if (store.kind === 'url') return await migrate({ kind: 'url', url: store.url });
  const postgres = await startEmbeddedPostgres({ dataDir: store.dataDir, log: silentLog });
  try {
    await migrate({ kind: 'socket', ...postgres });
  } finally {
    await postgres.stop();
  }
}

/** What an operator's commands work with, beside running gateways or without any. */
export interface Operator {
  maintenance: Maintenance;
  store: KeyStore;
  /** Of this process alone: gateways that are beside it find the rows locked. */
  locks: DeviceLocks;
  messages: MessageStore;
  bounces: Bounces;
  /** @throws Error where what expires may not be judged here: this machine's clock differs from PostgreSQL's */
  refuseUnsoundClock(): Promise<void>;
  /** Revokes a device, and tells the gateways; those without Redis find out by themselves, on their next sweep. */
  revoke(device: DeviceAddress): Promise<{ keyVersion: number; revokedAtMs: number; hadKeys: boolean }>;
  close(): Promise<void>;
}

/**
 * Opens the configured store for a command; nobody is served.
 *
 * @param options.migrates brings the schema up to date first, as a starting gateway does; otherwise it must be
 * @throws Error where the store can't be reached, is behind, or is an embedded one that is in use or was never made
 */
export async function openOperator(
  config: StoreConfig,
  { migrates, log = silentLog }: { migrates: boolean; log?: Log },
): Promise<Operator> {
  const { store: where } = config;
  if (where.kind === 'embedded' && !isEmbeddedMade(where.dataDir)) {
    throw new Error(
      `there is no store in ${where.dataDir}: DATA_DIR, or DATABASE_URL, must be that of the gateway`,
    );
  }
  return await opened(async (undo) => {
    const address = await openStore(config, { log, undo });
    if (migrates) await migrate(address);
    const database = openDatabase({ address, clock: systemClock, log });
    undo.push(() => database.close());
    const missing = await missingMigrations(database);
    if (missing > 0) throw new Error(`the schema is ${missing} migrations behind: run keygate migrate`);
    const messages = createMessageStore(database);
    const bounces = createBounces({
      messages,
      // Nobody is told: the gateways' own sweeps find what came home.
      bus: createInProcessBus({ log }),
      clock: systemClock,
      messageLifetimeMs: config.messages.lifetimeMs,
      reports: noReports,
    });
    const store = createKeyStore(database);
    return {
      maintenance: createMaintenance(database),
      store,
      locks: createInProcessLocks({ clock: systemClock }),
      messages,
      bounces,
      async refuseUnsoundClock() {
        const aheadMs = await leapOf(systemClock, database);
        if (aheadMs === null) return;
        throw new Error(
          `the clock of this machine differs by ${Math.round(aheadMs / 1000)} s from that of PostgreSQL`,
        );
      },
      async revoke(device) {
        const { bus, locks } = openEngines(config, { clock: systemClock, log, timing: {}, undo });
        // First of all: nothing that Redis refuses keeps a device from being revoked.
        const { data } = await revokeDevice({ store, locks, clock: systemClock }, device);
        await bus.start({ onPoke() {}, onDisplaced() {}, onGap() {} });
        undo.push(() => bus.stop());
        bus.poke([device]);
        await createBounces({
          messages,
          bus,
          clock: systemClock,
          messageLifetimeMs: config.messages.lifetimeMs,
          reports: noReports,
        }).settle(device);
        return data;
      },
    };
  });
}

/**
 * A clock that has leapt would end in a minute what was to last for weeks: messages, claims, the keys of idle devices.
 *
 * @returns how far it is ahead of PostgreSQL's, in ms; null where that is little enough for a sweep
 */
async function leapOf(clock: Clock, database: Database): Promise<number | null> {
  const aheadMs = clock.nowMs() - (await examinePostgres(database)).nowMs;
  return Math.abs(aheadMs) <= SWEEP_CLOCK_DIFFERENCE_MAX_MS ? null : aheadMs;
}

/** What an engine tells of itself. */
export interface EngineFacts {
  version: string;
  isNewEnough: boolean;
  /** How far its clock is ahead of this machine's. */
  clockDifferenceMs: number;
}

export interface PostgresFindings extends EngineFacts {
  missingMigrations: number;
  /** What keeps it from serving, though it can be reached, each in a line. */
  troubles: readonly string[];
}

/**
 * Asks the configured PostgreSQL who it is and how its schema stands; an embedded one is started for it.
 *
 * @returns `notMade` for an embedded store that no gateway has started yet, `inUse` for one on which a gateway runs
 * @throws Error where it can't be reached
 */
export async function examineStore(config: Config): Promise<PostgresFindings | 'notMade' | 'inUse'> {
  const { store } = config;
  if (store.kind === 'embedded' && !isEmbeddedMade(store.dataDir)) return 'notMade';
  try {
    return await examineDatabase(config);
  } catch (error) {
    if (error instanceof FolderInUseError) return 'inUse';
    throw error;
  }
}

async function examineDatabase(config: Config): Promise<PostgresFindings> {
  const log = silentLog;
  const examiner = await opened(async (undo) => {
    const address = await openStore(config, { log, undo });
    const database = openDatabase({ address, clock: systemClock, log });
    undo.push(() => database.close());
    return { database };
  });
  try {
    const { version, versionNumber, nowMs } = await examinePostgres(examiner.database);
    const clockDifferenceMs = nowMs - systemClock.nowMs();
    return {
      version,
      isNewEnough: versionNumber >= POSTGRES_VERSION_MIN,
      clockDifferenceMs,
      missingMigrations: await missingMigrations(examiner.database),
      troubles: await faultsOfPostgres(examiner.database),
    };
  } finally {
    await examiner.close();
  }
}

async function faultsOfPostgres(database: Database): Promise<string[]> {
  return [...(await troublesOfPostgres(database)), ...(await shortcomingsOfPostgres(database))];
}

/** The same of Redis; null where none is configured. */
export async function examineRedisOf(config: Config): Promise<EngineFacts | null> {
  if (config.redisUrl === null) return null;
  const link = connectRedis({ url: config.redisUrl, name: 'doctor', log: silentLog });
  try {
    const { version, nowMs } = await examineRedis(link);
    return {
      version,
      isNewEnough: compareVersions(version, REDIS_VERSION_MIN) >= 0,
      clockDifferenceMs: nowMs - systemClock.nowMs(),
    };
  } finally {
    link.disconnect();
  }
}

/** Runs `open`, and gives what it made a `close` that undoes it; where it fails, what was begun is undone. */
async function opened<Made extends object>(
  open: (undo: Frame['undo']) => Promise<Made>,
): Promise<Made & { close(): Promise<void> }> {
  const undo: Frame['undo'] = [];
  const close = async (): Promise<void> => {
    for (const step of undo.splice(0).reverse()) await step();
  };
  try {
    return { ...(await open(undo)), close };
  } catch (error) {
    await close();
    throw error;
  }
}

/** By numbers, part by part. */
function compareVersions(a: string, b: string): number {
  return a.localeCompare(b, 'en', { numeric: true });
}

interface Frame {
  clock: Clock;
  comparesClock: boolean;
  log: Log;
  timing: NodeTiming;
  /** Run last to first when the gateway stops. */
  undo: (() => Promise<void> | void)[];
  stop(): Promise<void>;
}

async function start(config: Config, frame: Frame): Promise<Gateway> {
  const { clock, comparesClock, log, timing, undo, stop } = frame;
  let draining = false;
  const isDraining = () => draining;

  const address = await openStore(config, { log, undo });
  await migrate(address);
  const database = openDatabase({ address, clock: systemClock, log });
  // Until the pools are closed, which is undone before it.
  undo.push(
    surviveFaults((error) => {
      if (!isDriverWriteFault(error)) return false;
      database.recycle('the driver wrote to a connection that is gone');
      return true;
    }),
  );
  undo.push(() => database.close());
  const troubles = await faultsOfPostgres(database);
  if (troubles.length > 0) throw new Error(troubles.join('\n'));
  const store = createKeyStore(database);
  const messages = createMessageStore(database);
  const { bus, locks, limiter, trouble } = openEngines(config, { clock, log, timing, undo });

  const { preKeys } = config;
  const messageLifetimeMs = config.messages.lifetimeMs;
  const observer = createObserver(log, { logsDebug: config.logLevel === 'debug' });
  const bounces = createBounces({ messages, bus, clock, messageLifetimeMs, reports: observer });
  const courier = createCourier({
    messages,
    bus,
    bounces,
    clock,
    log,
    lowThreshold: preKeys.lowThreshold,
    reports: observer,
    ...(timing.sweepPeriodMs === undefined ? {} : { sweepPeriodMs: timing.sweepPeriodMs }),
  });
  const metrics = createMetrics({
    clock,
    log,
    statistics: createStatistics(database),
    busTrouble: () => bus.trouble(),
    busProbes: () => bus.probes(),
    databaseWaiting: () => database.waitingCount(),
  });
  observer.attach(metrics.listener);
  const claims = createBundleClaims({
    store: {
      ...store,
      claim(requests, how) {
        metrics.claimBatch(requests.length);
        return store.claim(requests, how);
      },
    },
    locks,
    clock,
    lowThreshold: preKeys.lowThreshold,
    onRanLow: (devices) => bus.poke(devices),
  });
  const authenticator = await createAuthenticator({
    keys: await tokenKeys(config, log),
    issuer: config.tokens.issuer,
    audience: config.tokens.audience,
    clock,
  });
  const keyParts = { store, locks, clock, claimedPreKeyRetentionMs: preKeys.claimedRetentionMs };
  const handlers = createHandlers({
    ...keyParts,
    proofs: createValidationProofs({ store, clock }),
    messages,
    courier,
    bus,
    bounces,
    claims,
    drainAlarm: createDrainAlarm({
      claimsMin: config.preKeys.drainAlarmClaims,
      clock,
      onAlarm: (event) => observer.drainSuspected(event),
    }),
    authenticator,
    log,
    poolMax: preKeys.poolMax,
    lowThreshold: preKeys.lowThreshold,
    signedPreKeyLifetimeMs: preKeys.signedPreKeyLifetimeMs,
    messageLifetimeMs,
    queueMax: config.messages.queueMax,
    reports: observer,
  });
  const limits = createLimits({ limiter, observer });
  const dispatch = createDispatch({
    handlers,
    limits,
    directory: createDirectory({ isPrivate: config.privateDirectory, clock }),
    observer,
    clock,
  });

  await bus.start(courier);
  undo.push(() => bus.stop());
  courier.start();
  undo.push(() => courier.stop());
  const idleSweep = createIdleSweep({
    store,
    locks,
    clock,
    retentionMs: preKeys.idleDeviceRetentionMs,
    async onWiped(device) {
      bus.poke([device]);
      await bounces.bounceStale(device);
    },
  });
  const sweepIdle = async (): Promise<void> => {
    const { wipedCount } = await idleSweep.run();
    if (wipedCount > 0) log.info({ deviceCount: wipedCount }, 'idle devices lost their keys');
  };
  const isClockSound = async (): Promise<boolean> => {
    const aheadMs = await leapOf(clock, database);
    if (aheadMs === null) return true;
    log.warn({ aheadMs }, 'this node sweeps nothing: its clock differs from that of PostgreSQL');
    return false;
  };
  const retention = every(clock, RETENTION_PERIOD_MS, async () => {
    const mayJudge =
      !comparesClock ||
      (await isClockSound().catch((error: Error) => {
        log.warn({ error }, 'a retention sweep failed');
        return false;
      }));
    if (!mayJudge) return;
    const lock = await locks.acquire([RETENTION_LOCK]);
    // One node at a time; with the lock's engine away several sweep, which the rows' locks put up with.
    const sweeps =
      lock.held.size === 0
        ? []
        : [sweepKeys(keyParts), sweepMessages({ messages, bounces, clock }), sweepIdle()];
    for (const outcome of await Promise.allSettled(sweeps)) {
      if (outcome.status === 'rejected') {
        log.warn({ error: outcome.reason as Error }, 'a retention sweep failed');
      }
    }
    await lock.release();
  });
  undo.push(() => retention.cancel());

  const http = await createHttpDoor({
    dispatch,
    authenticator,
    refuseRevoked: (caller) => refuseRevoked(messages, caller),
    limits,
    origins: config.origins,
    clock,
    observer,
    isDraining,
  });
  undo.push(() => http.close());
  const sockets = createSocketDoor({
    server: http.server,
    authenticator,
    courier,
    dispatch,
    observer,
    clock,
    isOriginAllowed: (origin) => isOriginAllowed(config.origins, origin),
    clientAddressOf: createClientAddressOf(config.trustedProxies),
    limits,
    log,
    connectionsMax: connectionsMax(config.limits.connections, openFilesMax()),
    connectionsPerAddressMax: config.limits.connectionsPerAddress,
    framesPerSecondMax: config.limits.framesPerSocket,
    isDraining,
  });
  undo.push(() => sockets.close());
  const url = await http.listen(config.listen.host, config.listen.port);

  const probes: Probe[] = [
    { name: 'serving', required: true, check: async () => (draining ? 'draining' : null) },
    {
      name: 'postgres',
      required: true,
      check: () => inALine(troublesOfPostgres, database),
    },
    { name: 'postgresSetup', required: false, check: () => inALine(shortcomingsOfPostgres, database) },
    {
      name: 'migrations',
      required: true,
      check: async () => {
        const missing = await missingMigrations(database);
        return missing === 0 ? null : `${missing} migrations are missing: run keygate migrate`;
      },
    },
    { name: 'bus', required: false, check: async () => trouble() },
  ];
  const token = await adminToken(config, log);
  const inspector =
    token === null
      ? null
      : await createInspector({
          observer,
          relay: openRelay(config, { log, undo }),
          keys: store,
          store: createInspectionStore(database),
          token,
          writable: config.admin.writable,
          version: packageVersion(),
          lowThreshold: preKeys.lowThreshold,
          clock,
          log,
        });
  undo.push(() => inspector?.close());
  const admin: Admin = await startAdmin({
    ...config.admin,
    probes,
    pages: [metrics.page, ...referencePages({ version: packageVersion(), variables: configReference() })],
    inspector: inspector === null ? null : inspector.handle,
  });
  undo.push(() => admin.close());
  undo.push(async () => {
    draining = true;
    await sockets.drain(Math.min(DRAIN_SPREAD_MAX_MS, sockets.count() * DRAIN_SPREAD_PER_SOCKET_MS));
  });
  return { url, adminUrl: admin.url, stop };
}

async function openStore(
  config: StoreConfig,
  { log, undo }: Pick<Frame, 'log' | 'undo'>,
): Promise<PostgresAddress> {
  const { store } = config;
  if (store.kind === 'url') return { kind: 'url', url: store.url };
  const postgres = await startEmbeddedPostgres({ dataDir: store.dataDir, log });
  undo.push(() => postgres.stop());
  let stopping = false;
  undo.push(() => {
    stopping = true;
  });
  postgres.onExit((reason) => {
    // Nothing can be served without the store, and only a new start brings it back.
    if (!stopping) throw new Error(`the embedded PostgreSQL ended: ${reason}`);
  });
  return { kind: 'socket', ...postgres };
}

function openEngines(
  config: StoreConfig,
  { clock, log, timing, undo }: Pick<Frame, 'clock' | 'log' | 'timing' | 'undo'>,
): { bus: Bus; locks: DeviceLocks; limiter: RateLimiter; trouble(): string | null } {
  const limits = limitsOf(config);
  if (config.redisUrl === null) {
    const bus = createInProcessBus({ log });
    return {
      bus,
      locks: createInProcessLocks({ clock: systemClock }),
      limiter: createInProcessRateLimiter({ limits, clock }),
      trouble: () => bus.trouble(),
    };
  }
  const commands = connectRedis({ url: config.redisUrl, name: 'commands', log });
  undo.push(() => {
    commands.disconnect();
  });
  const subscriber = connectSubscriber({ url: config.redisUrl, name: 'subscriber', log });
  undo.push(() => {
    subscriber.disconnect();
  });
  const counts = connectRedis({ url: config.redisUrl, name: 'limits', isPipelined: true, log });
  undo.push(() => {
    counts.disconnect();
  });
  const bus = createRedisBus({ commands, subscriber, clock: systemClock, log, timing: timing.bus ?? {} });
  return {
    bus,
    locks: createRedisLocks({ link: commands, clock: systemClock, log }),
    // Redis ends the windows by its own clock.
    limiter: createRedisRateLimiter({ limits, link: counts, clock: systemClock, log }),
    trouble: () => bus.trouble(),
  };
}

/** Those that are switched on. */
function limitsOf(config: StoreConfig): Limit[] {
  return (Object.keys(LIMIT_WINDOWS_MS) as RateName[])
    .map((name) => ({ name, points: config.limits[name], windowMs: LIMIT_WINDOWS_MS[name] }))
    .filter(({ points }) => points > 0);
}

/** Nodes talk about what they see on a link of its own: a viewer that wants much must not delay a poke. */
function openRelay(config: StoreConfig, { log, undo }: Pick<Frame, 'log' | 'undo'>): Relay {
  const nodeId = `${hostname().slice(0, 40)}-${randomBytes(6).toString('hex')}`;
  if (config.redisUrl === null) return createInProcessRelay(nodeId);
  const url = config.redisUrl;
  const commands = connectRedis({ url, name: 'inspector', log });
  undo.push(() => {
    commands.disconnect();
  });
  const subscriber = connectSubscriber({ url, name: 'inspector-subscriber', log });
  undo.push(() => {
    subscriber.disconnect();
  });
  return createRedisRelay({ nodeId, commands, subscriber, clock: systemClock });
}

/** Null where there is none: the inspector is off then. */
async function adminToken({ admin: { token } }: Config, log: Log): Promise<string | null> {
  if (token === null || token.kind === 'token') return token?.token ?? null;
  const secret = await embeddedSecret(token.dataDir, 'admin-token');
  log.info(
    { file: embeddedSecretFile(token.dataDir, 'admin-token') },
    'the inspector is opened with the token in this file',
  );
  return new TextDecoder().decode(secret);
}

async function tokenKeys(config: Config, log: Log): Promise<TokenKeys> {
  const { keys } = config.tokens;
  if (keys.kind !== 'secretFile') return keys;
  const secret = await embeddedSecret(keys.dataDir);
  log.info({ file: embeddedSecretFile(keys.dataDir) }, 'tokens are signed with the secret in this file');
  return { kind: 'secret', secret };
}

function once(action: () => Promise<void>): () => Promise<void> {
  let done: Promise<void> | null = null;
  return () => {
    done ??= action();
    return done;
  };
}
