/** Watches the load process itself: a tester that is out of breath measures itself. */
import { monitorEventLoopDelay } from 'node:perf_hooks';
import type { Clock } from '../lib/clock.ts';

export interface OwnLoad {
  /** Processor time over wall time: 1 is a whole core, all that JavaScript can use. */
  cores: number;
  /** How late timers of this process fired, beyond their resolution. */
  eventLoopDelayP99Ms: number;
  eventLoopDelayMaxMs: number;
}

const RESOLUTION_MS = 10;

/** Watches from now on. @returns ends the watch, and tells */
export function watchOwnLoad(clock: Clock): () => OwnLoad {
  const delay = monitorEventLoopDelay({ resolution: RESOLUTION_MS });
  delay.enable();
  const startMs = clock.nowMs();
  const before = process.cpuUsage();
  return () => {
    delay.disable();
    const { user, system } = process.cpuUsage(before);
    const elapsedMs = Math.max(1, clock.nowMs() - startMs);
    const beyond = (nanoseconds: number) => Math.max(0, nanoseconds / 1e6 - RESOLUTION_MS);
    return {
      cores: (user + system) / 1000 / elapsedMs,
      eventLoopDelayP99Ms: delay.count === 0 ? 0 : beyond(delay.percentile(99)),
      eventLoopDelayMaxMs: delay.count === 0 ? 0 : beyond(delay.max),
    };
  };
}
