/** The device locks of a single node: a map, with the expiry and the owners that nodes would need. */
import { type Clock, hasPassed } from '../../lib/clock.ts';
import type { DeviceLocks } from '../../ports/lock.ts';
import { addressKey } from '../../protocol/ids.ts';

interface Lock {
  /** Of the acquisition that owns it. */
  number: number;
  takenAtMs: number;
  lockMs: number;
}

const LOCK_MS = 10_000;

/** @param options.lockMs how long a lock holds unless it is released, or asked for another time */
export function createInProcessLocks(options: { clock: Clock; lockMs?: number }): DeviceLocks {
  const { clock } = options;
  const locks = new Map<string, Lock>();
  let acquisitions = 0;

  function isExpired({ takenAtMs, lockMs }: Lock): boolean {
    return hasPassed(clock, takenAtMs, lockMs);
  }

  /** In the order of their taking; behind one that lasts longer, expired ones may wait for it. */
  function forgetExpired(): void {
    for (const [key, lock] of locks) {
      if (!isExpired(lock)) return;
      locks.delete(key);
    }
  }

  return {
    async acquire(devices, lockMs = options.lockMs ?? LOCK_MS) {
      forgetExpired();
      const takenAtMs = clock.nowMs();
      const number = ++acquisitions;
      const held = new Set<string>();
      for (const key of devices.map(addressKey)) {
        const lock = locks.get(key);
        if (lock !== undefined && !isExpired(lock)) continue;
        locks.delete(key);
        locks.set(key, { number, takenAtMs, lockMs });
        held.add(key);
      }
      return {
        held,
        async release() {
          for (const key of held) if (locks.get(key)?.number === number) locks.delete(key);
        },
      };
    },
  };
}
