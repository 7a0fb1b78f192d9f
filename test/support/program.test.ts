import { mkdirSync, mkdtempSync, rmSync, utimesSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { isOutdated } from './program.ts';

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'keygate-program-'));
  mkdirSync(join(folder, 'src/keys'), { recursive: true });
  for (const name of ['src/main.ts', 'src/keys/claim.ts', 'built']) writeFileSync(join(folder, name), '');
  for (const name of ['src', 'src/keys', 'src/main.ts', 'src/keys/claim.ts']) age(name, 100);
  age('built', 200);
});
afterEach(() => rmSync(folder, { recursive: true }));

function age(name: string, seconds: number): void {
  utimesSync(join(folder, name), seconds, seconds);
}

const outdated = (): boolean => isOutdated(join(folder, 'built'), join(folder, 'src'));

describe('what was built', () => {
  it('is good while nothing has changed since', () => {
    expect(outdated()).toBe(false);
  });

  it('is outdated when a source was changed at any depth', () => {
    age('src/keys/claim.ts', 201);
    expect(outdated()).toBe(true);
  });

  it('is outdated when a source is gone', () => {
    rmSync(join(folder, 'src/keys/claim.ts'));
    expect(outdated()).toBe(true);
  });

  it('is outdated when it was never built', () => {
    rmSync(join(folder, 'built'));
    expect(outdated()).toBe(true);
  });
});
