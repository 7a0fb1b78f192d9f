/** What a gateway under attack costs: the figures of one that runs with `probe.mjs`, and what it says of itself. */
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { eventually } from '../support/eventually.ts';
import type { GatewayProcess } from '../support/gateway-process.ts';

export interface Figures {
  peakBytes: number;
  heldBytes: number;
  loopDelayMaxMs: number;
  isPolluted: boolean;
}

/** No attack may bring the whole process above it. */
export const PEAK_BYTES_MAX = 768 * 1024 * 1024;
/** Little enough that what piles up ends the process. */
const HEAP_MIB_MAX = 512;
const PROBE = new URL('probe.mjs', import.meta.url);

/** What is loaded into a gateway to tell its figures. */
export async function createProbe(): Promise<{
  env: Record<string, string>;
  /** Since the last call. */
  figures(gateway: GatewayProcess): Promise<Figures>;
  remove(): Promise<void>;
}> {
  const dir = await mkdtemp(join(tmpdir(), 'keygate-hostile-'));
  const file = join(dir, 'figures.json');
  return {
    env: {
      LOG_LEVEL: 'warn',
      HOSTILE_FIGURES_FILE: file,
      NODE_OPTIONS: `--max-old-space-size=${HEAP_MIB_MAX} --import ${fileURLToPath(PROBE)}`,
    },
    async figures(gateway) {
      await rm(file, { force: true });
      await gateway.kill('SIGUSR2');
      return JSON.parse(await eventually(() => readFile(file, 'utf8'), { that: 'the gateway’s figures' }));
    },
    remove: () => rm(dir, { recursive: true, force: true }),
  };
}

/** The first line in which the gateway tells of a fault of its own; null where there is none. */
export async function complaintsOf(gateway: GatewayProcess): Promise<string | null> {
  const said = await gateway.output();
  return (
    said.split('\n').find((line) => /fault of the server|uncaught|RangeError|heap limit/.test(line)) ?? null
  );
}
