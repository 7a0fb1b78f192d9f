/** Bounces: a message that nobody can decrypt any more goes back to its sender, never into the void. */
import type { Clock } from '../lib/clock.ts';
import type { Bus } from '../ports/bus.ts';
import type { MessageStore } from '../ports/message-store.ts';
import type { DeviceAddress } from '../protocol/ids.ts';
import type { DeliveryReports } from './reports.ts';

export interface Bounces {
  /**
   * Brings what bounced of one recipient device, or of any, into its senders' queues. What a crash interrupts is
   * finished by the next call on any node.
   */
  settle(of: DeviceAddress | null): Promise<void>;
  /**
   * Bounces what waits under the stamp of a key set that was wiped, of one device or of all that were wiped lately,
   * and settles it.
   *
   * @returns how many messages
   */
  bounceStale(of: DeviceAddress | null): Promise<number>;
}

/** Rows brought back at a time. */
const SETTLE_MAX = 500;
/** Rows locked at a time. */
const STALE_MAX = 64;

export function createBounces(parts: {
  messages: MessageStore;
  bus: Bus;
  clock: Clock;
  messageLifetimeMs: number;
  reports: DeliveryReports;
}): Bounces {
  const { messages, bus, clock, messageLifetimeMs, reports } = parts;
  const bounces: Bounces = {
    async settle(of) {
      for (;;) {
        const nowMs = clock.nowMs();
        const { bounced, senders, more } = await messages.settleBounces(of, {
          nowMs,
          expiresAtMs: nowMs + messageLifetimeMs,
          limit: SETTLE_MAX,
        });
        if (bounced.length > 0) reports.bounced(bounced);
        bus.poke(senders);
        if (!more) return;
      }
    },

    async bounceStale(of) {
      let total = 0;
      for (;;) {
        const count = await messages.bounceStale(of, { nowMs: clock.nowMs(), limit: STALE_MAX });
        total += count;
        // Fewer than asked for may mean that others were held just then.
        if (count === 0) break;
      }
      await bounces.settle(of);
      return total;
    },
  };
  return bounces;
}
