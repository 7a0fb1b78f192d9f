/**
 * Limits counted in this process: the whole of the limiter where there is one node, the front and the guard of the
 * shared counts where there are many.
 *
 * The memory limiter of `rate-limiter-flexible` is not used for it: it reads the system's clock, holds a timer for
 * each key, knows no most number of keys, and makes a promise for each charge.
 */
import type { Clock } from '../../lib/clock.ts';
import { createRecent, type Recent } from '../../lib/recent.ts';
import type { Charge, Limit, LimitHit, RateLimiter } from '../../ports/rate-limiter.ts';

/** The counts that all nodes share. */
export interface SharedCounts {
  /** False while they are away: nothing is asked of them then. */
  isThere(): boolean;
  /**
   * Adds to the count of a key, in one round trip with everything that is added in the same turn.
   *
   * @returns the count of all nodes and when its window ends; null where they can't be reached, nothing is added then
   */
  add(charge: Charge): Promise<{ count: number; endsInMs: number } | null>;
}

/** A node tells of a key's charges when they make up this part of the limit. */
const SHARES_PER_LIMIT = 16;
/** At least so many keys of one limit are counted, those that were charged last, and at most twice as many. */
const KEYS_MAX = 50_000;
/** Clocks and round trips differ by less; two windows of one key by more. */
const SAME_WINDOW_MS = 500;

const NO_HITS: readonly LimitHit[] = [];
/** Stands for a count that takes no more, and refuses nothing. */
const SPENT: Count = { endsAtMs: 0, known: 0, underWay: 0, untold: 0 };

interface Count {
  endsAtMs: number;
  /** The count of all nodes when they were last asked. */
  known: number;
  /** Charged here since then: being told to the others, and not told yet. */
  underWay: number;
  untold: number;
}

interface Counter {
  limit: Limit;
  /** Told of at once from here on. */
  nearPoints: number;
  sharePoints: number;
  counts: Recent<Count>;
  /** When the present generation of `counts` began: windows that began before the one before it have ended. */
  turnedAtMs: number;
}

/** @param parts.shared what the nodes share; null where this is the only node */
export function createInProcessRateLimiter(parts: {
  limits: readonly Limit[];
  clock: Clock;
  shared?: SharedCounts | null;
}): RateLimiter {
  const { clock, shared = null } = parts;
  const counters = new Map<string, Counter>();
  for (const limit of parts.limits) {
    const sharePoints = Math.floor(limit.points / SHARES_PER_LIMIT);
    const counter: Counter = {
      limit,
      sharePoints,
      nearPoints: limit.points - sharePoints,
      counts: createRecent(KEYS_MAX, () => {
        counter.turnedAtMs = clock.nowMs();
      }),
      turnedAtMs: clock.nowMs(),
    };
    counters.set(limit.name, counter);
  }

  return {
    charge(charges) {
      const nowMs = clock.nowMs();
      let hits: LimitHit[] | null = null;
      let isRefused = false;
      // The memory of many keys is out of the processor's caches: each is looked up once.
      const found: (Count | undefined)[] = [];
      for (const { limit, key, points, onlyTells = false } of charges) {
        const counter = counters.get(limit);
        const count = counter === undefined ? undefined : presentCount(counter, key, nowMs);
        found.push(count);
        if (counter === undefined) continue;
        if ((count === undefined ? 0 : total(count)) + points <= counter.limit.points) continue;
        hits ??= [];
        hits.push(hitOf(counter, count, nowMs));
        isRefused ||= !onlyTells;
        found[found.length - 1] = SPENT;
      }
      if (isRefused) return hits ?? NO_HITS;

      const isShared = shared?.isThere() ?? false;
      let toTell: Promise<LimitHit | null>[] | null = null;
      for (const [index, { limit, key, points }] of charges.entries()) {
        const counter = counters.get(limit);
        const known = found[index];
        if (counter === undefined || known === SPENT) continue;
        const count = known ?? newCount(counter, key, nowMs);
        count.untold += points;
        if (!isShared) continue;
        if (count.untold <= counter.sharePoints && total(count) <= counter.nearPoints) continue;
        toTell ??= [];
        toTell.push(tell(counter, key, count));
      }
      const here = hits ?? NO_HITS;
      if (toTell === null) return here;
      return Promise.all(toTell).then((told) => [...here, ...told.filter((hit) => hit !== null)]);
    },
  };

  async function tell(counter: Counter, key: string, count: Count): Promise<LimitHit | null> {
    const points = count.untold;
    count.untold = 0;
    count.underWay += points;
    const answer = await shared!.add({ limit: counter.limit.name, key, points });
    count.underWay -= points;
    if (answer === null) {
      // It counts here, and for the others when they can be told.
      count.untold += points;
      return null;
    }
    const nowMs = clock.nowMs();
    const endsAtMs = nowMs + answer.endsInMs;
    // Answers may come in another order than that of the counts.
    const isSameWindow = endsAtMs <= count.endsAtMs + SAME_WINDOW_MS;
    count.known = isSameWindow ? Math.max(count.known, answer.count) : answer.count;
    count.endsAtMs = endsAtMs;
    return answer.count > counter.limit.points ? hitOf(counter, count, nowMs) : null;
  }
}

function presentCount(counter: Counter, key: string, nowMs: number): Count | undefined {
  const count = counter.counts.get(key);
  return count === undefined || hasEnded(count, counter, nowMs) ? undefined : count;
}

function newCount(counter: Counter, key: string, nowMs: number): Count {
  const { counts, limit } = counter;
  if (Math.abs(nowMs - counter.turnedAtMs) >= limit.windowMs) {
    counter.turnedAtMs = nowMs;
    counts.turn();
  }
  const count = { endsAtMs: nowMs + limit.windowMs, known: 0, underWay: 0, untold: 0 };
  counts.set(key, count);
  return count;
}

/** A clock that was set back can't tell how old a window is: then it has ended. */
function hasEnded(count: Count, { limit }: Counter, nowMs: number): boolean {
  return nowMs >= count.endsAtMs || count.endsAtMs - nowMs > limit.windowMs + SAME_WINDOW_MS;
}

function total(count: Count): number {
  return count.known + count.underWay + count.untold;
}

function hitOf({ limit }: Counter, count: Count | undefined, nowMs: number): LimitHit {
  const endsAtMs = count?.endsAtMs ?? nowMs + limit.windowMs;
  return { limit: limit.name, retryAfterMs: Math.max(1, endsAtMs - nowMs) };
}
