/** Why a folder can't be worked in, as its operator needs to hear it: whose it is, where it is another user's. */
import { statSync } from 'node:fs';

/** @returns an error of one sentence where `folder` is closed to this user, and any other fault as it is */
export function folderFault(error: unknown, folder: string): unknown {
  const code = error instanceof Error && 'code' in error ? error.code : null;
  if (code !== 'EACCES' && code !== 'EPERM') return error;
  const own = process.getuid?.();
  const owner = ownerOf(folder);
  if (owner === null || owner === own) return error;
  return new Error(
    `it belongs to another user (uid ${owner}): start as that user, or give ${folder} with all that is in it to this one (uid ${own})`,
  );
}

/** Null where the folder isn't there, or can't be looked at. */
function ownerOf(folder: string): number | null {
  try {
    return statSync(folder).uid;
  } catch {
    return null;
  }
}
