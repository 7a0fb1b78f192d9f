/** The open loop: operations leave when they are due, not when earlier ones have been answered. */
import type { Clock } from '../lib/clock.ts';
import type { Schedule } from './schedule.ts';

/**
 * One turn of a timer. An operation may leave so much before it is due, so that the timer's coarseness does not
 * stand in the measured times.
 */
const EARLY_MAX_MS = 1;

export interface Departure {
  index: number;
  /**
   * From when its latency counts: when it was due, however late this process sends it, or when it left, where that
   * was before. So neither a slow server nor a slow load process hides what a user would have waited.
   */
  startMs: number;
  /** So much after it was due. */
  lateMs: number;
}

/**
 * Calls `depart` for each operation of the schedule, in order; several in one turn where they are due.
 *
 * @param options.depart must not throw, and returns at once
 * @returns resolves when the last one has left, or when `signal` is raised
 */
export function pace(options: {
  clock: Clock;
  startMs: number;
  schedule: Schedule;
  signal: AbortSignal;
  depart(departure: Departure): void;
}): Promise<void> {
  const { clock, startMs, schedule, signal, depart } = options;
  if (signal.aborted) return Promise.resolve();
  return new Promise((resolve) => {
    let next = 0;
    const turn = (): void => {
      while (next < schedule.count && !signal.aborted) {
        const dueMs = startMs + schedule.offsetMs(next);
        const nowMs = clock.nowMs();
        if (dueMs - nowMs > EARLY_MAX_MS) {
          timer = clock.after(dueMs - nowMs - EARLY_MAX_MS, turn);
          return;
        }
        depart({ index: next, startMs: Math.min(dueMs, nowMs), lateMs: Math.max(0, nowMs - dueMs) });
        next += 1;
      }
      signal.removeEventListener('abort', stop);
      resolve();
    };
    const stop = (): void => {
      timer.cancel();
      resolve();
    };
    signal.addEventListener('abort', stop, { once: true });
    let timer = clock.after(0, turn);
  });
}
