/** The bus of a single node: everything that it would tell other nodes, it tells itself. */
import type { Log } from '../../lib/log.ts';
import type { Bus, BusListener, Lease } from '../../ports/bus.ts';
import { addressKey } from '../../protocol/ids.ts';

/** A bus for one node, with the promises of the port; its link can't break, so `onGap` never comes. */
export function createInProcessBus({ log }: { log: Log }): Bus {
  const leases = new Map<string, Lease>();
  const toLookAt = new Set<string>();
  let listener: BusListener | null = null;

  function tell(say: (to: BusListener) => void): void {
    if (listener === null) return;
    try {
      say(listener);
    } catch (error) {
      log.error({ error: String(error) }, 'a listener of the bus threw');
    }
  }

  function look(): void {
    const keys = [...toLookAt];
    toLookAt.clear();
    for (const key of keys) {
      const lease = leases.get(key);
      if (lease !== undefined) tell((to) => to.onPoke(lease.device));
    }
  }

  return {
    async start(to) {
      listener = to;
    },

    async acquire(lease) {
      const key = addressKey(lease.device);
      const held = leases.get(key);
      if (held !== undefined && held.fence > lease.fence) return false;
      leases.set(key, lease);
      if (held !== undefined && held.fence < lease.fence) tell((to) => to.onDisplaced(held));
      return true;
    },

    release(lease) {
      const key = addressKey(lease.device);
      if (leases.get(key)?.fence === lease.fence) leases.delete(key);
    },

    poke(devices) {
      for (const device of devices) {
        const key = addressKey(device);
        if (!leases.has(key)) continue;
        // Pokes of one tick are one look: a burst of messages to a device is read in one page.
        if (toLookAt.size === 0) setImmediate(look);
        toLookAt.add(key);
      }
    },

    trouble: () => null,
    probes: () => null,

    async stop() {
      listener = null;
      leases.clear();
    },
  };
}
