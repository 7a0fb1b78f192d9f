/** Devices that nobody has used for long lose their keys: what is sent to them would wait for nobody. */
import { type Clock, hasPassed } from '../lib/clock.ts';
import type { DeviceKeys, KeyStore } from '../ports/key-store.ts';
import type { DeviceLocks } from '../ports/lock.ts';
import type { DeviceAddress } from '../protocol/ids.ts';
import { wipeKeySet, withCourtesyLock } from './key-set.ts';

const LOOKED_AT_MAX = 1_000;
const PAGES_MAX = 20;
const WIPED_MAX = 200;
/** Between the end of one walk over all devices and the next walk. */
const REST_MS = 3_600_000;

export interface IdleSweep {
  /**
   * Goes on where the run before ended: looks at a bounded number of devices, and wipes those that are idle, each in a
   * transaction of its own.
   *
   * @returns how many lost their keys, and whether all devices have been looked at
   * @throws GatewayError UNAVAILABLE when the store can't be reached; what is done stays done
   */
  run(): Promise<{ wipedCount: number; isAtEnd: boolean }>;
}

/**
 * Before which time the last use of a device makes it idle; null where none ever is.
 *
 * @param times.retentionMs 0 for never
 */
export function idleCut(times: { nowMs: number; retentionMs: number }): number | null {
  return times.retentionMs === 0 ? null : times.nowMs - times.retentionMs;
}

/** @param parts.onWiped bounces what waited for a device whose keys are gone, before the next one is looked at */
export function createIdleSweep(parts: {
  store: KeyStore;
  locks: DeviceLocks;
  clock: Clock;
  retentionMs: number;
  onWiped(device: DeviceAddress): Promise<void>;
}): IdleSweep {
  const { store, locks, clock, retentionMs, onWiped } = parts;
  let after: DeviceAddress | null = null;
  let walkedAtMs = Number.NEGATIVE_INFINITY;

  /** `gone`: its keys were taken before, and what waited for it was not bounced, since the process died. */
  async function wipe(device: DeviceAddress, idleBeforeMs: number): Promise<'wiped' | 'gone' | 'used'> {
    return await withCourtesyLock(locks, device, () =>
      store.change(
        device,
        async (keys) => {
          if (keys.current.identity === null) return 'gone';
          if (!isIdle(keys.current, idleBeforeMs)) return 'used';
          await wipeKeySet(keys, 'RECIPIENT_KEYS_RESET', clock.nowMs(), { leavesMessages: true });
          return 'wiped';
        },
        { isUpkeep: true },
      ),
    );
  }

  return {
    async run() {
      const nowMs = clock.nowMs();
      const idleBeforeMs = idleCut({ nowMs, retentionMs });
      if (idleBeforeMs === null || !hasPassed(clock, walkedAtMs, REST_MS))
        return { wipedCount: 0, isAtEnd: true };
      let wipedCount = 0;
      for (let pages = 0; pages < PAGES_MAX; pages++) {
        const { idle, last } = await store.findIdle({ idleBeforeMs, after, limit: LOOKED_AT_MAX });
        for (const device of idle) {
          if (wipedCount === WIPED_MAX) return { wipedCount, isAtEnd: false };
          // Before it is wiped: one that fails holds up none of those behind it, and waits for the next walk.
          after = device;
          const outcome = await wipe(device, idleBeforeMs);
          if (outcome === 'wiped') wipedCount += 1;
          if (outcome !== 'used') await onWiped(device);
        }
        after = last;
        if (last === null) {
          walkedAtMs = nowMs;
          return { wipedCount, isAtEnd: true };
        }
      }
      return { wipedCount, isAtEnd: false };
    },
  };
}

/** The rule of the store's `findIdle`, for a row that is held: it may have been used since it was found. */
function isIdle(keys: DeviceKeys, idleBeforeMs: number): boolean {
  const uses = [keys.servedAtMs, keys.updatedAtMs, keys.restoredAtMs].filter((atMs) => atMs !== null);
  return uses.length > 0 && Math.max(...uses) < idleBeforeMs;
}
