/** Child processes of the bench, and the calls that go to and fro between them and their starter. */
import { type ChildProcess, spawn } from 'node:child_process';

export interface Child {
  pid: number;
  /** Calls one of the functions that the child offers. @throws Error with the child's message, or where it ended */
  call<Result>(name: string, input?: unknown): Promise<Result>;
  /** Resolves when the process is gone. Idempotent. */
  stop(): Promise<void>;
}

type Question = { id: number; name: string; input: unknown };
type Answer = { id: number; result?: unknown; error?: string };

/**
 * Starts a Node process that answers calls; it ends with this one.
 *
 * @param args what follows `node`
 * @param options.output where its standard output goes: shown, or read for the line that `readyLine` matches
 * @returns the child, and what `readyLine` captured
 */
export async function startChild(
  args: readonly string[],
  options: { env?: Record<string, string>; readyLine?: RegExp } = {},
): Promise<Child & { captured: string }> {
  const { NODE_OPTIONS: _, ...inherited } = process.env;
  const child = spawn(process.execPath, args, {
    env: { ...inherited, ...options.env },
    stdio: ['ignore', options.readyLine === undefined ? 'inherit' : 'pipe', 'inherit', 'ipc'],
    serialization: 'advanced',
  });
  const gone = new Promise<void>((resolve) => child.once('exit', () => resolve()));
  const captured = options.readyLine === undefined ? '' : await lineOf(child, gone, options.readyLine);
  const open = new Map<number, { resolve(value: never): void; reject(error: Error): void }>();
  let calls = 0;
  child.on('message', ({ id, result, error }: Answer) => {
    const waiting = open.get(id);
    open.delete(id);
    if (error === undefined) waiting?.resolve(result as never);
    else waiting?.reject(new Error(error));
  });
  void gone.then(() => {
    for (const waiting of open.values()) waiting.reject(new Error(`${args.at(-1)} has ended`));
  });
  return {
    pid: child.pid!,
    captured,
    call: (name, input = {}) =>
      new Promise((resolve, reject) => {
        open.set(++calls, { resolve, reject });
        child.send({ id: calls, name, input } satisfies Question, (error) => error && reject(error));
      }),
    async stop() {
      child.kill('SIGTERM');
      const cut = setTimeout(() => child.kill('SIGKILL'), 10_000);
      await gone;
      clearTimeout(cut);
    },
  };
}

/** Answers the starter's calls; ends this process when the starter has ended. */
export function answerCalls(functions: Record<string, (input: never) => unknown>): void {
  process.on('disconnect', () => process.exit(1));
  process.on('SIGTERM', () => process.exit(0));
  process.on('message', async ({ id, name, input }: Question) => {
    const answer: Answer = { id };
    try {
      answer.result = await functions[name]!(input as never);
    } catch (error) {
      answer.error = error instanceof Error ? (error.stack ?? error.message) : String(error);
    }
    process.send!(answer);
  });
}

/** A TypeScript file of the bench as arguments of `node`. */
export function script(url: URL): string[] {
  return ['--import', 'tsx', url.pathname];
}

function lineOf(child: ChildProcess, gone: Promise<void>, pattern: RegExp): Promise<string> {
  return new Promise((resolve, reject) => {
    let text = '';
    child.stdout!.setEncoding('utf8').on('data', (chunk: string) => {
      text = (text + chunk).slice(-10_000);
      const match = pattern.exec(text);
      if (match !== null) resolve(match[1] ?? '');
    });
    void gone.then(() => reject(new Error(`${child.spawnargs.join(' ')} ended before it was ready`)));
  });
}
