/**
 * The embedded engine: a private PostgreSQL on the gateway's data folder, reachable by a Unix socket only,
 * never as root, and gone when the gateway is, however it goes.
 */
import { existsSync } from 'node:fs';
import { chmod, mkdir, mkdtemp, realpath, rm, symlink } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { folderFault } from '../../lib/folder-fault.ts';
import type { Log } from '../../lib/log.ts';
import { type Undo, undoAll } from '../../lib/undo.ts';
import { npmBinaries } from './binaries.ts';
import { type EngineUser, engineUserFor, letPass } from './engine-user.ts';
import { ownFolder } from './folder-ownership.ts';
import { endOrphan, initialise, makeFolderFor, startPostmaster } from './postmaster.ts';
import { EmbeddedStartError, FolderInUseError } from './start-error.ts';

export { EmbeddedStartError, FolderInUseError } from './start-error.ts';

/** A running engine. The first four are connection options of postgres.js, with `socketDir` as its host. */
export interface EmbeddedPostgres {
  socketDir: string;
  port: number;
  user: string;
  database: string;
  /** Shuts PostgreSQL down and gives the folder up. Idempotent. */
  stop(): Promise<void>;
  /** Tells that PostgreSQL ended, or has ended, although nobody called `stop`; with the tail of its log. */
  onExit(listener: (reason: string) => void): void;
}

/** Only names the socket file; nothing listens on a port. */
const PORT = 5432;
const DATABASE_FOLDER = 'postgres';
const ROLE = 'keygate';
const DATABASE = 'keygate';
/** The shortest limit of a Unix socket path is macOS's, with 103 bytes and an end. */
const SOCKET_PATH_BYTES_MAX = 103;

const SETTINGS: Record<string, string> = {
  listen_addresses: '',
  port: String(PORT),
  unix_socket_permissions: '0700',
  fsync: 'on',
  full_page_writes: 'on',
  synchronous_commit: 'on',
  max_connections: '60',
  shared_buffers: '128MB',
  max_wal_size: '512MB',
  // Small containers have little shared memory to spare, and no query here gains from helpers.
  max_parallel_workers_per_gather: '0',
  jit: 'off',
  timezone: 'UTC',
  log_timezone: 'UTC',
  // The log tells of the server, not of clients: it stays small, and no statement's data gets into it.
  log_min_messages: 'log',
  log_min_error_statement: 'panic',
  log_checkpoints: 'off',
};

/**
 * Starts PostgreSQL on `<dataDir>/postgres`, which is made on the first start; the server's log is
 * `<dataDir>/postgres.log`. Everything that was committed is there again after any kind of end.
 *
 * @param options.settings over those of this file
 * @throws EmbeddedStartError with one sentence: no binaries for this platform, the folder is owned by another
 *   gateway, or what PostgreSQL itself complained about
 */
export async function startEmbeddedPostgres(options: {
  dataDir: string;
  log: Log;
  settings?: Record<string, string>;
}): Promise<EmbeddedPostgres> {
  const undo: Undo = [];
  try {
    return await start(options, undo);
  } catch (error) {
    await undoAll(undo, (failure) =>
      options.log.error({ error: failure }, 'a part did not end as it should'),
    );
    if (error instanceof EmbeddedStartError) throw error;
    const fault = folderFault(error, options.dataDir);
    const reason = fault instanceof Error ? fault.message : String(fault);
    throw new EmbeddedStartError(
      `The embedded PostgreSQL could not start on ${options.dataDir}: ${reason}.`,
      { cause: fault },
    );
  }
}

/** Whether a gateway has started on the folder before. */
export function isEmbeddedMade(dataDir: string): boolean {
  return existsSync(join(dataDir, DATABASE_FOLDER));
}

async function start(
  options: { dataDir: string; log: Log; settings?: Record<string, string> },
  undo: Undo,
): Promise<EmbeddedPostgres> {
  const { log } = options;
  const wasMade = await mkdir(resolve(options.dataDir), { recursive: true });
  const dataDir = await realpath(resolve(options.dataDir));
  if (wasMade !== undefined) await chmod(dataDir, 0o700);
  const databaseDir = join(dataDir, DATABASE_FOLDER);
  const user = await engineUserFor(databaseDir);

  const closed = user === null ? null : await letPass(user, dataDir);
  const isHidden = closed !== null;
  const alias = isHidden || isTooLongForSockets(dataDir) ? await makeAlias(dataDir, user) : null;
  if (alias !== null) undo.push(() => rm(alias, { recursive: true, force: true }));
  if (closed !== null && (process.platform !== 'linux' || (await letPass(user!, alias!)) !== null)) {
    throw new EmbeddedStartError(
      `PostgreSQL never runs as root, and ${user!.name}, whom it would run as, can't enter ${closed}: ` +
        'put DATA_DIR elsewhere, or start as a user that is not root.',
    );
  }
  const shortDir = alias === null ? dataDir : join(alias, 'data');
  // What PostgreSQL's user must reach by name lies where it can go.
  const reachableDir = isHidden ? alias! : dataDir;

  const ownership = await ownFolder(join(shortDir, 'owner'));
  if (ownership === null) {
    throw new FolderInUseError(
      `Another gateway is running on ${dataDir}: stop it, or give this one its own DATA_DIR.`,
    );
  }
  undo.push(() => ownership.release());

  const binaries = await npmBinaries({ dataDir: reachableDir, user });
  await endOrphan(databaseDir);
  await initialise({ binaries, user, databaseDir, isHidden, role: ROLE, database: DATABASE, durable: true });
  const socketDir = join(isHidden ? reachableDir : shortDir, 'run');
  await makeFolderFor(user, join(reachableDir, 'run'));
  const server = await startPostmaster({
    binaries,
    user,
    databaseDir,
    isHidden,
    logFile: join(dataDir, 'postgres.log'),
    settings: { ...SETTINGS, unix_socket_directories: quoted(socketDir), ...options.settings },
    address: { path: join(socketDir, `.s.PGSQL.${PORT}`) },
    role: ROLE,
    database: DATABASE,
    removeWhenOrphaned: alias === null ? [] : [alias],
  });
  log.info({ postmaster: server.pid, dataDir }, 'embedded PostgreSQL runs');

  const listeners: ((reason: string) => void)[] = [];
  let isStopping = false;
  let endReason: string | null = null;
  undo.push(async () => {
    await server.stop();
  });
  const watched = server.exited.then(async (end) => {
    if (isStopping) return;
    let reason: string;
    if (end.cause === 'guardianLost') {
      // Without its guardian the server would outlive this process.
      await endOrphan(databaseDir).catch((error: Error) =>
        log.error({ error }, 'PostgreSQL could not be stopped'),
      );
      reason = 'PostgreSQL was stopped because its guardian was killed';
    } else {
      reason = `PostgreSQL ended by itself (${end.signal ?? `code ${end.code}`}); its log ends with:\n${await server.logTail()}`;
    }
    endReason = reason;
    for (const listener of listeners) listener(reason);
  });
  let stopped: Promise<void> | null = null;
  return {
    socketDir,
    port: PORT,
    user: ROLE,
    database: DATABASE,
    stop() {
      isStopping = true;
      stopped ??= undoAll(undo).then(() => watched);
      return stopped;
    },
    onExit(listener) {
      if (endReason === null) listeners.push(listener);
      else listener(endReason);
    },
  };
}

function isTooLongForSockets(dataDir: string): boolean {
  const longest = [join(dataDir, 'run', `.s.PGSQL.${PORT}`), join(dataDir, 'owner', 'new-12345678')];
  return longest.some((path) => Buffer.byteLength(path) > SOCKET_PATH_BYTES_MAX);
}

/**
 * A folder of our own in the system's temporary one, with a link `data` to `dataDir`: sockets are named through
 * it where the path of `dataDir` is too long, and lie in it where PostgreSQL's user can't go to `dataDir`.
 */
async function makeAlias(dataDir: string, user: EngineUser | null): Promise<string> {
  const alias = await mkdtemp(join(await realpath(tmpdir()), 'keygate-'));
  await symlink(dataDir, join(alias, 'data'));
  if (user !== null) await chmod(alias, 0o711);
  return alias;
}

/** As PostgreSQL reads a list of folders. */
function quoted(folder: string): string {
  return `"${folder.replaceAll('"', '""')}"`;
}
