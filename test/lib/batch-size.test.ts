import { expect, it } from 'vitest';
import { createBatchSize } from '../../src/lib/batch-size.ts';
import { createManualClock } from '../support/manual-clock.ts';

it('grows while batches are quick, and shrinks as soon as one lasts too long, also one that fails', async () => {
  const clock = createManualClock();
  const size = createBatchSize({ clock, rowsMax: 400, durationMaxMs: 40 });
  const lasting = (ms: number) => size.run(async () => void (await clock.advance(ms)));
  expect(size.rows()).toBe(50);
  for (const rows of [100, 200, 400, 400]) {
    await lasting(5);
    expect(size.rows()).toBe(rows);
  }
  await lasting(41);
  expect(size.rows()).toBe(200);
  await lasting(20);
  expect(size.rows()).toBe(200);
  const failing = size.run(async () => {
    await clock.advance(500);
    throw new Error('away');
  });
  await expect(failing).rejects.toThrow('away');
  expect(size.rows()).toBe(100);
  for (let index = 0; index < 10; index++) await lasting(41);
  expect(size.rows()).toBe(1);
});
