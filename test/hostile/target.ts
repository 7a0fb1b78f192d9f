/**
 * A gateway under attack, in a process of its own on real engines: what an attack does to its memory, to its event
 * loop and to those who mean no harm.
 */
import { Worker } from 'node:worker_threads';
import { expect } from 'vitest';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import { createDatabase } from '../support/engines.ts';
import { connectClient, NO_LIMITS, tokenFor } from '../support/gateway.ts';
import { type GatewayProcess, startGatewayProcess } from '../support/gateway-process.ts';
import { KeyMaker } from '../support/key-maker.ts';
import { complaintsOf, createProbe, type Figures, PEAK_BYTES_MAX } from './probe.ts';

export interface Target {
  gateway: GatewayProcess;
  /**
   * Runs an attack, and then looks after the gateway: it has not grown beyond its bounds, nobody changed a prototype,
   * it logged no fault of its own, it answered the bystander all the while, and it serves a newcomer by both doors.
   * The figures are printed.
   */
  attack<Outcome>(name: string, run: () => Promise<Outcome>): Promise<Outcome>;
  /** The first line in which the gateway tells of a fault of its own; null where there is none. */
  complaints(): Promise<string | null>;
  /** A device that nobody knew before uploads keys, claims a bundle, and looks at its own by HTTP. */
  serveNewcomer(): Promise<void>;
  stop(): Promise<void>;
}

/** As an operator starts it: the harness of the other tests lifts them. */
export const DEFAULT_LIMITS: Readonly<Record<string, string>> = Object.fromEntries(
  Object.keys(NO_LIMITS).map((name) => [name, '']),
);

export const BYSTANDER = { userId: 'bystander', deviceId: 1 };

const MIB = 1024 * 1024;
/** No attack may leave so much behind. */
const HELD_BYTES_MAX = 48 * MIB;

interface Seen {
  answered: number;
  /** Told to come again: the node was too busy to ask its store in time. */
  refused: number;
  slowestMs: number;
  /** Why his socket ended, if it did. */
  disconnected: string | null;
}

let newcomers = 0;

export async function startTarget(
  env: Record<string, string> = {},
  tokenOf: (device: DeviceAddress) => Promise<string> = tokenFor,
): Promise<Target> {
  const database = await createDatabase();
  const probe = await createProbe();
  const gateway = await startGatewayProcess({ databaseUrl: database.url }, { ...probe.env, ...env });
  const figures = (): Promise<Figures> => probe.figures(gateway);
  const owner = await connectClient(gateway.url, await tokenOf(BYSTANDER));
  await owner.call('uploadKeys', new KeyMaker().keySet());
  owner.close();
  const bystander = new Worker(new URL('bystander.mjs', import.meta.url), {
    workerData: { url: gateway.url, token: await tokenOf(BYSTANDER) },
  });

  /** What the bystander has seen since this was last called. */
  function seenByBystander(): Promise<Seen> {
    return new Promise((resolve, reject) => {
      const settle = (seen: Seen): void => {
        bystander.off('error', reject);
        resolve(seen);
      };
      bystander.once('message', settle);
      bystander.once('error', reject);
      bystander.postMessage('tell');
    });
  }

  async function serveNewcomer(): Promise<void> {
    const address = { userId: `newcomer-${++newcomers}`, deviceId: 1 };
    const client = await connectClient(gateway.url, await tokenOf(address));
    const keys = new KeyMaker();
    await client.call('uploadKeys', keys.keySet());
    const { devices } = await client.call('requestBundle', {
      claimId: crypto.randomUUID(),
      userId: BYSTANDER.userId,
    });
    expect(devices).toHaveLength(1);
    client.close();
    const status = await fetch(`${gateway.url}/signal/status/minimal`, {
      headers: { authorization: `Bearer ${await tokenOf(address)}` },
    });
    expect([status.status, await status.json()]).toMatchObject([200, { identityKey: keys.identityKey() }]);
  }

  const complaints = (): Promise<string | null> => complaintsOf(gateway);

  // Everything is loaded and compiled once before it is measured.
  await serveNewcomer();
  const atRest = await figures();

  return {
    gateway,
    complaints,
    serveNewcomer,
    async attack(name, run) {
      const before = await figures();
      await seenByBystander();
      const startedMs = performance.now();
      const outcome = await run();
      const tookMs = performance.now() - startedMs;
      const seen = await seenByBystander();
      await serveNewcomer();
      const after = await figures();
      const mib = (bytes: number): string => (bytes / MIB).toFixed(0);
      process.stdout.write(
        `  hostile: ${name}: ${(tookMs / 1000).toFixed(1)} s, memory at most ${mib(after.peakBytes)} MiB ` +
          `(${mib(before.peakBytes)} before), held ${mib(after.heldBytes)} MiB (${mib(atRest.heldBytes)} at rest), ` +
          `loop delay at most ${after.loopDelayMaxMs} ms, ` +
          `bystander answered ${seen.answered} times and put off ${seen.refused} times, in ${seen.slowestMs.toFixed(0)} ms at most\n`,
      );
      expect(after.peakBytes, 'memory during the attack').toBeLessThan(PEAK_BYTES_MAX);
      expect(after.heldBytes - atRest.heldBytes, 'memory after the attack').toBeLessThan(HELD_BYTES_MAX);
      expect(after.isPolluted).toBe(false);
      expect(seen.disconnected, 'the bystander’s socket').toBeNull();
      expect(await complaints()).toBeNull();
      return outcome;
    },
    async stop() {
      await bystander.terminate();
      await gateway.stop();
      await database.drop();
      await probe.remove();
    },
  };
}

/** A device id of its own for each attacker, and the token of it. */
export async function attackerToken(name: string): Promise<string> {
  return await tokenFor({ userId: `attacker-${name}`, deviceId: 1 });
}
