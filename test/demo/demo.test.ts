/** The demo as a stranger runs it. */
import { spawn } from 'node:child_process';
import { chmod, mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, it } from 'vitest';
import { stopped } from '../support/stopped.ts';

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'keygate-demo-test-'));
  // As root, PostgreSQL's user has to pass through.
  await chmod(folder, 0o711);
});
afterEach(() => rm(folder, { recursive: true, force: true }));

/** What the demo has in its temporary folder; the runner of TypeScript may keep a cache there. */
async function leftBehind(): Promise<string[]> {
  return (await readdir(folder)).filter((name) => name.startsWith('keygate-'));
}

interface Run {
  code: number | null;
  stdout: string;
  stderr: string;
}

/** However slow the machine is, what a test does to it then comes in its midst. */
const STOPS_AT_STEP_2 = `--import=data:text/javascript,${encodeURIComponent(`
  const { log } = console;
  console.log = (line) => {
    log(line);
    if (line.startsWith('\\n2. ')) process.kill(process.pid, 'SIGSTOP');
  };`)}`;

/** @param atStep2 what happens while it stands still there; it goes on afterwards */
function runDemo(env: NodeJS.ProcessEnv, atStep2?: (pid: number) => unknown): Promise<Run> {
  const child = spawn(process.execPath, ['--import', 'tsx', 'test/demo/demo.ts'], {
    env: {
      PATH: process.env.PATH,
      HOME: process.env.HOME,
      ...(atStep2 === undefined ? {} : { NODE_OPTIONS: STOPS_AT_STEP_2 }),
      ...env,
    },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  const output = { stdout: '', stderr: '' };
  for (const name of ['stdout', 'stderr'] as const) {
    child[name].setEncoding('utf8').on('data', (chunk: string) => {
      output[name] += chunk;
    });
  }
  return new Promise((resolve, reject) => {
    child.on('close', (code) => resolve({ code, ...output }));
    if (atStep2 === undefined) return;
    const toldStep2 = new Promise<void>((told) => {
      child.stdout.on('data', () => {
        if (output.stdout.includes('\n2. ')) told();
      });
    });
    toldStep2
      .then(() => stopped(child.pid!))
      .then(() => atStep2(child.pid!))
      .finally(() => child.kill('SIGCONT'))
      .catch(reject);
  });
}

it('tells how two phones talk, ends by itself with 0 and leaves nothing behind', {
  timeout: 120_000,
}, async () => {
  // Settings of a gateway in the same shell are none of the demo's.
  const { code, stdout, stderr } = await runDemo({ TMPDIR: folder, DATABASE_URL: 'nonsense', PORT: 'x' });
  expect(stderr).toBe('');
  expect(code).toBe(0);
  const steps = [...stdout.matchAll(/^(\d+)\. (.+)$/gm)].map(([, number, title]) => [Number(number), title]);
  expect(steps).toEqual(
    [
      'A gateway starts, with a database of its own in a temporary folder.',
      'Two phones sign in: Alice’s and Bob’s.',
      'Each phone makes its keys and uploads the public halves.',
      'Bob’s phone goes offline.',
      'Alice wants to write to Bob, and claims his keys.',
      'Alice’s phone encrypts a message, and the gateway takes it in.',
      'Bob’s phone comes back, and asks for its messages at once.',
      'Bob’s phone tells which keys it holds, and the gateway compares.',
      'Now Bob’s phone says that it is ready, and the gate opens.',
      'Bob’s phone decrypts the message.',
      'Bob answers, and Alice’s phone goes the same way.',
    ].map((title, index) => [index + 1, title]),
  );
  expect(stdout).toContain('The gateway refuses: KEYS_NOT_VALIDATED.');
  expect(stdout).toContain('From alice: Meet me at the old mill at noon.');
  expect(stdout).toContain('From bob: I will be there.');
  expect(stdout.trimEnd().split('\n').at(-1)).toBe(
    'That is all. The gateway has ended, and its folder is gone.',
  );
  expect(await leftBehind()).toEqual([]);
});

it('says in one line why it failed, and ends with 1', { timeout: 120_000 }, async () => {
  const { code, stdout, stderr } = await runDemo({ TMPDIR: folder }, killDatabase);
  expect(stderr).toMatch(/^The demo failed at step \d+: .+\n$/);
  expect(code).toBe(1);
  expect(stdout).not.toContain('That is all.');
  expect(await leftBehind()).toEqual([]);
});

async function killDatabase(): Promise<void> {
  const [demo] = await leftBehind();
  const pidFile = await readFile(join(folder, demo!, 'data', 'postgres', 'postmaster.pid'), 'utf8');
  process.kill(Number(pidFile.split('\n')[0]), 'SIGKILL');
}

it('cleans up also when it is ended in the middle', { timeout: 120_000 }, async () => {
  const { code, stderr } = await runDemo({ TMPDIR: folder }, (pid) => process.kill(pid, 'SIGINT'));
  expect(code).toBe(1);
  expect(stderr).toMatch(/^The demo failed at step \d+: it was ended by SIGINT\n$/);
  expect(await leftBehind()).toEqual([]);
});
