import { readFileSync } from 'node:fs';

/** This package's version, both from `src` and from `dist`. */
export function packageVersion(): string {
  return JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8')).version;
}
