// Limits over a real Redis: the contract, what it costs Redis, and a Redis that breaks.
import { Redis } from 'ioredis';
import { afterAll, beforeAll, describe, expect, it, vi } from 'vitest';
import { connectRedis } from '../../src/backends/redis/connect.ts';
import { createRedisRateLimiter } from '../../src/backends/redis/rate-limiter.ts';
import { systemClock } from '../../src/lib/clock.ts';
import { type Log, silentLog } from '../../src/lib/log.ts';
import type { Limit } from '../../src/ports/rate-limiter.ts';
import { describeRateLimiter, WINDOW_MS } from '../contract/rate-limiter.ts';
import { type Engine, startRedis } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { createManualClock } from '../support/manual-clock.ts';

let redis: Engine;
let admin: Redis;

beforeAll(async () => {
  redis = await startRedis();
  admin = new Redis(redis.url, { maxRetriesPerRequest: null, retryStrategy: () => 20 });
  admin.on('error', () => {});
});
afterAll(async () => {
  admin.disconnect();
  await redis.stop();
});

async function openLink(): Promise<Redis> {
  const link = connectRedis({
    url: redis.url,
    name: 'test',
    isPipelined: true,
    log: silentLog,
    retryDelayMaxMs: 20,
  }) as Redis;
  await eventually(() => link.status === 'ready');
  return link;
}

describeRateLimiter('Redis', async (limits) => {
  await admin.flushall();
  const clock = createManualClock();
  const [one, other] = [await openLink(), await openLink()];
  return {
    limiter: createRedisRateLimiter({ limits, link: one, clock, log: silentLog }),
    otherNode: createRedisRateLimiter({ limits, link: other, clock, log: silentLog }),
    async endWindows() {
      // Redis ends its windows by its own clock, which nobody moves.
      await admin.flushall();
      await clock.advance(WINDOW_MS);
    },
    async close() {
      one.disconnect();
      other.disconnect();
    },
  };
});

const LIMITS: Limit[] = [
  { name: 'one', points: 1_000, windowMs: WINDOW_MS },
  { name: 'two', points: 1_000, windowMs: WINDOW_MS },
  { name: 'three', points: 10, windowMs: WINDOW_MS },
];

describe('limits over Redis', () => {
  it('ask Redis for all limits of a request in one write', async () => {
    const link = await openLink();
    const clock = createManualClock();
    const limiter = createRedisRateLimiter({ limits: LIMITS, link, clock, log: silentLog });
    const charge = (key: string) =>
      limiter.charge(LIMITS.map(({ name, points }) => ({ limit: name, key, points: points * 0.9 })));
    // The first brings the script along.
    await charge('alice');
    const writes = vi.spyOn(link.stream, 'write');
    expect(await charge('bob')).toEqual([]);
    expect(writes).toHaveBeenCalledTimes(1);
    expect(await admin.keys('keygate:limit:*:bob')).toHaveLength(3);
    link.disconnect();
  });

  it('ask Redis once in a sixteenth of a limit, and never for what is spent', async () => {
    await admin.flushall();
    const link = await openLink();
    const clock = createManualClock();
    const limiter = createRedisRateLimiter({ limits: LIMITS, link, clock, log: silentLog });
    const asked = async (times: number): Promise<number> => {
      await admin.config('RESETSTAT');
      for (let i = 0; i < times; i++) await limiter.charge([{ limit: 'one', key: 'alice', points: 1 }]);
      const stats = await admin.info('commandstats');
      return Number(/cmdstat_incrby:calls=(\d+)/.exec(stats)?.[1] ?? 0);
    };
    expect(await asked(62)).toBe(0);
    expect(await asked(868)).toBe(14);
    // The last sixteenth is counted one by one.
    expect(await asked(70)).toBeLessThanOrEqual(70);
    expect(await asked(1_000)).toBeLessThanOrEqual(1);
    expect(await asked(1_000)).toBe(0);
    link.disconnect();
  });

  it('are held by each node alone while Redis is away, and told to the others when it is back', async () => {
    await admin.flushall();
    const lines: string[] = [];
    const log: Log = {
      ...silentLog,
      info: (_, message) => lines.push(message),
      warn: (_, message) => lines.push(message),
    };
    const link = await openLink();
    const limiter = createRedisRateLimiter({ limits: LIMITS, link, clock: systemClock, log });
    const letThrough = async (times: number): Promise<number> => {
      let count = 0;
      for (let i = 0; i < times; i++) {
        if ((await limiter.charge([{ limit: 'three', key: 'alice', points: 1 }])).length === 0) count += 1;
      }
      return count;
    };
    expect(await letThrough(4)).toBe(4);
    await redis.kill('SIGKILL');
    expect(await letThrough(20)).toBe(6);
    await redis.restart();
    await eventually(async () => {
      await limiter.charge([{ limit: 'three', key: 'bob', points: 1 }]);
      return lines.some((line) => line.endsWith('Redis is back')) || link.status === 'ready';
    });
    expect(await letThrough(20)).toBe(0);
    link.disconnect();
  });

  it('make nobody wait for a Redis that is silent, but for one trial in a second', async () => {
    const link = await openLink();
    const lines: string[] = [];
    const limiter = createRedisRateLimiter({
      limits: LIMITS,
      link,
      clock: systemClock,
      log: { ...silentLog, warn: (_, message) => lines.push(message) },
    });
    await redis.kill('SIGSTOP');
    try {
      const asked = vi.spyOn(link, 'sendCommand');
      for (let i = 0; i < 500; i++) {
        await limiter.charge([{ limit: 'one', key: `key ${i}`, points: 500 }]);
      }
      expect(asked.mock.calls.length).toBeLessThan(5);
      expect(lines).toEqual(['limits: Redis is away, each node counts for itself']);
    } finally {
      await redis.kill('SIGCONT');
      link.disconnect();
    }
  });

  it('ask a silent Redis again each second, once, and go on with it when it answers', async () => {
    const manual = createManualClock();
    let offsetMs = 0;
    const clock = { ...manual, nowMs: () => manual.nowMs() + offsetMs };
    const lines: string[] = [];
    const note = (_: unknown, message: string) => lines.push(message);
    const link = await openLink();
    const log = { ...silentLog, info: note, warn: note };
    const limiter = createRedisRateLimiter({ limits: LIMITS, link, clock, log });
    let keys = 0;
    const charge = () => limiter.charge([{ limit: 'one', key: `silent ${keys++}`, points: 500 }]);
    // The first brings the script along.
    await charge();
    /** Each answer that is waited for has a timer. */
    const trialCount = () => clock.timerCount();
    const away = 'limits: Redis is away, each node counts for itself';
    await redis.kill('SIGSTOP');
    try {
      const first = charge();
      await clock.advance(100);
      await first;
      await clock.advance(999);
      await charge();

      await clock.advance(1);
      const second = charge();
      expect(trialCount()).toBe(1);
      // Those that come beside the trial wait for nothing.
      await charge();
      expect(trialCount()).toBe(1);
      await clock.advance(100);
      await second;
      expect(lines).toEqual([away]);
    } finally {
      await redis.kill('SIGCONT');
    }
    // The system's time was set back: no reason to wait for an hour.
    offsetMs = -3_600_000;
    await charge();
    expect(lines).toEqual([away, 'limits: Redis is back']);
    const last = charge();
    expect(trialCount()).toBe(1);
    await last;
    expect(lines).toHaveLength(2);
    link.disconnect();
  });

  it('have Redis end its windows after the time of the limit, and none after less than a second', async () => {
    const link = await openLink();
    const limits: Limit[] = [
      { name: 'long', points: 10, windowMs: WINDOW_MS },
      { name: 'short', points: 10, windowMs: 100 },
    ];
    const limiter = createRedisRateLimiter({ limits, link, clock: createManualClock(), log: silentLog });
    await limiter.charge(limits.map(({ name }) => ({ limit: name, key: 'alice', points: 5 })));
    const [long, short] = [
      await admin.pttl('keygate:limit:long:alice'),
      await admin.pttl('keygate:limit:short:alice'),
    ];
    expect(long).toBeGreaterThan(WINDOW_MS / 2);
    expect(long).toBeLessThanOrEqual(WINDOW_MS);
    // It is there with an end, or has ended.
    expect(short).not.toBe(-1);
    expect(short).toBeLessThanOrEqual(1_000);
    link.disconnect();
  });
});
