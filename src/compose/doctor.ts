/** The engines that a gateway would have, asked before one is started, or beside it. */

import { FolderInUseError, isEmbeddedMade } from '../backends/postgres/embedded.ts';
import { examinePostgres } from '../backends/postgres/examine.ts';
import { missingMigrations } from '../backends/postgres/migrations.ts';
import { connectRedis } from '../backends/redis/connect.ts';
import { examineRedis } from '../backends/redis/examine.ts';
import type { Config } from '../config.ts';
import { systemClock } from '../lib/clock.ts';
import { silentLog } from '../lib/log.ts';
import { opened } from '../lib/undo.ts';
import { faultsOf, openPools, openStore } from './store.ts';

/** PostgreSQL 14, as it numbers itself. */
const POSTGRES_VERSION_MIN = 140_000;
const REDIS_VERSION_MIN = '6.2';

/** What an engine tells of itself. */
export interface EngineFacts {
  version: string;
  isNewEnough: boolean;
  /** How far its clock is ahead of this machine's. */
  clockDifferenceMs: number;
}

export interface PostgresFindings extends EngineFacts {
  missingMigrations: number;
  /** What keeps it from serving, though it can be reached, each in a line. */
  troubles: readonly string[];
}

/**
 * Asks the configured PostgreSQL who it is and how its schema stands; an embedded one is started for it.
 *
 * @returns `notMade` for an embedded store that no gateway has started yet, `inUse` for one on which a gateway runs
 * @throws Error where it can't be reached
 */
export async function examineStore(config: Config): Promise<PostgresFindings | 'notMade' | 'inUse'> {
  const { store } = config;
  if (store.kind === 'embedded' && !isEmbeddedMade(store.dataDir)) return 'notMade';
  try {
    return await examineDatabase(config);
  } catch (error) {
    if (error instanceof FolderInUseError) return 'inUse';
    throw error;
  }
}

async function examineDatabase(config: Config): Promise<PostgresFindings> {
  const log = silentLog;
  const examiner = await opened(async (undo) => {
    const address = await openStore(config, { log, undo });
    return { database: openPools(address, { log, undo }) };
  });
  try {
    const { version, versionNumber, nowMs } = await examinePostgres(examiner.database);
    const clockDifferenceMs = nowMs - systemClock.nowMs();
    return {
      version,
      isNewEnough: versionNumber >= POSTGRES_VERSION_MIN,
      clockDifferenceMs,
      missingMigrations: await missingMigrations(examiner.database),
      troubles: await faultsOf(examiner.database),
    };
  } finally {
    await examiner.close();
  }
}

/** The same of Redis; null where none is configured. */
export async function examineRedisOf(config: Config): Promise<EngineFacts | null> {
  if (config.redisUrl === null) return null;
  const link = connectRedis({ url: config.redisUrl, name: 'doctor', log: silentLog });
  try {
    const { version, nowMs } = await examineRedis(link);
    return {
      version,
      isNewEnough: compareVersions(version, REDIS_VERSION_MIN) >= 0,
      clockDifferenceMs: nowMs - systemClock.nowMs(),
    };
  } finally {
    link.disconnect();
  }
}

/** By numbers, part by part. */
function compareVersions(a: string, b: string): number {
  return a.localeCompare(b, 'en', { numeric: true });
}
