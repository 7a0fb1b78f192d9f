/** What the files of faults share: a stage for the whole file, and three seeds for each fault. */
import { afterAll, afterEach, beforeEach, expect, it } from 'vitest';
import { type Fault, run } from './run.ts';
import { type ProcessStage, startStage } from './stage.ts';

const SEEDS = [1, 2, 3];

/** @returns declares that the rules hold over a fault, which may depend on the seed */
export function onStage(): (name: string, faultOf: (seed: number) => Fault) => void {
  let stage: ProcessStage | null = null;
  const stop = async (): Promise<void> => {
    await stage?.stop();
    stage = null;
  };
  beforeEach(async () => {
    stage ??= await startStage();
  });
  // What a fault broke and a failure left so must not fail the next one.
  afterEach(({ task }) => (task.result?.state === 'fail' ? stop() : undefined));
  afterAll(stop);
  return (name, faultOf) => {
    it.each(SEEDS)(`${name} (seed %i)`, { timeout: 150_000 }, async (seed) => {
      const { violations, counts } = await run({ stage: stage!, seed, fault: faultOf(seed) });
      expect(violations, `seed ${seed}: ${JSON.stringify(counts)}`).toEqual([]);
    });
  };
}
