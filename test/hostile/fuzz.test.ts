/** Ten thousand cases of the fuzzer; `npm run fuzz` makes a million. */
import { afterAll, beforeAll, expect, it } from 'vitest';
import { createChance, fuzz } from './fuzz.ts';
import { attackerToken, startTarget, type Target } from './target.ts';

const CASES = 10_000;

let target: Target;

beforeAll(async () => {
  target = await startTarget();
});
afterAll(() => target?.stop());

it('ten thousand mutated frames and bodies find no fault', { timeout: 120_000 }, async () => {
  const seed = Number(process.env.FUZZ_SEED ?? createChance(Date.now()).below(2 ** 31));
  process.stdout.write(`  hostile: fuzzing with FUZZ_SEED=${seed}\n`);
  const report = await target.attack(`${CASES} cases of the fuzzer`, () =>
    fuzz({
      url: target.gateway.url,
      cases: CASES,
      seed,
      tokenOf: attackerToken,
      complaints: () => target.complaints(),
    }),
  );
  const { findings, ...counts } = report;
  process.stdout.write(`  hostile: ${JSON.stringify(counts)}\n`);
  expect(findings).toEqual([]);
  expect(counts.requests + counts.frames + counts.http).toBe(CASES);
});

it('the same seed makes the same attempts', () => {
  const [one, again, other] = [7, 7, 8].map((seed) => {
    const chance = createChance(seed);
    return Array.from({ length: 100 }, () => chance.below(1_000_000));
  });
  expect(one).toEqual(again);
  expect(one).not.toEqual(other);
});
