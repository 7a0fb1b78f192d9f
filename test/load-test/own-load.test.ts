import { expect, it } from 'vitest';
import { watchOwnLoad } from '../../src/load-test/own-load.ts';
import { createManualClock } from '../support/manual-clock.ts';

/** Calls of the system, so that its share of the processor's time is not lost in the program's. */
function work(): void {
  const untilUs = process.cpuUsage().system + 50_000;
  while (process.cpuUsage().system < untilUs) process.memoryUsage();
}

it('tells the processor time of this process, the system’s part too, by the time that passed', async () => {
  const clock = createManualClock();
  const outer = process.cpuUsage();
  const tell = watchOwnLoad(clock);
  const inner = process.cpuUsage();
  work();
  const least = process.cpuUsage(inner);
  await clock.advance(1_000);
  const { cores } = tell();
  const most = process.cpuUsage(outer);
  expect(cores).toBeGreaterThanOrEqual((least.user + least.system) / 1e6);
  expect(cores).toBeLessThanOrEqual((most.user + most.system) / 1e6);
});
