/** Under what a figure was taken: without it, no figure means anything. */
import { execFileSync } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { cpus, release, totalmem } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { findRedis } from '../support/debian-binary.ts';

export interface Setting {
  commit: string;
  date: string;
  machine: string;
  versions: Record<string, string>;
}

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const PACKAGES = ['socket.io', 'ws', 'postgres', 'drizzle-orm', 'ioredis', 'zod'];

export async function describeSetting(postgresBinDir: string): Promise<Setting> {
  const model = cpus()[0]?.model ?? 'unknown processor';
  const redis = await findRedis();
  const version = (command: string, args: string[], env = process.env) =>
    /\d+\.\d+(\.\d+)?/.exec(execFileSync(command, args, { encoding: 'utf8', env }))?.[0] ?? '?';
  return {
    commit: commit(),
    date: new Date().toISOString().slice(0, 10),
    machine: `${model}, ${cpus().length} cores, ${Math.round(totalmem() / 2 ** 30)} GB, Linux ${release()}`,
    versions: {
      node: process.versions.node,
      postgresql: version(join(postgresBinDir, 'postgres'), ['--version']),
      redis: version(redis.command, ['--version'], { ...process.env, ...redis.env }),
      ...Object.fromEntries(PACKAGES.map((name) => [name, packageVersion(name)])),
    },
  };
}

function commit(): string {
  const git = (...args: string[]) => execFileSync('git', args, { cwd: ROOT, encoding: 'utf8' }).trim();
  try {
    const changed = git('status', '--porcelain', '--', 'src', 'drizzle', 'package-lock.json') !== '';
    return git('rev-parse', '--short=12', 'HEAD') + (changed ? ' with uncommitted changes' : '');
  } catch {
    return 'unknown';
  }
}

function packageVersion(name: string): string {
  const file = join(ROOT, 'node_modules', name, 'package.json');
  return existsSync(file) ? JSON.parse(readFileSync(file, 'utf8')).version : '?';
}
