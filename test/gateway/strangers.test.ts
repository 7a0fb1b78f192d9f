/** What a connection may do before it is taken in, how soon it ends, and what WebSocket's own frames may cost. */
import { once } from 'node:events';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { Server, type Socket } from 'socket.io';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { watchStrangers } from '../../src/gateway/strangers.ts';
import { TOKEN_LENGTH_MAX } from '../../src/protocol/limits.ts';
import {
  frame,
  OPCODE,
  openAdmittedPeer,
  openWebSocketPeer,
  type RawPeer,
  text,
} from '../hostile/raw-peer.ts';
import { eventually } from '../support/eventually.ts';
import { createManualClock, type ManualClock } from '../support/manual-clock.ts';

let io: Server;
let url: string;
let clock: ManualClock;
const peers: RawPeer[] = [];

beforeEach(async () => {
  const server = createServer();
  io = new Server(server, { transports: ['websocket'] });
  clock = createManualClock();
  const strangers = watchStrangers(io.engine, clock);
  io.on('connection', (socket) => {
    strangers.admitted(socket.conn);
    socket.on('there?', (_, acknowledge) => acknowledge());
  });
  await new Promise<void>((listening) => server.listen(0, '127.0.0.1', listening));
  url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
});
afterEach(async () => {
  for (const peer of peers.splice(0)) peer.destroy();
  await io.close();
});

async function stranger(): Promise<RawPeer> {
  const peer = await openWebSocketPeer(url);
  peers.push(peer);
  return peer;
}

async function admitted(): Promise<{ peer: RawPeer; socket: Socket }> {
  const connected = once(io, 'connection') as Promise<[Socket]>;
  const peer = await openAdmittedPeer(url, 'any');
  peers.push(peer);
  const [socket] = await connected;
  return { peer, socket };
}

let asked = 0;
/** Whether all that was written before has been read, and did not end the connection. */
async function isServed(peer: RawPeer): Promise<boolean> {
  const id = asked++;
  await peer.write(text(`42${id}["there?",{}]`));
  return await peer.seen(`43${id}[`);
}

/** The answer to a ping of WebSocket's own, which comes to strangers too. */
async function isPonged(peer: RawPeer): Promise<boolean> {
  const word = `ping ${asked++}`;
  await peer.write(frame(OPCODE.ping, word));
  return await peer.seen(word);
}

describe('a stranger', () => {
  it('that shows no token within ten seconds is cut', async () => {
    const peer = await stranger();
    await clock.advance(9_999);
    expect(await isPonged(peer)).toBe(true);
    await clock.advance(1);
    await peer.closed;
  });

  it('may send twice what the longest token takes, and is cut for more', async () => {
    const peer = await stranger();
    // A message in two parts, each with a ping behind it.
    for (const [opcode, word, share] of [
      [OPCODE.text, 'most of it', 1.5],
      [OPCODE.continuation, 'all of it', 0.5],
    ] as const) {
      const ping = frame(OPCODE.ping, word);
      const letters = 'x'.repeat(share * TOKEN_LENGTH_MAX - ping.length - 8);
      const bytes = Buffer.concat([frame(opcode, letters, { isLast: false }), ping]);
      expect(bytes).toHaveLength(share * TOKEN_LENGTH_MAX);
      await peer.write(bytes);
      expect(await peer.seen(word)).toBe(true);
    }
    await peer.write('x');
    await peer.closed;
  });

  it('that leaves keeps no timer but the one that ends its connection', async () => {
    const peer = await stranger();
    expect(clock.timerCount()).toBe(1);
    peer.destroy();
    await eventually(() => expect(io.engine.clientsCount).toBe(0));
    expect(clock.timerCount()).toBe(1);
    await clock.advance(2_000);
    expect(clock.timerCount()).toBe(0);
  });
});

describe('a connection that was taken in', () => {
  it('is bounded neither in time nor in bytes as strangers are', async () => {
    const { peer } = await admitted();
    expect(clock.timerCount()).toBe(0);
    for (let id = 900; id < 903; id++) {
      await peer.write(text(`42${id}["there?","${'x'.repeat(TOKEN_LENGTH_MAX)}"]`));
    }
    await clock.advance(10_000);
    expect(await isServed(peer)).toBe(true);
  });

  it('and is over waits two seconds for its client to agree', async () => {
    const { peer, socket } = await admitted();
    socket.conn.close();
    expect(await peer.seen('\x88')).toBe(true);
    await eventually(() => expect(clock.timerCount()).toBe(1));
    await clock.advance(1_999);
    expect(peer.isClosed).toBe(false);
    await clock.advance(1);
    await peer.closed;
  });

  it.each(['ping', 'pong'] as const)('may send a hundred frames of kind %s in ten seconds', async (kind) => {
    const { peer } = await admitted();
    const some = (count: number) =>
      peer.write(Buffer.concat(Array.from({ length: count }, () => frame(OPCODE[kind], ''))));
    for (let period = 0; period < 2; period++) {
      await some(100);
      expect(await isServed(peer)).toBe(true);
      await clock.advance(10_000);
    }
    await some(60);
    expect(await isServed(peer)).toBe(true);
    await clock.advance(9_999);
    await some(40);
    expect(await isServed(peer)).toBe(true);
    await some(1);
    await peer.closed;
  });
});
