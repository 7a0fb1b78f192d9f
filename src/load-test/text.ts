/** Words and numbers that the table and the page share. */
import type { PartPlan } from './load-plan.ts';
import type { PartResult } from './result.ts';

/** Three digits are as much as a run repeats. */
export function shortMs(ms: number): string {
  if (ms >= 100) return ms.toFixed(0);
  return ms >= 10 ? ms.toFixed(1) : ms.toFixed(2);
}

export function planOf(plan: PartPlan): string {
  const { scenario, deviceCount, ratePerSecond, durationMs, backlogLength, hasPq } = plan;
  const rate = ratePerSecond === null ? 'all at once' : `${ratePerSecond}/s`;
  const backlog = scenario === 'backlog' ? `, ${backlogLength} messages waiting for each` : '';
  const pq = hasPq ? ', with PQ prekeys' : '';
  return `${scenario}, ${deviceCount} devices, ${rate}, ${durationMs / 1000} s${backlog}${pq}`;
}

/** Name and figure of each count, in the order of interest. */
export function countsOf(part: PartResult): [string, string][] {
  const rate = (perSecond: number | null) => (perSecond === null ? '' : ` (${perSecond.toFixed(1)}/s)`);
  const counts: [string, string][] = [
    ['offered', `${part.offered}${rate(part.offeredPerSecond)}`],
    ['achieved', `${part.completed}${rate(part.achievedPerSecond)}`],
    ['failed', String(part.failed)],
  ];
  if (part.unfinished > 0) counts.push(['unfinished', String(part.unfinished)]);
  if (part.withheld > 0) counts.push(['withheld', String(part.withheld)]);
  return counts;
}

/** What the books of messages and claims hold; empty for what has none. */
export function booksOf({ plan, messages, claims }: PartResult): [string, number][] {
  if (messages !== null) {
    const always: [string, number][] = [
      ['messages stored', messages.stored],
      ['delivered', messages.delivered],
      ['lost', messages.lost],
      ['doubled', messages.doubled],
      ['out of order', messages.outOfOrder],
      ['redelivered', messages.redelivered],
    ];
    const rare: [string, number][] = [
      ['not proven', messages.unproven],
      ['bounced', messages.bounced],
      ['of earlier runs', messages.foreign],
    ];
    return [...always, ...rare.filter(([, count]) => count > 0)];
  }
  if (claims === null) return [];
  const pq: [string, number][] = [
    ['one-time PQ prekeys', claims.withPqOneTimePreKey],
    ['last-resort ones instead', claims.withPqLastResortPreKey],
  ];
  return [
    ['one-time prekeys', claims.withOneTimePreKey],
    ['handed out twice', claims.handedOutTwice],
    ['bundles without, none left', claims.noneLeft],
    ['bundles without, limited', claims.limited],
    ...(plan.hasPq ? pq : []),
  ];
}
