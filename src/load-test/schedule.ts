/** When operations are due: fixed before the first one, whatever the server makes of them. */
import type { PartPlan } from './load-plan.ts';

export interface Schedule {
  count: number;
  /** Of operation `index`, from the part's start. Never falls as `index` rises. */
  offsetMs(index: number): number;
}

/** From one storm to the next. */
const STORM_PERIOD_MS = 10_000;

export function scheduleOf(part: PartPlan): Schedule {
  const { scenario, deviceCount, durationMs, ratePerSecond } = part;
  if (scenario === 'storm') {
    // A storm whose devices come back one after the other takes as long as it takes: the next follows it.
    const spreadMs = ratePerSecond === null ? 0 : (deviceCount / ratePerSecond) * 1000;
    const periodMs = Math.max(STORM_PERIOD_MS, spreadMs);
    return {
      count: Math.max(1, Math.floor(durationMs / periodMs)) * deviceCount,
      offsetMs: (index) =>
        Math.floor(index / deviceCount) * periodMs + ((index % deviceCount) / deviceCount) * spreadMs,
    };
  }
  const rate = ratePerSecond ?? deviceCount;
  const due = Math.max(1, Math.floor((rate * durationMs) / 1000));
  return {
    // A backlog can be drained once.
    count: scenario === 'backlog' ? Math.min(due, deviceCount) : due,
    offsetMs: (index) => (index / rate) * 1000,
  };
}
