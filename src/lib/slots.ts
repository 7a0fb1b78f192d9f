/** A bounded number of things under way at once; the rest wait in line, and only so many for so long. */
import type { Clock } from './clock.ts';

export interface Slots {
  /**
   * Runs `action` when a slot is free, first come, first served.
   *
   * @throws NoSlotError where the line is too long, or none came free in time; `action` was not run then
   */
  run<Result>(action: () => Promise<Result>): Promise<Result>;
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
  const { clock, slotCount, waitingMax, waitMaxMs } = options;
  let free = slotCount;
  const line = new Set<() => void>();

  function take(): Promise<void> {
    if (free > 0) {
      free -= 1;
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

  /** A slot goes from hand to hand: it is free only when nobody waits. */
  function giveBack(): void {
    const [next] = line;
    if (next === undefined) free += 1;
    else next();
  }

  return {
    waitingCount: () => line.size,

    async run(action) {
      await take();
      try {
        return await action();
      } finally {
        giveBack();
      }
    },
  };
}
