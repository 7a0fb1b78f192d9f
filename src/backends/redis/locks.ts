/** Device locks that several nodes share through Redis: one round trip for a batch, and none to wait for when it's away. */
import { randomUUID } from 'node:crypto';
import type { Clock } from '../../lib/clock.ts';
import type { Log } from '../../lib/log.ts';
import type { DeviceLocks, HeldLocks } from '../../ports/lock.ts';
import { addressKey } from '../../protocol/ids.ts';
import { isUp, type RedisLink, within } from './connect.ts';
import { answeredOf, partsOf, run, script } from './scripts.ts';

const ANSWER_WAIT_MAX_MS = 100;
/** After a failure, Redis is tried at most this often, and nobody waits for the trial. */
const TRIAL_PERIOD_MS = 1_000;
const LOCK_MS = 10_000;

/** KEYS: locks. ARGV: token, milliseconds. Returns the positions of those that others hold. */
const TAKE = script(`
local refused = {}
for i = 1, #KEYS do
  if not redis.call('SET', KEYS[i], ARGV[1], 'NX', 'PX', ARGV[2]) then refused[#refused + 1] = i - 1 end
end
return refused`);

/** KEYS: locks. ARGV: their token. */
const GIVE_BACK = script(`
for i = 1, #KEYS do
  if redis.call('GET', KEYS[i]) == ARGV[1] then redis.call('DEL', KEYS[i]) end
end`);

export interface RedisLocksOptions {
  link: RedisLink;
  clock: Clock;
  log: Log;
  /** How long a lock holds unless it is released, or asked for another time. There is no renewal. */
  lockMs?: number;
}

/**
 * Locks in Redis. With Redis away or silent, `acquire` answers within ANSWER_WAIT_MAX_MS the first time and at once
 * from then on.
 */
export function createRedisLocks(options: RedisLocksOptions): DeviceLocks {
  const { link, clock, log } = options;
  const owner = randomUUID();
  let acquisitions = 0;
  let isAway = false;
  let isTrialDue = false;

  function noteAway(reason: string): void {
    if (isAway) return;
    isAway = true;
    log.warn({ reason }, 'device locks: Redis is away, working without them');
    awaitTrial();
  }

  function awaitTrial(): void {
    isTrialDue = false;
    clock.after(TRIAL_PERIOD_MS, () => {
      isTrialDue = true;
    });
  }

  function noteBack(): void {
    if (!isAway) return;
    isAway = false;
    log.info({}, 'device locks: Redis is back');
  }

  /** @returns the devices that others hold; those of a node that is away aren't among them */
  async function take(keys: readonly string[], token: string, lockMs: number): Promise<Set<string>> {
    const answers = await answeredOf(
      partsOf(link, keys).map(async (part) => {
        const positions = await run(link, TAKE, part.map(lockKey), [token, lockMs]);
        if (!Array.isArray(positions)) throw new Error('Redis answered without a list');
        return positions.map((position) => part[Number(position)] ?? '');
      }),
    );
    return new Set(answers.flat());
  }

  /** @param token null where nothing was sent to Redis */
  function hold(keys: readonly string[], token: string | null): HeldLocks {
    let owned = token;
    return {
      held: new Set(keys),
      async release() {
        const arg = owned;
        owned = null;
        if (arg === null || keys.length === 0 || !isUp(link)) return;
        const answered = within(
          answeredOf(partsOf(link, keys).map((part) => run(link, GIVE_BACK, part.map(lockKey), [arg]))),
          ANSWER_WAIT_MAX_MS,
          clock,
          // They expire by themselves.
        ).catch((error: unknown) => noteAway(String(error)));
        if (!isAway) await answered;
      },
    };
  }

  return {
    async acquire(devices, lockMs = options.lockMs ?? LOCK_MS) {
      const keys = devices.map(addressKey);
      if (keys.length === 0) return hold(keys, null);
      if (!isUp(link)) {
        noteAway('no connection');
        return hold(keys, null);
      }
      if (isAway && !isTrialDue) return hold(keys, null);

      const token = `${owner}:${++acquisitions}`;
      const taking = within(take(keys, token, lockMs), ANSWER_WAIT_MAX_MS, clock);
      if (isAway) {
        awaitTrial();
        taking.then(noteBack, () => {});
        return hold(keys, token);
      }
      try {
        const refused = await taking;
        const held = refused.size === 0 ? keys : keys.filter((key) => !refused.has(key));
        return hold(held, token);
      } catch (error) {
        noteAway(error instanceof Error ? error.message : String(error));
        // Whether Redis took them is unknown: the release that follows frees them.
        return hold(keys, token);
      }
    },
  };
}

function lockKey(key: string): string {
  return `keygate:lock:{${key}}`;
}
