/** A second of one node in numbers, and the sum of many nodes' seconds. Nothing is counted while nobody looks. */
import type { Clock } from '../lib/clock.ts';
import type { OverviewSample } from '../protocol/inspector/overview.ts';
import type { NodeState } from '../protocol/inspector/stream.ts';
import type { Observer } from '../requests/observe.ts';
import { isoTime, type LiveSockets } from './live-sockets.ts';

/** One node's second, as nodes send it to each other: what can be added up. */
export interface NodeSample {
  node: string;
  atMs: number;
  gates: OverviewSample['gates'];
  events: number;
  preKeys: OverviewSample['preKeys'];
  messages: OverviewSample['messages'];
  requests: Record<string, { count: number; errorCount: number; buckets: Record<number, number> }>;
}

export interface NodeCounts {
  /** What was counted since the last call, or since the counting began. */
  take(): NodeSample;
  stop(): void;
}

export function countNode(parts: {
  observer: Observer;
  node: string;
  sockets: LiveSockets;
  clock: Clock;
}): NodeCounts {
  const { observer, node, sockets, clock } = parts;
  let counts = nothing();
  const detach = observer.attach({
    requestEnded({ name, code, durationMs, reply }) {
      counts.events += 1;
      counts.requests[name] ??= { count: 0, errorCount: 0, buckets: {} };
      const request = counts.requests[name];
      request.count += 1;
      if (code !== null) request.errorCount += 1;
      const bucket = bucketOf(durationMs);
      request.buckets[bucket] = (request.buckets[bucket] ?? 0) + 1;
      if (name === 'requestBundle' && reply?.ok === true) countBundles(reply.data as unknown as Bundles);
    },
    pushSent() {
      counts.events += 1;
      return null;
    },
    gateMoved() {
      counts.events += 1;
    },
    socketOpened() {
      counts.events += 1;
    },
    socketClosed() {
      counts.events += 1;
    },
    handshakeRefused() {
      counts.events += 1;
    },
    stored: ({ deviceIds }) => countLives('stored', deviceIds.length),
    pushed: (_, envelopes) => countLives('pushed', envelopes.length),
    settled: (_, { processed }) => countLives('acknowledged', processed.length),
    bounced: (messages) => countLives('bounced', messages.length),
  });

  function countLives(stage: keyof OverviewSample['messages'], count: number): void {
    counts.events += count;
    counts.messages[stage] += count;
  }

  function countBundles({ devices }: Bundles): void {
    counts.events += devices.length;
    for (const { oneTimePreKey, pqPreKey } of devices) {
      if (oneTimePreKey === null) counts.preKeys.fallback += 1;
      else counts.preKeys.ec += 1;
      if (pqPreKey?.lastResort === false) counts.preKeys.pq += 1;
    }
  }

  return {
    take() {
      const taken = counts;
      counts = nothing();
      return { ...taken, node, atMs: clock.nowMs(), gates: sockets.gateCounts() };
    },
    stop: detach,
  };
}

interface Bundles {
  devices: { oneTimePreKey: object | null; pqPreKey: { lastResort: boolean } | null }[];
}

function nothing(): Omit<NodeSample, 'node' | 'atMs' | 'gates'> {
  return {
    events: 0,
    preKeys: { ec: 0, pq: 0, fallback: 0 },
    messages: { stored: 0, pushed: 0, acknowledged: 0, bounced: 0 },
    requests: {},
  };
}

/** One sample of the whole installation. */
export function merged(
  samples: readonly NodeSample[],
  rest: {
    atMs: number;
    nodes: NodeState[];
    lowDevices: OverviewSample['lowDevices'];
    droppedTotal: number;
  },
): OverviewSample {
  const sum = (of: (sample: NodeSample) => number): number =>
    samples.reduce((total, sample) => total + of(sample), 0);
  const gates = {
    connected: sum((sample) => sample.gates.connected),
    validated: sum((sample) => sample.gates.validated),
    open: sum((sample) => sample.gates.open),
  };
  const names = new Set(samples.flatMap((sample) => Object.keys(sample.requests)));
  return {
    time: isoTime(rest.atMs),
    nodes: rest.nodes,
    sockets: gates.connected + gates.validated + gates.open,
    gates,
    eventsPerSecond: sum((sample) => sample.events),
    requests: [...names].sort().map((event) => {
      const all = samples.flatMap((sample) => sample.requests[event] ?? []);
      const buckets = all.map((one) => one.buckets);
      return {
        event,
        count: all.reduce((total, one) => total + one.count, 0),
        errorCount: all.reduce((total, one) => total + one.errorCount, 0),
        p50Ms: quantile(buckets, 0.5),
        p99Ms: quantile(buckets, 0.99),
      };
    }),
    preKeys: {
      ec: sum((sample) => sample.preKeys.ec),
      pq: sum((sample) => sample.preKeys.pq),
      fallback: sum((sample) => sample.preKeys.fallback),
    },
    messages: {
      stored: sum((sample) => sample.messages.stored),
      pushed: sum((sample) => sample.messages.pushed),
      acknowledged: sum((sample) => sample.messages.acknowledged),
      bounced: sum((sample) => sample.messages.bounced),
    },
    lowDevices: rest.lowDevices,
    droppedTotal: rest.droppedTotal,
  };
}

/** Buckets whose bounds grow by an eighth of an octave: a quantile is at most a tenth too high. */
const BUCKETS_PER_OCTAVE = 8;
const BUCKET_MAX = 160;

function bucketOf(ms: number): number {
  if (ms < 1) return 0;
  return Math.min(BUCKET_MAX, 1 + Math.floor(Math.log2(ms) * BUCKETS_PER_OCTAVE + 1e-9));
}

/** The upper bound of a bucket; 0 for what took no millisecond. */
function boundOf(bucket: number): number {
  return bucket === 0 ? 0 : Math.round(2 ** (bucket / BUCKETS_PER_OCTAVE) * 10) / 10;
}

function quantile(buckets: readonly Record<number, number>[], share: number): number {
  const counts = new Map<number, number>();
  let total = 0;
  for (const one of buckets) {
    for (const [bucket, count] of Object.entries(one)) {
      counts.set(Number(bucket), (counts.get(Number(bucket)) ?? 0) + count);
      total += count;
    }
  }
  let left = Math.ceil(total * share);
  for (const bucket of [...counts.keys()].sort((a, b) => a - b)) {
    left -= counts.get(bucket)!;
    if (left <= 0) return boundOf(bucket);
  }
  return 0;
}
