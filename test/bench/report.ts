/** From runs to what is said about them: medians, ratios within one round, verdicts, a table. */
import type { Contestant, Run } from './contest.ts';
import type { IdleResult } from './idle.ts';
import type { Setting } from './machine.ts';

export type Entrant = Pick<Contestant, 'name' | 'what' | 'operation'>;

export interface Results {
  setting: Setting;
  options: { rounds: number; seconds: number };
  entrants: Entrant[];
  /** One object per round, by the contestants' names. */
  rounds: Record<string, Run>[];
  idle: Record<string, IdleResult>;
}

export interface Verdict {
  figure: string;
  bound: string;
  /** Null where a contestant that it needs did not take part. */
  value: number | null;
  passed: boolean | null;
}

/** The most of one core that the load process may take before it counts as the limit itself. */
const LOAD_SHARE_MAX = 0.9;
/** Of the machine, for processes outside the bench: beyond it a turn counts as disturbed. */
export const OTHERS_SHARE_MAX = 0.05;
const IDLE_BYTES_MAX = 25 * 1024;

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

/** The median of the ratios of each round: what slows a whole round down falls out of it. */
export function ratioOf(
  results: Results,
  above: { name: string; figure: (run: Run) => number | undefined },
  below: { name: string; figure: (run: Run) => number | undefined },
): number | null {
  const ratios = results.rounds.flatMap((round) => {
    const a = round[above.name] && above.figure(round[above.name]!);
    const b = round[below.name] && below.figure(round[below.name]!);
    return a === undefined || b === undefined ? [] : [a / b];
  });
  return ratios.length === 0 ? null : median(ratios);
}

const rate = (run: Run) => run.perSecond;
const serverCpu = (run: Run) => run.cpuPerOperationUs.server;
const postgresCpu = (run: Run) => run.cpuPerOperationUs.postgres;

export function verdictsOf(results: Results): Verdict[] {
  const idle = results.idle.gateway;
  const judged = (
    figure: string,
    value: number | null,
    bound: { atLeast: number } | { atMost: number },
  ): Verdict => ({
    figure,
    value,
    bound: 'atLeast' in bound ? `≥ ${bound.atLeast}` : `≤ ${bound.atMost}`,
    passed: value === null ? null : 'atLeast' in bound ? value >= bound.atLeast : value <= bound.atMost,
  });
  return [
    judged(
      'bundles a second ÷ pgbench single claims a second (UPDATE)',
      ratioOf(results, { name: 'gateway', figure: rate }, { name: 'pgbench-update', figure: rate }),
      { atLeast: 0.8 },
    ),
    judged(
      'server CPU per bundle ÷ per bare echo',
      ratioOf(results, { name: 'gateway', figure: serverCpu }, { name: 'echo', figure: serverCpu }),
      { atMost: 4 },
    ),
    judged(
      `resident KB per idle authenticated socket, at ${idle?.sockets ?? 0} sockets`,
      idle === undefined ? null : idle.bytesPerSocket / 1024,
      { atMost: IDLE_BYTES_MAX / 1024 },
    ),
  ];
}

/** Told, not judged. */
export function furtherRatios(results: Results): { figure: string; value: number | null }[] {
  const gateway = (figure: (run: Run) => number | undefined) => ({ name: 'gateway', figure });
  return [
    {
      figure: 'bundles a second ÷ pgbench DELETE',
      value: ratioOf(results, gateway(rate), { name: 'pgbench-delete', figure: rate }),
    },
    {
      figure: 'bundles a second ÷ the usual way',
      value: ratioOf(results, gateway(rate), { name: 'usual-way', figure: rate }),
    },
    {
      figure: 'bundles a second ÷ bare echoes a second',
      value: ratioOf(results, gateway(rate), { name: 'echo', figure: rate }),
    },
    {
      figure: 'PostgreSQL CPU per bundle ÷ per pgbench claim (UPDATE)',
      value: ratioOf(results, gateway(postgresCpu), { name: 'pgbench-update', figure: postgresCpu }),
    },
    ...results.entrants
      .map(({ name }) => name)
      .filter((name) => name.startsWith('other-'))
      .flatMap((name) => [
        {
          figure: `bundles a second of ${name} ÷ of gateway`,
          value: ratioOf(results, { name, figure: rate }, gateway(rate)),
        },
        {
          figure: `server CPU per bundle of ${name} ÷ of gateway`,
          value: ratioOf(results, { name, figure: serverCpu }, gateway(serverCpu)),
        },
        {
          figure: `PostgreSQL CPU per bundle of ${name} ÷ of gateway`,
          value: ratioOf(results, { name, figure: postgresCpu }, gateway(postgresCpu)),
        },
      ]),
    {
      figure: 'server CPU per message ÷ per bare echo',
      value: ratioOf(results, { name: 'messages', figure: serverCpu }, { name: 'echo', figure: serverCpu }),
    },
  ].filter(({ value }) => value !== null);
}

/** Whatever makes a figure doubtful. */
export function remarksOf(results: Results): string[] {
  const remarks = results.rounds.flatMap((round, index) =>
    Object.entries(round).flatMap(([name, run]) => [
      ...run.remarks.map((remark) => `round ${index + 1}, ${name}: ${remark}`),
      ...(run.othersShare > OTHERS_SHARE_MAX
        ? [`round ${index + 1}, ${name}: other processes had ${percent(run.othersShare)} of the machine`]
        : []),
      ...((run.loadShare ?? 0) > LOAD_SHARE_MAX
        ? [
            `round ${index + 1}, ${name}: the load process was the limit (${percent(run.loadShare!)} of a core)`,
          ]
        : []),
    ]),
  );
  return remarks;
}

/** The report in Markdown, as it stands in BENCHMARKS.md. */
export function toMarkdown(results: Results): string {
  const { setting, options } = results;
  const versions = Object.entries(setting.versions).map(([name, version]) => `${name} ${version}`);
  const number = (value: number | null, digits = 0) => (value === null ? '–' : value.toFixed(digits));
  const of = (name: string, figure: (run: Run) => number | null | undefined, digits = 0) =>
    number(medianOf(results, name, figure), digits);
  const rows = results.entrants.map(({ name, operation }) =>
    [
      name,
      of(name, rate),
      ...(['p50', 'p90', 'p99', 'p999'] as const).map((p) => of(name, (run) => run.latencyMs?.[p], 1)),
      ...['server', 'postgres', 'redis', 'load'].map((process) =>
        of(name, (run) => run.cpuPerOperationUs[process]),
      ),
      share(medianOf(results, name, (run) => run.loopShare)),
      share(medianOf(results, name, (run) => run.loadShare)),
      share(medianOf(results, name, (run) => run.othersShare)),
      operation,
    ].join(' | '),
  );
  const idle = Object.entries(results.idle).map(
    ([name, result]) =>
      `${name} | ${result.sockets} | ${(result.bytesPerSocket / 1024).toFixed(1)} | ${(result.heapBytesPerSocket / 1024).toFixed(1)} | ${result.handshakesPerSecond.toFixed(0)}`,
  );
  const remarks = remarksOf(results);
  return [
    `Commit ${setting.commit}, ${setting.date}. ${setting.machine}.`,
    `${versions.join(', ')}. ${options.rounds} rounds of ${options.seconds} s each, in random order; medians.`,
    '',
    ...table(
      '| contestant | a second | p50 ms | p90 | p99 | p99.9 | CPU µs per operation: server | PostgreSQL | Redis | load | event loop | load process | other processes | operation |',
      rows,
    ),
    '',
    ...(idle.length === 0
      ? []
      : [
          ...table(
            '| idle sockets of | sockets | resident KB each | of it heap and buffers | handshakes a second |',
            idle,
          ),
          '',
        ]),
    ...table(
      '| figure | bound | value | |',
      verdictsOf(results).map(
        ({ figure, bound, value, passed }) =>
          `${figure} | ${bound} | ${number(value, 2)} | ${passed === null ? 'not measured' : passed ? 'PASS' : '**MISS**'}`,
      ),
    ),
    '',
    ...table(
      '| further ratios | value |',
      furtherRatios(results).map(({ figure, value }) => `${figure} | ${number(value, 2)}`),
    ),
    ...(remarks.length === 0 ? [] : ['', 'Remarks:', ...remarks.map((remark) => `- ${remark}`)]),
    '',
  ].join('\n');
}

function table(head: string, rows: readonly string[]): string[] {
  const columns = head.split('|').length - 2;
  return [head, `|${' --- |'.repeat(columns)}`, ...rows.map((row) => `| ${row} |`)];
}

function share(value: number | null): string {
  return value === null ? '–' : percent(value);
}

function percent(value: number): string {
  return `${Math.round(value * 100)} %`;
}
