/** Secrets for which none is configured: files of the data folder, each made once. */
import { randomBytes } from 'node:crypto';
import { chmod, type FileHandle, link, mkdir, open, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { folderFault } from './lib/folder-fault.ts';
import { SECRET_BYTES_MIN } from './requests/authenticate.ts';

const SECRET_BYTES = 32;
const OWNER_ONLY = 0o600;

/** What users' tokens are signed with, and what opens the inspector. */
export type EmbeddedSecretName = 'token-secret' | 'admin-token';

/** Where the secret of `dataDir` lies, whether or not it is there yet. */
export function embeddedSecretFile(dataDir: string, name: EmbeddedSecretName = 'token-secret'): string {
  return join(dataDir, name);
}

/**
 * The secret of `dataDir`: made by whoever asks first, the same for everyone ever after, readable by the file's
 * owner alone. Its bytes are the file's text, which therefore works as JWT_SECRET too.
 *
 * @throws Error naming the file where it holds no secret, or can't be read or made
 */
export async function embeddedSecret(
  dataDir: string,
  name: EmbeddedSecretName = 'token-secret',
): Promise<Uint8Array> {
  const file = embeddedSecretFile(dataDir, name);
  try {
    return (await readSecret(file)) ?? (await makeSecret(dataDir, file));
  } catch (error) {
    const fault = folderFault(error, dataDir);
    throw fault === error ? error : new Error(`can not read ${file}`, { cause: fault });
  }
}

/** The secret of `dataDir` where somebody has made it; null where nobody has. @throws as {@link embeddedSecret} */
export async function existingSecret(dataDir: string, name: EmbeddedSecretName): Promise<Uint8Array | null> {
  return await readSecret(embeddedSecretFile(dataDir, name));
}

async function readSecret(file: string): Promise<Uint8Array | null> {
  let text: string;
  try {
    const handle = await open(file, 'r');
    try {
      const { mode } = await handle.stat();
      if ((mode & 0o077) !== 0) await closeToOthers(handle, file);
      text = await handle.readFile('utf8');
    } finally {
      await handle.close();
    }
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return null;
    throw error;
  }
  const secret = new TextEncoder().encode(text.trim());
  if (secret.byteLength < SECRET_BYTES_MIN) {
    throw new Error(`${file} holds no secret of ${SECRET_BYTES_MIN} bytes; remove it and a new one is made`);
  }
  return secret;
}

/** @throws Error naming the file, where it is somebody else's */
async function closeToOthers(handle: FileHandle, file: string): Promise<void> {
  try {
    await handle.chmod(OWNER_ONLY);
  } catch (error) {
    throw new Error(`${file} can be read by others, and its mode can't be changed: it is another user's`, {
      cause: error,
    });
  }
}

async function makeSecret(dataDir: string, file: string): Promise<Uint8Array> {
  const made = await mkdir(dataDir, { recursive: true });
  if (made !== undefined) await chmod(dataDir, 0o700);
  const draft = `${file}-${randomBytes(6).toString('hex')}`;
  try {
    const handle = await open(draft, 'wx', OWNER_ONLY);
    try {
      await handle.writeFile(randomBytes(SECRET_BYTES).toString('base64url'));
      await handle.sync();
    } finally {
      await handle.close();
    }
    // A link never replaces and is never half written: of several makers one wins, and all read what it made.
    await link(draft, file).catch((error: NodeJS.ErrnoException) => {
      if (error.code !== 'EEXIST') throw error;
    });
  } finally {
    await rm(draft, { force: true });
  }
  const secret = await readSecret(file);
  if (secret === null) throw new Error(`${file} vanished while it was made`);
  return secret;
}
