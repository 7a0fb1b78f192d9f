/**
 * Real engines for tests and benches: private PostgreSQL and Redis servers on free loopback ports, in
 * temporary folders, that end with the process that started them, also when it is killed.
 */
import { randomBytes } from 'node:crypto';
import { closeSync, openSync } from 'node:fs';
import { access, mkdtemp, readdir, readFile, realpath, rm, writeFile } from 'node:fs/promises';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import postgres from 'postgres';
import { npmBinaries, type PostgresBinaries } from '../../src/backends/postgres/binaries.ts';
import { type EngineUser, engineUserFor, letPass } from '../../src/backends/postgres/engine-user.ts';
import { type GuardedProcess, startGuarded } from '../../src/backends/postgres/guarded-process.ts';
import { initialise, startPostmaster } from '../../src/backends/postgres/postmaster.ts';
import { type EngineBinary, findRedis, MissingEngineError } from './debian-binary.ts';
import { eventually } from './eventually.ts';
import { freePort } from './ports.ts';
import { stopped } from './stopped.ts';

export interface Engine {
  url: string;
  port: number;
  /** The server's pid; another one after `restart`. */
  readonly pid: number;
  /** Sends a signal; one that ends or stops the server is answered when it has. */
  kill(signal: NodeJS.Signals): Promise<void>;
  /** Starts the server again at the same address, on what the last one left. */
  restart(): Promise<void>;
  /** Ends the server and removes its folder. Idempotent. */
  stop(): Promise<void>;
}

export interface PostgresEngine extends Engine {
  /** Where the binaries lie; Debian's folder also has pgbench and psql. */
  binDir: string;
}

export interface PostgresEngineOptions {
  /** Whether commits are flushed to the disk, as in production. Off for speed, unless a test asks. */
  durable?: boolean;
  /** Where to take the binaries from first. */
  prefer?: 'npm' | 'system';
  settings?: Record<string, string>;
}

/** Another process may take a free port between the look and the start. */
const PORT_ATTEMPTS_MAX = 5;
const CLUSTER_SLOTS = 16_384;
const DEBIAN_POSTGRES_DIR = '/usr/lib/postgresql';
const NOT_DEADLY: readonly NodeJS.Signals[] = [
  'SIGSTOP',
  'SIGCONT',
  'SIGHUP',
  'SIGUSR1',
  'SIGUSR2',
  'SIGTSTP',
];

/** @throws MissingEngineError with one line that says what to install */
export async function startPostgres(options: PostgresEngineOptions = {}): Promise<PostgresEngine> {
  return inTemporaryFolder((dir) => startPostgresIn(dir, options));
}

async function startPostgresIn(dir: string, options: PostgresEngineOptions): Promise<PostgresEngine> {
  const { durable = false, prefer = 'npm' } = options;
  const databaseDir = join(dir, 'postgres');
  const user = await engineUserFor(databaseDir);
  const closed = user === null ? null : await letPass(user, dir);
  if (closed !== null)
    throw new Error(`PostgreSQL never runs as root, and ${user!.name} can't enter ${closed}.`);
  const binaries = await findPostgres({ dataDir: dir, user, prefer });
  await initialise({
    binaries,
    user,
    databaseDir,
    isHidden: false,
    role: 'postgres',
    database: 'test',
    durable,
  });
  const flushed = durable ? 'on' : 'off';
  const engine = await startOnFreePort(dir, (port) =>
    startPostmaster({
      binaries,
      user,
      databaseDir,
      isHidden: false,
      logFile: join(dir, 'postgres.log'),
      settings: {
        listen_addresses: '127.0.0.1',
        port: String(port),
        unix_socket_directories: '',
        max_connections: '300',
        fsync: flushed,
        full_page_writes: flushed,
        synchronous_commit: 'on',
        timezone: 'UTC',
        ...options.settings,
      },
      address: { host: '127.0.0.1', port },
      role: 'postgres',
      database: 'test',
      removeWhenOrphaned: [dir],
    }),
  );
  return withUrl(engine, `postgres://postgres@127.0.0.1:${engine.port}/test`, {
    binDir: dirname(binaries.postgres),
  });
}

/**
 * Starts a Redis of its own, for one test file or one fault: channels can't be kept apart on a shared one.
 *
 * @param options.appendOnly whether it keeps its keys over `restart`
 * @throws MissingEngineError with one line that says what to install
 */
export async function startRedis({ appendOnly = false }: { appendOnly?: boolean } = {}): Promise<Engine> {
  const binary = await findRedis();
  const more = ['--appendonly', appendOnly ? 'yes' : 'no', '--appendfsync', 'always'];
  return inTemporaryFolder((dir) => startRedisIn(dir, binary, more));
}

/**
 * What knows where a Redis is, and is none itself.
 *
 * @throws MissingEngineError with one line that says what to install
 */
export async function startRedisSentinel(): Promise<Engine> {
  const binary = await findRedis();
  return inTemporaryFolder(async (dir) => {
    const file = join(dir, 'sentinel.conf');
    await writeFile(file, '');
    return await startEngine(dir, {
      name: 'Redis Sentinel',
      binary,
      argsFor: (port) => [file, '--sentinel', '--bind', '127.0.0.1', '--port', String(port), '--dir', dir],
      answers: answersPing,
      urlFor: (port) => `redis://127.0.0.1:${port}`,
    });
  });
}

/** A Redis Cluster without replicas: what a lost node held is lost, and the others serve on. */
export interface RedisCluster {
  /** Names all of them. */
  url: string;
  nodes: readonly Engine[];
  stop(): Promise<void>;
}

/** @throws MissingEngineError with one line that says what to install */
export async function startRedisCluster({ nodeCount = 3 } = {}): Promise<RedisCluster> {
  const binary = await findRedis();
  const more = [
    ...['--appendonly', 'no', '--cluster-enabled', 'yes', '--cluster-config-file', 'nodes.conf'],
    ...['--cluster-node-timeout', '1000', '--cluster-require-full-coverage', 'no'],
  ];
  const nodes: Engine[] = [];
  const stop = async (): Promise<void> => void (await Promise.all(nodes.map((node) => node.stop())));
  try {
    for (let i = 0; i < nodeCount; i++) {
      nodes.push(await inTemporaryFolder((dir) => startRedisIn(dir, binary, more)));
    }
    const shareSize = Math.ceil(CLUSTER_SLOTS / nodeCount);
    for (const [index, { port }] of nodes.entries()) {
      const first = index * shareSize;
      const slots = Array.from({ length: Math.min(shareSize, CLUSTER_SLOTS - first) }, (_, i) => first + i);
      await tellRedis(port, `CLUSTER ADDSLOTS ${slots.join(' ')}`);
      await tellRedis(port, `CLUSTER MEET 127.0.0.1 ${nodes[0]!.port}`);
    }
    await eventually(
      async () => {
        for (const { port } of nodes) {
          const info = await tellRedis(port, 'CLUSTER INFO');
          if (!info.includes('cluster_state:ok') || !info.includes(`cluster_known_nodes:${nodeCount}`))
            return false;
        }
        return true;
      },
      { waitMaxMs: 20_000, that: 'the Redis Cluster being whole' },
    );
    return { url: `redis://${nodes.map(({ port }) => `127.0.0.1:${port}`).join(',')}`, nodes, stop };
  } catch (error) {
    await stop();
    throw error;
  }
}

function startRedisIn(dir: string, binary: EngineBinary, more: readonly string[]): Promise<Engine> {
  return startEngine(dir, {
    name: 'Redis',
    binary,
    argsFor: (port) => [
      ...['--bind', '127.0.0.1', '--port', String(port), '--dir', dir, '--save', ''],
      ...more,
    ],
    answers: answersPing,
    urlFor: (port) => `redis://127.0.0.1:${port}`,
  });
}

/** A program that serves a port, on a free one. */
export async function startEngine(
  dir: string,
  engine: {
    name: string;
    binary: EngineBinary;
    user?: EngineUser | null;
    /** Called for each port that is tried. */
    argsFor(port: number): readonly string[];
    answers(port: number): Promise<boolean>;
    urlFor(port: number): string;
  },
): Promise<Engine> {
  const { name, binary, user = null } = engine;
  const logFile = join(dir, 'engine.log');
  const started = await startOnFreePort(dir, async (port) => {
    const outputFd = openSync(logFile, 'a', 0o600);
    const server = await startGuarded({
      command: binary.command,
      args: [...engine.argsFor(port)],
      cwd: dir,
      env: binary.env,
      user,
      outputFd,
      stopSteps: [
        { signal: 'SIGTERM', waitMs: 3_000 },
        { signal: 'SIGKILL', waitMs: 1_000 },
      ],
      removeWhenOrphaned: [dir],
    }).finally(() => closeSync(outputFd));
    const isReady = await Promise.race([
      server.exited.then(() => false),
      eventually(() => engine.answers(port), { that: `${name} answering` }),
    ]);
    if (!isReady) throw new Error(`${name} did not start: ${await readFile(logFile, 'utf8')}`);
    return server;
  });
  return withUrl(started, engine.urlFor(started.port), {});
}

/** Makes an empty database on the suite's shared server (`TEST_DATABASE_URL`). */
export async function createDatabase(): Promise<{ url: string; drop(): Promise<void> }> {
  const serverUrl = sharedUrl('TEST_DATABASE_URL');
  const name = `keygate_test_${randomBytes(6).toString('hex')}`;
  await administrate(
    serverUrl,
    `CREATE DATABASE ${name} TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE 'C' LC_CTYPE 'C'`,
  );
  const url = new URL(serverUrl);
  url.pathname = `/${name}`;
  return {
    url: url.href,
    drop: () => administrate(serverUrl, `DROP DATABASE IF EXISTS ${name} WITH (FORCE)`),
  };
}

/**
 * The suite's shared Redis (`TEST_REDIS_URL`), with a database number for each worker. Channels are shared by
 * all workers: what publishes wants `startRedis`.
 */
export function redisUrl(): string {
  const url = new URL(sharedUrl('TEST_REDIS_URL'));
  url.pathname = `/${process.env.VITEST_POOL_ID ?? '0'}`;
  return url.href;
}

function sharedUrl(name: 'TEST_DATABASE_URL' | 'TEST_REDIS_URL'): string {
  const url = process.env[name];
  if (url === undefined || url === '')
    throw new Error(`${name} is not set: test/support/global-setup.ts sets it.`);
  return url;
}

async function administrate(serverUrl: string, statement: string): Promise<void> {
  const sql = postgres(serverUrl, { max: 1, onnotice: () => {} });
  await sql.unsafe(statement).finally(() => sql.end());
}

async function findPostgres(options: {
  dataDir: string;
  user: EngineUser | null;
  prefer: 'npm' | 'system';
}): Promise<PostgresBinaries> {
  const fromNpm = (): Promise<PostgresBinaries | null> => npmBinaries(options).catch(() => null);
  const sources = options.prefer === 'npm' ? [fromNpm, systemBinaries] : [systemBinaries, fromNpm];
  for (const source of sources) {
    const binaries = await source();
    if (binaries !== null) return binaries;
  }
  throw new MissingEngineError(
    'The tests need a real PostgreSQL: install postgresql (14 or newer), or set TEST_DATABASE_URL.',
  );
}

/** Debian keeps each version in a folder of its own, off the path; the newest is taken. */
async function systemBinaries(): Promise<PostgresBinaries | null> {
  const versions = (await readdir(DEBIAN_POSTGRES_DIR).catch((): string[] => []))
    .map(Number)
    .filter((version) => version >= 14);
  for (const version of versions.sort((a, b) => b - a)) {
    const binDir = join(DEBIAN_POSTGRES_DIR, String(version), 'bin');
    const binaries = { initdb: join(binDir, 'initdb'), postgres: join(binDir, 'postgres') };
    const isWhole = await Promise.all([access(binaries.initdb), access(binaries.postgres)]).then(
      () => true,
      () => false,
    );
    if (isWhole) return binaries;
  }
  return null;
}

async function startOnFreePort(
  dir: string,
  start: (port: number) => Promise<GuardedProcess>,
): Promise<Omit<Engine, 'url'>> {
  let port = 0;
  let server: GuardedProcess | null = null;
  for (let attempt = 1; server === null; attempt++) {
    port = await freePort();
    try {
      server = await start(port);
    } catch (error) {
      if (attempt === PORT_ATTEMPTS_MAX) throw error;
    }
  }
  let current = server;
  return {
    port,
    get pid() {
      return current.pid;
    },
    async kill(signal) {
      current.kill(signal);
      if (signal === 'SIGSTOP') await stopped(current.pid);
      if (!NOT_DEADLY.includes(signal)) await current.exited;
    },
    async restart() {
      await current.stop();
      current = await start(port);
    },
    async stop() {
      // A server that a test has frozen can't answer a request to end.
      current.kill('SIGCONT');
      await current.stop();
      await rm(dir, { recursive: true, force: true, maxRetries: 20 });
    },
  };
}

/** Keeps the getter of `pid`, which spreading would freeze. */
function withUrl<T extends object>(engine: Omit<Engine, 'url'>, url: string, more: T): Engine & T {
  return Object.defineProperties({ url, ...more }, Object.getOwnPropertyDescriptors(engine)) as Engine & T;
}

/** The folder stays when `start` succeeds: the engine removes it when it is stopped. */
export async function inTemporaryFolder<T>(start: (dir: string) => Promise<T>): Promise<T> {
  const dir = await mkdtemp(join(await realpath(tmpdir()), 'keygate-test-'));
  try {
    return await start(dir);
  } catch (error) {
    await rm(dir, { recursive: true, force: true });
    throw error;
  }
}

function answersPing(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect(port, '127.0.0.1', () => socket.write('PING\r\n'));
    socket.once('data', (answer) => {
      resolve(answer.toString().startsWith('+PONG'));
      socket.destroy();
    });
    socket.on('error', () => resolve(false));
    socket.once('close', () => resolve(false));
  });
}

/** One command without arguments that need quoting. @returns the raw answer */
function tellRedis(port: number, command: string): Promise<string> {
  return new Promise((resolve, reject) => {
    const socket = connect(port, '127.0.0.1', () => socket.write(`${command}\r\n`));
    socket.once('data', (answer) => {
      socket.destroy();
      const text = answer.toString();
      if (text.startsWith('-')) reject(new Error(`Redis refused ${command.slice(0, 40)}: ${text}`));
      else resolve(text);
    });
    socket.on('error', reject);
  });
}
