/** The report in Markdown, as it stands in BENCHMARKS.md, and whatever makes a figure in it doubtful. */
import type { Run } from './contest.ts';
import {
  coresOf,
  furtherRatios,
  median,
  medianOf,
  type Results,
  type Verdict,
  verdictsOf,
} from './figures.ts';

/** The most of one core that the load process may take before it counts as the limit itself. */
const LOAD_SHARE_MAX = 0.9;
/** Of the machine, for processes outside the bench: beyond it a turn counts as disturbed. */
export const OTHERS_SHARE_MAX = 0.05;
/** Processes whose time is told for each operation. */
const PROCESSES = ['server', 'peer', 'postgres', 'redis', 'load'];

export function toMarkdown(results: Results): string {
  const { setting, options } = results;
  const versions = Object.entries(setting.versions).map(([name, version]) => `${name} ${version}`);
  return [
    `Commit ${setting.commit}, ${setting.date}. ${setting.machine}.`,
    `${versions.join(', ')}. ${options.rounds} rounds of ${options.seconds} s each, in random order; medians.`,
    '',
    ...table(
      '| figure | bound | value | |',
      verdictsOf(results).map((verdict) =>
        [verdict.figure, verdict.bound, number(verdict.value, 2), outcomeOf(verdict)].join(' | '),
      ),
    ),
    '',
    ...table(
      '| further ratios | value |',
      furtherRatios(results).map(({ figure, value }) => `${figure} | ${number(value, 2)}`),
    ),
    '',
    ...contestants(results),
    ...twoNodes(results),
    ...idle(results),
    ...start(results),
    ...remarks(results),
  ].join('\n');
}

function contestants(results: Results): string[] {
  if (results.entrants.length === 0) return [];
  const of = (name: string, figure: (run: Run) => number | null | undefined, digits = 0) =>
    number(medianOf(results, name, figure), digits);
  const rows = results.entrants.map(({ name, operation }) =>
    [
      name,
      of(name, (run) => run.perSecond),
      ...(['p50', 'p90', 'p99', 'p999'] as const).map((p) => of(name, (run) => run.latencyMs?.[p], 1)),
      ...PROCESSES.map((process) => of(name, (run) => run.cpuPerOperationUs[process])),
      share(medianOf(results, name, (run) => run.loopShare)),
      share(medianOf(results, name, (run) => run.loadShare)),
      share(medianOf(results, name, (run) => run.othersShare)),
      operation,
    ].join(' | '),
  );
  return [
    ...table(
      '| contestant | a second | p50 ms | p90 | p99 | p99.9 | CPU µs per operation: server | second server | PostgreSQL | Redis | load | event loop | load process | other processes | operation |',
      rows,
    ),
    '',
  ];
}

/** What two processes are limited by. */
function twoNodes(results: Results): string[] {
  const columns = ['gateway', 'two-nodes'].map((name) => ({ name, cores: coresOf(results, name) }));
  if (columns.some(({ cores }) => Object.keys(cores).length === 0)) return [];
  const rows = columns.map(({ name, cores }) =>
    [
      name,
      ...PROCESSES.map((process) => number(cores[process] ?? null, 2)),
      number(
        Object.values(cores).reduce((sum, busy) => sum + busy, 0),
        2,
      ),
    ].join(' | '),
  );
  const head = `| cores that claims keep busy, of ${results.options.cores} | server | second server | PostgreSQL | Redis | load | in all |`;
  return [...table(head, rows), ''];
}

function idle(results: Results): string[] {
  const rows = Object.entries(results.idle).map(([name, { sockets, bytesPerSocket, heapBytesPerSocket }]) =>
    [name, sockets, (bytesPerSocket / 1024).toFixed(1), (heapBytesPerSocket / 1024).toFixed(1)].join(' | '),
  );
  if (rows.length === 0) return [];
  return [...table('| idle sockets of | sockets | resident KB each | of it heap and buffers |', rows), ''];
}

function start({ start: result }: Results): string[] {
  if (result === null) return [];
  const seconds = (ms: number) => (ms / 1000).toFixed(2);
  const warm = `${seconds(Math.min(...result.warmMs))} to ${seconds(Math.max(...result.warmMs))} s`;
  return [
    `Start to listening, embedded: ${seconds(result.coldMs)} s on an empty folder, ${seconds(median(result.warmMs))} s (${warm}) on that folder again.`,
    '',
  ];
}

function remarks(results: Results): string[] {
  const lines = remarksOf(results);
  return lines.length === 0 ? [] : ['Remarks:', '', ...lines.map((remark) => `- ${remark}`), ''];
}

/** Whatever makes a figure doubtful. */
function remarksOf(results: Results): string[] {
  return results.rounds.flatMap((round, index) =>
    Object.entries(round).flatMap(([name, run]) =>
      [
        ...run.remarks,
        ...(run.othersShare > OTHERS_SHARE_MAX
          ? [`other processes had ${percent(run.othersShare)} of the machine`]
          : []),
        ...((run.loadShare ?? 0) > LOAD_SHARE_MAX
          ? [`the load process was the limit (${percent(run.loadShare!)} of a core)`]
          : []),
      ].map((remark) => `round ${index + 1}, ${name}: ${remark}`),
    ),
  );
}

function outcomeOf({ outcome, reason }: Verdict): string {
  switch (outcome) {
    case 'passed':
      return 'PASS';
    case 'missed':
      return '**MISS**';
    case 'not judged':
      return reason ?? outcome;
    case 'not measured':
      return outcome;
  }
}

function table(head: string, rows: readonly string[]): string[] {
  const columns = head.split('|').length - 2;
  return [head, `|${' --- |'.repeat(columns)}`, ...rows.map((row) => `| ${row} |`)];
}

function number(value: number | null, digits = 0): string {
  return value === null ? '–' : value.toFixed(digits);
}

function share(value: number | null): string {
  return value === null ? '–' : percent(value);
}

function percent(value: number): string {
  return `${Math.round(value * 100)} %`;
}
