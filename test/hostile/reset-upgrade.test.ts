/** A peer that resets its connection while the gateway still judges whether it may become a WebSocket. */
import { once } from 'node:events';
import { connect, createServer } from 'node:net';
import { expect, it } from 'vitest';
import { createDatabase, redisUrl } from '../support/engines.ts';
import { someone, undoAfterEach } from '../support/flow.ts';
import { startGatewayProcess } from '../support/gateway-process.ts';
import { openPeer, type RawPeer, upgradeRequest } from './raw-peer.ts';

const undo = undoAfterEach();

/** Passes everything on to Redis, but holds what has `text` in it, and all behind it, until it is let go. */
async function startHolder(text: string): Promise<{ url: string; holds: Promise<void>; letGo(): void }> {
  const { hostname, port } = new URL(redisUrl());
  let isOver = false;
  let onHold = (): void => {};
  const held: (() => void)[] = [];
  const holds = new Promise<void>((resolve) => {
    onHold = resolve;
  });
  const server = createServer((client) => {
    const redis = connect(Number(port), hostname);
    const chunks: Buffer[] = [];
    let isHolding = false;
    client.on('data', (chunk) => {
      if (!isOver && chunk.includes(text)) {
        isHolding = true;
        held.push(() => {
          isHolding = false;
          for (const late of chunks) redis.write(late);
        });
        onHold();
      }
      if (isHolding) chunks.push(chunk);
      else redis.write(chunk);
    });
    redis.pipe(client);
    for (const [one, other] of [
      [client, redis],
      [redis, client],
    ] as const) {
      one.on('error', () => {});
      one.on('close', () => other.destroy());
    }
  });
  await once(server.listen(0, '127.0.0.1'), 'listening');
  undo.push(() => {
    server.close();
  });
  const { port: listensAt } = server.address() as { port: number };
  return {
    url: `redis://127.0.0.1:${listensAt}`,
    holds,
    letGo() {
      isOver = true;
      for (const goOn of held) goOn();
    },
  };
}

/** A gateway that has just started serves before its link for limits is up: it judges the first ones by itself. */
async function openHeldPeer(url: string, holds: Promise<void>): Promise<RawPeer> {
  for (let n = 0; n < 65_536; n++) {
    const peer = await openPeer(url, `127.1.${n >> 8}.${n & 255}`);
    await peer.write(upgradeRequest(url));
    const isHeld = await Promise.race([holds.then(() => true), peer.seen('HTTP/1.1 101').then(() => false)]);
    if (isHeld) return peer;
    peer.destroy();
  }
  throw new Error('Redis was never asked');
}

it('does not end the process', async () => {
  const database = await createDatabase();
  undo.push(() => database.drop());
  const redis = await startHolder('handshakesPerAddress');
  const gateway = await startGatewayProcess(
    { databaseUrl: database.url, redisUrl: redis.url },
    // So low that Redis is asked of every one.
    { LIMIT_HANDSHAKES_PER_ADDRESS: '15' },
  );
  undo.push(() => gateway.stop());
  const peer = await openHeldPeer(gateway.url, redis.holds);
  peer.socket.resetAndDestroy();
  redis.letGo();
  const ended = gateway.ended.then((end) => end.cause);
  const served = gateway.connect(someone()).then((client) => client.call('keyStatus'));
  expect(await Promise.race([ended, served])).toMatchObject({ keyVersion: 0 });
});
