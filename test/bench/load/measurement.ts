/** What one run found, over its measured time alone. */
import { createHistogram } from 'node:perf_hooks';
import { cpuMs, type Watched } from '../cpu.ts';

export interface Latency {
  p50: number;
  p90: number;
  p99: number;
  p999: number;
}

export interface Measurement {
  operations: number;
  elapsedMs: number;
  /** Null where single operations have none. */
  latencyMs: Latency | null;
  /** Processor time by the names of the watched processes; `load` is the load process itself. */
  cpuMs: Record<string, number>;
  /** What was refused, or answered otherwise than the contestant should, by what it was; warm-up included. */
  faults: Record<string, number>;
  /** Answered as it should be, from the first request to the last. */
  operationsInAll: number;
  /** Whether everything that could be asked for was used up before the time was. */
  endedEarly: boolean;
}

export interface Timing {
  warmUpMs: number;
  measureMs: number;
}

/** Keeps the time and the books of one run: operations that end between warm-up and end are measured. */
export function startMeter(timing: Timing, watched: Readonly<Record<string, Watched>>) {
  const histogram = createHistogram();
  const faults: Record<string, number> = {};
  let phase: 'warmUp' | 'measure' | 'over' = 'warmUp';
  let operations = 0;
  let operationsInAll = 0;
  let startedAtMs = 0;
  let endedAtMs = 0;
  let endedEarly = false;
  let before: Record<string, number> = {};
  let after: Record<string, number> = {};
  let end = (): void => {};
  const over = new Promise<void>((resolve) => {
    end = resolve;
  });

  function start(): void {
    before = readCpu(watched);
    startedAtMs = performance.now();
    phase = 'measure';
  }

  function finish(): void {
    if (phase === 'over') return;
    if (phase === 'warmUp') start();
    phase = 'over';
    endedAtMs = performance.now();
    after = readCpu(watched);
    end();
  }

  const timers = [setTimeout(start, timing.warmUpMs), setTimeout(finish, timing.warmUpMs + timing.measureMs)];

  return {
    isOver: () => phase === 'over',
    done(sentAtMs: number): void {
      operationsInAll += 1;
      if (phase !== 'measure') return;
      operations += 1;
      histogram.record(Math.max(1, Math.round((performance.now() - sentAtMs) * 1e6)));
    },
    fault(what: string): void {
      faults[what] = (faults[what] ?? 0) + 1;
    },
    endEarly(): void {
      endedEarly = true;
      for (const timer of timers) clearTimeout(timer);
      finish();
    },
    /** Resolves when the time is over. */
    over,
    result(): Measurement {
      const percentile = (p: number) => histogram.percentile(p) / 1e6;
      return {
        operations,
        elapsedMs: endedAtMs - startedAtMs,
        latencyMs: {
          p50: percentile(50),
          p90: percentile(90),
          p99: percentile(99),
          p999: percentile(99.9),
        },
        cpuMs: Object.fromEntries(
          Object.keys(after).map((name) => [name, (after[name] ?? 0) - (before[name] ?? 0)]),
        ),
        faults,
        operationsInAll,
        endedEarly,
      };
    },
  };
}

/** What the watched processes and this one have used so far. */
export function readCpu(watched: Readonly<Record<string, Watched>>): Record<string, number> {
  const own = process.cpuUsage();
  const others = Object.entries(watched).map(([name, target]) => [name, cpuMs(target)] as const);
  return { ...Object.fromEntries(others), load: (own.user + own.system) / 1000 };
}

export type Meter = ReturnType<typeof startMeter>;
