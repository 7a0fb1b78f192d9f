/** Waits for a process that was told to stand still: its guardian passes SIGSTOP on some time after it was asked. */
import { readFileSync } from 'node:fs';
import { eventually } from './eventually.ts';

/** Resolves when the process runs no further; what it is sent from then on it can't have seen. */
export async function stopped(pid: number): Promise<void> {
  await eventually(() => readFileSync(`/proc/${pid}/status`, 'utf8').includes('State:\tT (stopped)'), {
    that: `process ${pid} standing still`,
  });
}
