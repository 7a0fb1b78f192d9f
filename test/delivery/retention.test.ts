// The retention of messages: what of it fails, and what is done all the same.
import { expect, it } from 'vitest';
import { sweepMessages } from '../../src/delivery/retention.ts';
import type { MessageStore } from '../../src/ports/message-store.ts';
import { createManualClock } from '../support/manual-clock.ts';

const failure = new Error('no');

const STEPS = ['settle', 'bounceStale', 'sweep'] as const;

/** @param touched rows of each batch of the sweep */
function steps({ failing, touched = [] }: { failing?: (typeof STEPS)[number]; touched?: number[] }) {
  const done: string[] = [];
  const parts = {
    clock: createManualClock(),
    bounces: {
      async settle() {
        done.push('settle');
        if (failing === 'settle') throw failure;
      },
      async bounceStale() {
        done.push('bounceStale');
        if (failing === 'bounceStale') throw failure;
        return 0;
      },
    },
    messages: {
      async sweep() {
        done.push('sweep');
        if (failing === 'sweep') throw failure;
        return touched.shift() ?? 0;
      },
    } as Pick<MessageStore, 'sweep'> as MessageStore,
  };
  return { done, parts };
}

it.each(STEPS)('does the other steps although %s fails, and throws', async (failing) => {
  const { done, parts } = steps({ failing });
  await expect(sweepMessages(parts)).rejects.toBe(failure);
  expect(done).toEqual(['settle', 'bounceStale', 'sweep', 'settle']);
});

it('sweeps until nothing is left to touch, and settles what each batch has bounced before the next', async () => {
  const { done, parts } = steps({ touched: [64, 1] });
  expect(await sweepMessages(parts)).toBe(65);
  expect(done).toEqual([
    ...['settle', 'bounceStale'],
    ...['sweep', 'settle', 'sweep', 'settle', 'sweep'],
    'settle',
  ]);
});
