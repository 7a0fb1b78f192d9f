/** The result as a table for the terminal. */
import type { LoadResult, PartResult } from './result.ts';
import { booksOf, countsOf, planOf, shortMs } from './text.ts';

export function textReport(result: LoadResult): string {
  const { ownLoad, machine } = result;
  const lines = [
    `Load test of ${result.url}${result.wasInterrupted ? ', interrupted' : ''}`,
    ...result.parts.flatMap(partLines),
    '',
    `load process: ${ownLoad.cores.toFixed(2)} of a core, timers ${shortMs(ownLoad.eventLoopDelayP99Ms)} ms late at p99; Node ${machine.node}, ${machine.cpuCount} cores`,
    ...result.warnings.map((warning) => `warning: ${warning}`),
    ...result.faults.map((fault) => `fault: ${fault}`),
  ];
  return lines.join('\n');
}

function partLines(part: PartResult): string[] {
  const books = booksOf(part);
  const failures = Object.entries(part.failures);
  const steps = part.steps.filter(({ count }) => count > 0);
  const nameWidth = Math.max(7, ...steps.map(({ name }) => name.length));
  const row = (name: string, cells: string[]) =>
    `  ${name.padEnd(nameWidth)}${cells.map((cell) => cell.padStart(10)).join('')}`;
  return [
    '',
    `${part.plan.name}  ${planOf(part.plan)}`,
    `  ${countsOf(part)
      .map(([name, figure]) => `${name} ${figure}`)
      .join('   ')}`,
    ...(steps.length === 0 ? [] : [row('ms', ['count', 'p50', 'p90', 'p99', 'p99.9', 'max'])]),
    ...steps.map(({ name, count, ms }) =>
      row(name, [String(count), ...[ms.p50, ms.p90, ms.p99, ms.p999, ms.max].map(shortMs)]),
    ),
    ...(books.length === 0 ? [] : [`  ${books.map(([name, count]) => `${name} ${count}`).join('   ')}`]),
    ...(failures.length === 0
      ? []
      : [`  answered or ended with  ${failures.map(([code, count]) => `${code} ${count}`).join('   ')}`]),
  ];
}
