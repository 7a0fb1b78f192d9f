import { expect, it } from 'vitest';
import { createGatherer } from '../../src/lib/gather.ts';

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

it('runs a second batch beside the first where it is worth it, without the keys that are under way', async () => {
  const { batches, run } = heldBatches<string>();
  const gatherer = createGatherer({ batchMax: 10, besideMin: 2, keyOf: (item: string) => item[0]!, run });
  const all = [gatherer.submit('a1')];
  await turn();
  all.push(gatherer.submit('a2'), gatherer.submit('b1'));
  await turn();
  // Of the two that wait, one is of a device that is under way.
  expect(batches.map((batch) => batch.items)).toEqual([['a1']]);
  all.push(gatherer.submit('b2'), gatherer.submit('c1'));
  await turn();
  expect(batches.map((batch) => batch.items)).toEqual([['a1'], ['b1', 'b2', 'c1']]);
  all.push(gatherer.submit('d1'), gatherer.submit('d2'), gatherer.submit('d3'));
  await turn();
  expect(batches).toHaveLength(2);
  batches[1]!.end();
  await turn();
  // The older one of key a still waits for its like.
  expect(batches[2]!.items).toEqual(['d1', 'd2', 'd3']);
  batches[0]!.end();
  batches[2]!.end();
  await turn();
  expect(batches[3]!.items).toEqual(['a2']);
  batches[3]!.end();
  expect(await Promise.all(all)).toEqual(['a1', 'a2', 'b1', 'b2', 'c1', 'd1', 'd2', 'd3']);
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
