/**
 * A whole gateway in a process of its own, as an operator starts it: what can be killed, frozen and started again.
 * It ends with the run that started it, also when that one is killed.
 */
import { closeSync, openSync } from 'node:fs';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import {
  type GuardedProcess,
  type ProcessEnd,
  startGuarded,
} from '../../src/backends/postgres/guarded-process.ts';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import { eventually } from './eventually.ts';
import { type Client, connectClient, TEST_SECRET, testEnvironment, tokenFor } from './gateway.ts';
import { freePort } from './ports.ts';
import { KEYGATE } from './program.ts';
import { stopped } from './stopped.ts';

/** Where its store is: a PostgreSQL by URL, or a data folder on which it starts its own. */
export type GatewayProcessStore = { databaseUrl: string; redisUrl?: string } | { dataDir: string };

export interface GatewayProcess {
  /** The same over restarts. */
  readonly url: string;
  readonly adminUrl: string;
  /** Another one after `restart`. */
  readonly pid: number;
  /** Whether it has ended by itself or by a signal. */
  readonly ended: Promise<ProcessEnd>;
  /** Everything that it wrote so far to standard output and error, over restarts. */
  output(): Promise<string>;
  /** A connected client of the device. */
  connect(device: DeviceAddress): Promise<Client>;
  /** Sends a signal; SIGKILL, SIGTERM and SIGINT are answered when the process has ended, SIGSTOP when it stands still. */
  kill(signal: NodeJS.Signals): Promise<void>;
  /** Ends what is left of the old process, and starts a new one at the same addresses. */
  restart(): Promise<void>;
  /** Closes the clients and ends the process in good order, or by force where that takes too long. Idempotent. */
  stop(): Promise<void>;
}

interface Serving {
  url: string;
  adminUrl: string;
}

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
/** A first start on a busy machine, which makes its store. */
export const START_MAX_MS = 30_000;
const DEADLY: readonly NodeJS.Signals[] = ['SIGKILL', 'SIGTERM', 'SIGINT'];

/**
 * @param options.program what Node is given; it writes what `keygate serve` writes
 * @param options.through a command that becomes the gateway: its last arguments are what to run
 * @throws Error with the process's own words where it does not start to serve
 */
export async function startGatewayProcess(
  store: GatewayProcessStore,
  env: Record<string, string> = {},
  {
    program = [KEYGATE, 'serve'],
    through = [],
  }: { program?: readonly string[]; through?: readonly string[] } = {},
): Promise<GatewayProcess> {
  const outputDir = await mkdtemp(join(tmpdir(), 'keygate-process-'));
  const outputFile = join(outputDir, 'output.log');
  const output = (): Promise<string> => readFile(outputFile, 'utf8');
  const clients: Client[] = [];
  const [command, ...args] = [...through, process.execPath];
  const ports = { PORT: String(await freePort()), ADMIN_PORT: String(await freePort()) };

  /** Serves when it resolves. */
  async function start(): Promise<Serving & { child: GuardedProcess }> {
    const outputFd = openSync(outputFile, 'a', 0o600);
    const saidBefore = (await output()).length;
    const child = await startGuarded({
      command: command!,
      args: [...args, ...program],
      cwd: ROOT,
      env: { ...environmentOf(store), ...env, ...ports },
      user: null,
      outputFd,
      stopSteps: [
        { signal: 'SIGTERM', waitMs: 15_000 },
        { signal: 'SIGKILL', waitMs: 5_000 },
      ],
      removeWhenOrphaned: [outputDir],
    }).finally(() => closeSync(outputFd));
    let hasEnded = false;
    void child.exited.then(() => {
      hasEnded = true;
    });
    const serving = await eventually(
      async (): Promise<Serving | null | false> => {
        const said = (await output()).slice(saidBefore);
        const [, url, adminUrl] = /gateway {2}(http\S+)\n {2}health {3}(http\S+)\/readyz/.exec(said) ?? [];
        if (url !== undefined && adminUrl !== undefined) return { url, adminUrl };
        return hasEnded ? null : false;
      },
      { waitMaxMs: START_MAX_MS, that: 'the gateway serving' },
    ).catch(() => null);
    if (serving) return { child, ...serving };
    await child.stop();
    throw new Error(`the gateway did not start to serve: ${(await output()).slice(saidBefore)}`);
  }

  const removeOutput = () => rm(outputDir, { recursive: true, force: true });
  let current = await start().catch(async (error: unknown) => {
    await removeOutput();
    throw error;
  });

  return {
    url: current.url,
    adminUrl: current.adminUrl,
    get pid() {
      return current.child.pid;
    },
    get ended() {
      return current.child.exited;
    },
    output,
    async connect(device) {
      const client = await connectClient(current.url, await tokenFor(device));
      clients.push(client);
      return client;
    },
    async kill(signal) {
      current.child.kill(signal);
      if (signal === 'SIGSTOP') await stopped(current.child.pid);
      if (DEADLY.includes(signal)) await current.child.exited;
    },
    async restart() {
      current.child.kill('SIGCONT');
      await current.child.stop();
      current = await start();
    },
    async stop() {
      for (const client of clients) client.close();
      // A process that a test has frozen can't answer a request to end.
      current.child.kill('SIGCONT');
      await current.child.stop();
      await removeOutput();
    },
  };
}

/** The whole environment: what the run itself was given must not reach the gateway. */
function environmentOf(store: GatewayProcessStore): Record<string, string> {
  const { PATH = '', HOME = '' } = process.env;
  if ('databaseUrl' in store) return { PATH, HOME, ...testEnvironment({ redisUrl: undefined, ...store }) };
  const { DATABASE_URL: _, ...embedded } = testEnvironment({ databaseUrl: '' });
  return { PATH, HOME, ...embedded, JWT_SECRET: TEST_SECRET, DATA_DIR: store.dataDir };
}
