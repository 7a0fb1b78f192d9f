/** A disk that a test can fill: a small tmpfs, mounted where the user may, or else in a user namespace of its own. */
import { execFile } from 'node:child_process';
import { chmod, mkdtemp, open, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';

const run = promisify(execFile);
const BALLAST = 'ballast';
const BLOCK = Buffer.alloc(64 * 1024);

export interface SmallDisk {
  /** The folder, for those that are started through `through`. */
  dir: string;
  /** What a process has to be started through to see the disk; empty where everybody sees it. */
  through: readonly string[];
  /** Writes until nothing more fits. @param pid of a process that sees the disk */
  fill(pid: number): Promise<void>;
  /** Takes away what `fill` wrote. */
  free(pid: number): Promise<void>;
  remove(): Promise<void>;
}

/** @throws Error with one line, where this machine gives no right to mount a tmpfs in either way */
export async function smallDisk(sizeMb: number): Promise<SmallDisk> {
  const dir = await mkdtemp(join(tmpdir(), 'keygate-disk-'));
  // As root, PostgreSQL's user has to pass through.
  await chmod(dir, 0o711);
  const options = `size=${sizeMb}m,mode=0711`;
  const [uid, gid] = [process.getuid!(), process.getgid!()];
  const isRoot = uid === 0;
  const mapped = `mount -t tmpfs -o ${options} none "$0" && exec unshare -U --map-user=${uid} --map-group=${gid} -- "$@"`;
  const through = isRoot ? [] : ['unshare', '-rm', 'sh', '-c', mapped, dir];
  try {
    if (isRoot) await run('mount', ['-t', 'tmpfs', '-o', options, 'none', dir]);
    else await run('unshare', [...through.slice(1), 'true']);
  } catch (cause) {
    await rm(dir, { recursive: true, force: true });
    throw new Error(
      'A full disk needs a small tmpfs: this machine lets this user mount none, nor make a user namespace for one.',
      { cause },
    );
  }
  const ballast = (pid: number): string => join(isRoot ? dir : `/proc/${pid}/root${dir}`, BALLAST);
  return {
    dir,
    through,
    async fill(pid) {
      const file = await open(ballast(pid), 'a');
      try {
        for (;;) await file.write(BLOCK);
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== 'ENOSPC') throw error;
      } finally {
        await file.close();
      }
    },
    free: (pid) => rm(ballast(pid), { force: true }),
    async remove() {
      if (isRoot) await run('umount', ['--lazy', dir]);
      await rm(dir, { recursive: true, force: true });
    },
  };
}
