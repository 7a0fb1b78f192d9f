/** What processes have used of the processor, read from /proc: Linux only, in steps of 10 ms. */
import { readFileSync } from 'node:fs';

/** Whose time counts under a name: one process, or one with all its children, dead or alive. */
export interface Watched {
  pid: number;
  withChildren: boolean;
}

const TICK_MS = 10;

/** @returns user and system time since the process began; 0 for one that is gone */
export function cpuMs({ pid, withChildren }: Watched): number {
  const own = ticks(pid);
  if (!withChildren) return (own.self ?? 0) * TICK_MS;
  // A child that has ended counts with its parent's reaped ones.
  const living = childrenOf(pid).reduce((sum, child) => sum + (ticks(child).self ?? 0), 0);
  return ((own.self ?? 0) + (own.reaped ?? 0) + living) * TICK_MS;
}

/** What all processors of the machine together have been busy, whatever with, since it started. */
export function machineBusyMs(): number {
  const [, user, nice, system, , , irq, softirq, steal] = (read('/proc/stat').split('\n')[0] ?? '').split(
    /\s+/,
  );
  return (
    [user, nice, system, irq, softirq, steal].reduce((sum, field) => sum + Number(field ?? 0), 0) * TICK_MS
  );
}

/** Resident memory in bytes; 0 for a process that is gone. */
export function residentBytes(pid: number): number {
  const [, kilobytes] = /^VmRSS:\s+(\d+) kB$/m.exec(read(`/proc/${pid}/status`)) ?? [];
  return Number(kilobytes ?? 0) * 1024;
}

function ticks(pid: number): { self?: number; reaped?: number } {
  const stat = read(`/proc/${pid}/stat`);
  // The name, in brackets, may itself hold spaces and brackets.
  const fields = stat
    .slice(stat.lastIndexOf(')') + 2)
    .split(' ')
    .map(Number);
  if (fields.length < 15) return {};
  return { self: fields[11]! + fields[12]!, reaped: fields[13]! + fields[14]! };
}

function childrenOf(pid: number): number[] {
  return read(`/proc/${pid}/task/${pid}/children`).split(' ').filter(Boolean).map(Number);
}

function read(path: string): string {
  try {
    return readFileSync(path, 'utf8');
  } catch {
    return '';
  }
}
