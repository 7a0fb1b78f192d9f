/** Limits that all nodes share through Redis; with Redis away, each node holds them by its own counts. */
import { RateLimiterRedis } from 'rate-limiter-flexible';
import type { Clock } from '../../lib/clock.ts';
import type { Log } from '../../lib/log.ts';
import type { Limit, RateLimiter } from '../../ports/rate-limiter.ts';
import { createInProcessRateLimiter, type SharedCounts } from '../in-process/rate-limiter.ts';
import { isUp, type RedisLink, within } from './connect.ts';

const ANSWER_WAIT_MAX_MS = 100;
/** After a failure, Redis is asked again at most this often. */
const TRIAL_PERIOD_MS = 1_000;

/**
 * The library's script adds to one key a call, about 15 µs of this process. That is borne because the front of
 * `in-process/rate-limiter.ts` asks once for many charges; and what a request asks goes out in one write where the
 * link has `enableAutoPipelining`.
 */
export function createRedisRateLimiter(parts: {
  limits: readonly Limit[];
  /** A link of its own: pipelining by itself would delay the locks and the bus to the end of the turn. */
  link: RedisLink;
  clock: Clock;
  log: Log;
}): RateLimiter {
  const { limits, link, clock, log } = parts;
  const stores = new Map(
    limits.map(({ name, points, windowMs }) => [
      name,
      new RateLimiterRedis({
        storeClient: link,
        keyPrefix: `keygate:limit:${name}`,
        points,
        duration: Math.max(1, Math.round(windowMs / 1000)),
        rejectIfRedisNotReady: true,
      }),
    ]),
  );
  let isAway = false;
  let triedAtMs = Number.NEGATIVE_INFINITY;

  const shared: SharedCounts = {
    isThere: () => isUp(link) && (!isAway || Math.abs(clock.nowMs() - triedAtMs) >= TRIAL_PERIOD_MS),

    async add({ limit, key, points }) {
      if (isAway) triedAtMs = clock.nowMs();
      try {
        // `penalty` adds and tells the count; `consume` would reject beyond the limit, which the front judges.
        const answer = stores.get(limit)!.penalty(key, points);
        const { consumedPoints, msBeforeNext } = await within(answer, ANSWER_WAIT_MAX_MS, clock);
        if (isAway) log.info({}, 'limits: Redis is back');
        isAway = false;
        return { count: consumedPoints, endsInMs: msBeforeNext };
      } catch (error) {
        triedAtMs = clock.nowMs();
        // Not the error itself: it carries the command's arguments.
        const reason = error instanceof Error ? error.message : String(error);
        if (!isAway) log.warn({ reason }, 'limits: Redis is away, each node counts for itself');
        isAway = true;
        return null;
      }
    },
  };
  return createInProcessRateLimiter({ limits, clock, shared });
}
