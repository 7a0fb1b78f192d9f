/** The device locks of a single node: a map, with the expiry and the owner tokens that nodes would need. */
import type { Clock } from '../../lib/clock.ts';
import type { DeviceLocks } from '../../ports/lock.ts';
import { addressKey } from '../../protocol/ids.ts';

interface Lock {
  /** Unique per acquisition, so it says who owns the lock. */
  fence: number;
  takenAtMs: number;
}

/**
 * Locks within this process. The fencing number counts on from the microseconds of the clock, so that it rises over
 * restarts as well.
 *
 * @param options.lockMs how long a lock holds unless it is released
 */
export function createInProcessLocks({
  clock,
  lockMs = 10_000,
}: {
  clock: Clock;
  lockMs?: number;
}): DeviceLocks {
  /** In the order of their taking, so that the expired ones come first. */
  const locks = new Map<string, Lock>();
  let lastFence = 0;

  /** A clock that was set back can't tell how old a lock is: then it counts as expired. */
  function isExpired(takenAtMs: number): boolean {
    const ageMs = clock.nowMs() - takenAtMs;
    return ageMs < 0 || ageMs >= lockMs;
  }

  function forgetExpired(): void {
    for (const [key, lock] of locks) {
      if (!isExpired(lock.takenAtMs)) return;
      locks.delete(key);
    }
  }

  return {
    async acquire(devices) {
      forgetExpired();
      const takenAtMs = clock.nowMs();
      const fence = Math.max(lastFence + 1, takenAtMs * 1000);
      lastFence = fence;
      const held = new Set<string>();
      for (const key of devices.map(addressKey)) {
        const lock = locks.get(key);
        if (lock !== undefined && !isExpired(lock.takenAtMs)) continue;
        locks.delete(key);
        locks.set(key, { fence, takenAtMs });
        held.add(key);
      }
      const owns = (key: string): boolean => locks.get(key)?.fence === fence;
      let isReleased = false;
      return {
        held,
        fence,
        isLost: () => isExpired(takenAtMs) || (!isReleased && ![...held].every(owns)),
        async release() {
          isReleased = true;
          for (const key of held) if (owns(key)) locks.delete(key);
        },
      };
    },
  };
}
