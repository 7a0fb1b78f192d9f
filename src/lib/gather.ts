/** Group commit: while one batch is under way the next one gathers, so a lone item never waits for a timer. */

export interface Gatherer<Item, Result> {
  /** Resolves with the item's own result, or rejects with what its batch was rejected with. */
  submit(item: Item): Promise<Result>;
}

interface Waiting<Item, Result> {
  item: Item;
  resolve(result: Result): void;
  reject(error: unknown): void;
}

/**
 * @param options.run gets at most `batchMax` items, in the order of their submission, and returns their results in
 *   the same order; one call at a time
 */
export function createGatherer<Item, Result>(options: {
  batchMax: number;
  run(items: Item[]): Promise<Result[]>;
}): Gatherer<Item, Result> {
  const { batchMax, run } = options;
  const waiting: Waiting<Item, Result>[] = [];
  let underWay = false;

  async function drain(): Promise<void> {
    underWay = true;
    while (waiting.length > 0) {
      const batch = waiting.splice(0, batchMax);
      try {
        const results = await run(batch.map((entry) => entry.item));
        batch.forEach((entry, index) => {
          entry.resolve(results[index]!);
        });
      } catch (error) {
        for (const entry of batch) entry.reject(error);
      }
    }
    underWay = false;
  }

  return {
    submit(item) {
      return new Promise((resolve, reject) => {
        waiting.push({ item, resolve, reject });
        // The first item waits for the rest of this turn's, which costs it nothing.
        if (!underWay) {
          underWay = true;
          queueMicrotask(() => void drain());
        }
      });
    },
  };
}
