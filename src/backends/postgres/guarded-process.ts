/**
 * Runs a process that ends with the one that started it, also when that one is killed with SIGKILL:
 * a small guardian holds a channel to the owner, and stops its child when the channel closes.
 */
import { spawn } from 'node:child_process';

/** How to stop a process: each signal in turn, until it has ended. */
export interface StopStep {
  signal: NodeJS.Signals;
  waitMs: number;
}

export interface GuardedOptions {
  command: string;
  args: readonly string[];
  /** Entered before the user is changed, so it may lie where that user couldn't go. */
  cwd: string;
  /** The whole environment; nothing is inherited. */
  env: Record<string, string>;
  /** Whom to run as; null is the owner's own user. */
  user: { uid: number; gid: number } | null;
  /** Receives standard output and error. May be closed once `startGuarded` has returned. */
  outputFd: number;
  /** Standard input; none is an empty one. */
  input?: string;
  stopSteps: readonly StopStep[];
  /** Removed by the guardian, after the process has ended, where the owner is no longer there to do it. */
  removeWhenOrphaned?: readonly string[];
}

export type ProcessEnd =
  | { cause: 'ended'; code: number | null; signal: string | null }
  /** The guardian itself was killed: the process may still run, and nobody will stop it. */
  | { cause: 'guardianLost' };

export interface GuardedProcess {
  pid: number;
  guardianPid: number;
  /** Never rejects. */
  exited: Promise<ProcessEnd>;
  /** Sends one signal; does nothing once the process has ended. */
  kill(signal: NodeJS.Signals): void;
  /** Goes through the stop steps. Resolves when process and guardian are gone; idempotent. */
  stop(): Promise<ProcessEnd>;
}

type Report =
  | { kind: 'started'; pid: number }
  | { kind: 'failed'; message: string }
  | { kind: 'exited'; code: number | null; signal: string | null };

// Text rather than a file, because it has to run alike from compiled output and from sources under a loader.
// As the parent of its child it can't mistake another process for it: a pid is not reused before it is reaped.
const GUARDIAN_PROGRAM = `
const { spawn } = require('node:child_process');
const { rmSync } = require('node:fs');
// A signal sent to everybody is the owner's to answer: it ends its engine when it is done with it.
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, () => {});
let child = null, order = null, stopping = false;
const report = (message, then = () => {}) => process.connected ? process.send(message, then) : then();
const stop = (step = 0) => {
  if (step === 0 && stopping) return;
  stopping = true;
  const next = order.stopSteps[step];
  if (!next || child.exitCode !== null || child.signalCode !== null) return;
  child.kill(next.signal);
  setTimeout(stop, next.waitMs, step + 1);
};
const start = () => {
  child = spawn(order.command, order.args, {
    cwd: order.cwd, env: order.env, stdio: [order.input === undefined ? 'ignore' : 'pipe', 'inherit', 'inherit'],
    ...(order.user ? { uid: order.user.uid, gid: order.user.gid } : {}),
  });
  child.on('spawn', () => report({ kind: 'started', pid: child.pid }));
  child.on('error', (error) => {
    if (child.pid === undefined) report({ kind: 'failed', message: error.message }, () => process.exit(1));
  });
  child.on('exit', (code, signal) => report({ kind: 'exited', code, signal }, () => {
    if (!process.connected) {
      for (const path of order.removeWhenOrphaned) rmSync(path, { recursive: true, force: true, maxRetries: 20 });
    }
    process.exit(0);
  }));
  if (order.input !== undefined) {
    child.stdin.on('error', () => {});
    child.stdin.end(order.input);
  }
};
process.on('message', (message) => {
  if (message.kind === 'start') { order = message.order; start(); }
  else if (message.kind === 'kill') child.kill(message.signal);
  else if (message.kind === 'stop') stop();
});
process.on('disconnect', () => child ? stop() : process.exit(0));
`;

/**
 * Starts a process under a guardian.
 *
 * @throws Error when the process can't be started at all (no such file, no permission)
 */
export async function startGuarded(options: GuardedOptions): Promise<GuardedProcess> {
  const { NODE_OPTIONS: _, ...env } = process.env;
  const guardian = spawn(process.execPath, ['-e', GUARDIAN_PROGRAM], {
    cwd: '/',
    env,
    // A session of its own: what a terminal or a killed process group gets is not for the engine.
    detached: true,
    stdio: ['ignore', options.outputFd, options.outputFd, 'ipc'],
  });
  const gone = new Promise<void>((resolve) => {
    guardian.once('exit', () => resolve());
    guardian.once('error', () => resolve());
  });
  const reported = new Promise<Report>((resolve) => {
    guardian.once('message', (report: Report) => resolve(report));
    guardian.once('error', (error) => resolve({ kind: 'failed', message: error.message }));
    void gone.then(() => resolve({ kind: 'failed', message: 'its guardian ended' }));
  });
  const exited = new Promise<ProcessEnd>((resolve) => {
    guardian.on('message', (report: Report) => {
      if (report.kind === 'exited') resolve({ cause: 'ended', code: report.code, signal: report.signal });
    });
    void gone.then(() => resolve({ cause: 'guardianLost' }));
  });

  const send = (message: object): void => {
    // A guardian that is gone has been noticed by its exit.
    if (guardian.connected) guardian.send(message, () => {});
  };
  const { removeWhenOrphaned = [], outputFd: _fd, ...order } = options;
  send({ kind: 'start', order: { ...order, removeWhenOrphaned } });
  const first = await reported;
  if (first.kind !== 'started') {
    throw new Error(
      `${options.command} can't be run: ${first.kind === 'failed' ? first.message : 'it ended'}`,
    );
  }
  return {
    pid: first.pid,
    guardianPid: guardian.pid!,
    exited,
    kill: (signal) => send({ kind: 'kill', signal }),
    async stop() {
      send({ kind: 'stop' });
      await gone;
      return exited;
    },
  };
}
