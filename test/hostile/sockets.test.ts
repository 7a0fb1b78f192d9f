/** Those who connect and never say who they are: they are cut, and cost little until then. */
import { randomUUID } from 'node:crypto';
import { afterAll, beforeAll, describe, it } from 'vitest';
import { FRAME_BYTES_MAX } from '../../src/protocol/limits.ts';
import {
  frame,
  OPCODE,
  openPeer,
  openWebSocketPeer,
  type RawPeer,
  text,
  upgradeRequest,
} from './raw-peer.ts';
import { startTarget, type Target } from './target.ts';

let target: Target;

beforeAll(async () => {
  target = await startTarget();
});
afterAll(() => target?.stop());

/** Addresses of this machine beside that of the bystander. */
const addressOf = (index: number): string => `127.0.${1 + Math.floor(index / 250)}.${1 + (index % 250)}`;

/** Opens many, so many at a time; a full backlog of the listener would only make the test slow. */
async function openMany<Peer>(count: number, open: (index: number) => Promise<Peer>): Promise<Peer[]> {
  const peers: Peer[] = [];
  let next = 0;
  const worker = async (): Promise<void> => {
    while (next < count) peers.push(await open(next++));
  };
  await Promise.all(Array.from({ length: 64 }, worker));
  return peers;
}

/** What they write, one step a second, for as long as they live. */
async function drip(peer: RawPeer, step: () => string | Buffer): Promise<void> {
  const timer = setInterval(() => void peer.write(step()), 1000);
  await peer.closed;
  clearInterval(timer);
}

const KINDS: Record<string, (index: number) => Promise<RawPeer>> = {
  'TCP and not a byte': (index) => openPeer(target.gateway.url, addressOf(index)),
  'header lines, a byte a second': async (index) => {
    const peer = await openPeer(target.gateway.url, addressOf(index));
    await peer.write('GET /api/keys/stats HTTP/1.1\r\nX-Slow: ');
    void drip(peer, () => 'x');
    return peer;
  },
  'an upgrade, a byte a second': async (index) => {
    const peer = await openPeer(target.gateway.url, addressOf(index));
    await peer.write(upgradeRequest(target.gateway.url).slice(0, -4));
    void drip(peer, () => '0');
    return peer;
  },
  'WebSocket without CONNECT': (index) => openWebSocketPeer(target.gateway.url, addressOf(index)),
  'WebSocket with pongs only': async (index) => {
    const peer = await openWebSocketPeer(target.gateway.url, addressOf(index));
    void drip(peer, () => text('3'));
    return peer;
  },
  'WebSocket with a bad token': async (index) => {
    const peer = await openWebSocketPeer(target.gateway.url, addressOf(index));
    await peer.write(text(`40{"token":"${randomUUID()}"}`));
    return peer;
  },
  'WebSocket with a frame, a byte a second': async (index) => {
    const peer = await openWebSocketPeer(target.gateway.url, addressOf(index));
    await peer.write(frame(OPCODE.text, '40{"token":"', { announcedBytes: FRAME_BYTES_MAX }));
    void drip(peer, () => 'x');
    return peer;
  },
};

const SOCKETS = 10_000;
const SECONDS = 1000;

describe('ten thousand sockets that never authenticate', () => {
  it('are all cut, whatever they do instead, and whoever means no harm is served meanwhile', {
    timeout: 60 * SECONDS,
  }, async () => {
    const kinds = Object.entries(KINDS);
    await target.attack(`${SOCKETS} sockets without a token`, async () => {
      const lives = new Map<string, number[]>(kinds.map(([kind]) => [kind, []]));
      const peers = await openMany(SOCKETS, async (index) => {
        const [kind, open] = kinds[index % kinds.length]!;
        const peer = await open(index);
        const openedMs = performance.now();
        const life = peer.closed.then(() => lives.get(kind)!.push(performance.now() - openedMs));
        return { peer, life };
      });
      await target.serveNewcomer();
      const open = peers.filter(({ peer }) => !peer.isClosed).length;
      process.stdout.write(`  hostile: ${open} of ${SOCKETS} stood open while a newcomer was served\n`);
      await Promise.all(peers.map(({ life }) => life));
      for (const [kind, livesMs] of lives) {
        const [first, last] = [Math.min(...livesMs), Math.max(...livesMs)].map((ms) =>
          (ms / SECONDS).toFixed(1),
        );
        process.stdout.write(`  hostile: ${livesMs.length} × ${kind}: cut after ${first} to ${last} s\n`);
      }
    });
  });

  it('nor wait behind an upgrade at an address where there is none', async () => {
    await target.attack('2,000 upgrades elsewhere', async () => {
      const peers = await openMany(2_000, async (index) => {
        const peer = await openPeer(target.gateway.url, addressOf(index));
        const path = ['/', '/elsewhere/', '/socket.io', '/socket.iox/', '/api/keys/stats'][index % 5]!;
        await peer.write(upgradeRequest(target.gateway.url).replace('/socket.io/', path));
        return peer;
      });
      await Promise.all(peers.map((peer) => peer.closed));
    });
  });
});
