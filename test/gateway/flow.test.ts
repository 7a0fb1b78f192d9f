/** The bucket of frames that one connection may bring: what it holds, and how it fills. */
import { expect, it } from 'vitest';
import { createFlow, type Flow } from '../../src/gateway/flow.ts';
import { createManualClock } from '../support/manual-clock.ts';

/** How many frames it takes until it takes no more. */
function takenBy(flow: Flow): number {
  for (let count = 0; count < 1_000; count++) if (!flow.takes()) return count;
  return Number.POSITIVE_INFINITY;
}

it('takes ten seconds’ worth at once, and as many as the time brings from then on', async () => {
  const clock = createManualClock();
  const flow = createFlow(10, clock);
  expect(takenBy(flow)).toBe(100);
  await clock.advance(99);
  expect(takenBy(flow)).toBe(0);
  await clock.advance(1);
  expect(takenBy(flow)).toBe(1);
  await clock.advance(3_000);
  expect(takenBy(flow)).toBe(30);
  await clock.advance(3_600_000);
  expect(takenBy(flow)).toBe(100);
});

it('loses nothing by a clock that is set back', async () => {
  const clock = createManualClock();
  const flow = createFlow(10, clock);
  takenBy(flow);
  await clock.advance(-3_600_000);
  expect(takenBy(flow)).toBe(0);
  await clock.advance(1_000);
  expect(takenBy(flow)).toBe(10);
});
