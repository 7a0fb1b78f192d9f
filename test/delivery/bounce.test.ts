/** Bounces on their way home: all that are there, however few a statement takes. */
import { expect, it } from 'vitest';
import { createBounces } from '../../src/delivery/bounce.ts';
import { noReports } from '../../src/delivery/reports.ts';
import type { Bus } from '../../src/ports/bus.ts';
import type { MessageStore } from '../../src/ports/message-store.ts';
import { createManualClock } from '../support/manual-clock.ts';

const sender = (userId: string) => ({ userId, deviceId: 1 });

/** @param staleCounts what each look for stale messages bounces */
function bounces(staleCounts: number[] = []) {
  const done: string[] = [];
  const queues = ['anna', 'bea', 'cleo'];
  return {
    done,
    ...createBounces({
      messages: {
        async settleBounces() {
          const senders = queues.splice(0, 1).map(sender);
          return { bounced: [], senders, more: queues.length > 0 };
        },
        async bounceStale() {
          const count = staleCounts.shift() ?? 0;
          done.push(`bounced ${count}`);
          return count;
        },
      } as Partial<MessageStore> as MessageStore,
      bus: { poke: (devices) => done.push(`poked ${devices[0]?.userId}`) } as Partial<Bus> as Bus,
      clock: createManualClock(),
      messageLifetimeMs: 1,
      reports: noReports,
    }),
  };
}

it('are settled until none is left, and each sender is told to look', async () => {
  const { settle, done } = bounces();
  await settle(null);
  expect(done).toEqual(['poked anna', 'poked bea', 'poked cleo']);
});

it('of what a wiped key set left are looked for until none is found: some may be held just then', async () => {
  const { bounceStale, done } = bounces([64, 1]);
  expect(await bounceStale(null)).toBe(65);
  expect(done).toEqual([
    ...['bounced 64', 'bounced 1', 'bounced 0'],
    ...['poked anna', 'poked bea', 'poked cleo'],
  ]);
});
