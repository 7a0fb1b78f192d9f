/** Clocks of gateways that are set by an hour, while they work. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Engine, startRedis } from '../support/engines.ts';
import { type LocalStage, startLocalStage } from './local-stage.ts';
import { type Fault, run } from './run.ts';

const HOUR_MS = 3_600_000;

let redis: Engine;
let stage: LocalStage;
beforeAll(async () => {
  redis = await startRedis();
  stage = await startLocalStage(redis.url);
});
afterAll(async () => {
  await stage?.stop();
  await redis?.stop();
});

const clockStepped: Fault<LocalStage> = async ({ stage, random, actions }) => {
  for (let i = 0; i < 3; i++) {
    // On one node or on both, so that they may differ by two hours.
    for (const clock of stage.clocks) {
      if (random.happens(0.7)) clock.stepTo(random.pick([-HOUR_MS, 0, HOUR_MS]));
    }
    await actions(8);
  }
  for (const clock of stage.clocks) clock.stepTo(0);
  await actions(5);
};

describe('the rules hold', () => {
  it.each([1, 2, 3])(
    'when clocks are set by an hour, forth and back (seed %i)',
    { timeout: 150_000 },
    async (seed) => {
      const { violations, counts } = await run({ stage, seed, fault: clockStepped });
      expect(violations, `seed ${seed}: ${JSON.stringify(counts)}`).toEqual([]);
    },
  );
});
