/** What `keygate doctor` asks Redis. */
import { once } from 'node:events';
import type { RedisLink } from './connect.ts';

export interface RedisFacts {
  version: string;
  nowMs: number;
}

const WAIT_MAX_MS = 5_000;

/** @throws Error where it can't be reached */
export async function examineRedis(link: RedisLink): Promise<RedisFacts> {
  if (link.status !== 'ready') {
    await once(link, 'ready', { signal: AbortSignal.timeout(WAIT_MAX_MS) }).catch(() => {
      throw new Error('no connection to Redis');
    });
  }
  const [seconds, microseconds] = await link.time();
  const info = await link.info('server');
  return {
    version: /redis_version:(\S+)/.exec(info)?.[1] ?? 'unknown',
    nowMs: Number(seconds) * 1000 + Number(microseconds) / 1000,
  };
}
