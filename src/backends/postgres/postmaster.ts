/** Makes a database folder and runs one PostgreSQL server on it, under a guardian. */

import { execFile } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { closeSync, openSync } from 'node:fs';
import {
  chmod,
  chown,
  mkdir,
  open,
  readdir,
  readFile,
  readlink,
  realpath,
  rename,
  rm,
  stat,
  writeFile,
} from 'node:fs/promises';
import { connect, type NetConnectOpts } from 'node:net';
import { basename, dirname, join } from 'node:path';
import { setTimeout as pause } from 'node:timers/promises';
import { promisify } from 'node:util';
import type { PostgresBinaries } from './binaries.ts';
import type { EngineUser } from './engine-user.ts';
import { type GuardedProcess, type StopStep, startGuarded } from './guarded-process.ts';
import { EmbeddedStartError } from './start-error.ts';

/** Fast shutdown, then an immediate one: committed work is safe with either. */
const STOP_STEPS: readonly StopStep[] = [
  { signal: 'SIGINT', waitMs: 10_000 },
  { signal: 'SIGQUIT', waitMs: 5_000 },
  { signal: 'SIGKILL', waitMs: 1_000 },
];
const INITDB_STOP_STEPS: readonly StopStep[] = [
  { signal: 'SIGTERM', waitMs: 2_000 },
  { signal: 'SIGKILL', waitMs: 1_000 },
];
/** Recovery after a crash replays at most max_wal_size, which takes seconds. */
const READY_WAIT_MAX_MS = 120_000;
const PROBE_WAIT_MAX_MS = 2_000;
const READY_POLL_MS = 5;
const START_ATTEMPTS_MAX = 25;
const START_PAUSE_MS = 200;
const LOG_BYTES_MAX = 8 * 1024 * 1024;
const LOG_TAIL_BYTES_MAX = 4_096;
/** Beyond every system's highest pid. */
const PID_OF_NOBODY = 2 ** 31 - 1;
/** Names the folder that a process was started in, also where it couldn't go there by name. */
const OWN_FOLDER = '/proc/self/cwd';
const ENVIRONMENT = { PATH: '/usr/bin:/bin', LC_ALL: 'C', TZ: 'UTC' };

export interface PostmasterOptions {
  binaries: PostgresBinaries;
  user: EngineUser | null;
  databaseDir: string;
  /** Whether `user` can't reach the folder by its name (Linux only). */
  isHidden: boolean;
  logFile: string;
  settings: Record<string, string>;
  /** Where it will answer. */
  address: NetConnectOpts;
  role: string;
  database: string;
  removeWhenOrphaned?: readonly string[];
}

export interface Postmaster extends GuardedProcess {
  /** The end of what this server has written to its log. */
  logTail(): Promise<string>;
}

/**
 * Makes the database folder with one role and one database, unless it is there already. It gets its name only
 * when it is whole, so that one broken off is never taken for good.
 *
 * @throws EmbeddedStartError when the folder holds something else, or initdb fails
 */
export async function initialise(options: {
  binaries: PostgresBinaries;
  user: EngineUser | null;
  databaseDir: string;
  /** Whether `user` can't reach the folder by its name (Linux only). */
  isHidden: boolean;
  role: string;
  database: string;
  /** False only for tests' throwaway folders. */
  durable: boolean;
}): Promise<void> {
  const { binaries, user, databaseDir, role, database } = options;
  const parent = dirname(databaseDir);
  const partPrefix = `${basename(databaseDir)}.part-`;
  for (const name of await readdir(parent)) {
    if (name.startsWith(partPrefix)) await rm(join(parent, name), { recursive: true, force: true });
  }
  const present = await readdir(databaseDir).catch((): string[] => []);
  if (present.includes('PG_VERSION')) return;
  if (present.length > 0) {
    throw new EmbeddedStartError(
      `${databaseDir} holds something that is not a PostgreSQL database: move it away.`,
    );
  }

  const part = join(parent, `${partPrefix}${randomBytes(4).toString('hex')}`);
  await makeFolderFor(user, part);
  const partAsSeen = options.isHidden ? OWN_FOLDER : part;
  const runIn = (command: string, args: string[], input?: string): Promise<void> =>
    runToEnd({
      command,
      args,
      cwd: part,
      user,
      logFile: `${part}.log`,
      ...(input === undefined ? {} : { input }),
    });
  await runIn(binaries.initdb, [
    `--pgdata=${partAsSeen}`,
    `--username=${role}`,
    '--auth=trust',
    '--encoding=UTF8',
    '--locale=C',
    '--data-checksums',
    ...(options.durable ? [] : ['--no-sync']),
  ]);
  const sync = options.durable ? 'on' : 'off';
  await runIn(
    binaries.postgres,
    // By itself it ends with 0 whatever became of the statement.
    ['--single', '-D', partAsSeen, '-c', `fsync=${sync}`, '-c', 'exit_on_error=on', 'postgres'],
    `CREATE DATABASE "${database}";\n`,
  );
  await rename(part, databaseDir);
  await rm(`${part}.log`, { force: true });
  const parentHandle = await open(parent, 'r');
  await parentHandle.sync().finally(() => parentHandle.close());
}

/**
 * Starts a server on an initialised folder, and waits until it takes queries. A server that an earlier owner
 * left behind on this very folder is ended first: the caller must be the only owner.
 *
 * @throws EmbeddedStartError with the server's own reason
 */
export async function startPostmaster(options: PostmasterOptions): Promise<Postmaster> {
  const { databaseDir, logFile } = options;
  if ((await fileBytes(logFile)) > LOG_BYTES_MAX) await rename(logFile, `${logFile}.old`);
  for (let attempt = 1; ; attempt++) {
    await endOrphan(databaseDir);
    const logStartBytes = await fileBytes(logFile);
    const logTail = (): Promise<string> => readFrom(logFile, logStartBytes);
    const args = ['-D', options.isHidden ? OWN_FOLDER : databaseDir];
    for (const [name, value] of Object.entries(options.settings)) args.push('-c', `${name}=${value}`);
    const server = await withLogFd(logFile, (outputFd) =>
      startGuarded({
        command: options.binaries.postgres,
        args,
        cwd: databaseDir,
        env: ENVIRONMENT,
        user: options.user,
        outputFd,
        stopSteps: STOP_STEPS,
        removeWhenOrphaned: options.removeWhenOrphaned ?? [],
      }),
    );
    if (await becomesReady(server, options)) return { ...server, logTail };
    const end = await server.stop();
    const tail = await logTail();
    // What an earlier server leaves behind when it dies (its lock, its children) is gone in a moment.
    const isLeftover = /lock file .* already exists|shared memory block .* is still in use/i.test(tail);
    if (!isLeftover || attempt === START_ATTEMPTS_MAX) {
      throw new EmbeddedStartError(`PostgreSQL did not start on ${databaseDir}: ${reasonOf(tail, end)}.`);
    }
    await pause(START_PAUSE_MS);
  }
}

/**
 * Ends a server that runs on `databaseDir` without an owner. Its pid file is only a hint: after a crash the
 * number may have passed to any other process, so the process itself is looked at.
 *
 * @throws EmbeddedStartError when it can't be ended, or runs where this process can't see it
 */
export async function endOrphan(databaseDir: string): Promise<void> {
  const pidFile = join(databaseDir, 'postmaster.pid');
  const text = await readFile(pidFile, 'utf8').catch(() => null);
  if (text === null) return;
  // The power failed between its making and its writing: PostgreSQL, which is still to start here, would not.
  if (text === '') return void (await rm(pidFile));
  const [pidText, , , port, socketDir] = text.split('\n');
  const pid = Number(pidText);
  if (!Number.isInteger(pid) || pid <= 1) return;

  if (!(await isPostmasterOf(pid, databaseDir))) {
    if (
      socketDir &&
      (await probe({ path: join(socketDir, `.s.PGSQL.${port}`) }, 'nobody', 'nobody')) !== 'silent'
    ) {
      throw new EmbeddedStartError(
        `A PostgreSQL server that is not ours runs on ${databaseDir}: stop it first.`,
      );
    }
    // PostgreSQL would refuse for a stranger's sake. The rest of the file stays: by it, PostgreSQL makes sure
    // that no child of the dead server is left.
    if (isAlive(pid)) await writeFile(pidFile, text.replace(/^\d+/, String(PID_OF_NOBODY)));
    return;
  }
  for (const { signal, waitMs } of STOP_STEPS) {
    try {
      process.kill(pid, signal);
    } catch {
      // Gone since the last look, which the loop sees, or not ours to signal, which ends in the error below.
    }
    const deadline = AbortSignal.timeout(waitMs);
    while (!deadline.aborted) {
      if (!(await isPostmasterOf(pid, databaseDir))) return;
      await pause(READY_POLL_MS);
    }
  }
  throw new EmbeddedStartError(
    `A PostgreSQL server (pid ${pid}) runs on ${databaseDir} and could not be stopped.`,
  );
}

/** Makes a folder of mode 0700 that belongs to the one that PostgreSQL runs as. */
export async function makeFolderFor(user: EngineUser | null, folder: string): Promise<void> {
  await mkdir(folder, { recursive: true });
  await chmod(folder, 0o700);
  if (user !== null) await chown(folder, user.uid, user.gid);
}

/** PostgreSQL goes to its folder before anything else, and stays there. */
async function isPostmasterOf(pid: number, databaseDir: string): Promise<boolean> {
  const isPostgres = (command: string): boolean => /(^|\/)postgres /.test(command);
  if (process.platform === 'linux') {
    const command = await readFile(`/proc/${pid}/cmdline`, 'utf8').catch(() => '');
    const folder = await readlink(`/proc/${pid}/cwd`).catch(() => null);
    return isPostgres(command.replaceAll('\0', ' ')) && folder === (await realpath(databaseDir));
  }
  const ps = await promisify(execFile)('ps', ['-ww', '-o', 'command=', '-p', String(pid)]).catch(() => null);
  return ps !== null && isPostgres(ps.stdout) && ps.stdout.includes(` -D ${databaseDir} `);
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM';
  }
}

async function becomesReady(server: GuardedProcess, options: PostmasterOptions): Promise<boolean> {
  const ended = server.exited.then(() => 'ended' as const);
  const deadline = AbortSignal.timeout(READY_WAIT_MAX_MS);
  while (!deadline.aborted) {
    const answer = await Promise.race([ended, probe(options.address, options.role, options.database)]);
    if (answer === 'ready') return true;
    if (answer === 'ended' || (await Promise.race([ended, pause(READY_POLL_MS)])) === 'ended') return false;
  }
  return false;
}

/**
 * Knocks like a client would, with the first message of the protocol: a server that still recovers, or shuts
 * down, already listens but answers with an error.
 */
function probe(
  address: NetConnectOpts,
  role: string,
  database: string,
): Promise<'ready' | 'busy' | 'silent'> {
  const parameters = Buffer.from(`user\0${role}\0database\0${database}\0\0`);
  const greeting = Buffer.alloc(8);
  greeting.writeInt32BE(8 + parameters.length, 0);
  greeting.writeInt32BE(0x0003_0000, 4);
  const goodbye = Buffer.from([0x58, 0, 0, 0, 4]);
  return new Promise((resolve) => {
    const socket = connect(address);
    // One that stands still takes connections and says nothing.
    socket.setTimeout(PROBE_WAIT_MAX_MS, () => {
      socket.destroy();
      resolve('busy');
    });
    socket.once('connect', () => socket.write(Buffer.concat([greeting, parameters])));
    socket.once('data', (answer) => {
      socket.end(goodbye);
      resolve(answer[0] === 'R'.charCodeAt(0) ? 'ready' : 'busy');
    });
    socket.on('error', () => resolve('silent'));
    socket.once('close', () => resolve('silent'));
  });
}

async function runToEnd(options: {
  command: string;
  args: string[];
  cwd: string;
  user: EngineUser | null;
  logFile: string;
  input?: string;
}): Promise<void> {
  const { logFile, ...command } = options;
  const run = await withLogFd(logFile, (outputFd) =>
    startGuarded({ ...command, env: ENVIRONMENT, outputFd, stopSteps: INITDB_STOP_STEPS }),
  );
  const end = await run.exited;
  if (end.cause === 'ended' && end.code === 0) return;
  const reason = reasonOf(await readFrom(logFile, 0), end);
  // As in a container that runs under a number of its own.
  const hasNoAccount = /could not look up effective user ID/.test(reason);
  const remedy = hasNoAccount ? ' Give that user a line in /etc/passwd, or set DATABASE_URL.' : '';
  throw new EmbeddedStartError(
    `The database folder could not be made (${basename(options.command)}): ${reason}.${remedy}`,
  );
}

async function withLogFd<T>(logFile: string, run: (fd: number) => Promise<T>): Promise<T> {
  const fd = openSync(logFile, 'a', 0o600);
  return run(fd).finally(() => closeSync(fd));
}

async function fileBytes(path: string): Promise<number> {
  return stat(path).then(
    (found) => found.size,
    () => 0,
  );
}

async function readFrom(path: string, startBytes: number): Promise<string> {
  const file = await open(path, 'r').catch(() => null);
  if (file === null) return '';
  try {
    const { size } = await file.stat();
    const from = Math.max(startBytes, size - LOG_TAIL_BYTES_MAX);
    const { buffer, bytesRead } = await file.read({
      buffer: Buffer.alloc(Math.max(0, size - from)),
      position: from,
    });
    return buffer.subarray(0, bytesRead).toString('utf8').trim();
  } finally {
    await file.close();
  }
}

/** The server's own last word where it had one, without its timestamp. */
function reasonOf(log: string, end: { cause: string; code?: number | null; signal?: string | null }): string {
  const lines = log.split('\n').filter((line) => line.trim() !== '');
  // Early knocks of our own are answered in the same log.
  const isCause = (line: string): boolean =>
    /\b(FATAL|PANIC|error):/i.test(line) && !/is starting up/.test(line);
  const said = lines.findLast(isCause) ?? lines.at(-1);
  const reason = said?.replace(/^.*?\b(FATAL|PANIC|error):\s*/i, '').replace(/\.$/, '');
  return (
    reason ??
    (end.cause === 'ended' ? `it ended with ${end.signal ?? `code ${end.code}`}` : 'its guardian was killed')
  );
}
