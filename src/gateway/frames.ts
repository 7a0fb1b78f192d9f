/**
 * The short way between a WebSocket and its device: requests, replies, pushes and their acknowledgements are read and
 * written here, past layers of events that would take more time than they do themselves (an echo costs 19 µs through
 * Socket.IO, 13 without). It keeps everything else: handshake, heartbeat, namespaces, attachments, the end. What is not
 * plainly one of the four goes to it, and is judged by it alone.
 */
import type { Socket } from 'socket.io';
import type { Clock } from '../lib/clock.ts';
import { nestsDeeper } from '../lib/json-depth.ts';
import { JSON_DEPTH_MAX } from '../protocol/limits.ts';
import { ARGUMENTS_MAX } from './parser.ts';
import { plainFrame, readPlainFrames, writePlainFrames } from './plain-frames.ts';
import { webSocketOf } from './strangers.ts';

/** A request as its frame has it. */
export interface RequestFrame {
  /** What its answer bears. */
  id: number;
  event: string;
  args: readonly unknown[];
  bytes: number;
}

// First characters of a text frame: Engine.IO's type, then, within its messages, Socket.IO's.
const MESSAGE = 0x34;
const EVENT = 0x32;
const ACKNOWLEDGEMENT = 0x33;
/** Socket.IO's packet by which a client leaves. */
const GOODBYE = '41';
/** Engine.IO's packet that says nothing but that its sender lives. */
const NOTHING_TO_SAY = Buffer.from('6');
/** As the engine announces a packet to those who count them. */
const PACKET = Object.freeze({ type: 'message' });
/** Numbers of requests have no more digits: a longer one would come back as another. */
const ID_DIGITS_MAX = 15;
/** More than this does not wait for the end of the turn. */
const UNSENT_MAX = 64 * 1024;
/** By these the library knows moments of its own. */
const RESERVED_EVENTS = new Set([
  'connect',
  'connect_error',
  'disconnect',
  'disconnecting',
  'newListener',
  'removeListener',
]);

/** What is put off to the end of the turn, such as a push, comes before what is put off once more. */
function atEndOfTurn(frames: Frames): void {
  process.nextTick(flush, frames);
}

function flush(frames: Frames): void {
  frames.flush();
}

/** A class, because every open socket has one. */
export class Frames {
  readonly #socket: Pick<Socket, 'conn' | 'connected'>;
  readonly #webSocket: ReturnType<typeof webSocketOf>;
  readonly #unreadBytesMax: number;
  readonly #onTooSlow: () => void;
  /** Who waits for the acknowledgement of a push, by its number; null from when nobody does, as on most sockets. */
  #awaited: Map<number, (answer: unknown) => void> | null = null;
  #pushes = 0;
  /** What the engine keeps until its WebSocket takes more: it hands over one batch at a time. */
  #queuedBytes = 0;
  /** Frames of this turn, which go out at its end: a reply and the messages behind it are one write. */
  #unsent = '';
  /** The client has said that it leaves: Socket.IO ends it a tick later. */
  #isLeaving = false;
  #isPongDue = false;
  #pingedAtMs = 0;
  #roundTripMs: number | null = null;

  /**
   * @param options.unreadBytesMax bytes that may wait to be read by the client: neither the engine nor its WebSocket
   *   bounds what it queues
   * @param options.onTooSlow more is written than that
   */
  constructor(
    socket: Pick<Socket, 'conn' | 'connected'>,
    options: { clock: Clock; unreadBytesMax: number; onTooSlow(): void },
  ) {
    const { clock } = options;
    this.#socket = socket;
    this.#webSocket = webSocketOf(socket.conn);
    this.#unreadBytesMax = options.unreadBytesMax;
    this.#onTooSlow = options.onTooSlow;
    socket.conn.on('packetCreate', ({ type, data }: { type: string; data?: string | Buffer }) => {
      if (type === 'ping') {
        this.#isPongDue = true;
        this.#pingedAtMs = clock.nowMs();
      }
      this.flush();
      if (data === undefined) return;
      this.#queuedBytes += Buffer.byteLength(data);
      this.#checkUnread();
    });
    socket.conn.on('flush', () => {
      this.#queuedBytes = 0;
    });
    socket.conn.on('heartbeat', () => {
      this.#isPongDue = false;
      this.#roundTripMs = clock.nowMs() - this.#pingedAtMs;
    });
  }

  /** From now on requests are read here. `onRequest` never throws. */
  serve(onRequest: (request: RequestFrame) => void): void {
    const webSocket = this.#webSocket;
    const [library, another] = webSocket.listeners('message');
    if (library === undefined || another !== undefined)
      throw new Error('the engine reads its WebSocket otherwise');
    webSocket.off('message', library);
    // It may end the connection: what was answered before goes out first.
    const passOn: typeof library = (data, isBinary) => {
      this.flush();
      library.call(webSocket, data, isBinary);
    };
    webSocket.on('message', (data, isBinary) => {
      const taken = !isBinary && this.#take(data.toString(), data.length, onRequest, passOn);
      if (!taken) passOn(data, isBinary);
    });
    readPlainFrames(webSocket, (text, bytes) => {
      if (!this.#take(text, bytes, onRequest, passOn)) passOn(Buffer.from(text), false);
    });
  }

  facts(): { bufferedBytes: number; roundTripMs: number | null } {
    return { bufferedBytes: this.#unreadBytes(), roundTripMs: this.#roundTripMs };
  }

  /** @param reply JSON */
  reply(id: number, reply: string): void {
    this.#send(`43${id}[${reply}]`);
  }

  /** @param payload JSON */
  push(event: string, payload: string): void {
    this.#send(`42["${event}",${payload}]`);
  }

  /**
   * @param payload JSON
   * @param onAnswer called once, with whatever the client says, or never
   * @returns the push's number, by which the answer may be given up
   */
  pushForAnswer(event: string, payload: string, onAnswer: (answer: unknown) => void): number {
    const id = this.#pushes++;
    this.#awaited ??= new Map();
    this.#awaited.set(id, onAnswer);
    this.#send(`42${id}["${event}",${payload}]`);
    return id;
  }

  /** Nobody waits for the answer to that push any more. */
  giveUpAnswer(id: number): void {
    this.#awaited?.delete(id);
    if (this.#awaited?.size === 0) this.#awaited = null;
  }

  /** To be called before the connection is closed: what was sent in this turn goes out now. */
  flush(): void {
    if (this.#unsent === '') return;
    const frames = this.#unsent;
    this.#unsent = '';
    writePlainFrames(this.#webSocket, frames);
    this.#checkUnread();
  }

  #send(text: string): void {
    if (this.#socket.conn.readyState !== 'open') return;
    const frame = plainFrame(text);
    if (frame === null || this.#webSocket._socket === undefined) {
      this.flush();
      this.#webSocket.send(text);
      this.#checkUnread();
      return;
    }
    if (this.#unsent === '') process.nextTick(atEndOfTurn, this);
    this.#unsent += frame;
    if (this.#unsent.length > UNSENT_MAX) this.flush();
  }

  #unreadBytes(): number {
    return this.#queuedBytes + this.#webSocket.bufferedAmount;
  }

  #checkUnread(): void {
    if (this.#unreadBytes() > this.#unreadBytesMax) this.#onTooSlow();
  }

  /** @returns false where it is Socket.IO's to judge */
  #take(
    text: string,
    bytes: number,
    onRequest: (request: RequestFrame) => void,
    passOn: (data: Buffer, isBinary: boolean) => void,
  ): boolean {
    const { conn } = this.#socket;
    if (text === GOODBYE) this.#isLeaving = true;
    if (this.#isLeaving || !this.#socket.connected || conn.readyState !== 'open') return false;
    const packet = packetIn(text);
    if (packet === null) return false;
    // To those who count packets.
    conn.emit('packet', PACKET);
    // Whoever sends while its pong is due is alive, which the engine would notice by itself.
    if (this.#isPongDue) {
      this.#isPongDue = false;
      passOn(NOTHING_TO_SAY, false);
    }
    const { id, isEvent, args } = packet;
    if (isEvent) {
      onRequest({ id, event: args[0] as string, args: args.slice(1), bytes: bytes - 1 });
      return true;
    }
    const onAnswer = this.#awaited?.get(id);
    this.giveUpAnswer(id);
    onAnswer?.(args[0]);
    return true;
  }
}

/** @returns null for what is not plainly an event or an acknowledgement that bears a number */
function packetIn(text: string): { id: number; isEvent: boolean; args: unknown[] } | null {
  const type = text.charCodeAt(1);
  if (text.charCodeAt(0) !== MESSAGE || (type !== EVENT && type !== ACKNOWLEDGEMENT)) return null;
  let at = 2;
  let id = 0;
  for (; at < text.length; at++) {
    const digit = text.charCodeAt(at) - 0x30;
    if (digit < 0 || digit > 9) break;
    id = id * 10 + digit;
  }
  // Without a number nobody waits for an answer.
  if (at === 2 || at > 2 + ID_DIGITS_MAX) return null;
  const json = text.slice(at);
  if (nestsDeeper(json, JSON_DEPTH_MAX)) return null;
  let args: unknown;
  try {
    args = JSON.parse(json);
  } catch {
    return null;
  }
  if (!Array.isArray(args) || args.length > ARGUMENTS_MAX) return null;
  const isEvent = type === EVENT;
  if (isEvent && (typeof args[0] !== 'string' || RESERVED_EVENTS.has(args[0]))) return null;
  return { id, isEvent, args };
}
