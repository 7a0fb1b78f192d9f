/** How many files this process may have open, connections among them. */
import { readFileSync } from 'node:fs';

/** @returns null where there is no bound, or the system does not tell it in `/proc` */
export function openFilesMax(): number | null {
  try {
    const [, max] = /^Max open files\s+(\d+)/m.exec(readFileSync('/proc/self/limits', 'utf8')) ?? [];
    return max === undefined ? null : Number(max);
  } catch {
    return null;
  }
}
