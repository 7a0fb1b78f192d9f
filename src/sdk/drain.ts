/** What waited when the gate opened: how far it is handed over, and when it is waited for no longer. */
import type { KitClock } from './time.ts';

export interface DrainParts {
  clock: KitClock;
  /** `progress` says something else than before. */
  onProgress(): void;
  /** The queue is empty, or will not be soon. */
  onEnd(): void;
}

export interface Drain {
  /** Null where nothing is waited for. */
  progress(): { handled: number; pending: number } | null;
  /** To be called before `clientReady` is asked. @returns begins, with what its answer says */
  expect(): (pending: number) => void;
  /** An envelope is through. */
  handled(): void;
  /** The gateway says that the queue is empty. */
  emptied(): void;
  /** The gate is open no more: `onEnd` is not called. */
  abandon(): void;
}

/** A message that keeps failing must not keep the pools empty. */
const PATIENCE_MS = 60_000;

export function createDrain(parts: DrainParts): Drain {
  let handledCount = 0;
  let emptiedCount = 0;
  let current: { handledBefore: number; pending: number } | null = null;
  let cancelPatience = () => {};

  function abandon(): void {
    cancelPatience();
    current = null;
  }

  function end(): void {
    abandon();
    parts.onProgress();
    parts.onEnd();
  }

  return {
    progress: () => current && { handled: handledCount - current.handledBefore, pending: current.pending },

    expect() {
      const handledBefore = handledCount;
      const emptiedBefore = emptiedCount;
      return (pending) => {
        cancelPatience();
        // What follows the answer at once may have been taken in before it.
        if (emptiedCount !== emptiedBefore) return;
        current = { handledBefore, pending };
        cancelPatience = parts.clock.after(PATIENCE_MS, end);
      };
    },

    handled() {
      handledCount += 1;
      if (current !== null) parts.onProgress();
    },

    emptied() {
      emptiedCount += 1;
      end();
    },

    abandon,
  };
}
