/** Finds what the tests need beside Node: on the path, or from Debian's packages unpacked into a private folder. */
import { execFile } from 'node:child_process';
import { constants } from 'node:fs';
import { access, chmod, lstat, mkdir, mkdtemp, readdir, readFile, rename, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { delimiter, join } from 'node:path';
import { promisify } from 'node:util';

const run = promisify(execFile);
const DOWNLOAD_WAIT_MAX_MS = 120_000;

export interface EngineBinary {
  command: string;
  env: Record<string, string>;
}

/** A real engine can't be had; the message is one line that says what to install. */
export class MissingEngineError extends Error {
  override readonly name = 'MissingEngineError';
}

interface Engine {
  /** Any of these will do. */
  programs: readonly string[];
  debian: DebianProgram;
  /** One line that says what to install. */
  advice: string;
}

interface DebianProgram {
  package: string;
  /** Where the package has its program. */
  program: string;
}

const REDIS: Engine = {
  programs: ['redis-server', 'valkey-server'],
  debian: { package: 'redis-server', program: 'usr/bin/redis-server' },
  advice: 'The tests need a real Redis: install redis-server (or valkey-server), or set TEST_REDIS_URL.',
};

const PGBOUNCER: Engine = {
  programs: ['pgbouncer'],
  debian: { package: 'pgbouncer', program: 'usr/sbin/pgbouncer' },
  advice: 'The tests need a real PgBouncer: install pgbouncer.',
};

/** @throws MissingEngineError where there is no server and no Debian to take one from */
export function findRedis(): Promise<EngineBinary> {
  return find(REDIS);
}

/** @throws MissingEngineError where there is none and no Debian to take one from */
export function findPgBouncer(): Promise<EngineBinary> {
  return find(PGBOUNCER);
}

async function find({ programs, debian, advice }: Engine): Promise<EngineBinary> {
  const folders = [
    ...(process.env.PATH ?? '').split(delimiter),
    '/usr/bin',
    '/usr/sbin',
    '/usr/local/bin',
    '/opt/homebrew/bin',
  ];
  for (const name of programs) {
    for (const folder of folders.filter((path) => path !== '')) {
      const command = join(folder, name);
      if (await isExecutable(command)) return { command, env: {} };
    }
  }
  try {
    return await unpacked(debian);
  } catch (cause) {
    throw new MissingEngineError(advice, { cause });
  }
}

/**
 * Downloads Debian's package and unpacks it, without root and without touching the system; the next run finds
 * it where this one put it.
 */
async function unpacked(wanted: DebianProgram): Promise<EngineBinary> {
  const release =
    (await readFile('/etc/os-release', 'utf8')).match(/^VERSION_CODENAME="?([\w-]+)/m)?.[1] ?? 'unknown';
  const uid = process.getuid?.() ?? 0;
  const cache = join(tmpdir(), `keygate-${wanted.package}-${release}-${process.arch}-${uid}`);
  if (!(await isOurs(cache, uid))) {
    const part = await mkdtemp(`${cache}.part-`);
    try {
      await downloadInto(part, wanted.package);
      await binaryIn(part, wanted);
      // Some programs are run by another user than root.
      await chmod(part, 0o755);
      // Named when it is whole and known to run. Another run that was quicker has made the same.
      await rename(part, cache).catch((error: NodeJS.ErrnoException) => {
        if (error.code !== 'ENOTEMPTY' && error.code !== 'EEXIST') throw error;
      });
    } finally {
      await rm(part, { recursive: true, force: true });
    }
    if (!(await isOurs(cache, uid))) throw new Error(`${cache} belongs to somebody else`);
  }
  return binaryIn(cache, wanted);
}

/** Names in the temporary folder are free for all: only what this user alone could write is run. */
async function isOurs(folder: string, uid: number): Promise<boolean> {
  const found = await lstat(folder).catch(() => null);
  if (found === null) return false;
  return found.isDirectory() && found.uid === uid && (found.mode & 0o022) === 0;
}

async function downloadInto(folder: string, packageName: string): Promise<void> {
  const [lists, archives] = [join(folder, 'apt', 'lists'), join(folder, 'apt', 'archives')];
  for (const path of [lists, archives]) await mkdir(join(path, 'partial'), { recursive: true });
  const options = [
    `Dir::State::Lists=${lists}`,
    `Dir::Cache=${join(folder, 'apt')}`,
    `Dir::Cache::archives=${archives}`,
    'Debug::NoLocking=1',
    ...(process.getuid?.() === 0 ? ['APT::Sandbox::User=root'] : []),
  ].flatMap((option) => ['-o', option]);
  const apt = (...args: string[]) =>
    run('apt-get', ['-q', ...options, ...args], { timeout: DOWNLOAD_WAIT_MAX_MS });
  await apt('update');
  await apt('install', '--download-only', '--no-install-recommends', '--yes', packageName);
  for (const name of await readdir(archives)) {
    if (name.endsWith('.deb')) await run('dpkg-deb', ['-x', join(archives, name), folder]);
  }
  await rm(join(folder, 'apt'), { recursive: true, force: true });
}

async function binaryIn(folder: string, { program }: DebianProgram): Promise<EngineBinary> {
  const command = join(folder, program);
  const libraries = join(folder, 'usr', 'lib');
  const machines = await readdir(libraries).catch((): string[] => []);
  const env = { LD_LIBRARY_PATH: machines.map((name) => join(libraries, name)).join(':') };
  await run(command, ['--version'], { env });
  return { command, env };
}

async function isExecutable(path: string): Promise<boolean> {
  return access(path, constants.X_OK).then(
    () => true,
    () => false,
  );
}
