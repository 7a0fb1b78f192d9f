// The promises of ports/lock, for every backend whose engine is there.
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { DeviceLocks } from '../../src/ports/lock.ts';
import { addressKey } from '../../src/protocol/ids.ts';
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

    it('holds as many as a batch of claims has, but for those that another holds, and gives all of them back', async () => {
      const crowd = Array.from({ length: 512 }, (_, index) => device(`crowd-${index}`));
      const taken = [3, 127, 128, 300, 511].map((index) => crowd[index]!);
      const theirs = await otherNode.acquire(taken);
      const mine = await locks.acquire(crowd);
      const free = crowd.filter((each) => !taken.includes(each)).map(addressKey);
      expect(mine.held).toEqual(new Set(free));
      await Promise.all([mine.release(), theirs.release()]);
      expect((await otherNode.acquire(crowd)).held.size).toBe(512);
    });

    it('lets exactly one of many that come at once hold a device', async () => {
      const all = await Promise.all(
        Array.from({ length: 40 }, (_, i) => (i % 2 === 0 ? locks : otherNode).acquire([alice])),
      );
      expect(all.filter((one) => one.held.size === 1)).toHaveLength(1);
    });

    it('lets locks expire by themselves, those that were asked for longer later', async () => {
      await start(30);
      await locks.acquire([bob], 60_000);
      await locks.acquire([alice]);
      await eventually(async () => expect((await otherNode.acquire([alice])).held.size).toBe(1));
      expect((await otherNode.acquire([bob])).held.size).toBe(0);
    });

    it('never frees the lock of the owner that came after its expiry', async () => {
      await start(500);
      const mine = await locks.acquire([alice]);
      let theirs = mine;
      await eventually(async () => {
        theirs = await otherNode.acquire([alice], 60_000);
        return theirs.held.size === 1;
      });
      await mine.release();
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
