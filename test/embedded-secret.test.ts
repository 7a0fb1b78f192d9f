import { spawn } from 'node:child_process';
import { chmod, mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { embeddedSecret, embeddedSecretFile } from '../src/embedded-secret.ts';

describe('the secret of a data folder', () => {
  let folder: string;
  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), 'keygate-secret-'));
  });
  afterEach(() => rm(folder, { recursive: true, force: true }));

  it('is made once, for its owner alone, with the folder around it', async () => {
    const dataDir = join(folder, 'deep', 'data');
    const secret = await embeddedSecret(dataDir);
    expect(secret.byteLength).toBeGreaterThanOrEqual(32);
    expect(await embeddedSecret(dataDir)).toEqual(secret);
    expect((await stat(embeddedSecretFile(dataDir))).mode & 0o777).toBe(0o600);
    expect(await readdir(dataDir)).toHaveLength(1);
    expect(await readFile(embeddedSecretFile(dataDir), 'utf8')).toBe(new TextDecoder().decode(secret));
  });

  it('is the same for all that ask at once, also in other processes', async () => {
    const script = `import { embeddedSecret } from './src/embedded-secret.ts';
      process.stdout.write(Buffer.from(await embeddedSecret(process.argv[1])).toString());`;
    const others = Array.from({ length: 4 }, () => {
      const child = spawn(
        process.execPath,
        ['--import', 'tsx', '--input-type=module', '-e', script, folder],
        {
          stdio: ['ignore', 'pipe', 'inherit'],
        },
      );
      return new Promise<string>((resolve) => {
        let text = '';
        child.stdout.setEncoding('utf8').on('data', (chunk: string) => {
          text += chunk;
        });
        child.on('close', () => resolve(text));
      });
    });
    const here = await Promise.all(Array.from({ length: 20 }, () => embeddedSecret(folder)));
    const all = [...here.map((secret) => new TextDecoder().decode(secret)), ...(await Promise.all(others))];
    expect(all[0]).toHaveLength(43);
    expect(new Set(all).size).toBe(1);
    expect(await readdir(folder)).toHaveLength(1);
  });

  it('is the same for all that come while it is being made', async () => {
    for (let round = 0; round < 30; round++) {
      const dataDir = join(folder, String(round));
      const asked: Promise<Uint8Array>[] = [];
      // One after the other, so that some have a secret while others are still making theirs.
      for (let asker = 0; asker < 20; asker++) {
        asked.push(embeddedSecret(dataDir));
        for (let turn = 0; turn < asker % 4; turn++) await new Promise(setImmediate);
      }
      const secrets = (await Promise.all(asked)).map((secret) => new TextDecoder().decode(secret));
      expect(new Set(secrets).size).toBe(1);
    }
  });

  it('is closed to others where somebody has opened it', async () => {
    await embeddedSecret(folder);
    await chmod(embeddedSecretFile(folder), 0o644);
    await embeddedSecret(folder);
    expect((await stat(embeddedSecretFile(folder))).mode & 0o777).toBe(0o600);
  });

  it('is not believed where the file holds too little, and the file is named without what it holds', async () => {
    await writeFile(embeddedSecretFile(folder), 'hunter2\n');
    const failure = await embeddedSecret(folder).then(
      () => '',
      (error: Error) => error.message,
    );
    expect(failure).toContain(embeddedSecretFile(folder));
    expect(failure).not.toContain('hunter2');
  });
});
