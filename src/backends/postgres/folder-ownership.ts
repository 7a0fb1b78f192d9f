/**
 * Decides which living process owns a folder. The kernel is the judge: the owner listens on a Unix socket in
 * it, which stops answering in the moment that process dies, however it dies.
 */
import { randomBytes } from 'node:crypto';
import { chown, link, mkdir, readdir, rm, stat } from 'node:fs/promises';
import { connect, createServer } from 'node:net';
import { join } from 'node:path';

export interface FolderOwnership {
  /** Gives the folder up. Idempotent. */
  release(): void;
}

/** Each round is lost to another taker that got further, so a handful is plenty. */
const ROUNDS_MAX = 50;
const SILENT_OWNER_MS = 1_000;
/** After a reset the socket is gone; whoever resets again and again is alive. */
const RESETS_MAX = 10;

/**
 * Owns `folder` until `release` or the end of this process; makes the folder when it is absent.
 *
 * The sockets are numbered, and the highest number is the owner's. A number is given out by `link`, which
 * never replaces, to a socket that already listens; and the highest one is never removed. So a number found
 * dead stays dead, and of those that find it dead at once, one gets the next.
 *
 * @param folder short enough for a Unix socket path in it
 * @returns null when another living process owns it, or this one already does
 */
export async function ownFolder(folder: string): Promise<FolderOwnership | null> {
  await mkdir(folder, { recursive: true, mode: 0o700 });
  const server = createServer((socket) => socket.destroy());
  const newcomer = `new-${randomBytes(4).toString('hex')}`;
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject);
    server.listen(join(folder, newcomer), resolve);
  });
  server.unref();
  const isOwner = await openToItsOwner(folder, newcomer)
    .then(() => takeNumber(folder, newcomer))
    .catch((error: unknown) => {
      server.close();
      throw error;
    });
  if (!isOwner) server.close();
  return isOwner ? { release: () => server.close() } : null;
}

/** Whoever starts as root once must not shut the folder's owner out. */
async function openToItsOwner(folder: string, newcomer: string): Promise<void> {
  if (process.getuid?.() !== 0) return;
  const { uid, gid } = await stat(folder);
  await chown(join(folder, newcomer), uid, gid).catch((error: NodeJS.ErrnoException) => {
    // An owner has cleared it away.
    if (error.code !== 'ENOENT') throw error;
  });
}

async function takeNumber(folder: string, newcomer: string): Promise<boolean> {
  for (let round = 0; round < ROUNDS_MAX; round++) {
    const latest = await highestNumber(folder);
    if (latest > 0 && (await answers(join(folder, String(latest))))) return false;
    const mine = String(latest + 1);
    try {
      await link(join(folder, newcomer), join(folder, mine));
    } catch (error) {
      const code = (error as NodeJS.ErrnoException).code;
      if (code === 'EEXIST') continue;
      // Only an owner clears newcomers away.
      if (code === 'ENOENT') return false;
      throw error;
    }
    // A taker that slept since it looked may have been overtaken by more than one.
    if ((await highestNumber(folder)) > latest + 1) {
      await rm(join(folder, mine), { force: true });
      continue;
    }
    for (const name of await readdir(folder)) {
      if (Number(name) > latest || name === mine) continue;
      await rm(join(folder, name), { force: true });
    }
    return true;
  }
  return false;
}

async function highestNumber(folder: string): Promise<number> {
  const numbers = (await readdir(folder)).map(Number).filter(Number.isInteger);
  return Math.max(0, ...numbers);
}

/**
 * Whether the owner lives: then it closes each connection in good order. A child that it had just forked when it was
 * killed keeps its socket listening for a moment, until that child becomes what it was forked for; then what waits there
 * is reset. An owner that stands still says nothing, and is one all the same.
 */
function answers(socketPath: string, triesLeft = RESETS_MAX): Promise<boolean> {
  return new Promise((resolve, reject) => {
    const socket = connect(socketPath);
    const settle = (isOwned: boolean | Promise<boolean>): void => {
      socket.destroy();
      resolve(isOwned);
    };
    socket.setTimeout(SILENT_OWNER_MS, () => settle(true));
    socket.once('end', () => settle(true));
    socket.once('error', (error: NodeJS.ErrnoException) => {
      if (error.code === 'ECONNREFUSED' || error.code === 'ENOENT') settle(false);
      // The owner is there, with a full queue of callers.
      else if (error.code === 'EAGAIN') settle(true);
      else if (error.code === 'ECONNRESET') settle(triesLeft === 0 || answers(socketPath, triesLeft - 1));
      else reject(error);
    });
    // Nothing is said; what ends is seen only by whoever reads.
    socket.resume();
  });
}
