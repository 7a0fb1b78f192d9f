/** The reader of the inspector's stream, while there is nothing to read. */
import { expect, it } from 'vitest';
import { readStream } from '../../src/admin/stream-client.ts';
import { eventually } from '../support/eventually.ts';
import { createManualClock } from '../support/manual-clock.ts';

it('leaves nothing behind of each try in a long outage', async () => {
  const clock = createManualClock();
  const ending = new AbortController();
  const warnings: Error[] = [];
  const note = (warning: Error): void => void warnings.push(warning);
  process.on('warning', note);
  const delaysMs: number[] = [];
  const reading = readStream({
    url: 'http://127.0.0.1:1',
    token: 'any',
    filter: {},
    clock,
    signal: ending.signal,
    onFrame: () => {},
    onLost: (_, delayMs) => void delaysMs.push(delayMs),
  });
  for (let tries = 1; tries <= 15; tries++) {
    await eventually(() => expect(delaysMs).toHaveLength(tries));
    await clock.advance(delaysMs.at(-1)!);
  }
  ending.abort();
  await reading;
  await new Promise((resolve) => setImmediate(resolve));
  process.off('warning', note);
  expect(warnings).toEqual([]);
});
