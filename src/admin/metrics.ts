/**
 * Metrics: what the one tap reports, as Prometheus reads it. Every label has few values, none of them of a device or a
 * user. On the way of a request nothing is made or hashed: the children of a metric are looked up once and kept.
 */
import { Counter, collectDefaultMetrics, Gauge, type Metric, Registry } from 'prom-client';
import { type Clock, hasPassed } from '../lib/clock.ts';
import type { Log } from '../lib/log.ts';
import type { Statistics, StoreStatistics } from '../ports/statistics.ts';
import { bounceReason } from '../protocol/envelope.ts';
import type { PushPayload, RequestData } from '../protocol/events.ts';
import { type GateName, gateName } from '../protocol/inspector/values.ts';
import type { Reports, RequestEnded } from '../requests/observe.ts';
import { createDistribution } from './distribution.ts';
import type { AdminPage } from './health.ts';

export interface MetricsParts {
  clock: Clock;
  log: Log;
  statistics: Statistics;
  /** Why another node can't be told anything at present; null where all is well. */
  busTrouble(): string | null;
  /** How the bus's own probes fare; null where there is no link that could lag. */
  busProbes(): { lagMs: number | null; failureCount: number } | null;
  /** Queries that wait for a connection. */
  databaseWaiting(): number;
}

export interface Metrics {
  /** To be attached to the tap. */
  listener: Partial<Reports>;
  /** How many requests went into one claim statement. */
  claimBatch(requestCount: number): void;
  page: AdminPage;
}

const SECONDS = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10];
const LATENCY_SECONDS = [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 15, 60, 600, 3_600, 86_400];
const BATCH_SIZES = [1, 2, 4, 8, 16, 32, 64, 128];
/** The store is asked no more often than this, however many scrape. */
const STORE_PERIOD_MS = 15_000;

interface OpenSocket {
  gate: GateName;
  openedAtMs: number;
  wasReady: boolean;
}

export function createMetrics(parts: MetricsParts): Metrics {
  const { clock, log } = parts;
  const registry = new Registry();
  collectDefaultMetrics({ register: registry });
  const registers = [registry];
  const counter = <Label extends string>(name: string, help: string, labelNames: readonly Label[] = []) =>
    new Counter<Label>({ name, help, labelNames, registers });

  // ── Requests
  const durations = createDistribution(registry, {
    name: 'keygate_request_duration_seconds',
    help: 'Requests by event and answer, from when they were well-formed to their answer.',
    buckets: SECONDS,
  });
  const durationOf = memo((name) => memo((code) => durations.of({ event: name, code })));
  const handshakes = kept(
    counter('keygate_handshakes_total', 'Connections that showed a token, by answer.', ['result']),
    'result',
  );
  const httpRefusals = kept(
    counter('keygate_http_refused_total', 'HTTP requests whose token was not accepted, by answer.', ['code']),
    'code',
  );
  const limits = kept(
    counter(
      'keygate_limits_hit_total',
      'What was beyond a limit, by the limit; beyond bundlesPerTarget nothing is refused.',
      ['limit'],
    ),
    'limit',
  );
  const drains = counter(
    'keygate_drains_suspected_total',
    'Devices whose prekeys were claimed far more often than is usual for them, once in ten minutes each.',
  );

  // ── Keys
  const claims = kept(
    counter('keygate_claims_total', 'Bundles given out, by what became of the one-time prekey.', ['kind']),
    'kind',
  );
  const uploads = kept(
    counter('keygate_prekeys_uploaded_total', 'One-time prekeys of uploads, by verdict.', ['verdict']),
    'verdict',
  );
  const badSignatures = kept(
    counter('keygate_signature_failures_total', 'Keys whose signature did not hold.', ['kind']),
    'kind',
  );
  const lowNotices = counter('keygate_prekeys_low_total', 'Notices that a pool of prekeys is low.');
  const batches = createDistribution(registry, {
    name: 'keygate_batch_size',
    help: 'What went together: requests in a claim statement, envelopes in a push.',
    buckets: BATCH_SIZES,
  });
  const claimBatches = batches.of({ of: 'claim' });
  const pushBatches = batches.of({ of: 'push' });

  // ── Gates and delivery
  const sockets = new Map<number, OpenSocket>();
  const openings = createDistribution(registry, {
    name: 'keygate_gate_open_seconds',
    help: 'From the connection to its first open gate.',
    buckets: SECONDS,
  }).of({});
  const closings = kept(
    counter('keygate_gates_closed_total', 'Open gates that closed, by reason.', ['reason']),
    'reason',
  );
  const stored = counter('keygate_messages_stored_total', 'Messages stored, one for each recipient device.');
  const delivered = counter(
    'keygate_messages_delivered_total',
    'Envelopes that their recipient has processed.',
  );
  const latencies = createDistribution(registry, {
    name: 'keygate_delivery_latency_seconds',
    help: 'From storing a message to pushing it, the first time or again.',
    buckets: LATENCY_SECONDS,
  }).of({});
  const again = kept(
    counter(
      'keygate_messages_redelivered_total',
      'Envelopes to be offered again, by what became of the last offer.',
      ['reason'],
    ),
    'reason',
  );
  const bounced = kept(
    counter('keygate_messages_bounced_total', 'Messages on their way back to their senders.', ['reason']),
    'reason',
  );
  for (const reason of bounceReason.options) bounced(reason).inc(0);

  // ── What is asked when somebody reads
  const gateCounts = new Gauge({
    name: 'keygate_gates',
    help: 'Open connections by the state of their gate.',
    labelNames: ['state'],
    registers,
    collect() {
      const counts: Record<GateName, number> = { connected: 0, validated: 0, open: 0 };
      for (const { gate } of sockets.values()) counts[gate] += 1;
      for (const state of gateName.options) gateCounts.set({ state }, counts[state]);
    },
  });
  const gauge = (name: string, help: string, read: () => number | null): void => {
    const one = new Gauge({
      name,
      help,
      registers,
      collect() {
        one.set(read() ?? Number.NaN);
      },
    });
  };
  gauge('keygate_connections', 'Open connections.', () => sockets.size);
  gauge('keygate_database_waiting', 'Queries that wait for a connection.', () => parts.databaseWaiting());
  gauge('keygate_bus_up', '1 while other nodes can be told to look.', () =>
    parts.busTrouble() === null ? 1 : 0,
  );
  gauge('keygate_bus_lag_seconds', 'Round trip of the last probe over the bus.', () => {
    const lagMs = parts.busProbes()?.lagMs ?? null;
    return lagMs === null ? null : lagMs / 1000;
  });
  gauge(
    'keygate_bus_probe_failures',
    'Probes over the bus that did not come back, since the start.',
    () => parts.busProbes()?.failureCount ?? 0,
  );
  const storeFacts = storeReader(parts);
  gauge(
    'keygate_messages_pending',
    'Envelopes that wait in the store, over all nodes; an estimate.',
    () => storeFacts.last()?.pendingCount ?? null,
  );
  gauge('keygate_messages_oldest_seconds', 'Age of the envelope that expires first.', () => {
    const oldest = storeFacts.last()?.oldestStoredAtMs ?? null;
    return oldest === null ? 0 : (clock.nowMs() - oldest) / 1000;
  });
  registry.registerMetric(availableKeys(() => storeFacts.last()));

  function requestEnded({ name, code, durationMs, reply }: RequestEnded): void {
    durationOf(name)(code ?? 'ok').observe(durationMs / 1000);
    if (reply === undefined) return;
    if (reply.ok) {
      if (name === 'requestBundle') countBundles(reply.data as RequestData<'requestBundle'>);
      else if (name === 'uploadKeys' || name === 'addPreKeys') {
        countVerdicts(reply.data as RequestData<'addPreKeys'>);
      }
    } else if (reply.error.code === 'SIGNATURE_INVALID') {
      const { details } = reply.error;
      if (details !== undefined && 'keys' in details) {
        for (const { kind } of details.keys) badSignatures(kind).inc();
      }
    }
  }

  function countBundles({ devices }: RequestData<'requestBundle'>): void {
    for (const { oneTimePreKey, oneTimePreKeyAbsent = 'noneLeft' } of devices) {
      claims(oneTimePreKey === null ? oneTimePreKeyAbsent : 'oneTime').inc();
    }
  }

  function countVerdicts({ oneTimePreKeys, pqOneTimePreKeys }: RequestData<'addPreKeys'>): void {
    for (const verdict of [oneTimePreKeys, pqOneTimePreKeys]) {
      if (verdict.stored > 0) uploads('stored').inc(verdict.stored);
      if (verdict.unchanged > 0) uploads('unchanged').inc(verdict.unchanged);
      for (const { reason } of verdict.conflicts) uploads(reason).inc();
    }
  }

  return {
    listener: {
      requestEnded,
      limitHit: ({ limit }) => limits(limit).inc(),
      drainSuspected: () => drains.inc(),
      handshakeRefused: ({ door, code }) => (door === 'socket' ? handshakes : httpRefusals)(code).inc(),
      socketOpened({ fence }) {
        handshakes('ok').inc();
        sockets.set(fence, { gate: 'connected', openedAtMs: clock.nowMs(), wasReady: false });
      },
      socketClosed: ({ fence }) => void sockets.delete(fence),
      gateMoved({ fence }, _from, to, reason) {
        if (reason !== null) closings(reason).inc();
        const socket = sockets.get(fence);
        if (socket === undefined) return;
        socket.gate = to.name;
        if (to.name !== 'open' || socket.wasReady) return;
        socket.wasReady = true;
        openings.observe((clock.nowMs() - socket.openedAtMs) / 1000);
      },
      stored: ({ deviceIds }) => stored.inc(deviceIds.length),
      pushed(_reader, envelopes) {
        pushBatches.observe(envelopes.length);
        const nowMs = clock.nowMs();
        for (const { storedAtMs, body } of envelopes) {
          if (body.kind === 'message') latencies.observe(Math.max(0, nowMs - storedAtMs) / 1000);
        }
      },
      settled(_reader, { processed, failed = [] }) {
        if (processed.length > 0) delivered.inc(processed.length);
        for (const { reason } of failed) again(reason).inc();
      },
      bounced(list) {
        for (const { reason } of list) bounced(reason).inc();
      },
      pushSent(_device, _fence, name, payload) {
        if (name === 'preKeysLow') lowNotices.inc();
        if (name !== 'messages') return null;
        const count = (payload as PushPayload<'messages'>).envelopes.length;
        return (acknowledgement) => {
          if (acknowledgement === null) again('unacknowledged').inc(count);
        };
      },
    },

    claimBatch: (requestCount) => claimBatches.observe(requestCount),

    page: {
      path: '/metrics',
      headers: { 'content-type': registry.contentType },
      async body() {
        await storeFacts.refresh().catch((error: Error) => {
          log.warn({ error }, 'the store could not be asked for its metrics');
        });
        return await registry.metrics();
      },
    },
  };
}

/** The store's statistics, at most so old; what could not be read stays as it was. */
function storeReader({ clock, statistics }: MetricsParts): {
  refresh(): Promise<void>;
  last(): StoreStatistics | null;
} {
  let facts: StoreStatistics | null = null;
  let readAtMs = Number.NEGATIVE_INFINITY;
  let reading: Promise<void> | null = null;
  return {
    refresh() {
      if (!hasPassed(clock, readAtMs, STORE_PERIOD_MS)) return Promise.resolve();
      reading ??= statistics
        .read()
        .then((read) => {
          facts = read;
          readAtMs = clock.nowMs();
        })
        .finally(() => {
          reading = null;
        });
      return reading;
    },
    last: () => facts,
  };
}

/** A histogram over devices as they stand now, not over what happened: made anew at each reading. */
function availableKeys(read: () => StoreStatistics | null): Metric {
  const name = 'keygate_devices_by_available_prekeys';
  const help = 'Devices with at most so many unclaimed one-time prekeys, over all nodes; an estimate.';
  const metric = {
    name,
    get() {
      let count = 0;
      const values = (read()?.devicesByAvailable ?? []).map(({ upTo, deviceCount }) => {
        count += deviceCount;
        return { labels: { le: String(upTo ?? '+Inf') }, value: count };
      });
      return { name, help, type: 'gauge', aggregator: 'max', values };
    },
    reset() {},
  };
  return metric as unknown as Metric;
}

/** The children of a counter with one label. */
function kept<Label extends string>(one: Counter<Label>, label: Label): (value: string) => Counter.Internal {
  return memo((value) => one.labels({ [label]: value } as Record<Label, string>));
}

function memo<Value>(make: (key: string) => Value): (key: string) => Value {
  const made = new Map<string, Value>();
  return (key) => {
    let value = made.get(key);
    if (value === undefined) {
      value = make(key);
      made.set(key, value);
    }
    return value;
  };
}
