/**
 * Notices that a device's one-time prekeys are claimed far more often than is usual for it: somebody may be draining
 * them. The limits hold the harm down by themselves; this tells people.
 */
import type { Clock } from '../lib/clock.ts';
import { createRecent } from '../lib/recent.ts';
import { addressKey, type DeviceAddress } from '../protocol/ids.ts';

export interface DrainAlarm {
  /** A bundle of this device was asked for, with a one-time prekey or without. */
  noteClaim(device: DeviceAddress): void;
}

const WINDOW_MS = 10 * 60_000;
/** So many times its usual count in a window is far over it. */
const UNUSUAL_FACTOR = 10;
/** What a window's count weighs in the usual one: a day's windows are forgotten in about a day. */
const WEIGHT = 1 / 32;
/** At least so many devices are watched, those that were claimed of last, and at most twice as many. */
const DEVICES_MAX = 50_000;

interface Watch {
  window: number;
  count: number;
  /** Claims in a window, as they mostly are. */
  usual: number;
}

/**
 * @param parts.claimsMin fewer claims in ten minutes are never an alarm; 0 never raises one
 * @param parts.onAlarm called once in ten minutes for a device
 */
export function createDrainAlarm(parts: {
  claimsMin: number;
  clock: Clock;
  onAlarm(event: { device: DeviceAddress; claimCount: number; usualCount: number }): void;
}): DrainAlarm {
  const { claimsMin, clock, onAlarm } = parts;
  const watches = createRecent<Watch>(DEVICES_MAX);

  function watchOf(key: string, window: number): Watch {
    const present = watches.get(key);
    if (present?.window === window) return present;
    const watch: Watch = { window, count: 0, usual: 0 };
    if (present !== undefined) {
      // The windows between had no claims at all.
      const idle = Math.max(0, window - present.window - 1);
      watch.usual = (present.usual + (present.count - present.usual) * WEIGHT) * (1 - WEIGHT) ** idle;
    }
    watches.set(key, watch);
    return watch;
  }

  return {
    noteClaim(device) {
      if (claimsMin === 0) return;
      const watch = watchOf(addressKey(device), Math.floor(clock.nowMs() / WINDOW_MS));
      watch.count += 1;
      const alarmAt = Math.max(claimsMin, Math.ceil(watch.usual * UNUSUAL_FACTOR));
      if (watch.count === alarmAt) onAlarm({ device, claimCount: watch.count, usualCount: watch.usual });
    },
  };
}
