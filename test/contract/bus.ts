// The promises of ports/bus, for every backend: one node, whose link works.
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Bus, BusListener, Lease } from '../../src/ports/bus.ts';
import { addressKey, type DeviceAddress } from '../../src/protocol/ids.ts';
import { eventually } from '../support/eventually.ts';

export interface RecordedBus extends BusListener {
  /** `addressKey`s, in the order of the calls. */
  pokes: string[];
  displaced: Lease[];
  gaps: number;
}

export function recorder(): RecordedBus {
  const recorded: RecordedBus = {
    pokes: [],
    displaced: [],
    gaps: 0,
    onPoke: (device) => recorded.pokes.push(addressKey(device)),
    onDisplaced: (lease) => recorded.displaced.push(lease),
    onGap: () => recorded.gaps++,
  };
  return recorded;
}

export function device(name: string): DeviceAddress {
  return { userId: name, deviceId: 1 };
}

export interface OpenBus {
  bus: Bus;
  close(): Promise<void>;
}

/** @param open makes a bus on which nobody has leased anything; not started */
export function describeBus(backend: string, open: () => Promise<OpenBus>): void {
  describe(`the bus (${backend})`, () => {
    const alice = device('alice');
    let opened: OpenBus;
    let bus: Bus;
    let heard: RecordedBus;

    beforeEach(async () => {
      opened = await open();
      bus = opened.bus;
      heard = recorder();
      await bus.start(heard);
    });
    afterEach(async () => {
      await bus.stop();
      await opened.close();
    });

    /** Pokes until a device that is served hears it: by then, every earlier poke has arrived. */
    async function settled(): Promise<void> {
      const marker = device('marker');
      await bus.acquire({ device: marker, fence: 1 });
      await eventually(() => {
        bus.poke([marker]);
        return heard.pokes.includes(addressKey(marker));
      });
      bus.release({ device: marker, fence: 1 });
      heard.pokes = heard.pokes.filter((key) => key !== addressKey(marker));
    }

    it('pokes the listener about a device that it serves', async () => {
      expect(await bus.acquire({ device: alice, fence: 7 })).toBe(true);
      bus.poke([alice]);
      await eventually(() => expect(heard.pokes).toEqual(['alice.1']));
    });

    it('says nothing about a device that nobody serves', async () => {
      bus.poke([alice]);
      await settled();
      expect(heard.pokes).toEqual([]);
    });

    it('keeps apart devices whose names are alike', async () => {
      const served = { userId: 'a.1:b@c-d_e', deviceId: 1 };
      await bus.acquire({ device: served, fence: 1 });
      bus.poke([
        { userId: 'a.1:b@c-d_e', deviceId: 11 },
        { userId: 'a', deviceId: 1 },
        { userId: 'a.1:b@c-d_e.1', deviceId: 1 },
      ]);
      await settled();
      expect(heard.pokes).toEqual([]);
      bus.poke([served]);
      await eventually(() => expect(heard.pokes).toEqual(['a.1:b@c-d_e.1']));
    });

    it('returns from a poke before the listener hears it, and makes one look of many pokes in a tick', async () => {
      await bus.acquire({ device: alice, fence: 1 });
      for (let i = 0; i < 100; i++) bus.poke([alice, alice]);
      expect(heard.pokes).toEqual([]);
      await settled();
      expect(heard.pokes).toEqual(['alice.1']);
    });

    it('tells the connection with the lower number that it was displaced, before the newer one has the lease', async () => {
      await bus.acquire({ device: alice, fence: 1 });
      const acquired = await bus.acquire({ device: alice, fence: 2 });
      expect(acquired).toBe(true);
      expect(heard.displaced).toEqual([{ device: alice, fence: 1 }]);
    });

    it('refuses a lower number while a higher one holds the lease, and displaces nobody', async () => {
      await bus.acquire({ device: alice, fence: 2 });
      expect(await bus.acquire({ device: alice, fence: 1 })).toBe(false);
      expect(heard.displaced).toEqual([]);
    });

    it('grants the same number twice, and displaces nobody', async () => {
      await bus.acquire({ device: alice, fence: 2 });
      expect(await bus.acquire({ device: alice, fence: 2 })).toBe(true);
      expect(heard.displaced).toEqual([]);
    });

    it('lets exactly the highest of many that come at once keep the lease', async () => {
      const fences = [4, 9, 1, 7, 3, 8, 2, 6, 5];
      const granted = await Promise.all(fences.map((fence) => bus.acquire({ device: alice, fence })));
      const kept = fences.filter((fence, i) => {
        const wasDisplaced = heard.displaced.some((lease) => lease.fence === fence);
        return granted[i] && !wasDisplaced;
      });
      expect(kept).toEqual([9]);
    });

    it('immunity 26: a late release of the old connection leaves the new one served', async () => {
      await bus.acquire({ device: alice, fence: 1 });
      await bus.acquire({ device: alice, fence: 2 });
      bus.release({ device: alice, fence: 1 });
      bus.poke([alice]);
      await eventually(() => expect(heard.pokes).toEqual(['alice.1']));
      expect(await bus.acquire({ device: alice, fence: 1 })).toBe(false);
    });

    it('pokes no longer about a device that was released', async () => {
      await bus.acquire({ device: alice, fence: 1 });
      bus.release({ device: alice, fence: 1 });
      bus.poke([alice]);
      await settled();
      expect(heard.pokes).toEqual([]);
    });

    it('grants a lower number once the higher one was released', async () => {
      await bus.acquire({ device: alice, fence: 2 });
      bus.release({ device: alice, fence: 2 });
      expect(await bus.acquire({ device: alice, fence: 1 })).toBe(true);
      bus.poke([alice]);
      await eventually(() => expect(heard.pokes).toEqual(['alice.1']));
    });

    it('ignores the release of what was never acquired', () => {
      expect(() => bus.release({ device: alice, fence: 3 })).not.toThrow();
    });

    it('goes on after a listener has thrown', async () => {
      const record = heard.onPoke;
      heard.onPoke = () => {
        throw new Error('a fault of the listener');
      };
      await bus.acquire({ device: alice, fence: 1 });
      bus.poke([alice]);
      await new Promise((resolve) => setImmediate(resolve));
      heard.onPoke = record;
      bus.poke([alice]);
      await eventually(() => expect(heard.pokes).toContain('alice.1'));
    });

    it('reports no trouble and no gap while the link works', async () => {
      await settled();
      expect(bus.trouble()).toBeNull();
      expect(heard.gaps).toBe(0);
    });
  });
}
