/**
 * Keeps the statements of a pool to the connections that PostgreSQL gives it. The driver would rather open one more
 * than wait for one that is there, and each that is refused costs a request its way there and back, and its pauses.
 */
import type { Clock } from '../../lib/clock.ts';
import type { Slots } from '../../lib/slots.ts';

/** One more is tried after so long: refused again, it costs one statement its way there and back. */
const GROW_PERIOD_MS = 5_000;

export interface GivenConnections {
  /**
   * A connection was refused because there are too many: one fewer is there than was tried.
   *
   * @returns whether it was the only one, so that the pool has none
   */
  refused(): boolean;
  /** The pool begins anew with one. */
  beginAnew(): void;
}

/**
 * @param options.connectionsMax connections that the pool opens
 * @param options.slots of its statements, as many as go out at once where all connections are given
 */
export function createGivenConnections(options: {
  clock: Clock;
  slots: Slots;
  connectionsMax: number;
  slotCount: number;
}): GivenConnections {
  const { clock, slots, connectionsMax, slotCount } = options;
  let given = connectionsMax;
  let isGrowing = false;

  function keepTo(count: number): void {
    given = count;
    limit();
    growLater();
  }

  /** While some are missing each serves one statement at a time: for a second one the driver would open another. */
  function limit(): void {
    slots.limit(given === connectionsMax ? slotCount : given);
  }

  function growLater(): void {
    if (isGrowing || given === connectionsMax) return;
    isGrowing = true;
    clock.after(GROW_PERIOD_MS, () => {
      isGrowing = false;
      keepTo(given + 1);
    });
  }

  return {
    refused() {
      const wasTheOnlyOne = given === 1;
      keepTo(Math.max(1, given - 1));
      return wasTheOnlyOne;
    },
    beginAnew: () => keepTo(1),
  };
}
