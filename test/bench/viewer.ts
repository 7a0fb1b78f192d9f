/**
 * What a viewer costs: a gateway that sees 20,000 events a second for ten seconds, without a viewer and with one, in
 * turn. Every event is a request that is refused for its form, so that the gateway alone, and no store, is measured.
 *
 *   npx tsx test/bench/viewer.ts [--rate 20000] [--seconds 10] [--rounds 3]
 */
import { parseArgs } from 'node:util';
import { build } from 'hdr-histogram-js';
import { startPostgres } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { tokenFor } from '../support/gateway.ts';
import { startGatewayProcess } from '../support/gateway-process.ts';
import { ADMIN_TOKEN, type InspectorClient, login } from '../support/inspector.ts';
import { buildKeygate } from '../support/program.ts';
import { cpuMs, residentBytes } from './cpu.ts';
import { RawSocket } from './load/raw-socket.ts';

const SOCKETS = 50;
const TICK_MS = 5;
const REQUEST = 'requestBundle';
/** Well-formed but for its claim id: its refusal is answered at once, and shown with what was wrong. */
const INPUT = JSON.stringify({ claimId: 'not a UUID', userId: 'nobody' });

interface Round {
  viewers: number;
  sentPerSecond: number;
  p50Ms: number;
  p99Ms: number;
  cpuShare: number;
  residentMiB: number;
  shown: number;
  dropped: number;
}

const { values } = parseArgs({
  options: {
    rate: { type: 'string', default: '20000' },
    seconds: { type: 'string', default: '10' },
    rounds: { type: 'string', default: '3' },
  },
});
const rate = Number(values.rate);
const seconds = Number(values.seconds);

buildKeygate();
const postgres = await startPostgres();
const gateway = await startGatewayProcess(
  { databaseUrl: postgres.url },
  { ADMIN_TOKEN, NODE_ENV: 'production' },
);
const rounds: Round[] = [];
try {
  const sockets = await openSockets();
  const viewer = await login(gateway.adminUrl);
  // The first round compiles code, which is nobody's in particular.
  await round(sockets, null);
  for (let i = 0; i < Number(values.rounds); i++) {
    rounds.push(await round(sockets, null));
    rounds.push(await round(sockets, viewer));
  }
  for (const { raw } of sockets) raw.close();
  viewer.close();
} finally {
  await gateway.stop();
  await postgres.stop();
}
console.table(rounds);

interface LoadSocket {
  raw: RawSocket;
  sentAtMs: Map<number, number>;
}

async function openSockets(): Promise<LoadSocket[]> {
  return await Promise.all(
    Array.from({ length: SOCKETS }, async (_, i) => {
      const token = await tokenFor({ userId: `viewer-load-${i}`, deviceId: 1 });
      const sentAtMs = new Map<number, number>();
      return { raw: await RawSocket.open({ url: gateway.url, token }), sentAtMs };
    }),
  );
}

/** Open loop: what is due is sent, whatever became of what was sent before. */
async function round(sockets: LoadSocket[], inspector: InspectorClient | null): Promise<Round> {
  const stream = await inspector?.stream();
  const latencies = build({ highestTrackableValue: 60_000_000, numberOfSignificantValueDigits: 3 });
  let answered = 0;
  for (const { raw, sentAtMs } of sockets) {
    raw.listener = {
      ...raw.listener,
      onReply(id) {
        answered += 1;
        latencies.recordValue(Math.round((performance.now() - sentAtMs.get(id)!) * 1_000));
        sentAtMs.delete(id);
      },
    };
  }
  const startedAtMs = performance.now();
  const cpuBeforeMs = cpuMs({ pid: gateway.pid, withChildren: false });
  let sent = 0;
  let residentMax = 0;
  await new Promise<void>((resolve) => {
    const ticking = setInterval(() => {
      const elapsedMs = performance.now() - startedAtMs;
      const due = Math.min(elapsedMs, seconds * 1_000) * (rate / 1_000);
      for (; sent < due; sent++) {
        const { raw, sentAtMs } = sockets[sent % sockets.length]!;
        sentAtMs.set(raw.request(REQUEST, INPUT), performance.now());
      }
      residentMax = Math.max(residentMax, residentBytes(gateway.pid));
      if (elapsedMs < seconds * 1_000) return;
      clearInterval(ticking);
      resolve();
    }, TICK_MS);
  });
  while (answered < sent) await new Promise((resolve) => setTimeout(resolve, TICK_MS));
  const elapsedMs = performance.now() - startedAtMs;
  const usedMs = cpuMs({ pid: gateway.pid, withChildren: false }) - cpuBeforeMs;
  // Each request is shown or counted as dropped.
  if (stream !== undefined) {
    await eventually(() => stream.events().length + stream.dropped() >= sent, {
      that: 'all that was sent, told',
    });
  }
  const shown = stream?.events().length ?? 0;
  const dropped = stream?.dropped() ?? 0;
  stream?.close();
  return {
    viewers: inspector === null ? 0 : 1,
    sentPerSecond: Math.round(sent / seconds),
    p50Ms: latencies.getValueAtPercentile(50) / 1_000,
    p99Ms: latencies.getValueAtPercentile(99) / 1_000,
    cpuShare: Math.round((usedMs / elapsedMs) * 100) / 100,
    residentMiB: Math.round(residentMax / 1_048_576),
    shown,
    dropped,
  };
}
