/** Group commit: while a batch is under way the next one gathers, so a lone item never waits for a timer. */

export interface Gatherer<Item, Result> {
  /** Resolves with the item's own result, or rejects with what its batch was rejected with. */
  submit(item: Item): Promise<Result>;
}

export interface GathererOptions<Item, Result> {
  batchMax: number;
  /** A batch holds no more than `max` in all, but for an item that weighs more alone. */
  weight?: { of(item: Item): number; max: number };
  /**
   * Where it is given, a second batch runs beside the first as soon as it would have so many items: whoever works on
   * batches then never idles while the results of the last one are handed out, and no batch is too small to be cheap.
   */
  besideMin?: number;
  /** Items of one key are never in two batches at once; those that come later wait. */
  keyOf?(item: Item): string;
  /**
   * Gets at most `batchMax` items, in the order of their submission, and returns their results in the same order.
   */
  run(items: Item[]): Promise<Result[]>;
}

interface Waiting<Item, Result> {
  item: Item;
  key: string;
  resolve(result: Result): void;
  reject(error: unknown): void;
}

const BATCHES_MAX = 2;

export function createGatherer<Item, Result>(options: GathererOptions<Item, Result>): Gatherer<Item, Result> {
  const { batchMax, weight, besideMin = Number.POSITIVE_INFINITY, keyOf = () => '', run } = options;
  let waiting: Waiting<Item, Result>[] = [];
  /** The keys of what is under way. */
  const busy = new Set<string>();
  let underWay = 0;
  let isStarting = false;
  /** So many must wait before it is worth looking whether a batch can run beside the one under way. */
  let lookAt = besideMin;

  function start(): void {
    isStarting = false;
    while (underWay < BATCHES_MAX && waiting.length >= (underWay === 0 ? 1 : lookAt)) {
      const batch: Waiting<Item, Result>[] = [];
      const left: Waiting<Item, Result>[] = [];
      let weightOfBatch = 0;
      let isFull = false;
      for (const entry of waiting) {
        const itemWeight = weight?.of(entry.item) ?? 0;
        isFull ||=
          batch.length === batchMax ||
          (weight !== undefined && batch.length > 0 && weightOfBatch + itemWeight > weight.max);
        if (isFull || (underWay > 0 && busy.has(entry.key))) {
          left.push(entry);
          continue;
        }
        weightOfBatch += itemWeight;
        batch.push(entry);
      }
      if (underWay > 0 && batch.length < besideMin && !isFull) {
        lookAt = waiting.length + besideMin;
        return;
      }
      waiting = left;
      void carryOut(batch);
    }
  }

  async function carryOut(batch: Waiting<Item, Result>[]): Promise<void> {
    underWay += 1;
    const keys = new Set(batch.map((entry) => entry.key));
    for (const key of keys) busy.add(key);
    try {
      const results = await run(batch.map((entry) => entry.item));
      finish(keys);
      batch.forEach((entry, index) => {
        entry.resolve(results[index]!);
      });
    } catch (error) {
      finish(keys);
      for (const entry of batch) entry.reject(error);
    }
  }

  /** The next batch goes out before the results of this one are handed on. */
  function finish(keys: ReadonlySet<string>): void {
    underWay -= 1;
    for (const key of keys) busy.delete(key);
    lookAt = besideMin;
    start();
  }

  return {
    submit(item) {
      return new Promise((resolve, reject) => {
        waiting.push({ item, key: keyOf(item), resolve, reject });
        // The first item waits for the rest of this turn's, which costs it nothing.
        if (isStarting || underWay === BATCHES_MAX || (underWay > 0 && waiting.length < lookAt)) return;
        isStarting = true;
        queueMicrotask(start);
      });
    },
  };
}
