/** The composition root: the only file that knows every room. */

import { type Admin, type Probe, startAdmin } from './admin/health.ts';
import { createInspector } from './admin/inspector.ts';
import { createMetrics } from './admin/metrics.ts';
import { referencePages } from './admin/reference.ts';
import type { Database } from './backends/postgres/database.ts';
import { inALine, shortcomingsOfPostgres, troublesOfPostgres } from './backends/postgres/examine.ts';
import { createInspectionStore } from './backends/postgres/inspection.ts';
import { createKeyStore } from './backends/postgres/key-store.ts';
import { createMessageStore } from './backends/postgres/message-store.ts';
import { migrateDatabase as migrate, missingMigrations } from './backends/postgres/migrations.ts';
import { createStatistics } from './backends/postgres/statistics.ts';
import type { RedisBusTiming } from './backends/redis/bus.ts';
import { openBusAndLocks, openRateLimiter, openRelay } from './compose/engines.ts';
import { startRetention } from './compose/retention.ts';
import { faultsOf, leapOf, openPools, openStore } from './compose/store.ts';
import type { Config } from './config.ts';
import { configReference } from './config-reference.ts';
import { createBounces } from './delivery/bounce.ts';
import { createCourier } from './delivery/courier.ts';
import { embeddedSecret, embeddedSecretFile } from './embedded-secret.ts';
import { connectionsMax } from './gateway/bound-connections.ts';
import { createSocketDoor } from './gateway/server.ts';
import { createHttpDoor } from './http/door.ts';
import { createBundleClaims } from './keys/claim-bundle.ts';
import { createDrainAlarm } from './keys/drain-alarm.ts';
import { createValidationProofs } from './keys/validation.ts';
import { type Clock, systemClock } from './lib/clock.ts';
import { type Log, silentLog } from './lib/log.ts';
import { openFilesMax } from './lib/open-files.ts';
import { type Undo, undoAll } from './lib/undo.ts';
import { packageVersion } from './package-version.ts';
import type { Bus } from './ports/bus.ts';
import {
  type Authenticator,
  createAuthenticator,
  refuseRevoked,
  type TokenKeys,
} from './requests/authenticate.ts';
import { createClientAddressOf } from './requests/client-address.ts';
import { createDirectory } from './requests/directory.ts';
import { createDispatch } from './requests/dispatch.ts';
import { createHandlers } from './requests/handlers.ts';
import { createLimits } from './requests/limits.ts';
import { createObserver } from './requests/observe.ts';
import { isOriginAllowed } from './requests/origins.ts';

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

/** Clients of a draining node come back spread over this time, two milliseconds each. */
const DRAIN_SPREAD_MAX_MS = 5_000;
const DRAIN_SPREAD_PER_SOCKET_MS = 2;

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
  const undo: Undo = [];
  const stop = once(() => undoAll(undo, (error) => log.error({ error }, 'a part did not end as it should')));
  try {
    return await start(config, { clock, comparesClock, log, timing, undo, stop });
  } catch (error) {
    await stop();
    throw error;
  }
}

interface Frame {
  clock: Clock;
  comparesClock: boolean;
  log: Log;
  timing: NodeTiming;
  /** Undone when the gateway stops. */
  undo: Undo;
  stop(): Promise<void>;
}

async function start(config: Config, frame: Frame): Promise<Gateway> {
  const { clock, comparesClock, log, timing, undo, stop } = frame;
  let draining = false;
  const isDraining = () => draining;

  const database = await openServedDatabase(config, frame);
  const store = createKeyStore(database);
  const messages = createMessageStore(database);
  const { bus, locks } = openBusAndLocks(config, { log, timing: timing.bus ?? {}, undo });

  const { preKeys } = config;
  const messageLifetimeMs = config.messages.lifetimeMs;
  const observer = createObserver(log, { logsDebug: config.logLevel === 'debug' });
  const metrics = createMetrics({
    clock,
    log,
    statistics: createStatistics(database),
    busTrouble: () => bus.trouble(),
    busProbes: () => bus.probes(),
    databaseWaiting: () => database.waitingCount(),
  });
  observer.attach(metrics.listener);

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
  const limits = createLimits({ limiter: openRateLimiter(config, { clock, log, undo }), observer });
  const handlers = createHandlers({
    store,
    locks,
    clock,
    claimedPreKeyRetentionMs: preKeys.claimedRetentionMs,
    proofs: createValidationProofs({ store, clock }),
    messages,
    courier,
    bus,
    bounces,
    claims,
    drainAlarm: createDrainAlarm({
      claimsMin: preKeys.drainAlarmClaims,
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
    onStored: (recipientUserId, bytes) => limits.noteStored(recipientUserId, bytes),
  });
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
  const retention = startRetention({
    store,
    messages,
    bounces,
    bus,
    locks,
    clock,
    log,
    leapMs: async () => (comparesClock ? await leapOf(clock, database) : null),
    claimedPreKeyRetentionMs: preKeys.claimedRetentionMs,
    idleDeviceRetentionMs: preKeys.idleDeviceRetentionMs,
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
    probes: probesOf({ isDraining, database, bus, authenticator }),
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

/**
 * The store of a gateway, its schema up to date.
 *
 * @throws Error with a sentence for each thing that keeps it from being served from
 */
async function openServedDatabase(config: Config, { log, undo }: Frame): Promise<Database> {
  const address = await openStore(config, { log, undo });
  await migrate(address);
  const database = openPools(address, { log, undo });
  const faults = await faultsOf(database);
  if (faults.length > 0) throw new Error(faults.join('\n'));
  return database;
}

/** What `/readyz` asks. */
function probesOf(parts: {
  isDraining(): boolean;
  database: Database;
  bus: Bus;
  authenticator: Authenticator;
}): Probe[] {
  const { isDraining, database, bus, authenticator } = parts;
  return [
    { name: 'serving', required: true, check: async () => (isDraining() ? 'draining' : null) },
    { name: 'postgres', required: true, check: () => inALine(troublesOfPostgres, database) },
    { name: 'postgresSetup', required: false, check: () => inALine(shortcomingsOfPostgres, database) },
    {
      name: 'migrations',
      required: true,
      check: async () => {
        const missing = await missingMigrations(database);
        return missing === 0 ? null : `${missing} migrations are missing: run keygate migrate`;
      },
    },
    { name: 'bus', required: false, check: async () => bus.trouble() },
    { name: 'tokens', required: false, check: async () => authenticator.trouble() },
  ];
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
