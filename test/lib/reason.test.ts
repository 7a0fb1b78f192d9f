import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, it } from 'vitest';
import { reasonOf } from '../../src/lib/reason.ts';
import { keygate } from '../support/command-line.ts';

it('tells the causes of a fault in one line, each of them once', () => {
  const disk = new Error('the disk\n  is full');
  expect(reasonOf(disk)).toBe('the disk is full');
  expect(reasonOf(new Error('no start', { cause: disk }))).toBe('no start: the disk is full');
  expect(reasonOf(new Error('no start: the disk is full.', { cause: disk }))).toBe(
    'no start: the disk is full.',
  );
  expect(reasonOf(new Error('Failed query: SELECT', { cause: disk }))).toBe('the disk is full');
});

it('tells once why the embedded store can not start', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'keygate-command-'));
  const dataDir = join(folder, 'file', 'data');
  await writeFile(join(folder, 'file'), '');
  const { code, stderr } = await keygate(['migrate'], { DATA_DIR: dataDir });
  await rm(folder, { recursive: true, force: true });
  expect({ code, stderr }).toEqual({
    code: 1,
    stderr: `keygate: The embedded PostgreSQL could not start on ${dataDir}: ENOTDIR: not a directory, mkdir '${dataDir}'.\n`,
  });
});
