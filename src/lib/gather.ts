/** Group commit: while a batch is under way the next one gathers, so a lone item never waits for a timer. */
import { type Clock, steadyClock } from './clock.ts';

export interface Gatherer<Item, Result> {
  /**
   * Resolves with the item's own result, or rejects with what its batch was rejected with, or with the line's refusal. Of
   * two batches the later may be told first.
   */
  submit(item: Item): Promise<Result>;
}

/**
 * What may wait while a batch is under way: at most {@link LINE_ITEMS_MAX}, and what has waited for longer than
 * {@link LINE_WAIT_MAX_MS} when the batch ends is refused, since whoever asked may have given up. Nothing was begun of what
 * is refused.
 */
export interface Line {
  /** What an item is refused with. */
  refusal(): Error;
  /** Of all that wait, by the gatherer's `weight`. */
  weightMax?: number;
  /** By default the steady one. */
  clock?: Clock;
}

const LINE_ITEMS_MAX = 10_000;
/** Half of what a query may take. */
const LINE_WAIT_MAX_MS = 5_000;

export interface GathererOptions<Item, Result, Prepared> {
  batchMax: number;
  /** A batch holds no more than `max` in all, but for an item that weighs more alone. */
  weight?: { of(item: Item): number; max: number };
  /**
   * Between two batches some turns of the event loop pass, and no more of this clock's time than a few milliseconds, unless
   * a full one waits. For items that come one in a turn, as connections do: by itself a batch would hold what came within
   * a round trip, which is one or two.
   */
  lingersBy?: Clock;
  /** Without it whatever comes may wait, for as long as it takes. */
  line?: Line;
  /** Fetches what a batch needs before it runs, as locks are. */
  prepare?(items: Item[]): Promise<Prepared>;
  /**
   * Gets at most `batchMax` items, in the order of their submission, and returns their results in the same order.
   */
  run(items: Item[], prepared: Prepared): Promise<Result[]>;
}

interface Waiting<Item, Result> {
  item: Item;
  weight: number;
  sinceMs: number;
  resolve(result: Result): void;
  reject(error: unknown): void;
}

/** Of an idle event loop they take microseconds; of a busy one, no more than the time. */
const LINGER_TURNS_MAX = 16;
const LINGER_MAX_MS = 10;

export function createGatherer<Item, Result, Prepared = void>(
  options: GathererOptions<Item, Result, Prepared>,
): Gatherer<Item, Result> {
  const { batchMax, weight, lingersBy, line, prepare, run } = options;
  const lineClock = line?.clock ?? steadyClock;
  let waiting: Waiting<Item, Result>[] = [];
  let waitingWeight = 0;
  /** A batch is under way, or begins with the end of this turn. */
  let isBusy = false;

  function takeBatch(): Waiting<Item, Result>[] {
    let count = 0;
    let weightOfBatch = 0;
    for (const entry of waiting) {
      if (count === batchMax) break;
      if (weight !== undefined && count > 0 && weightOfBatch + entry.weight > weight.max) break;
      weightOfBatch += entry.weight;
      count += 1;
    }
    return takeFirst(count);
  }

  function takeFirst(count: number): Waiting<Item, Result>[] {
    const first = waiting.slice(0, count);
    waiting = waiting.slice(count);
    for (const entry of first) waitingWeight -= entry.weight;
    return first;
  }

  function isRefused(itemWeight: number): boolean {
    if (line === undefined) return false;
    return (
      waiting.length >= LINE_ITEMS_MAX ||
      waitingWeight + itemWeight > (line.weightMax ?? Number.POSITIVE_INFINITY)
    );
  }

  function refuseLate({ refusal }: Line): void {
    const beforeMs = lineClock.nowMs() - LINE_WAIT_MAX_MS;
    const inTime = waiting.findIndex(({ sinceMs }) => sinceMs >= beforeMs);
    const lateCount = inTime === -1 ? waiting.length : inTime;
    if (lateCount === 0) return;
    for (const { reject } of takeFirst(lateCount)) reject(refusal());
  }

  async function linger(clock: Clock): Promise<void> {
    const endMs = clock.nowMs() + LINGER_MAX_MS;
    for (let turns = 0; turns < LINGER_TURNS_MAX; turns++) {
      if (waiting.length >= batchMax || clock.nowMs() >= endMs) return;
      await new Promise((resolve) => setImmediate(resolve));
    }
  }

  async function work(): Promise<void> {
    let handOnLast = (): void => {};
    while (waiting.length > 0) {
      const handOn = await carryOut(takeBatch(), handOnLast);
      if (line !== undefined) refuseLate(line);
      if (waiting.length === 0) handOn();
      else if (lingersBy === undefined) handOnLast = () => setImmediate(handOn);
      else {
        handOn();
        await linger(lingersBy);
      }
    }
    isBusy = false;
  }

  /**
   * The results of a batch are handed on when the next one is on its way: what is done with a hundred results takes as
   * long as a statement, and whoever works on batches would idle meanwhile.
   *
   * @returns hands its own on
   */
  async function carryOut(
    batch: readonly Waiting<Item, Result>[],
    handOnLast: () => void,
  ): Promise<() => void> {
    try {
      const items = batch.map((entry) => entry.item);
      let running: Promise<Result[]>;
      try {
        running = run(items, (await prepare?.(items)) as Prepared);
      } finally {
        handOnLast();
      }
      const results = await running;
      if (results.length !== batch.length) throw new Error('a batch has a result for each of its items');
      return () => {
        batch.forEach((entry, index) => {
          entry.resolve(results[index]!);
        });
      };
    } catch (error) {
      return () => {
        for (const entry of batch) entry.reject(error);
      };
    }
  }

  return {
    submit(item) {
      return new Promise((resolve, reject) => {
        const itemWeight = weight?.of(item) ?? 0;
        if (isRefused(itemWeight)) {
          reject(line!.refusal());
          return;
        }
        waitingWeight += itemWeight;
        waiting.push({
          item,
          weight: itemWeight,
          sinceMs: line === undefined ? 0 : lineClock.nowMs(),
          resolve,
          reject,
        });
        if (isBusy) return;
        isBusy = true;
        // The first item waits for the rest of this turn's, which costs it nothing.
        queueMicrotask(() => void work());
      });
    },
  };
}
