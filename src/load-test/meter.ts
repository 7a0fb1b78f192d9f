/** What was measured of one part: latencies by step, rates over time, failures by code. */
import { build, type Histogram } from 'hdr-histogram-js';
import type { Clock } from '../lib/clock.ts';
import type { FailureCode } from './device.ts';

export interface Percentiles {
  p50: number;
  p90: number;
  p99: number;
  p999: number;
  max: number;
}

/** Of one step of the operations, as "stored" and "delivered" are of a message. Milliseconds. */
export interface StepResult {
  name: string;
  count: number;
  meanMs: number;
  ms: Percentiles;
  /** For the percentile plot: the latency at each percentile of a fixed list. */
  curve: { percentile: number; ms: number }[];
  /** By when the operations were due; null where nothing of an interval came back. */
  overTime: ({ count: number; ms: Percentiles } | null)[];
}

export interface Rates {
  /** Operations that were due in each interval. */
  offered: number[];
  /** Operations that were completed in each interval. */
  achieved: number[];
}

export interface MeterResult {
  intervalMs: number;
  /** From the start until the last operation had left. */
  offeringMs: number;
  /** From the start until the last operation was completed; 0 where none was. */
  completingMs: number;
  offered: number;
  completed: number;
  failed: number;
  /** Neither completed nor failed when the test ended. */
  unfinished: number;
  /** Not sent, since too many were under way. */
  withheld: number;
  failures: Partial<Record<FailureCode, number>>;
  /** Of the operations that left: how long after they were due. */
  lateMs: Percentiles;
  /** Operations that left more than {@link LATE_MS} after they were due. */
  lateCount: number;
  steps: StepResult[];
  rates: Rates;
}

/** Later than a busy timer's usual lateness. */
export const LATE_MS = 10;

const MICROSECONDS = 1000;
const LATENCY_MAX_US = 3_600_000_000;
/** Intervals of a plot; there are a few more where the last answers come late. */
const INTERVALS_MAX = 100;
const INTERVAL_CHOICES_MS = [
  250, 500, 1_000, 2_000, 5_000, 10_000, 30_000, 60_000, 120_000, 300_000, 900_000,
];

/** Ever closer towards 100 %: 0, 5, … 85, 90, 90.5, … 98.5, 99, 99.05, … */
const CURVE_PERCENTILES: readonly number[] = [0, 1, 2, 3].flatMap((nines) => {
  const left = 10 ** -nines;
  return Array.from({ length: 18 }, (_, step) => 100 * (1 - left) + 100 * left * 0.05 * step);
});

/** The shortest interval in which a test of this length has not more than its plot shows. */
export function intervalFor(durationMs: number): number {
  return (
    INTERVAL_CHOICES_MS.find((intervalMs) => durationMs / intervalMs <= INTERVALS_MAX) ??
    INTERVAL_CHOICES_MS.at(-1)!
  );
}

interface Step {
  total: Histogram;
  intervals: (Histogram | undefined)[];
}

export class Meter {
  readonly #clock: Clock;
  readonly #intervalMs: number;
  readonly #steps = new Map<string, Step>();
  readonly #late = histogram(3);
  readonly #offeredOverTime: number[] = [];
  readonly #achievedOverTime: number[] = [];
  readonly #failures = new Map<FailureCode, number>();
  #startMs = 0;
  #offeredUntilMs = 0;
  #completedUntilMs = 0;
  #offered = 0;
  #completed = 0;
  #failed = 0;
  #withheld = 0;
  #lateCount = 0;

  /** @param options.steps in the order in which they are shown */
  constructor(options: { clock: Clock; durationMs: number; steps: readonly string[] }) {
    this.#clock = options.clock;
    this.#intervalMs = intervalFor(options.durationMs);
    for (const name of options.steps) this.#steps.set(name, { total: histogram(3), intervals: [] });
  }

  begin(startMs: number): void {
    this.#startMs = startMs;
    this.#offeredUntilMs = startMs;
    this.#completedUntilMs = startMs;
  }

  offered({ startMs, lateMs }: { startMs: number; lateMs: number }): void {
    this.#offered += 1;
    this.#offeredUntilMs = startMs + lateMs;
    this.#late.recordValue(microseconds(lateMs));
    if (lateMs > LATE_MS) this.#lateCount += 1;
    this.#countIn(this.#offeredOverTime, startMs);
  }

  /** An operation was due, and too many were under way to send it. */
  withheld(): void {
    this.#withheld += 1;
  }

  /** Now, this step of an operation whose latency counts from `startMs` is done. */
  step(name: string, startMs: number): void {
    const step = this.#steps.get(name);
    if (step === undefined) throw new Error(`no step ${name}`);
    const latency = microseconds(this.#clock.nowMs() - startMs);
    const index = this.#intervalOf(startMs);
    step.total.recordValue(latency);
    // Two digits are as much as a plot shows, and a seventh of the memory.
    const interval = step.intervals[index] ?? histogram(2);
    step.intervals[index] = interval;
    interval.recordValue(latency);
  }

  completed(): void {
    this.#completed += 1;
    this.#completedUntilMs = this.#clock.nowMs();
    this.#countIn(this.#achievedOverTime, this.#completedUntilMs);
  }

  /** The operation is over without success. */
  failed(code: FailureCode): void {
    this.#failed += 1;
    this.noted(code);
  }

  /** Something went wrong, and the operation goes on. */
  noted(code: FailureCode): void {
    this.#failures.set(code, (this.#failures.get(code) ?? 0) + 1);
  }

  underWay(): number {
    return this.#offered - this.#withheld - this.#completed - this.#failed;
  }

  counts(): { offered: number; completed: number; failed: number } {
    return { offered: this.#offered, completed: this.#completed, failed: this.#failed };
  }

  /** Of the last step so far; null before its first. */
  latestPercentiles(): Percentiles | null {
    const last = [...this.#steps.values()].at(-1);
    return last === undefined || last.total.totalCount === 0 ? null : percentilesOf(last.total);
  }

  result(): MeterResult {
    const intervalCount = Math.max(this.#offeredOverTime.length, this.#achievedOverTime.length);
    const filled = (counts: number[]) => Array.from({ length: intervalCount }, (_, i) => counts[i] ?? 0);
    return {
      intervalMs: this.#intervalMs,
      offeringMs: this.#offeredUntilMs - this.#startMs,
      completingMs: this.#completedUntilMs - this.#startMs,
      offered: this.#offered,
      completed: this.#completed,
      failed: this.#failed,
      unfinished: this.underWay(),
      withheld: this.#withheld,
      failures: Object.fromEntries([...this.#failures].sort(([, a], [, b]) => b - a)),
      lateMs: percentilesOf(this.#late),
      lateCount: this.#lateCount,
      steps: [...this.#steps].map(([name, { total, intervals }]) => ({
        name,
        count: total.totalCount,
        meanMs: total.totalCount === 0 ? 0 : total.mean / MICROSECONDS,
        ms: percentilesOf(total),
        curve: CURVE_PERCENTILES.filter((percentile) => isTold(percentile, total.totalCount)).map(
          (percentile) => ({ percentile, ms: total.getValueAtPercentile(percentile) / MICROSECONDS }),
        ),
        overTime: Array.from({ length: intervals.length }, (_, i) => {
          const interval = intervals[i];
          return interval === undefined ? null : { count: interval.totalCount, ms: percentilesOf(interval) };
        }),
      })),
      rates: { offered: filled(this.#offeredOverTime), achieved: filled(this.#achievedOverTime) },
    };
  }

  #countIn(counts: number[], atMs: number): void {
    const index = this.#intervalOf(atMs);
    while (counts.length <= index) counts.push(0);
    counts[index]! += 1;
  }

  #intervalOf(atMs: number): number {
    return Math.max(0, Math.floor((atMs - this.#startMs) / this.#intervalMs));
  }
}

/** Whether there are enough values for this percentile to be one of them, and not just the largest. */
function isTold(percentile: number, count: number): boolean {
  return count > 0 && (1 - percentile / 100) * count >= 1 - 1e-9;
}

function histogram(digits: 2 | 3): Histogram {
  return build({
    lowestDiscernibleValue: 1,
    highestTrackableValue: LATENCY_MAX_US,
    numberOfSignificantValueDigits: digits,
  });
}

function microseconds(ms: number): number {
  return Math.min(LATENCY_MAX_US, Math.max(0, Math.round(ms * MICROSECONDS)));
}

function percentilesOf(recorded: Histogram): Percentiles {
  const at = (percentile: number) =>
    recorded.totalCount === 0 ? 0 : recorded.getValueAtPercentile(percentile) / MICROSECONDS;
  return { p50: at(50), p90: at(90), p99: at(99), p999: at(99.9), max: at(100) };
}
