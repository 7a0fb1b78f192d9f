/** Everything that a run needs, started once: engines, databases, servers, the load process. */
import { randomBytes } from 'node:crypto';
import { fileURLToPath } from 'node:url';
import postgres from 'postgres';
import { type Engine, type PostgresEngine, startPostgres, startRedis } from '../support/engines.ts';
import { NO_LIMITS } from '../support/gateway.ts';
import { startTcpProxy, type TcpProxy } from '../support/tcp-proxy.ts';
import { type Child, script, startChild } from './calls.ts';
import { cpuMs, type Watched } from './cpu.ts';
import { type KeyPool, makeKeyPool } from './seed.ts';

export interface Server extends Child {
  url: string;
}

/** Of the folder `servers`. */
export type ServerName = 'echo-server' | 'usual-way-server' | 'usual-messages-server' | 'statement-server';

export interface Stage {
  postgres: PostgresEngine;
  redis: Engine;
  load: Child;
  pool: KeyPool;
  tokenSecret: string;
  /** A fresh database; the client is for seeding and asking, not for what is measured. */
  createDatabase(name: string): Promise<{ url: string; sql: postgres.Sql }>;
  /**
   * A gateway as in production, out of a folder that `npm run build` filled.
   *
   * @param options.isFar its engines are a network away, {@link FAR_MS} each way
   */
  startGateway(options: {
    databaseUrl: string;
    distDir: string;
    isFar?: boolean;
    env?: Record<string, string>;
  }): Promise<Server>;
  startServer(name: ServerName, env: Record<string, string>): Promise<Server>;
  /** One or two servers and the engines, by the names under which their processor time is told. */
  watched(servers: readonly Child[]): Record<string, Watched>;
  /** Processor time of everything that belongs to the bench, ended processes too. */
  ownCpuMs(): number;
  checkpoint(): Promise<void>;
  stop(): Promise<void>;
}

/** As between two data centres of a region. */
const FAR_MS = 1;
/** So many sockets as elsewhere: with fewer, requests would be waited for rather than engines. */
export const FAR_SOCKETS_TIMES = 5;
export const FAR = `through ${FAR_SOCKETS_TIMES} times as many sockets, PostgreSQL and Redis ${FAR_MS} ms away either way`;

export const DIST_DIR = fileURLToPath(new URL('../../dist', import.meta.url));
const PROBE = new URL('./probe.mjs', import.meta.url).pathname;

/**
 * PostgreSQL as in production, where durability is concerned. The rest keeps one contestant's upkeep out of another's
 * time: what is due is done between the rounds.
 */
export const POSTGRES_SETTINGS = {
  fsync: 'on',
  synchronous_commit: 'on',
  shared_buffers: '512MB',
  max_wal_size: '16GB',
  checkpoint_timeout: '1h',
  autovacuum: 'off',
};

/** Far out of reach, and not off: what counting costs is part of what is measured. */
const FAR_LIMITS = Object.fromEntries(
  [...Object.keys(NO_LIMITS), 'PREKEY_DRAIN_ALARM'].map((name) => [name, '999999999']),
);

export async function openStage(): Promise<Stage> {
  const undo: (() => Promise<unknown>)[] = [];
  const stop = async (): Promise<void> => {
    for (const step of undo.splice(0).reverse()) await step();
  };
  try {
    const engine = await startPostgres({ durable: true, prefer: 'system', settings: POSTGRES_SETTINGS });
    undo.push(() => engine.stop());
    const redis = await startRedis();
    undo.push(() => redis.stop());
    const admin = postgres(engine.url, { max: 1, onnotice: () => {} });
    undo.push(() => admin.end());
    const load = await startChild(script(new URL('./load/load-process.ts', import.meta.url)));
    undo.push(() => load.stop());
    const tokenSecret = randomBytes(32).toString('hex');

    const links = new Map<string, Promise<TcpProxy>>();
    /** @returns where the engine at `url` is found a network away */
    const far = async (url: string): Promise<string> => {
      const { host } = new URL(url);
      const link =
        links.get(host) ??
        startTcpProxy(`http://${host}`, { raw: true }).then((proxy) => {
          undo.push(() => proxy.stop());
          proxy.impair({ delayMs: FAR_MS });
          return proxy;
        });
      links.set(host, link);
      const farUrl = new URL(url);
      farUrl.host = new URL((await link).url).host;
      return farUrl.href;
    };

    const started = async (args: string[], env: Record<string, string>, readyLine: RegExp) => {
      const child = await startChild(args, { env, readyLine });
      const stopChild = child.stop;
      const server = { ...child, url: child.captured };
      undo.push(stopChild);
      return server;
    };

    return {
      postgres: engine,
      redis,
      load,
      pool: makeKeyPool(),
      tokenSecret,
      async createDatabase(name) {
        await admin.unsafe(
          `CREATE DATABASE ${name} TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE 'C' LC_CTYPE 'C'`,
        );
        const url = new URL(engine.url);
        url.pathname = `/${name}`;
        const sql = postgres(url.href, {
          max: 1,
          fetch_types: false,
          onnotice: () => {},
          // Millions of rows are sorted in memory.
          connection: { work_mem: '512MB' },
        });
        undo.push(() => sql.end());
        return { url: url.href, sql };
      },
      startGateway: async ({ databaseUrl, distDir, isFar = false, env = {} }) =>
        await started(
          ['--import', PROBE, `${distDir}/main.js`, 'serve'],
          {
            NODE_ENV: 'production',
            PORT: '0',
            ADMIN_PORT: '0',
            HOST: '127.0.0.1',
            LOG_LEVEL: 'warn',
            DATABASE_URL: isFar ? await far(databaseUrl) : databaseUrl,
            REDIS_URL: isFar ? await far(redis.url) : redis.url,
            JWT_SECRET: tokenSecret,
            ...FAR_LIMITS,
            ...env,
          },
          /gateway\s+(http:\S+)/,
        ),
      startServer: (name, env) =>
        started(
          ['--import', PROBE, ...script(new URL(`./servers/${name}.ts`, import.meta.url))],
          { NODE_ENV: 'production', ...env },
          /listening on (\S+)/,
        ),
      watched: ([server, peer]) => ({
        server: { pid: server!.pid, withChildren: false },
        ...(peer === undefined ? {} : { peer: { pid: peer.pid, withChildren: false } }),
        postgres: { pid: engine.pid, withChildren: true },
        redis: { pid: redis.pid, withChildren: false },
      }),
      ownCpuMs: () =>
        cpuMs({ pid: process.pid, withChildren: true }) +
        cpuMs({ pid: engine.pid, withChildren: true }) +
        cpuMs({ pid: redis.pid, withChildren: false }),
      async checkpoint() {
        await admin`CHECKPOINT`;
      },
      stop,
    };
  } catch (error) {
    await stop();
    throw error;
  }
}
