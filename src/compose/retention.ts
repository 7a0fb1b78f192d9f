/** What expires: looked for every minute, by one node at a time, and by none whose clock can't be trusted. */

import type { Bounces } from '../delivery/bounce.ts';
import { sweepMessages } from '../delivery/retention.ts';
import { createIdleSweep } from '../keys/idle.ts';
import { sweepKeys } from '../keys/retention.ts';
import { type Clock, every, type Timer } from '../lib/clock.ts';
import type { Log } from '../lib/log.ts';
import type { Bus } from '../ports/bus.ts';
import type { KeyStore } from '../ports/key-store.ts';
import type { DeviceLocks } from '../ports/lock.ts';
import type { MessageStore } from '../ports/message-store.ts';

const RETENTION_PERIOD_MS = 60_000;
/** Longer than a sweep takes, unless a node died in one: then the others go on after this time. */
const RETENTION_LOCK_MS = 10 * 60_000;
/** A user id can't be empty: no device is locked by this. */
const RETENTION_LOCK = { userId: '', deviceId: 0 };

/**
 * Sweeps until it is cancelled; a sweep that fails is told and left to the next one.
 *
 * @param parts.leapMs how far this node's clock is from the store's; null where that does no harm
 * @param parts.claimedPreKeyRetentionMs how long a claim is kept by itself before its id is folded
 * @param parts.idleDeviceRetentionMs how long a device that nobody uses keeps its keys; 0 for ever
 */
export function startRetention(parts: {
  store: KeyStore;
  messages: MessageStore;
  bounces: Bounces;
  bus: Bus;
  locks: DeviceLocks;
  clock: Clock;
  log: Log;
  leapMs(): Promise<number | null>;
  claimedPreKeyRetentionMs: number;
  idleDeviceRetentionMs: number;
}): Timer {
  const { store, messages, bounces, bus, locks, clock, log, leapMs, claimedPreKeyRetentionMs } = parts;
  const failed = (error: unknown): void => log.warn({ error: error as Error }, 'a retention sweep failed');

  const idleSweep = createIdleSweep({
    store,
    locks,
    clock,
    retentionMs: parts.idleDeviceRetentionMs,
    async onWiped(device) {
      bus.poke([device]);
      await bounces.bounceStale(device);
    },
  });
  async function sweepIdle(): Promise<void> {
    const { wipedCount } = await idleSweep.run();
    if (wipedCount > 0) log.info({ deviceCount: wipedCount }, 'idle devices lost their keys');
  }

  async function mayJudge(): Promise<boolean> {
    try {
      const aheadMs = await leapMs();
      if (aheadMs === null) return true;
      log.warn({ aheadMs }, 'this node sweeps nothing: its clock differs from that of PostgreSQL');
    } catch (error) {
      failed(error);
    }
    return false;
  }

  return every(clock, RETENTION_PERIOD_MS, async () => {
    if (!(await mayJudge())) return;
    const lock = await locks.acquire([RETENTION_LOCK], RETENTION_LOCK_MS);
    // With the lock's engine away several sweep, which the rows' locks put up with.
    const sweeps =
      lock.held.size === 0
        ? []
        : [
            sweepKeys({ store, clock, claimedPreKeyRetentionMs }),
            sweepMessages({ messages, bounces, clock }),
            sweepIdle(),
          ];
    for (const outcome of await Promise.allSettled(sweeps)) {
      if (outcome.status === 'rejected') failed(outcome.reason);
    }
    await lock.release();
  });
}
