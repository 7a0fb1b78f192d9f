/** What nodes share by Redis, or what one node without it has in its own process instead. */

import { randomBytes } from 'node:crypto';
import { hostname } from 'node:os';
import { createInProcessBus } from '../backends/in-process/bus.ts';
import { createInProcessLocks } from '../backends/in-process/locks.ts';
import { createInProcessRateLimiter } from '../backends/in-process/rate-limiter.ts';
import { createInProcessRelay } from '../backends/in-process/relay.ts';
import { createRedisBus, type RedisBusTiming } from '../backends/redis/bus.ts';
import { connectRedis, connectSubscriber } from '../backends/redis/connect.ts';
import { createRedisLocks } from '../backends/redis/locks.ts';
import { createRedisRateLimiter } from '../backends/redis/rate-limiter.ts';
import { createRedisRelay } from '../backends/redis/relay.ts';
import type { StoreConfig } from '../config.ts';
import { type Clock, systemClock } from '../lib/clock.ts';
import type { Log } from '../lib/log.ts';
import type { Undo } from '../lib/undo.ts';
import type { Bus } from '../ports/bus.ts';
import type { DeviceLocks } from '../ports/lock.ts';
import type { Limit, RateLimiter } from '../ports/rate-limiter.ts';
import type { Relay } from '../ports/relay.ts';
import { LIMIT_WINDOWS_MS, type RateName } from '../requests/limits.ts';

/**
 * Connecting goes on in the background.
 *
 * @param parts.timing of the bus, where it differs from production's
 */
export function openBusAndLocks(
  config: StoreConfig,
  { log, timing = {}, undo }: { log: Log; timing?: Partial<RedisBusTiming>; undo: Undo },
): { bus: Bus; locks: DeviceLocks } {
  if (config.redisUrl === null) {
    return { bus: createInProcessBus({ log }), locks: createInProcessLocks({ clock: systemClock }) };
  }
  const commands = connectRedis({ url: config.redisUrl, name: 'commands', log });
  undo.push(() => {
    commands.disconnect();
  });
  const subscriber = connectSubscriber({ url: config.redisUrl, name: 'subscriber', log });
  undo.push(() => {
    subscriber.disconnect();
  });
  return {
    bus: createRedisBus({ commands, subscriber, clock: systemClock, log, timing }),
    locks: createRedisLocks({ link: commands, clock: systemClock, log }),
  };
}

/** @param parts.clock of the limits, where they are counted in this process */
export function openRateLimiter(
  config: StoreConfig,
  { clock, log, undo }: { clock: Clock; log: Log; undo: Undo },
): RateLimiter {
  const limits = limitsOf(config);
  if (config.redisUrl === null) return createInProcessRateLimiter({ limits, clock });
  const link = connectRedis({ url: config.redisUrl, name: 'limits', isPipelined: true, log });
  undo.push(() => {
    link.disconnect();
  });
  // Redis ends the windows by its own clock.
  return createRedisRateLimiter({ limits, link, clock: systemClock, log });
}

/** Nodes talk about what they see on a link of its own: a viewer that wants much must not delay a poke. */
export function openRelay(config: StoreConfig, { log, undo }: { log: Log; undo: Undo }): Relay {
  const nodeId = `${hostname().slice(0, 40)}-${randomBytes(6).toString('hex')}`;
  if (config.redisUrl === null) return createInProcessRelay(nodeId);
  const url = config.redisUrl;
  const commands = connectRedis({ url, name: 'inspector', log });
  undo.push(() => {
    commands.disconnect();
  });
  const subscriber = connectSubscriber({ url, name: 'inspector-subscriber', log });
  undo.push(() => {
    subscriber.disconnect();
  });
  return createRedisRelay({ nodeId, commands, subscriber, clock: systemClock });
}

/** Those that are switched on. */
function limitsOf(config: StoreConfig): Limit[] {
  return (Object.keys(LIMIT_WINDOWS_MS) as RateName[])
    .map((name) => ({ name, points: config.limits[name], windowMs: LIMIT_WINDOWS_MS[name] }))
    .filter(({ points }) => points > 0);
}
