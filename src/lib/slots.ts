/** A bounded number of things under way at once; the rest wait in line, and only so many for so long. */
import type { Clock } from './clock.ts';

export interface Slots {
  /**
   * Runs `action` when a slot is free, first come, first served.
   *
   * @throws NoSlotError where the line is too long, or none came free in time; `action` was not run then
   */
  run<Result>(action: () => Promise<Result>): Promise<Result>;
  /** From now on so many at once. Where more are under way, they go on, and nobody follows them. */
  limit(slotCount: number): void;
  waitingCount(): number;
}

/** Too much is under way: nothing was begun. */
export class NoSlotError extends Error {
  override name = 'NoSlotError';
}

export function createSlots(options: {
  clock: Clock;
  /** Actions under way at once. */
  slotCount: number;
  /** Actions that may wait. */
  waitingMax: number;
  waitMaxMs: number;
}): Slots {
  const { clock, waitingMax, waitMaxMs } = options;
  let { slotCount } = options;
  let underWay = 0;
  const line = new Set<() => void>();

  function take(): Promise<void> {
    if (underWay < slotCount) {
      underWay += 1;
      return Promise.resolve();
    }
    if (line.size >= waitingMax) return Promise.reject(new NoSlotError('too many wait already'));
    return new Promise((resolve, reject) => {
      const enter = (): void => {
        line.delete(enter);
        timer.cancel();
        resolve();
      };
      const timer = clock.after(waitMaxMs, () => {
        line.delete(enter);
        reject(new NoSlotError('nothing ended in time'));
      });
      line.add(enter);
    });
  }

  /** Who waits comes before who asks. */
  function admit(): void {
    for (const enter of line) {
      if (underWay >= slotCount) return;
      underWay += 1;
      enter();
    }
  }

  return {
    waitingCount: () => line.size,

    limit(count) {
      slotCount = count;
      admit();
    },

    async run(action) {
      await take();
      try {
        return await action();
      } finally {
        underWay -= 1;
        admit();
      }
    },
  };
}
