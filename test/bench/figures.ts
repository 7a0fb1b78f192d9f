/** What is said about the runs: medians over the rounds, ratios within one round, and how they stand to their bounds. */

import type { Contestant, Pools, Run } from './contest.ts';
import { PACE_PER_SECOND } from './contestants/gateway-claims.ts';
import type { IdleKind, IdleResult } from './idle.ts';
import type { Setting } from './machine.ts';
import type { StartResult } from './start.ts';

export type Entrant = Pick<Contestant, 'name' | 'what' | 'operation' | 'isGateway'>;

export interface Results {
  setting: Setting;
  options: {
    rounds: number;
    seconds: number;
    pools: Pools;
    deepPools: Pools;
    manyPools: Pools;
    backlog: number;
    cores: number;
  };
  entrants: Entrant[];
  /** One object per round, by the contestants' names. */
  rounds: Record<string, Run>[];
  idle: Partial<Record<IdleKind, IdleResult>>;
  start: StartResult | null;
}

export interface Verdict {
  figure: string;
  bound: string;
  /** Null where a contestant that it needs did not take part. */
  value: number | null;
  outcome: 'passed' | 'missed' | 'not measured' | 'not judged';
  /** Why it is not judged. */
  reason?: string;
}

interface Bound {
  atLeast?: number;
  atMost?: number;
  stretch?: number;
}

/** A share of the machine from which on a second process can't be expected to do more. */
const FULL_MACHINE_SHARE = 0.9;

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length / 2;
  return sorted.length % 2 === 1 ? sorted[Math.floor(middle)]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

/** The median of a figure over the rounds in which the contestant took part; null without any. */
export function medianOf(
  results: Results,
  name: string,
  figure: (run: Run) => number | null | undefined,
): number | null {
  const values = results.rounds.flatMap((round) => {
    const run = round[name];
    const value = run === undefined ? null : figure(run);
    return value == null ? [] : [value];
  });
  return values.length === 0 ? null : median(values);
}

type Figure = (run: Run) => number | null | undefined;

const rate: Figure = (run) => run.perSecond;
const serverCpu: Figure = (run) => run.cpuPerOperationUs.server;
const postgresCpu: Figure = (run) => run.cpuPerOperationUs.postgres;
const p50: Figure = (run) => run.latencyMs?.p50;
const p99: Figure = (run) => run.latencyMs?.p99;
const nodesCpu: Figure = ({ cpuPerOperationUs: { server = 0, peer = 0, redis = 0 } }) =>
  server + peer + redis;

/** The median of the ratios of each round: what slows a whole round down falls out of it. */
function ratio(
  results: Results,
  [above, figureAbove]: readonly [string, Figure],
  [below, figureBelow]: readonly [string, Figure],
): number | null {
  const ratios = results.rounds.flatMap((round) => {
    const a = round[above] && figureAbove(round[above]);
    const b = round[below] && figureBelow(round[below]);
    return a == null || b == null || b === 0 ? [] : [a / b];
  });
  return ratios.length === 0 ? null : median(ratios);
}

export function verdictsOf(results: Results): Verdict[] {
  const { idle, start, options } = results;
  const { pools, deepPools, manyPools } = options;
  const of = (above: readonly [string, Figure], below: readonly [string, Figure]): number | null =>
    ratio(results, above, below);
  const { gateway } = idle;
  return [
    judged(
      'bundles a second ÷ pgbench single claims a second (UPDATE, 8 clients, prepared)',
      of(['gateway', rate], ['pgbench-update', rate]),
      { atLeast: 1.3, stretch: 1.8 },
    ),
    judged('the same ÷ the usual way', of(['gateway', rate], ['usual-way', rate]), {
      atLeast: 20,
      stretch: 35,
    }),
    judged(
      'server CPU per bundle ÷ per bare Socket.IO echo',
      of(['gateway', serverCpu], ['echo', serverCpu]),
      { atMost: 2.5, stretch: 1.6 },
    ),
    judged(
      `all claims on one device ÷ claims spread over ${thousands(pools.devices)} devices`,
      of(['one-device', rate], ['gateway', rate]),
      { atLeast: 0.7 },
    ),
    judged('bundles a second ÷ bare echoes a second', of(['gateway', rate], ['echo', rate]), {
      atLeast: 0.45,
      stretch: 0.7,
    }),
    judged(
      'PostgreSQL CPU per bundle ÷ per pgbench single claim',
      of(['gateway', postgresCpu], ['pgbench-update', postgresCpu]),
      { atMost: 0.4 },
    ),
    judged(
      `p50 at ${PACE_PER_SECOND} requests a second ÷ p50 of one prepared statement per request without lock`,
      of([`gateway-${PACE_PER_SECOND}`, p50], [`statement-${PACE_PER_SECOND}`, p50]),
      { atMost: 2, stretch: 1.2 },
    ),
    judged(
      'cross-node message: CPU of both nodes and Redis ÷ CPU on one node',
      of(['cross-node-messages', nodesCpu], ['one-node-messages', serverCpu]),
      { atMost: 1.8 },
    ),
    judged(
      'send → deliver across two nodes, p99 ÷ on one node at the same rate',
      of(['cross-node-messages', p99], ['one-node-messages', p99]),
      { atMost: 2 },
    ),
    unlessMachineIsFull(
      results,
      judged(
        'claims a second of two gateway processes ÷ of one',
        of(['two-nodes', rate], ['gateway', rate]),
        { atLeast: 1.2 },
      ),
    ),
    judged(
      `claims a second with ${thousands(deepPools.perDevice)} keys a device ÷ with ${pools.perDevice}`,
      of(['deep-pools', rate], ['gateway', rate]),
      { atLeast: 0.85 },
    ),
    judged(
      `claims a second with ${thousands(manyPools.devices)} devices ÷ with ${thousands(pools.devices)}`,
      of(['many-devices', rate], ['gateway', rate]),
      { atLeast: 0.85 },
    ),
    judged(
      'messages stored, delivered and deleted a second ÷ pgbench doing one insert and one delete in two transactions',
      of(['messages', rate], ['pgbench-messages', rate]),
      { atLeast: 1.5, stretch: 2.3 },
    ),
    judged('the same ÷ the usual way', of(['messages', rate], ['usual-messages', rate]), { atLeast: 6 }),
    judged('server CPU per message end to end ÷ per echo', of(['messages', serverCpu], ['echo', serverCpu]), {
      atMost: 4,
      stretch: 2.7,
    }),
    judged(
      `backlog of ${thousands(options.backlog)} messages to one device: messages a second ÷ bare Socket.IO emits of the same size, acknowledged in pages of 100`,
      of(['backlog', rate], ['bare-backlog', rate]),
      { atLeast: 0.5 },
    ),
    judged(
      `resident KB per idle authenticated socket, at ${thousands(gateway?.sockets ?? 0)} sockets`,
      gateway === undefined ? null : gateway.bytesPerSocket / 1024,
      { atMost: 18 },
    ),
    judged(
      'handshakes a second ÷ a bare Socket.IO server that verifies the same token',
      of(['handshakes', rate], ['bare-handshakes', rate]),
      { atLeast: 0.8 },
    ),
    judged(
      'seconds from start to listening, embedded, warm',
      start === null ? null : median(start.warmMs) / 1000,
      { atMost: 1.5 },
    ),
    judged(
      'bundles a second with the inspector on and no viewer ÷ with it off',
      of(['inspected', rate], ['gateway', rate]),
      { atLeast: 0.98 },
    ),
  ];
}

/** Told, not judged. */
export function furtherRatios(results: Results): { figure: string; value: number | null }[] {
  const of = (figure: string, above: readonly [string, Figure], below: readonly [string, Figure]) => ({
    figure,
    value: ratio(results, above, below),
  });
  return [
    of('bundles a second ÷ pgbench DELETE', ['gateway', rate], ['pgbench-delete', rate]),
    of('server CPU per handshake ÷ per bare one', ['handshakes', serverCpu], ['bare-handshakes', serverCpu]),
    of(
      'messages a second of a backlog ÷ bare Socket.IO emits with a hundred messages each',
      ['backlog', rate],
      ['bare-pages', rate],
    ),
    of(
      'server CPU per message of a backlog ÷ per bare emit',
      ['backlog', serverCpu],
      ['bare-backlog', serverCpu],
    ),
    of(
      'PostgreSQL CPU per message ÷ per pgbench insert and delete',
      ['messages', postgresCpu],
      ['pgbench-messages', postgresCpu],
    ),
    ...results.entrants.flatMap(({ name, operation }) => {
      const [counterpart, label] = name.split('-other-');
      if (label === undefined) return [];
      const compared = (what: string, read: typeof rate) =>
        of(`${what} of ${name} ÷ of ${counterpart}`, [name, read], [counterpart!, read]);
      return [
        compared(`${operation}s a second`, rate),
        compared(`server CPU per ${operation}`, serverCpu),
        compared(`PostgreSQL CPU per ${operation}`, postgresCpu),
      ];
    }),
  ].filter(({ value }) => value !== null);
}

/** How many cores each process kept busy, by its name. */
export function coresOf(results: Results, name: string): Record<string, number> {
  const processes = new Set(
    results.rounds.flatMap((round) => Object.keys(round[name]?.cpuPerOperationUs ?? {})),
  );
  return Object.fromEntries(
    [...processes].map((process) => [
      process,
      medianOf(results, name, (run) => ((run.cpuPerOperationUs[process] ?? 0) * run.perSecond) / 1e6) ?? 0,
    ]),
  );
}

function judged(figure: string, value: number | null, { atLeast, atMost, stretch }: Bound): Verdict {
  const bound = atLeast === undefined ? `≤ ${atMost}` : `≥ ${atLeast}`;
  const passed = value !== null && (atLeast === undefined ? value <= atMost! : value >= atLeast);
  return {
    figure,
    value,
    bound: stretch === undefined ? bound : `${bound} (stretch ${stretch})`,
    outcome: value === null ? 'not measured' : passed ? 'passed' : 'missed',
  };
}

/** Two processes can't do more than one where the machine has no more to give. */
function unlessMachineIsFull(results: Results, verdict: Verdict): Verdict {
  if (verdict.outcome !== 'missed') return verdict;
  const cores = coresOf(results, 'two-nodes');
  const busy = Object.values(cores).reduce((sum, share) => sum + share, 0);
  if (busy < results.options.cores * FULL_MACHINE_SHARE) return verdict;
  return {
    ...verdict,
    outcome: 'not judged',
    reason: `the machine is the limit: ${busy.toFixed(2)} of ${results.options.cores} cores busy`,
  };
}

function thousands(count: number): string {
  return count.toLocaleString('en');
}
