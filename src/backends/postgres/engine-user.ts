/** Whom PostgreSQL runs as: it refuses root, so a root gateway hands it to an unprivileged user. */
import { chmod, readFile, stat } from 'node:fs/promises';
import { dirname } from 'node:path';

export interface EngineUser {
  name: string;
  uid: number;
  gid: number;
}

/** What the kernel calls nobody, where /etc/passwd doesn't say. */
const NOBODY: EngineUser = { name: 'nobody', uid: 65_534, gid: 65_534 };

/**
 * @param databaseDir an existing one keeps its owner, so that files needn't change hands
 * @returns null when this process isn't root: PostgreSQL then runs as this process does
 */
export async function engineUserFor(databaseDir: string): Promise<EngineUser | null> {
  if (process.getuid?.() !== 0) return null;
  const owner = await stat(databaseDir).catch(() => null);
  if (owner !== null && owner.uid !== 0) return { name: `uid ${owner.uid}`, uid: owner.uid, gid: owner.gid };
  const accounts = (await readFile('/etc/passwd', 'utf8').catch(() => ''))
    .split('\n')
    .map((line) => line.split(':'));
  for (const wanted of ['postgres', 'nobody']) {
    const account = accounts.find(([name]) => name === wanted);
    const [uid, gid] = [Number(account?.[2]), Number(account?.[3])];
    if (uid > 0 && gid > 0) return { name: wanted, uid, gid };
  }
  return NOBODY;
}

/**
 * Opens `folder` for `user` to pass through, not to list. Its parents belong to somebody else and are only
 * looked at.
 *
 * @param folder absolute, without links
 * @returns the parent that is closed to that user, or null when it can reach what lies in `folder`
 */
export async function letPass(user: EngineUser, folder: string): Promise<string | null> {
  const own = await stat(folder);
  if (!mayPass(user, own)) await chmod(folder, (own.mode & 0o777) | 0o001);
  for (let parent = dirname(folder); ; parent = dirname(parent)) {
    if (!mayPass(user, await stat(parent))) return parent;
    if (parent === dirname(parent)) return null;
  }
}

function mayPass(user: EngineUser, folder: { uid: number; gid: number; mode: number }): boolean {
  if (folder.uid === user.uid) return (folder.mode & 0o100) !== 0;
  if (folder.gid === user.gid) return (folder.mode & 0o010) !== 0;
  return (folder.mode & 0o001) !== 0;
}
