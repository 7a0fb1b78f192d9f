/** A clock that stands still until a test moves it. */
import type { Clock } from '../../src/lib/clock.ts';

export interface ManualClock extends Clock {
  /** Moves time on, firing what falls due in order; promises settle between the timers. */
  advance(ms: number): Promise<void>;
  /** Timers that are pending. */
  timerCount(): number;
}

export function createManualClock(startMs: number = Date.now()): ManualClock {
  let nowMs = startMs;
  const timers = new Set<{ dueMs: number; action: () => void }>();
  return {
    nowMs: () => nowMs,
    timerCount: () => timers.size,
    after(delayMs, action) {
      const timer = { dueMs: nowMs + Math.max(0, delayMs), action };
      timers.add(timer);
      return { cancel: () => timers.delete(timer) };
    },
    async advance(ms) {
      const endMs = nowMs + ms;
      for (;;) {
        await new Promise((resolve) => setImmediate(resolve));
        const due = [...timers].filter((timer) => timer.dueMs <= endMs).sort((a, b) => a.dueMs - b.dueMs)[0];
        if (due === undefined) break;
        timers.delete(due);
        nowMs = Math.max(nowMs, due.dueMs);
        due.action();
      }
      nowMs = endMs;
    },
  };
}
