// How frames may be cut on their way: whatever the pieces, each request is answered once, and nothing else is.
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { createServer } from 'node:http';
import { type AddressInfo, Socket as TcpSocket } from 'node:net';
import fc from 'fast-check';
import { Server, type Socket } from 'socket.io';
import {
  afterAll,
  afterEach,
  beforeAll,
  beforeEach,
  describe,
  expect,
  it,
  type MockInstance,
  vi,
} from 'vitest';
import { Frames, type RequestFrame } from '../../src/gateway/frames.ts';
import { type LibraryWebSocket, plainFrame } from '../../src/gateway/plain-frames.ts';
import { systemClock } from '../../src/lib/clock.ts';
import { frame, OPCODE, openAdmittedPeer, openWebSocketPeer, type RawPeer } from '../hostile/raw-peer.ts';
import { eventually } from '../support/eventually.ts';
import { startGateway, type TestGateway } from '../support/gateway.ts';

const FIRST_ID = 1;
const PING = frame(OPCODE.ping, 'are you there');

/** With a mask that is none of zeros, so that what is masked must be unmasked. */
const masked = (payload: string | Buffer, options: { isLast?: boolean } = {}, opcode: number = OPCODE.text) =>
  frame(opcode, payload, { ...options, mask: randomBytes(4) });
const text = (payload: string): Buffer => masked(payload);
/** What is `onWire` once it is masked. */
const unmaskedBy = (mask: Buffer, onWire: string): Buffer =>
  Buffer.from(onWire).map((byte, at) => byte ^ mask[at % 4]!) as Buffer;

/** A request as one frame; the others of its kinds take the library's way or Socket.IO's. */
const KINDS: Record<string, (id: number) => Buffer[]> = {
  'one frame': (id) => [text(`42${id}["keyStatus",{}]`)],
  'an acknowledgement alone': (id) => [text(`42${id}["keyStatus"]`)],
  'letters of several bytes': (id) => [text(`42${id}["keyStatus",{"é":"🔑"}]`)],
  'a length in two bytes': (id) => [text(`42${id}["keyStatus",{"x":"${'x'.repeat(300)}"}]`)],
  'a length in eight bytes': (id) => [text(`42${id}["keyStatus",{"x":"${'x'.repeat(70_000)}"}]`)],
  'two fragments': (id) => [
    masked(`42${id}["key`, { isLast: false }),
    masked('Status",{}]', {}, OPCODE.continuation),
  ],
  'two fragments and a ping between them': (id) => [
    masked(`42${id}["key`, { isLast: false }),
    PING,
    masked('Status",{}]', {}, OPCODE.continuation),
  ],
  'a ping before it': (id) => [PING, text(`42${id}["keyStatus",{}]`)],
  'an attachment': (id) => [
    text(`451-${id}["keyStatus",{"_placeholder":true,"num":0}]`),
    frame(OPCODE.binary, 'attached'),
  ],
};

describe('requests', () => {
  let gateway: TestGateway;
  let peer: RawPeer;
  let nextId = FIRST_ID;

  beforeAll(async () => {
    gateway = await startGateway();
  });
  afterAll(() => gateway?.stop());

  /** For each case: so many pings as all of them together have, no connection is allowed. */
  async function connect(): Promise<void> {
    peer = await openAdmittedPeer(gateway.url, await gateway.token({ userId: 'in-pieces', deviceId: 1 }));
  }
  beforeEach(connect);
  afterEach(() => peer.destroy());

  it('come after the answer to the upgrade and the engine’s first packet, which leave in one write', async () => {
    const writes = vi.spyOn(TcpSocket.prototype, '_writev' as never) as unknown as MockInstance<
      (chunks: { chunk: string | Buffer }[]) => void
    >;
    const newcomer = await openWebSocketPeer(gateway.url);
    newcomer.destroy();
    const [answer] = writes.mock.calls.map(([chunks]) => chunks.map(({ chunk }) => String(chunk)).join(''));
    writes.mockRestore();
    expect(answer).toMatch(/^HTTP\/1\.1 101 (?:.+\r\n)+\r\n.*"maxPayload"/);
  });

  /** Sends the bytes in pieces and resolves, when all of `ids` are answered, to the numbers of all answers. */
  async function answeredTo(pieces: readonly Buffer[], ids: readonly number[]): Promise<number[]> {
    const answered: number[] = [];
    const last = nextId++;
    await new Promise<void>((done) => {
      peer.onText = (message) => {
        const [, id] = /^43(\d+)\[/.exec(message) ?? [];
        // What is answered after all of them, and twice therefore, comes before the answer to one more.
        if (Number(id) === last) return done();
        if (id !== undefined) answered.push(Number(id));
        if (ids.every((each) => answered.includes(each))) void peer.write(text(`42${last}["keyStatus",{}]`));
      };
      void (async () => {
        for (const piece of pieces) await peer.write(piece);
      })();
    });
    return answered.sort((one, other) => one - other);
  }

  it.each(Object.keys(KINDS))('are answered once by %s, whole or byte by byte', async (kind) => {
    for (const isWhole of [true, false]) {
      const id = nextId++;
      const bytes = Buffer.concat(KINDS[kind]!(id));
      const pieces =
        isWhole || bytes.length > 1_000 ? [bytes] : [...bytes].map((byte) => Buffer.from([byte]));
      expect(await answeredTo(pieces, [id])).toEqual([id]);
    }
  });

  it('are answered once each, in whatever pieces they come together', async () => {
    const kinds = Object.values(KINDS);
    await fc.assert(
      fc
        .asyncProperty(
          fc.array(fc.nat(kinds.length - 1), { minLength: 2, maxLength: 12 }),
          fc.array(fc.nat(), { maxLength: 6 }),
          async (chosen, cuts) => {
            const ids = chosen.map(() => nextId++);
            const bytes = Buffer.concat(ids.flatMap((id, index) => kinds[chosen[index]!]!(id)));
            const places = [0, ...cuts.map((cut) => cut % bytes.length).sort((a, b) => a - b), bytes.length];
            const pieces = places.slice(1).map((place, index) => bytes.subarray(places[index], place));
            expect(await answeredTo(pieces, ids)).toEqual(ids);
          },
        )
        .beforeEach(async () => {
          peer.destroy();
          await connect();
        }),
      { numRuns: 60 },
    );
  });

  const broken = Buffer.concat([
    Buffer.from('421["keyStatus",{"x":"'),
    Buffer.from([0xc3, 0x28]),
    Buffer.from('"}]'),
  ]);
  const mask = Buffer.alloc(4, 0x80);
  it.each([
    ['with letters that are none', () => masked(broken)],
    // Masked twice, it would be a request.
    [
      'of which the mask makes text',
      () => frame(OPCODE.text, unmaskedBy(mask, '421["keyStatus",{}]'), { mask }),
    ],
  ])('that are no UTF-8, %s, end the connection with the code for it', async (_, bytes) => {
    const other = await openAdmittedPeer(
      gateway.url,
      await gateway.token({ userId: 'no-text', deviceId: 1 }),
    );
    await other.write(bytes());
    expect(await other.seen('\x88\x02\x03\xef')).toBe(true);
    expect(other.received).not.toContain('431[');
    other.destroy();
  });

  it.each([
    ['a packet that is none', '4x'],
    ['one that nests too deep', `422["keyStatus",${'['.repeat(100)}${']'.repeat(100)}]`],
    ['a second token', '40{"token":"another"}'],
  ])('are answered before the connection ends by what came with them: %s', async (_, last) => {
    const device = { userId: 'ends-badly', deviceId: 1 };
    const other = await openAdmittedPeer(gateway.url, await gateway.token(device));
    await other.write(Buffer.concat([text('421["noSuchThing",{}]'), text(last)]));
    expect(await other.seen('431[{"ok":false')).toBe(true);
    other.destroy();
  });

  it('behind a close frame are not read', async () => {
    const device = { userId: 'has-left', deviceId: 1 };
    const other = await openAdmittedPeer(gateway.url, await gateway.token(device));
    const ended = new Promise<void>((resolve) => other.socket.once('end', resolve));
    await other.write(
      Buffer.concat([frame(OPCODE.close, Buffer.from([0x03, 0xe8])), text('421["keyStatus",{}]')]),
    );
    await ended;
    expect(other.received).not.toContain('431[');
    other.destroy();
  });
});

describe('the short way', () => {
  let io: Server;
  let url: string;
  let peer: RawPeer;
  let second: RawPeer | null = null;
  let socket: Socket;
  let frames: Frames;
  const requests: RequestFrame[] = [];
  let tooSlow: Promise<void>;
  const UNREAD_BYTES_MAX = 1_000_000;

  const start = async () => {
    const server = createServer();
    io = new Server(server, { transports: ['websocket'] });
    requests.length = 0;
    let onTooSlow = (): void => {};
    tooSlow = new Promise((resolve) => {
      onTooSlow = resolve;
    });
    const connected = once(io, 'connection');
    await new Promise<void>((listening) => server.listen(0, '127.0.0.1', listening));
    url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
    peer = await openAdmittedPeer(url, 'any');
    [socket] = (await connected) as [Socket];
    frames = new Frames(socket, { clock: systemClock, unreadBytesMax: UNREAD_BYTES_MAX, onTooSlow });
    frames.serve((request) => {
      requests.push(request);
      frames.reply(request.id, '{}');
    });
  };
  afterEach(async () => {
    peer.destroy();
    second?.destroy();
    second = null;
    await io.close();
  });
  const library = () => (socket.conn.transport as unknown as { socket: LibraryWebSocket }).socket;

  it('is taken: a plain frame passes the library by, and nothing else does', async () => {
    await start();
    const receiver = library()._receiver as unknown as { write(chunk: Buffer): boolean };
    const write = vi.spyOn(receiver, 'write');
    await peer.write(text('421["one"]'));
    expect(await peer.seen('431[{}]')).toBe(true);
    expect(write).not.toHaveBeenCalled();
    await peer.write(Buffer.concat([PING, text('422["two"]')]));
    expect(await peer.seen('432[{}]')).toBe(true);
    expect(write).toHaveBeenCalledOnce();
    await peer.write(text('423["three"]'));
    expect(await peer.seen('433[{}]')).toBe(true);
    expect(write).toHaveBeenCalledOnce();
  });

  it('tells a request as it was written, and how long it was', async () => {
    await start();
    const inputs = ['"é🔑"', `"${'é🔑'.repeat(100)}","x"`, '{"x":"y"},2', `"${'x'.repeat(200)}é"`];
    for (const [id, input] of inputs.entries()) {
      await peer.write(text(`42${id}["one",${input}]`));
      expect(await peer.seen(`43${id}[{}]`)).toBe(true);
      // Of Socket.IO's packet, as where it comes by the library.
      const bytes = Buffer.byteLength(`2${id}["one",${input}]`);
      expect(requests.pop()).toEqual({ id, event: 'one', args: JSON.parse(`[${input}]`), bytes });
    }
  });

  it('reads a chunk that lies in the midst of other memory', async () => {
    await start();
    // Masked, it is text too.
    const request = frame(OPCODE.text, `421["one","${'x'.repeat(200)}"]`, { mask: Buffer.alloc(4, 1) });
    const memory = Buffer.alloc(1_000);
    library()._socket!.emit('data', memory.subarray(500, 500 + request.copy(memory, 500)));
    expect(await peer.seen('431[{}]')).toBe(true);
    expect(requests.map(({ args }) => args)).toEqual([['x'.repeat(200)]]);
  });

  it('leaves a frame without a mask to the library, which ends the connection', async () => {
    await start();
    const [letters, ended] = ['421["bare"]', once(socket, 'disconnect')];
    await peer.write(Buffer.concat([Buffer.from([0x81, letters.length]), Buffer.from(letters)]));
    expect(await peer.seen('\x88\x02\x03\xea')).toBe(true);
    await ended;
    expect(requests).toEqual([]);
  });

  it.each<[string, Buffer]>([
    ...['connect', 'connect_error', 'disconnect', 'disconnecting', 'newListener', 'removeListener'].map(
      (event): [string, Buffer] => [`its own event ${event}`, text(`421["${event}"]`)],
    ),
    ['an event that is no text', text('421[1,{}]')],
    ['more arguments than may be', text(`421["one"${',1'.repeat(64)}]`)],
    ['no list', text('421{"one":1}')],
    ['a request without a number', text('42["one"]')],
    ['a number that is too long to come back', text('421234567890123456["one"]')],
    ['bytes that look like a request', masked('421["one"]', {}, OPCODE.binary)],
  ])('leaves to Socket.IO what is not plainly a request: %s', async (_, bytes) => {
    await start();
    await peer.write(Buffer.concat([bytes, text('427["last"]')]));
    // False where the connection ended by it.
    await peer.seen('437[{}]');
    expect(requests.filter(({ event }) => event !== 'last')).toEqual([]);
  });

  it('takes numbers of 15 digits, and as many arguments as may be', async () => {
    await start();
    await peer.write(text(`42123456789012345["one"${',1'.repeat(63)}]`));
    expect(await peer.seen('43123456789012345[{}]')).toBe(true);
    expect(requests[0]?.args).toHaveLength(63);
  });

  it('writes what is more than 64 KiB before the turn ends', async () => {
    await start();
    const write = vi.spyOn(library()._socket!, 'write');
    for (let count = 0; count < 2; count++) frames.push('news', `"${'x'.repeat(32_000)}"`);
    expect(write).not.toHaveBeenCalled();
    frames.push('news', `"${'x'.repeat(32_000)}"`);
    expect(write).toHaveBeenCalledOnce();
  });

  it('writes nothing behind a close frame', async () => {
    await start();
    frames.push('news', '"late"');
    (library() as unknown as { close(): void }).close();
    expect(await peer.seen('\x88\x00')).toBe(true);
    await peer.write(masked('', {}, OPCODE.close));
    await once(peer.socket, 'end');
    expect(peer.received).not.toContain('late');
  });

  it('counts what Socket.IO sends as unread no longer than until the network has taken it', async () => {
    await start();
    socket.emit('news', 'x'.repeat(10_000));
    expect(await peer.seen('xxx"]')).toBe(true);
    await eventually(() => expect(frames.facts().bufferedBytes).toBe(0));
  });

  describe('takes no request out of the midst of another frame:', () => {
    const inner = frame(OPCODE.text, '421["smuggled"]');

    /** Each piece is heard before the next is written. */
    async function writeApart(...pieces: Buffer[]): Promise<void> {
      for (const piece of pieces) {
        const heard = once(library()._socket!, 'data');
        await peer.write(piece);
        await heard;
      }
    }

    it('of one whose head came alone', async () => {
      await start();
      const ping = frame(OPCODE.ping, inner);
      await writeApart(ping.subarray(0, 6), ping.subarray(6), text('422["last"]'));
      expect(await peer.seen('432[{}]')).toBe(true);
      expect(requests.map(({ event }) => event)).toEqual(['last']);
    });

    it('of one of whose head a byte came alone', async () => {
      await start();
      // From the second byte on, two pings look like a text: their masks are its length, its mask and its letters.
      const letters = Buffer.from('421["smuggled"]');
      const second = Buffer.alloc(letters.length);
      second[0] = 0x80 | OPCODE.ping;
      second[1] = 0x80 | (letters.length - 6);
      const mask = Buffer.from([second[0] ^ letters[0]!, second[1] ^ letters[1]!, 0, 0]);
      for (let at = 2; at < letters.length; at++) second[at] = letters[at]! ^ mask[at % 4]!;
      const first = Buffer.from([0x80 | OPCODE.ping, 0x81, 0x80 | letters.length, ...mask]);
      await writeApart(first.subarray(0, 1), Buffer.concat([first.subarray(1), second]), text('422["last"]'));
      expect(await peer.seen('432[{}]')).toBe(true);
      expect(requests.map(({ event }) => event)).toEqual(['last']);
    });

    it('of one in fragments, which ends the connection', async () => {
      await start();
      const ended = once(socket, 'disconnect');
      await writeApart(masked('421["first', { isLast: false }), inner);
      await ended;
      expect(requests).toEqual([]);
    });
  });

  /** Another client of the same server. */
  async function startSecond(): Promise<{ other: RawPeer; tcp: TcpSocket }> {
    const connected = once(io, 'connection') as Promise<[Socket]>;
    const other = await openAdmittedPeer(url, 'any');
    second = other;
    const [its] = await connected;
    const others = new Frames(its, { clock: systemClock, unreadBytesMax: UNREAD_BYTES_MAX, onTooSlow() {} });
    others.serve(({ id }) => others.reply(id, '{}'));
    return {
      other,
      tcp: (its.conn.transport as unknown as { socket: LibraryWebSocket }).socket._socket!,
    };
  }

  it('reads all sockets into one buffer, and what the library keeps of it is its own', async () => {
    await start();
    const { other, tcp: othersTcp } = await startSecond();
    const buffers = new Set<ArrayBufferLike>();
    for (const tcp of [library()._socket!, othersTcp]) {
      tcp.on('data', (chunk: Buffer) => buffers.add(chunk.buffer));
    }
    const request = text(`421["one",{"x":"${'x'.repeat(50)}"}]`);
    const half = once(library()._socket!, 'data');
    await peer.write(request.subarray(0, 40));
    await half;
    await other.write(text(`421["other",{"y":"${'y'.repeat(90)}"}]`));
    expect(await other.seen('431[{}]')).toBe(true);
    await peer.write(request.subarray(40));
    expect(await peer.seen('431[{}]')).toBe(true);
    expect(requests.map(({ event, args }) => ({ event, args }))).toEqual([
      { event: 'one', args: [{ x: 'x'.repeat(50) }] },
    ]);
    expect([...buffers].map(({ byteLength }) => byteLength)).toEqual([64 * 1024]);
  });

  it('gives the library memory of its own of no more than it keeps', async () => {
    await start();
    const receiver = library()._receiver as unknown as { write(chunk: Buffer): boolean };
    const write = vi.spyOn(receiver, 'write');
    await peer.write(PING);
    await peer.write(text('421["one"]'));
    expect(await peer.seen('431[{}]')).toBe(true);
    const chunk = write.mock.calls[0]![0];
    expect(chunk.subarray(0, PING.length)).toEqual(PING);
    expect(chunk.buffer.byteLength).toBe(chunk.length);
  });

  it('reads no more of a socket that is paused, until it goes on', async () => {
    await start();
    const { other } = await startSecond();
    const tcp = library()._socket!;
    tcp.pause();
    await peer.write(text('421["one"]'));
    await other.write(text('421["other"]'));
    expect(await other.seen('431[{}]')).toBe(true);
    expect(requests).toEqual([]);
    tcp.resume();
    expect(await peer.seen('431[{}]')).toBe(true);
  });

  it('writes at once what is sent in one turn, and before what goes by Socket.IO', async () => {
    await start();
    const write = vi.spyOn(library()._socket!, 'write');
    frames.reply(1, '{}');
    frames.push('news', '"first"');
    frames.pushForAnswer('news', '"second"', () => {});
    expect(await peer.seen('second')).toBe(true);
    expect(write).toHaveBeenCalledOnce();

    frames.push('news', '"third"');
    socket.emit('news', 'fourth');
    frames.push('news', '"éfth"');
    frames.push('news', '"sixth"');
    frames.push('news', '"séventh"');
    expect(await peer.seen('sixth')).toBe(true);
    expect(await peer.seen('venth"]')).toBe(true);
    const places = ['431[{}]', 'first', 'second', 'third', 'fourth', 'fth"]', 'sixth', 'venth"]'];
    const found = places.map((place) => peer.received.indexOf(place));
    expect(found).toEqual([...found].sort((one, other) => one - other));
  });

  it('hears an answer once, and none that was given up', async () => {
    await start();
    const heard: unknown[] = [];
    const ask = (name: string) =>
      frames.pushForAnswer('news', `"${name}"`, (answer) => heard.push([name, answer]));
    const [first, second] = [ask('first'), ask('second')];
    frames.giveUpAnswer(second);
    for (const id of [second, first, first]) await peer.write(text(`43${id}["yes"]`));
    await peer.write(text('421["last"]'));
    expect(await peer.seen('431[{}]')).toBe(true);
    expect(heard).toEqual([['first', 'yes']]);
  });

  it('leaves it to a library that is built otherwise', async () => {
    await start();
    const known = library();
    const hidden = new Proxy(known, {
      get(of, name) {
        if (name === '_socket' || name === '_receiver') return undefined;
        const value: unknown = Reflect.get(of, name);
        return typeof value === 'function' ? value.bind(of) : value;
      },
    });
    (socket.conn.transport as unknown as { socket: LibraryWebSocket }).socket = hidden;
    const other = new Frames(socket, { clock: systemClock, unreadBytesMax: 1_000, onTooSlow: () => {} });
    other.push('news', '"by the library"');
    expect(await peer.seen('by the library')).toBe(true);
  });

  it('writes what was sent before the connection is closed', async () => {
    await start();
    frames.push('news', '"last"');
    frames.flush();
    socket.conn.close();
    expect(await peer.seen('\x88')).toBe(true);
    expect(peer.received.indexOf('"last"]')).toBeGreaterThan(0);
    expect(peer.received.indexOf('"last"]')).toBeLessThan(peer.received.indexOf('\x88'));
  });

  /** Has the engine ping, as it does in intervals of its own; resolves when the client was asked. */
  async function askWhetherItLives(): Promise<void> {
    (socket.conn as unknown as { sendPacket(type: 'ping'): void }).sendPacket('ping');
    expect(await peer.seen('\x81\x012')).toBe(true);
  }

  it('tells the engine that a client lives whose pong is due', async () => {
    await start();
    const packets: string[] = [];
    socket.conn.on('packet', ({ type }: { type: string }) => packets.push(type));
    await askWhetherItLives();
    await peer.write(text('427["one"]'));
    expect(await peer.seen('437[{}]')).toBe(true);
    await peer.write(text('428["two"]'));
    expect(await peer.seen('438[{}]')).toBe(true);
    expect(requests.map(({ id, event }) => ({ id, event }))).toEqual([
      { id: 7, event: 'one' },
      { id: 8, event: 'two' },
    ]);
    // Once for each ping: the second request tells the engine nothing.
    expect(packets).toEqual(['message', 'noop', 'message']);
  });

  it('tells the engine no more of a client that has said its pong', async () => {
    await start();
    const packets: string[] = [];
    socket.conn.on('packet', ({ type }: { type: string }) => packets.push(type));
    expect(frames.facts().roundTripMs).toBeNull();
    await askWhetherItLives();
    await peer.write(Buffer.concat([text('3'), text('427["one"]')]));
    expect(await peer.seen('437[{}]')).toBe(true);
    expect(packets).toEqual(['pong', 'message']);
    expect(frames.facts().roundTripMs).toBeGreaterThanOrEqual(0);
  });

  it.each([
    ['the short way', () => frames.push('news', `"${'x'.repeat(10_000)}"`)],
    ['the library, since it is not ASCII', () => frames.push('news', `"${'é'.repeat(5_000)}"`)],
    ['Socket.IO', () => socket.emit('news', 'x'.repeat(10_000))],
  ])('finds a client too slow that reads nothing of what is sent by %s', async (_, send) => {
    await start();
    peer.socket.pause();
    let isTooSlow = false;
    void tooSlow.then(() => {
      isTooSlow = true;
    });
    // Far more than the bound and all that the system takes.
    for (let sent = 0; sent < 2_000 && !isTooSlow; sent++) {
      send();
      if (sent % 50 === 0) await new Promise((resolve) => setImmediate(resolve));
    }
    expect(isTooSlow).toBe(true);
    expect(frames.facts().bufferedBytes).toBeGreaterThan(UNREAD_BYTES_MAX);
  });

  it('takes no request behind a goodbye', async () => {
    await start();
    const gone = once(socket, 'disconnect');
    await peer.write(Buffer.concat([text('41'), text('421["late"]')]));
    await gone;
    expect(requests).toEqual([]);
  });

  it('lets the library go on reading what comes behind a close frame, to throw it away', async () => {
    await start();
    const tcp = library()._socket!;
    const ended = new Promise<void>((resolve) => peer.socket.once('end', resolve));
    await peer.write(masked(Buffer.from([0x03, 0xe8]), {}, OPCODE.close));
    await ended;
    await peer.write(text('421["late"]'));
    await peer.write(text('422["later"]'));
    expect(tcp.listenerCount('data')).toBe(0);
    expect(tcp.isPaused()).toBe(false);
    expect(requests).toEqual([]);
  });
});

describe('a frame that is written', () => {
  /** As `raw-peer` frames it, without the mask that only clients set. */
  const unmasked = (payload: string): Buffer => {
    const ofClient = frame(OPCODE.text, payload);
    const headLength = ofClient.length - payload.length;
    const head = Buffer.from(ofClient.subarray(0, headLength - 4));
    head[1]! &= 0x7f;
    return Buffer.concat([head, ofClient.subarray(headLength)]);
  };

  it.each([
    0, 1, 125, 126, 127, 128, 129, 255, 256, 383, 384, 32_767, 32_768, 32_895, 32_896, 65_407, 65_408, 65_535,
  ])('has the right head before %i characters, of one piece or of two', (length) => {
    for (const payload of [
      'x'.repeat(length),
      `${'x'.repeat(length >> 1)}${'y'.repeat(length - (length >> 1))}`,
    ]) {
      expect(Buffer.from(plainFrame(payload)!, 'latin1').equals(unmasked(payload))).toBe(true);
    }
  });

  it.each(['é', 'é'.repeat(40_000), '🔑', `${'x'.repeat(126)}ÿ`, 'x'.repeat(65_536)])(
    'is left to the library where it is not ASCII, or too long',
    (payload) => {
      expect(plainFrame(payload)).toBeNull();
    },
  );
});
