/** How long a gateway takes from its start to listening, where it brings its own PostgreSQL: cold once, warm often. */
import { type ChildProcess, spawn } from 'node:child_process';
import { mkdtemp, realpath, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { DIST_DIR } from './stage.ts';

export interface StartResult {
  /** On an empty folder: the database is made. */
  coldMs: number;
  /** On that folder again. */
  warmMs: number[];
}

const WARM_STARTS = 5;
const STOP_MAX_MS = 15_000;

export async function measureStart(): Promise<StartResult> {
  const dir = await mkdtemp(join(await realpath(tmpdir()), 'keygate-bench-'));
  try {
    const dataDir = join(dir, 'data');
    const coldMs = await startOnce(dataDir);
    const warmMs: number[] = [];
    for (let start = 0; start < WARM_STARTS; start++) warmMs.push(await startOnce(dataDir));
    return { coldMs, warmMs };
  } finally {
    await rm(dir, { recursive: true, force: true });
  }
}

/** @returns from the process's start to the line that tells where it listens */
async function startOnce(dataDir: string): Promise<number> {
  const { PATH = '', HOME = '' } = process.env;
  const startedAtMs = performance.now();
  const gateway = spawn(process.execPath, [join(DIST_DIR, 'main.js'), 'serve'], {
    env: {
      PATH,
      HOME,
      NODE_ENV: 'production',
      PORT: '0',
      ADMIN_PORT: '0',
      DATA_DIR: dataDir,
      LOG_LEVEL: 'warn',
    },
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  try {
    await listening(gateway);
    return performance.now() - startedAtMs;
  } finally {
    await stop(gateway);
  }
}

function listening(gateway: ChildProcess): Promise<void> {
  return new Promise((resolve, reject) => {
    let text = '';
    gateway.stdout!.setEncoding('utf8').on('data', (chunk: string) => {
      text += chunk;
      if (/gateway\s+http:\S+\n/.test(text)) resolve();
    });
    gateway.once('exit', () => reject(new Error('the embedded gateway ended before it listened')));
  });
}

async function stop(gateway: ChildProcess): Promise<void> {
  if (gateway.exitCode !== null || gateway.signalCode !== null) return;
  const ended = new Promise((resolve) => gateway.once('exit', resolve));
  gateway.kill('SIGTERM');
  const cut = setTimeout(() => gateway.kill('SIGKILL'), STOP_MAX_MS);
  await ended;
  clearTimeout(cut);
}
