/**
 * Limits counted in this process: the whole of the limiter where there is one node, the front and the guard of the
 * shared counts where there are many.
 *
 * The memory limiter of `rate-limiter-flexible` is not used for it: it reads the system's clock, holds a timer for
 * each key, knows no most number of keys, and makes a promise for each charge.
 */
import type { Clock } from '../../lib/clock.ts';
import type { Charge, Limit, LimitHit, RateLimiter } from '../../ports/rate-limiter.ts';
import { COUNT, Counts, hashOf, type KeyHash } from './counts.ts';

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
/** At least so many keys of one limit are counted, those that were charged last, and at most twice as many: 13 MB of a limit. */
const KEYS_MAX = 50_000;
/** Clocks and round trips differ by less; two windows of one key by more. */
const SAME_WINDOW_MS = 500;

const NO_HITS: readonly LimitHit[] = [];
/** Stand for the place of a count: of a key that has none, and of one that takes no more and refuses nothing. */
const NONE = -1;
const SPENT = -2;

interface Counter {
  limit: Limit;
  /** Told of at once from here on. */
  nearPoints: number;
  sharePoints: number;
  /**
   * Of each key the number of its window; when that ends; `known`, the count of all nodes when they were last asked; what
   * was charged here since then: `underWay`, being told to the others, and `untold`.
   */
  counts: Counts;
  /** Windows that began, of all keys. */
  windows: number;
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
      counts: new Counts(KEYS_MAX, () => {
        counter.turnedAtMs = clock.nowMs();
      }),
      windows: 0,
      turnedAtMs: clock.nowMs(),
    };
    counters.set(limit.name, counter);
  }

  return {
    charge(charges) {
      const nowMs = clock.nowMs();
      let hits: LimitHit[] | null = null;
      let isRefused = false;
      // The memory of many keys is out of the processor's caches: one whose window runs is looked up once.
      const found: { counter: Counter; hash: KeyHash; at: number; charge: Charge }[] = [];
      for (const charge of charges) {
        const counter = counters.get(charge.limit);
        if (counter === undefined) continue;
        const hash = hashOf(charge.key, charge.subkey ?? '');
        let at = presentPlace(counter, hash, nowMs);
        if (total(counter, at) + charge.points > counter.limit.points) {
          hits ??= [];
          hits.push(hitOf(counter, at, nowMs));
          isRefused ||= !charge.onlyTells;
          at = SPENT;
        }
        found.push({ counter, hash, at, charge });
      }
      if (isRefused) return hits ?? NO_HITS;

      const isShared = shared?.isThere() ?? false;
      let toTell: Promise<LimitHit | null>[] | null = null;
      for (const { counter, hash, at: known, charge } of found) {
        if (known === SPENT || charge.onlyJudged) continue;
        const at = known === NONE ? beginWindow(counter, hash, nowMs) : known;
        if (!add(counter, at, charge.points) || !isShared) continue;
        toTell ??= [];
        toTell.push(tell(counter, hash, at, charge));
      }
      const here = hits ?? NO_HITS;
      if (toTell === null) return here;
      return Promise.all(toTell).then((told) => [...here, ...told.filter((hit) => hit !== null)]);
    },

    note(charge) {
      const counter = counters.get(charge.limit);
      if (counter === undefined) return;
      const nowMs = clock.nowMs();
      const hash = hashOf(charge.key, charge.subkey ?? '');
      const known = presentPlace(counter, hash, nowMs);
      const at = known === NONE ? beginWindow(counter, hash, nowMs) : known;
      const isToBeTold = add(counter, at, charge.points);
      if (isToBeTold && (shared?.isThere() ?? false)) void tell(counter, hash, at, charge);
    },
  };

  /** @returns whether the other nodes are to be told of what the key was charged */
  function add(counter: Counter, at: number, points: number): boolean {
    const { values } = counter.counts;
    values[at + COUNT.untold]! += points;
    return values[at + COUNT.untold]! > counter.sharePoints || total(counter, at) > counter.nearPoints;
  }

  async function tell(
    counter: Counter,
    hash: KeyHash,
    place: number,
    { limit, key, subkey }: Charge,
  ): Promise<LimitHit | null> {
    const { counts } = counter;
    const window = counts.values[place + COUNT.window]!;
    const points = counts.values[place + COUNT.untold]!;
    counts.values[place + COUNT.untold] = 0;
    counts.values[place + COUNT.underWay]! += points;
    const answer = await shared!.add({ limit, key: subkey ? `${key}/${subkey}` : key, points });
    const at = counts.find(hash);
    const { values } = counts;
    if (at === NONE || values[at + COUNT.window] !== window) {
      // Its window has ended meanwhile, and what was charged in it counts in no other.
      return answer === null ? null : hitIfBeyond(counter, answer);
    }
    values[at + COUNT.underWay]! -= points;
    if (answer === null) {
      // It counts here, and for the others when they can be told.
      values[at + COUNT.untold]! += points;
      return null;
    }
    const endsAtMs = clock.nowMs() + answer.endsInMs;
    // Answers may come in another order than that of the counts.
    const isSameWindow = endsAtMs <= values[at + COUNT.endsAtMs]! + SAME_WINDOW_MS;
    values[at + COUNT.known] = isSameWindow
      ? Math.max(values[at + COUNT.known]!, answer.count)
      : answer.count;
    values[at + COUNT.endsAtMs] = endsAtMs;
    return hitIfBeyond(counter, answer);
  }
}

/** @returns where the values of the key's present window are; `NONE` where it has none */
function presentPlace(counter: Counter, hash: KeyHash, nowMs: number): number {
  const at = counter.counts.find(hash);
  return at === NONE || hasEnded(counter, at, nowMs) ? NONE : at;
}

/** @returns where the values of the key's new window are */
function beginWindow(counter: Counter, hash: KeyHash, nowMs: number): number {
  const { counts, limit } = counter;
  if (Math.abs(nowMs - counter.turnedAtMs) >= limit.windowMs) {
    counter.turnedAtMs = nowMs;
    counts.turn();
  }
  let at = counts.find(hash);
  if (at === NONE) at = counts.add(hash);
  const { values } = counts;
  counter.windows += 1;
  values[at + COUNT.window] = counter.windows;
  values[at + COUNT.endsAtMs] = nowMs + limit.windowMs;
  values[at + COUNT.known] = 0;
  values[at + COUNT.underWay] = 0;
  values[at + COUNT.untold] = 0;
  return at;
}

/** A clock that was set back can't tell how old a window is: then it has ended. */
function hasEnded({ counts, limit }: Counter, at: number, nowMs: number): boolean {
  const endsAtMs = counts.values[at + COUNT.endsAtMs]!;
  return nowMs >= endsAtMs || endsAtMs - nowMs > limit.windowMs + SAME_WINDOW_MS;
}

function total({ counts }: Counter, at: number): number {
  if (at === NONE) return 0;
  const { values } = counts;
  return values[at + COUNT.known]! + values[at + COUNT.underWay]! + values[at + COUNT.untold]!;
}

function hitOf({ counts, limit }: Counter, at: number, nowMs: number): LimitHit {
  const endsAtMs = at === NONE ? nowMs + limit.windowMs : counts.values[at + COUNT.endsAtMs]!;
  return { limit: limit.name, retryAfterMs: Math.max(1, endsAtMs - nowMs) };
}

function hitIfBeyond({ limit }: Counter, all: { count: number; endsInMs: number }): LimitHit | null {
  return all.count > limit.points ? { limit: limit.name, retryAfterMs: Math.max(1, all.endsInMs) } : null;
}
