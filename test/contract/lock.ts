// The promises of ports/lock, for every backend whose engine is there.
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { DeviceLocks } from '../../src/ports/lock.ts';
import { eventually } from '../support/eventually.ts';
import { device } from './bus.ts';

export interface OpenLocks {
  locks: DeviceLocks;
  /** The same locks, as another node sees them; the same object where there is only one node. */
  otherNode: DeviceLocks;
  close(): Promise<void>;
}

/** @param open makes locks of which none is held, and which expire after `lockMs` */
export function describeLocks(backend: string, open: (lockMs: number) => Promise<OpenLocks>): void {
  describe(`the device locks (${backend})`, () => {
    const [alice, bob, carol] = [device('alice'), device('bob'), device('carol')];
    let opened: OpenLocks[] = [];
    let locks: DeviceLocks;
    let otherNode: DeviceLocks;

    async function start(lockMs: number): Promise<void> {
      const started = await open(lockMs);
      opened.push(started);
      ({ locks, otherNode } = started);
    }

    beforeEach(() => start(60_000));
    afterEach(async () => {
      await Promise.all(opened.map((one) => one.close()));
      opened = [];
    });

    it('holds every device that is free', async () => {
      const mine = await locks.acquire([alice, bob]);
      expect(mine.held).toEqual(new Set(['alice.1', 'bob.1']));
      expect(mine.isLost()).toBe(false);
    });

    it('holds those that are free, and not those that another holds', async () => {
      await locks.acquire([alice, bob]);
      const theirs = await otherNode.acquire([bob, carol]);
      expect(theirs.held).toEqual(new Set(['carol.1']));
    });

    it('gives back what it held', async () => {
      const mine = await locks.acquire([alice, bob]);
      await mine.release();
      const theirs = await otherNode.acquire([alice, bob]);
      expect(theirs.held).toEqual(new Set(['alice.1', 'bob.1']));
    });

    it('gives back nothing of what it asked for and did not get', async () => {
      await locks.acquire([alice]);
      const theirs = await otherNode.acquire([alice, bob]);
      await theirs.release();
      expect((await otherNode.acquire([alice])).held).toEqual(new Set());
    });

    it('lets exactly one of many that come at once hold a device', async () => {
      const all = await Promise.all(
        Array.from({ length: 40 }, (_, i) => (i % 2 === 0 ? locks : otherNode).acquire([alice])),
      );
      expect(all.filter((one) => one.held.size === 1)).toHaveLength(1);
    });

    it('numbers acquisitions so that of two holders the newer has the higher number', async () => {
      const fences: number[] = [];
      for (let i = 0; i < 10; i++) {
        const one = await (i % 2 === 0 ? locks : otherNode).acquire(i % 3 === 0 ? [alice, bob] : [alice]);
        expect(one.held.has('alice.1')).toBe(true);
        fences.push(one.fence);
        await one.release();
      }
      expect(fences).toEqual([...new Set(fences)].sort((a, b) => a - b));
      expect(fences.every(Number.isSafeInteger)).toBe(true);
    });

    it('lets locks expire by themselves, and says so', async () => {
      await start(30);
      const mine = await locks.acquire([alice]);
      await eventually(async () => expect((await otherNode.acquire([alice])).held.size).toBe(1));
      expect(mine.isLost()).toBe(true);
    });

    it('never frees the lock of the owner that came after its expiry', async () => {
      await start(500);
      const mine = await locks.acquire([alice]);
      let theirs = mine;
      await eventually(async () => {
        theirs = await otherNode.acquire([alice]);
        return theirs.held.size === 1;
      });
      await mine.release();
      expect(theirs.isLost()).toBe(false);
      expect((await locks.acquire([alice])).held).toEqual(new Set());
    });

    it('can be released twice, and frees nothing the second time', async () => {
      const mine = await locks.acquire([alice]);
      await mine.release();
      await otherNode.acquire([alice]);
      await mine.release();
      expect((await locks.acquire([alice])).held).toEqual(new Set());
    });

    it('takes an empty list', async () => {
      const none = await locks.acquire([]);
      expect(none.held).toEqual(new Set());
      await none.release();
    });
  });
}
