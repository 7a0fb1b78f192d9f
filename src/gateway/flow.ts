/** How many frames one connection may bring: a bucket that fills by time. */
import type { Clock } from '../lib/clock.ts';

/** A client that was offline comes with much at once. */
const BURST_S = 10;

export interface Flow {
  /** Counts a frame. @returns false where it is too many */
  takes(): boolean;
}

export function createFlow(perSecond: number, clock: Clock): Flow {
  const capacity = perSecond * BURST_S;
  let room = capacity;
  let filledAtMs = clock.nowMs();
  return {
    takes() {
      if (room < 1) {
        // The clock is read only when a bucket is empty: for most it never is. One that was set back fills nothing.
        const nowMs = clock.nowMs();
        room = Math.min(capacity, room + (Math.max(0, nowMs - filledAtMs) * perSecond) / 1000);
        filledAtMs = nowMs;
      }
      if (room < 1) return false;
      room -= 1;
      return true;
    },
  };
}
