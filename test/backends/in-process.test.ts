// The backends of a single node, held to the contracts that the distributed ones are held to.
import { describe, expect, it } from 'vitest';
import { createInProcessBus } from '../../src/backends/in-process/bus.ts';
import { createInProcessLocks } from '../../src/backends/in-process/locks.ts';
import { type Clock, systemClock } from '../../src/lib/clock.ts';
import { silentLog } from '../../src/lib/log.ts';
import { describeBus, device } from '../contract/bus.ts';
import { describeLocks } from '../contract/lock.ts';

describeBus('in process', async () => ({
  bus: createInProcessBus({ log: silentLog }),
  close: async () => {},
}));

describeLocks('in process', async (lockMs) => {
  const locks = createInProcessLocks({ clock: systemClock, lockMs });
  return { locks, otherNode: locks, close: async () => {} };
});

describe('in-process locks', () => {
  it('are neither stuck nor trusted after the clock was set back by an hour', async () => {
    let nowMs = 10_000_000;
    const clock: Clock = { nowMs: () => nowMs, after: () => ({ cancel() {} }) };
    const locks = createInProcessLocks({ clock, lockMs: 1_000 });
    const mine = await locks.acquire([device('alice')]);
    nowMs -= 3_600_000;
    expect(mine.isLost()).toBe(true);
    const theirs = await locks.acquire([device('alice')]);
    expect(theirs.held.size).toBe(1);
    expect(theirs.fence).toBeGreaterThan(mine.fence);
  });
});
