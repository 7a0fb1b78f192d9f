/** What an authenticated socket costs while it idles: resident memory of a gateway that does nothing else. */
import { setTimeout as wait } from 'node:timers/promises';
import { startBareServer } from './contestants/bare.ts';
import { residentBytes } from './cpu.ts';
import { tokensFor, userIds } from './seed.ts';
import { DIST_DIR, type Server, type Stage } from './stage.ts';

/** `bare`: a Socket.IO server that verifies the same token. */
export type IdleKind = 'gateway' | 'bare';

export interface IdleResult {
  sockets: number;
  bytesPerSocket: number;
  /** Of these, what the engine's heap and buffers hold. */
  heapBytesPerSocket: number;
  handshakesPerSecond: number;
}

/** Memory that a burst of handshakes needs for its moment has been given back by then. */
const SETTLE_MS = 3_000;
/** The first handshakes fill caches and compile code, which is nobody's in particular. */
const WARM_UP_SOCKETS = 1_000;

interface Memory {
  heapUsed: number;
  external: number;
}

export async function measureIdle(stage: Stage, kind: IdleKind, sockets: number): Promise<IdleResult> {
  const server = await startFresh(stage, kind);
  const name = `idle-${kind}`;
  const devices = await tokensFor(userIds('idler', sockets), stage.tokenSecret);
  try {
    await stage.load.call('open', { name, urls: [server.url], devices: devices.slice(0, WARM_UP_SOCKETS) });
    await stage.load.call('close', { name });
    const before = await settled(server);
    const { elapsedMs } = await stage.load.call<{ elapsedMs: number }>('open', {
      name,
      urls: [server.url],
      devices,
    });
    const after = await settled(server);
    return {
      sockets,
      bytesPerSocket: (after.resident - before.resident) / sockets,
      heapBytesPerSocket: (after.heap - before.heap) / sockets,
      handshakesPerSecond: (sockets / elapsedMs) * 1000,
    };
  } finally {
    await stage.load.call('close', { name });
    await server.stop();
  }
}

async function startFresh(stage: Stage, kind: IdleKind): Promise<Server> {
  if (kind === 'bare') return await startBareServer(stage);
  const { url } = await stage.createDatabase(`idle_${Date.now()}`);
  return await stage.startGateway({ databaseUrl: url, distDir: DIST_DIR });
}

async function settled(server: Server): Promise<{ resident: number; heap: number }> {
  let memory: Memory = { heapUsed: 0, external: 0 };
  for (let pass = 0; pass < 3; pass++) {
    await wait(SETTLE_MS / 3);
    memory = await server.call<Memory>('collectGarbage');
  }
  return { resident: residentBytes(server.pid), heap: memory.heapUsed + memory.external };
}
