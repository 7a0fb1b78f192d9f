/** What `keygate doctor` asks Redis. */
import { once } from 'node:events';
import { Cluster } from 'ioredis';
import { isRefusal, linkFault, type RedisLink } from './connect.ts';

export interface RedisFacts {
  version: string;
  nowMs: number;
}

const WAIT_MAX_MS = 5_000;
/** So many that each node of a Cluster has some: of twenty nodes, fifteen each. */
const SCATTERED_KEYS = Array.from({ length: 300 }, (_, i) => `keygate:doctor:${i}`);

/**
 * @param link of nobody else: it listens in the end
 * @throws Error where it can't be reached or used, with the reason
 */
export async function examineRedis(link: RedisLink): Promise<RedisFacts> {
  if (link.status !== 'ready') {
    const patience = AbortSignal.timeout(WAIT_MAX_MS);
    await once(link, 'ready', { signal: patience }).catch((error: Error) => {
      const reason = patience.aborted ? `no answer within ${WAIT_MAX_MS} ms` : linkFault(error);
      // Without the error as its cause, which carries what was sent.
      throw new Error(`no connection to Redis: ${reason}${schemeHint(link, reason)}`);
    });
  }
  const [seconds, microseconds] = await link.time().catch(refused('to tell its time'));
  const info = await link.info('server').catch(refused('to tell its version'));
  await tryRights(link);
  return {
    version: /redis_version:(\S+)/.exec(info)?.[1] ?? 'unknown',
    nowMs: Number(seconds) * 1000 + Number(microseconds) / 1000,
  };
}

/** It may answer, and do nothing of what the gateway needs: for this user, or for anybody. @throws Error with Redis' own reason */
async function tryRights(link: RedisLink): Promise<void> {
  const keys = link instanceof Cluster ? SCATTERED_KEYS : ['keygate:doctor'];
  await Promise.all(
    keys.map((key) => link.eval(`return redis.call('SET', KEYS[1], '', 'PX', 1)`, 1, key)),
  ).catch(refused('a script that writes keygate:*'));
  await link.publish('keygate:doctor', '').catch(refused('a message on channels keygate:*'));
  // Last: a link that listens does nothing else.
  await link.subscribe('keygate:doctor').catch(refused('a subscription to channels keygate:*'));
}

function refused(what: string): (error: Error) => never {
  return (error) => {
    if (!isRefusal(error)) throw error;
    throw new Error(`Redis refuses ${what}: ${linkFault(error)}`);
  };
}

/** Where only one side speaks TLS, neither says so: Redis waits for more, or ends the connection. */
function schemeHint(link: RedisLink, reason: string): string {
  const { tls } = link instanceof Cluster ? (link.options.redisOptions ?? {}) : link.options;
  if (tls === undefined && /ECONNRESET|Connection is closed/.test(reason)) {
    return '; if its port speaks TLS, REDIS_URL must begin with rediss://';
  }
  if (tls !== undefined && /ETIMEDOUT|timeout|no answer/.test(reason)) {
    return '; if its port speaks no TLS, REDIS_URL must begin with redis://';
  }
  return '';
}
