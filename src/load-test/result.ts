/** What a load test found, as its JSON holds it, and what is to be thought of it. */
import type { ClaimCounts } from './claim-ledger.ts';
import type { PartPlan } from './load-plan.ts';
import type { MessageCounts } from './message-ledger.ts';
import { LATE_MS, type MeterResult } from './meter.ts';
import type { OwnLoad } from './own-load.ts';

export interface PartResult extends MeterResult {
  plan: PartPlan;
  /** Null where operations are due all at once. */
  offeredPerSecond: number | null;
  achievedPerSecond: number | null;
  messages: MessageCounts | null;
  claims: ClaimCounts | null;
}

export interface LoadResult {
  formatVersion: 1;
  keygateVersion: string;
  startedAt: string;
  url: string;
  wasInterrupted: boolean;
  /** Where the load process ran. */
  machine: { node: string; cpu: string; cpuCount: number };
  ownLoad: OwnLoad;
  parts: PartResult[];
  /** What makes the figures doubtful. */
  warnings: string[];
  /** Broken promises of the gateway, and parts in which nothing succeeded. Empty is success. */
  faults: string[];
}

/** A core that is never waited for is one that is used up. */
const BUSY_CORES = 0.9;
const EVENT_LOOP_DELAY_P99_MAX_MS = 50;
const LATE_SHARE_MAX = 0.01;
/** Where so many left late, what came of the others says little about the gateway. */
const LATE_SHARE_UNTOLD = 0.1;
const FAILED_SHARE_MAX = 0.01;
const ACHIEVED_SHARE_MIN = 0.95;
/** Answers that come so long after the last operation has left came too slowly before. */
const BEHIND_MS = 1_000;

/** Rates of a part; the last operation has its share of time too. */
export function ratesOf(
  plan: PartPlan,
  { offered, completed, offeringMs, completingMs }: MeterResult,
): Pick<PartResult, 'offeredPerSecond' | 'achievedPerSecond'> {
  if (plan.ratePerSecond === null || plan.scenario === 'storm' || offered === 0) {
    return { offeredPerSecond: null, achievedPerSecond: null };
  }
  const offeredMs = offeringMs + 1000 / plan.ratePerSecond;
  return {
    offeredPerSecond: (offered * 1000) / offeredMs,
    achievedPerSecond: (completed * 1000) / Math.max(offeredMs, completingMs),
  };
}

/**
 * What the gateway had to keep and did not, and what was no test at all; one line each.
 *
 * @param options.wasInterrupted the user ended it, maybe before anything of a part was due
 */
export function faultsOf(
  parts: readonly PartResult[],
  { wasInterrupted = false }: { wasInterrupted?: boolean } = {},
): string[] {
  return parts.flatMap(({ plan: { name }, offered, completed, messages, claims }) => {
    const faults: string[] = [];
    const tell = (count: number | undefined, what: string): void => {
      if (count !== undefined && count > 0) faults.push(`${name}: ${count} ${what}`);
    };
    tell(messages?.lost, 'messages were acknowledged as stored and lost');
    tell(messages?.doubled, 'messages came under a second envelope id, so that no client can tell');
    tell(messages?.outOfOrder, 'messages came after later ones of the same sender');
    tell(messages?.unproven, 'stored messages have not come, and the gateway could not be asked for them');
    tell(claims?.handedOutTwice, 'one-time prekeys were handed out twice');
    if (completed === 0 && !(wasInterrupted && offered === 0)) faults.push(`${name}: nothing succeeded`);
    return faults;
  });
}

/** What the latencies leave out, and whether they are the gateway's or this process's own; one line each. */
export function warningsOf(ownLoad: OwnLoad, parts: readonly PartResult[]): string[] {
  const warnings: string[] = [];
  if (parts.every(({ offered }) => offered === 0)) return warnings;
  if (ownLoad.cores >= BUSY_CORES) {
    warnings.push(
      `the load process used ${ownLoad.cores.toFixed(2)} of a core: it is the limit itself, or near it; use several processes`,
    );
  }
  if (ownLoad.eventLoopDelayP99Ms > EVENT_LOOP_DELAY_P99_MAX_MS) {
    warnings.push(
      `the load process was held up: its timers fired ${Math.round(ownLoad.eventLoopDelayP99Ms)} ms late at p99, which stands in the latencies`,
    );
  }
  for (const part of parts) {
    const { plan, offered, failed, lateCount, withheld, offeredPerSecond, achievedPerSecond } = part;
    if (failed > offered * FAILED_SHARE_MAX) {
      const codes = Object.entries(part.failures).map(([code, count]) => `${code} ${count}`);
      warnings.push(
        `${plan.name}: ${percent(failed / offered)} of the operations failed; requests and connections ended with ${codes.join(', ')}`,
      );
    }
    // In a storm all are due at once, and one process can't send them at once.
    const isLate = plan.ratePerSecond !== null && lateCount > offered * LATE_SHARE_MAX;
    if (isLate) {
      warnings.push(
        `${plan.name}: ${percent(lateCount / offered)} of the operations left more than ${LATE_MS} ms after they were due: the load process, or its machine, is too busy for this rate`,
      );
    }
    if (part.unfinished > 0) {
      warnings.push(
        `${plan.name}: ${percent(part.unfinished / offered)} of the operations had not ended when the test did; the latencies are without them`,
      );
    }
    if (withheld > 0) {
      warnings.push(
        `${plan.name}: ${withheld} operations were not sent, since earlier ones were still under way; the latencies are without them`,
      );
    }
    // Of a short test, the last answer's own time is a good part.
    const fellBehind =
      part.completed < offered * ACHIEVED_SHARE_MIN || part.completingMs - part.offeringMs > BEHIND_MS;
    if (
      fellBehind &&
      achievedPerSecond !== null &&
      achievedPerSecond < offeredPerSecond! * ACHIEVED_SHARE_MIN
    ) {
      warnings.push(
        `${plan.name}: ${achievedPerSecond.toFixed(0)}/s of ${offeredPerSecond!.toFixed(0)}/s were achieved; ${limitOf(ownLoad, lateCount / offered)}`,
      );
    }
  }
  return warnings;
}

/** What held the achieved rate down, as far as it can be told from here. */
function limitOf({ cores }: OwnLoad, lateShare: number): string {
  if (cores >= BUSY_CORES) return 'the load process is the reason, or may be';
  if (lateShare > LATE_SHARE_UNTOLD)
    return 'this machine was too busy to tell whether the gateway is the reason';
  return 'the load process had time left, so the gateway or the way to it is the reason';
}

function percent(share: number): string {
  return `${(share * 100).toFixed(share < 0.1 ? 1 : 0)} %`;
}
