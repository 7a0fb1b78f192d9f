import { describe, expect, it } from 'vitest';
import { createGatherer } from '../../src/lib/gather.ts';
import { createManualClock } from '../support/manual-clock.ts';

/** A runner whose batches end when the test says so. */
function heldBatches<Item>() {
  const batches: { items: Item[]; end(): void; fail(error: Error): void }[] = [];
  const run = (items: Item[]): Promise<Item[]> =>
    new Promise((resolve, reject) => {
      batches.push({ items, end: () => resolve(items), fail: reject });
    });
  return { batches, run };
}

const turn = () => new Promise((resolve) => setImmediate(resolve));

it('gathers what comes while a batch is under way, and gives each item its own result', async () => {
  const { batches, run } = heldBatches<number>();
  const gatherer = createGatherer({ batchMax: 3, run });
  const first = gatherer.submit(1);
  await turn();
  const later = [2, 3, 4, 5].map((item) => gatherer.submit(item));
  await turn();
  expect(batches.map((batch) => batch.items)).toEqual([[1]]);
  batches[0]!.end();
  expect(await first).toBe(1);
  await turn();
  expect(batches[1]!.items).toEqual([2, 3, 4]);
  batches[1]!.end();
  await turn();
  batches[2]!.end();
  expect(await Promise.all(later)).toEqual([2, 3, 4, 5]);
});

it('rejects every item of a batch that failed, and goes on', async () => {
  const { batches, run } = heldBatches<number>();
  const gatherer = createGatherer({ batchMax: 2, run });
  const failed = Promise.allSettled([gatherer.submit(1), gatherer.submit(2)]);
  const next = gatherer.submit(3);
  await turn();
  batches[0]!.fail(new Error('away'));
  expect((await failed).map(({ status }) => status)).toEqual(['rejected', 'rejected']);
  await turn();
  batches[1]!.end();
  expect(await next).toBe(3);
});

it('rejects a batch whose results are not one for each item, and goes on', async () => {
  const results: unknown[] = [undefined, [], [2]];
  const gatherer = createGatherer({ batchMax: 1, run: async () => results.shift() as number[] });
  const outcomes = await Promise.allSettled([0, 1, 2].map((item) => gatherer.submit(item)));
  expect(outcomes.map(({ status }) => status)).toEqual(['rejected', 'rejected', 'fulfilled']);
});

it('hands results on when the next batch is on its way, and at once where none waits', async () => {
  const { batches, run } = heldBatches<string>();
  const preparations: { end(): void; fail(error: Error): void }[] = [];
  const gatherer = createGatherer({
    batchMax: 1,
    prepare: () =>
      new Promise<void>((resolve, reject) => {
        preparations.push({ end: resolve, fail: reject });
      }),
    run,
  });
  const heard: string[] = [];
  const all = ['a', 'b', 'c', 'd'].map((item) =>
    gatherer.submit(item).then(
      (result) => heard.push(result),
      (error: Error) => heard.push(error.message),
    ),
  );
  await turn();
  preparations[0]!.end();
  await turn();
  batches[0]!.end();
  await turn();
  expect([heard, batches.length]).toEqual([[], 1]);
  preparations[1]!.end();
  await turn();
  await turn();
  expect([heard, batches.length]).toEqual([['a'], 2]);
  batches[1]!.end();
  await turn();
  // What the next one needs is not to be had: that holds up nothing.
  preparations[2]!.fail(new Error('away'));
  await turn();
  await turn();
  expect(heard).toEqual(['a', 'b']);
  preparations[3]!.end();
  await turn();
  await turn();
  expect(heard).toEqual(['a', 'b', 'away']);
  batches[2]!.end();
  await Promise.all(all);
  expect(heard).toEqual(['a', 'b', 'away', 'd']);
});

it('takes no more into a batch than may be in one, but for an item that is too heavy for any', async () => {
  const { batches, run } = heldBatches<number>();
  const weight = { of: (item: number) => item, max: 10 };
  const gatherer = createGatherer({ batchMax: 9, weight, run });
  const all = [4, 6, 1, 20, 3].map((item) => gatherer.submit(item));
  for (let index = 0; index < 4; index++) {
    await turn();
    batches[index]!.end();
  }
  expect(await Promise.all(all)).toEqual([4, 6, 1, 20, 3]);
  expect(batches.map((batch) => batch.items)).toEqual([[4, 6], [1], [20], [3]]);
});

it('lingers for some turns between two batches, so that what comes one in a turn is gathered; not where a full one waits', async () => {
  const { batches, run } = heldBatches<number>();
  const gatherer = createGatherer({ batchMax: 4, lingersBy: createManualClock(), run });
  const heard: number[] = [];
  const submit = (item: number) => gatherer.submit(item).then((result) => heard.push(result));
  const all = [submit(1)];
  await turn();
  // The first never waits, and its result waits for no other batch.
  expect(batches.map((batch) => batch.items)).toEqual([[1]]);
  all.push(submit(2));
  batches[0]!.end();
  await turn();
  expect(heard).toEqual([1]);
  all.push(submit(3));
  await turn();
  expect(batches).toHaveLength(1);
  all.push(submit(4), submit(5), submit(6));
  await turn();
  await turn();
  expect(batches.map((batch) => batch.items)).toEqual([[1], [2, 3, 4, 5]]);
  batches[1]!.end();
  // Alone it goes too, some turns later.
  while (batches.length < 3) await turn();
  batches[2]!.end();
  await Promise.all(all);
  expect(heard).toEqual([1, 2, 3, 4, 5, 6]);
});

describe('the line', () => {
  const refused = new Error('refused');
  const outcomeOf = (submitted: Promise<unknown>): Promise<string> => submitted.then(() => 'done', String);

  it('refuses what has waited for long when a batch ends, whatever became of it; what came later goes', async () => {
    const { batches, run } = heldBatches<string>();
    const clock = createManualClock();
    const gatherer = createGatherer({ batchMax: 2, line: { refusal: () => refused, clock }, run });
    const all = [outcomeOf(gatherer.submit('under way'))];
    await turn();
    for (const item of ['early', 'early too']) all.push(outcomeOf(gatherer.submit(item)));
    await clock.advance(4_000);
    all.push(outcomeOf(gatherer.submit('late')));
    await clock.advance(2_000);
    batches[0]!.fail(new Error('away'));
    await turn();
    expect(batches.map((batch) => batch.items)).toEqual([['under way'], ['late']]);
    batches[1]!.end();
    expect(await Promise.all(all)).toEqual(['Error: away', 'Error: refused', 'Error: refused', 'done']);
  });

  it('hands on the results of a batch also where all that waited is refused', async () => {
    const { batches, run } = heldBatches<string>();
    const clock = createManualClock();
    const gatherer = createGatherer({ batchMax: 2, line: { refusal: () => refused, clock }, run });
    const all = [outcomeOf(gatherer.submit('slow'))];
    await turn();
    all.push(outcomeOf(gatherer.submit('early')));
    await clock.advance(6_000);
    batches[0]!.end();
    expect(await Promise.all(all)).toEqual(['done', 'Error: refused']);
    const next = gatherer.submit('next');
    await turn();
    batches[1]!.end();
    expect(await next).toBe('next');
  });

  it('takes so many items, and so much weight, at once', async () => {
    const { batches, run } = heldBatches<number>();
    const weight = { of: (item: number) => item, max: 100_000 };
    const gatherer = createGatherer({
      batchMax: 20_000,
      weight,
      line: { refusal: () => refused, weightMax: 30_000 },
      run,
    });
    const first = gatherer.submit(1);
    await turn();
    const waiting = Array.from({ length: 10_000 }, () => gatherer.submit(1));
    await expect(gatherer.submit(1)).rejects.toBe(refused);
    batches[0]!.end();
    await first;
    await turn();
    // The weight of what is under way counts no more.
    const heavy = gatherer.submit(30_000);
    await expect(gatherer.submit(1)).rejects.toBe(refused);
    batches[1]!.end();
    await turn();
    batches[2]!.end();
    expect(await heavy).toBe(30_000);
    expect(await Promise.all(waiting)).toHaveLength(10_000);
  });
});
