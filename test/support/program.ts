/** The program as an operator runs it, `node dist/main.js`: what tests start is what is shipped. */
import { execFileSync } from 'node:child_process';
import { readdirSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));

/** The file that Node is given. */
export const KEYGATE = join(ROOT, 'dist/main.js');

/** Builds the program where it is outdated. @throws Error when it can't be built; the build has said why */
export function buildKeygate(): void {
  // What `npm run build` writes last.
  if (!isOutdated(join(ROOT, 'dist/admin/web/index.html'), join(ROOT, 'src'))) return;
  process.stderr.write('building dist/ ...\n');
  execFileSync('npm', ['run', '--silent', 'build'], { cwd: ROOT, stdio: 'inherit' });
}

/** Whether anything in the folder was changed, came or went since the file was written, or the file is not there. */
export function isOutdated(file: string, folder: string): boolean {
  const writtenAtMs = statSync(file, { throwIfNoEntry: false })?.mtimeMs ?? 0;
  const within = readdirSync(folder, { recursive: true, encoding: 'utf8' });
  // A folder is as young as the last file that came to it or left it.
  return ['', ...within].some((name) => statSync(join(folder, name)).mtimeMs >= writtenAtMs);
}
