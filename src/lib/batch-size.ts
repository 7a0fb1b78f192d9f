/** How many rows a batch of upkeep takes, found by trying: locks last as long as the batch, and disks differ. */
import type { Clock } from './clock.ts';

export interface BatchSize {
  rows(): number;
  /** Runs a batch; one that lasts too long halves the next, one that is done quickly doubles it. */
  run<Result>(batch: () => Promise<Result>): Promise<Result>;
}

/** @param options.rowsMax the most; it begins with an eighth of them */
export function createBatchSize(options: {
  clock: Clock;
  rowsMax: number;
  durationMaxMs: number;
}): BatchSize {
  const { clock, rowsMax, durationMaxMs } = options;
  let rows = Math.ceil(rowsMax / 8);
  return {
    rows: () => rows,
    async run(batch) {
      const startMs = clock.nowMs();
      try {
        return await batch();
      } finally {
        const durationMs = clock.nowMs() - startMs;
        if (durationMs > durationMaxMs) rows = Math.max(1, Math.floor(rows / 2));
        else if (durationMs < durationMaxMs / 4) rows = Math.min(rowsMax, rows * 2);
      }
    },
  };
}
