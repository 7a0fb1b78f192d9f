/** The command line as an operator runs it, in an environment that holds nothing but what is given. */
import { spawn } from 'node:child_process';
import { KEYGATE } from './program.ts';

export interface Ended {
  code: number | null;
  stdout: string;
  stderr: string;
}

export function keygate(args: readonly string[], env: NodeJS.ProcessEnv): Promise<Ended> {
  const child = spawn(process.execPath, [KEYGATE, ...args], {
    env: { PATH: process.env.PATH, HOME: process.env.HOME, ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  const output = { stdout: '', stderr: '' };
  for (const name of ['stdout', 'stderr'] as const) {
    child[name].setEncoding('utf8').on('data', (chunk: string) => {
      output[name] += chunk;
    });
  }
  return new Promise((resolve) => {
    child.on('close', (code) => resolve({ code, ...output }));
  });
}
