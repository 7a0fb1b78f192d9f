/** Device locks that several nodes share through Redis: one round trip for a batch, and none to wait for when it's away. */
import { randomUUID } from 'node:crypto';
import type { Clock } from '../../lib/clock.ts';
import type { Log } from '../../lib/log.ts';
import type { DeviceLocks, HeldLocks } from '../../ports/lock.ts';
import { addressKey } from '../../protocol/ids.ts';
import { isUp, type RedisLink, within } from './connect.ts';
import { answeredOf, run, script } from './scripts.ts';

const ANSWER_WAIT_MAX_MS = 100;
/** After a failure, Redis is tried at most this often, and nobody waits for the trial. */
const TRIAL_PERIOD_MS = 1_000;

/**
 * KEYS: the counter, then the locks. ARGV: token, milliseconds, the last number that this node knows.
 * Returns the fencing number and the positions of those that others hold. The number counts on from the microseconds
 * of Redis's clock and from what the caller knows, so that it rises also when Redis comes back empty.
 */
const TAKE = script(`
local now = redis.call('TIME')
local last = tonumber(redis.call('GET', KEYS[1])) or 0
local fence = math.max(last + 1, tonumber(ARGV[3]) + 1, now[1] * 1000000 + now[2])
redis.call('SET', KEYS[1], string.format('%.0f', fence), 'PX', 3600000)
local answer = { fence }
for i = 2, #KEYS do
  if not redis.call('SET', KEYS[i], ARGV[1], 'NX', 'PX', ARGV[2]) then answer[#answer + 1] = i - 2 end
end
return answer`);

/** KEYS: locks. ARGV: their token. Returns how many were still owned. */
const GIVE_BACK = script(`
local owned = 0
for i = 1, #KEYS do
  if redis.call('GET', KEYS[i]) == ARGV[1] then owned = owned + redis.call('DEL', KEYS[i]) end
end
return owned`);

export interface RedisLocksOptions {
  link: RedisLink;
  clock: Clock;
  log: Log;
  /** How long a lock holds unless it is released. There is no renewal: longer work asks `isLost`. */
  lockMs?: number;
}

/**
 * Locks in Redis. `fence` comes from one counter, so that it rises over all acquisitions of all nodes; in a Cluster,
 * where no counter is in reach of every device's slot, it is the highest of one counter per device, and two batches
 * compare as well as the clocks of the Cluster's nodes agree.
 *
 * With Redis away or silent, `acquire` answers within ANSWER_WAIT_MAX_MS the first time and at once from then on.
 */
export function createRedisLocks({ link, clock, log, lockMs = 10_000 }: RedisLocksOptions): DeviceLocks {
  const owner = randomUUID();
  let acquisitions = 0;
  let lastFence = 0;
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

  /** @returns the fencing number and the devices that others hold; those of a node that is away aren't among them */
  async function take(
    keys: readonly string[],
    token: string,
  ): Promise<{ fence: number; refused: Set<string> }> {
    const groups = link.isCluster ? keys.map((key) => [key]) : [keys];
    const answers = await answeredOf(
      groups.map(async (group) => {
        const counter = link.isCluster ? `keygate:lock-fence:{${group[0]}}` : 'keygate:lock-fence';
        const answer = await run(link, TAKE, [counter, ...group.map(lockKey)], [token, lockMs, lastFence]);
        const [fence, ...positions] = Array.isArray(answer) ? answer.map(Number) : [];
        if (fence === undefined) throw new Error('Redis answered without a fencing number');
        return { fence, refused: positions.map((position) => group[position] ?? '') };
      }),
    );
    return {
      fence: Math.max(...answers.map((answer) => answer.fence)),
      refused: new Set(answers.flatMap((answer) => answer.refused)),
    };
  }

  function hold(options: {
    keys: readonly string[];
    fence: number;
    /** Null where nothing was sent to Redis. */
    token: string | null;
    takenAtMs: number;
  }): HeldLocks {
    const { keys, fence, takenAtMs } = options;
    let token = options.token;
    let isStolen = false;
    return {
      held: new Set(keys),
      fence,
      isLost() {
        const ageMs = clock.nowMs() - takenAtMs;
        // A clock that was set back can't tell how old the locks are.
        return isStolen || ageMs < 0 || ageMs >= lockMs;
      },
      async release() {
        const arg = token;
        token = null;
        if (arg === null || keys.length === 0 || !isUp(link)) return;
        const groups = link.isCluster ? keys.map((key) => [key]) : [keys];
        const answered = within(
          answeredOf(groups.map((group) => run(link, GIVE_BACK, group.map(lockKey), [arg]))),
          ANSWER_WAIT_MAX_MS,
          clock,
        ).then(
          (owned) => {
            isStolen = owned.reduce<number>((sum, count) => sum + Number(count), 0) < keys.length;
          },
          // They expire by themselves.
          (error: unknown) => noteAway(String(error)),
        );
        if (!isAway) await answered;
      },
    };
  }

  return {
    async acquire(devices) {
      const keys = devices.map(addressKey);
      const takenAtMs = clock.nowMs();
      const without = (token: string | null): HeldLocks => {
        lastFence = Math.max(lastFence + 1, takenAtMs * 1000);
        return hold({ keys, fence: lastFence, token, takenAtMs });
      };
      if (keys.length === 0) return without(null);
      if (!isUp(link)) {
        noteAway('no connection');
        return without(null);
      }
      if (isAway && !isTrialDue) return without(null);

      const token = `${owner}:${++acquisitions}`;
      const taking = within(take(keys, token), ANSWER_WAIT_MAX_MS, clock);
      if (isAway) {
        awaitTrial();
        taking.then(noteBack, () => {});
        return without(token);
      }
      try {
        const { fence, refused } = await taking;
        lastFence = Math.max(lastFence, fence);
        return hold({ keys: keys.filter((key) => !refused.has(key)), fence, token, takenAtMs });
      } catch (error) {
        noteAway(error instanceof Error ? error.message : String(error));
        // Whether Redis took them is unknown: the release that follows frees them.
        return without(token);
      }
    },
  };
}

function lockKey(key: string): string {
  return `keygate:lock:{${key}}`;
}
