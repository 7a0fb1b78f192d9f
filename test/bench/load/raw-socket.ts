/**
 * A Socket.IO client made of one TCP connection and ready-made frames. It costs far less than the usual client,
 * so that on a small machine the load process leaves the processor to those that are measured.
 */
import { randomBytes } from 'node:crypto';
import { connect, type Socket } from 'node:net';

export interface RawSocketListener {
  /** The reply to request `id`: the text of a JSON array with one element. */
  onReply(id: number, text: string): void;
  /** An event of the server: the text of a JSON array, and the number that its acknowledgement takes, if it wants one. */
  onEvent(id: number | null, text: string): void;
  onClose(reason: string): void;
}

export const SILENT: RawSocketListener = { onReply() {}, onEvent() {}, onClose() {} };

/** Shared by all sockets: what is read is used up, or copied, before the next read. */
const readBuffer = Buffer.allocUnsafe(256 * 1024);
const TEXT_FRAME = 0x81;
/** First characters of packets: of Engine.IO, and, within its messages, of Socket.IO. */
const ENGINE_OPEN = 0x30;
const ENGINE_PING = 0x32;
const ENGINE_MESSAGE = 0x34;
const SOCKET_OPEN = 0x30;
const SOCKET_EVENT = 0x32;
const SOCKET_REPLY = 0x33;

export class RawSocket {
  listener: RawSocketListener = SILENT;
  readonly #socket: Socket;
  readonly #mask = randomBytes(4);
  readonly #opened: { resolve(): void; reject(error: Error): void };
  #rest: Buffer | null = null;
  #isUpgraded = false;
  #token: string;
  #requests = 0;

  /** Connects and authenticates. @throws Error with what the server refused it with */
  static open(options: { url: string; token: string }): Promise<RawSocket> {
    return new Promise((resolve, reject) => {
      const raw: RawSocket = new RawSocket(options, { resolve: () => resolve(raw), reject });
    });
  }

  private constructor(
    options: { url: string; token: string },
    opened: { resolve(): void; reject(error: Error): void },
  ) {
    const { hostname, port, host } = new URL(options.url);
    this.#token = options.token;
    this.#opened = opened;
    this.#socket = connect({
      host: hostname,
      port: Number(port),
      noDelay: true,
      onread: {
        buffer: readBuffer,
        callback: (size) => {
          this.#onData(readBuffer.subarray(0, size));
          return true;
        },
      },
    });
    this.#socket.on('error', (error) => opened.reject(error));
    this.#socket.on('close', () => {
      opened.reject(new Error('the connection was closed'));
      this.listener.onClose('closed');
    });
    this.#socket.write(
      `GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: ${host}\r\nUpgrade: websocket\r\n` +
        `Connection: Upgrade\r\nSec-WebSocket-Key: ${randomBytes(16).toString('base64')}\r\n` +
        'Sec-WebSocket-Version: 13\r\n\r\n',
    );
  }

  /** @param input JSON @returns the number that its reply bears */
  request(event: string, input: string): number {
    const id = this.#requests++;
    this.#send(`42${id}["${event}",${input}]`);
    return id;
  }

  acknowledge(id: number, answer: string): void {
    this.#send(`43${id}[${answer}]`);
  }

  close(): void {
    this.#socket.destroy();
  }

  #onData(chunk: Buffer): void {
    let data = chunk;
    if (this.#rest !== null) {
      data = Buffer.concat([this.#rest, chunk]);
      this.#rest = null;
    }
    if (!this.#isUpgraded) {
      const end = data.indexOf('\r\n\r\n');
      if (end < 0) {
        this.#rest = Buffer.from(data);
        return;
      }
      const head = data.toString('latin1', 0, end);
      if (!head.startsWith('HTTP/1.1 101')) {
        this.#fail(head.split('\r\n')[0]!);
        return;
      }
      this.#isUpgraded = true;
      data = data.subarray(end + 4);
    }
    let at = 0;
    while (data.length - at >= 2) {
      let length = data[at + 1]! & 0x7f;
      let start = at + 2;
      if (length === 126) {
        if (data.length < start + 2) break;
        length = data.readUInt16BE(start);
        start += 2;
      } else if (length === 127) {
        if (data.length < start + 8) break;
        length = Number(data.readBigUInt64BE(start));
        start += 8;
      }
      if (data.length < start + length) break;
      if (data[at] === TEXT_FRAME) this.#onPacket(data, start, start + length);
      at = start + length;
    }
    if (at < data.length) this.#rest = Buffer.from(data.subarray(at));
  }

  #onPacket(data: Buffer, start: number, end: number): void {
    if (data[start] === ENGINE_PING) this.#send('3');
    if (data[start] === ENGINE_OPEN) this.#send(`40${JSON.stringify({ token: this.#token })}`);
    if (data[start] !== ENGINE_MESSAGE) return;
    const text = data.toString('latin1', start + 2, end);
    const body = text.indexOf('[');
    switch (data[start + 1]) {
      case SOCKET_REPLY:
        this.listener.onReply(Number(text.slice(0, body)), text.slice(body));
        break;
      case SOCKET_EVENT:
        this.listener.onEvent(body === 0 ? null : Number(text.slice(0, body)), text.slice(body));
        break;
      case SOCKET_OPEN:
        this.#opened.resolve();
        break;
      default:
        this.#fail(`the server said ${data.toString('latin1', start, end)}`);
    }
  }

  #fail(reason: string): void {
    this.#opened.reject(new Error(reason));
    this.#socket.destroy();
  }

  /** Frames of clients are masked; the mask stays the same for a connection's life, which servers can't tell. */
  #send(text: string): void {
    const { length } = text;
    const head = length < 126 ? 6 : length < 65_536 ? 8 : 14;
    const frame = Buffer.allocUnsafe(head + length);
    frame[0] = TEXT_FRAME;
    if (head === 6) frame[1] = 0x80 | length;
    else if (head === 8) {
      frame[1] = 0x80 | 126;
      frame.writeUInt16BE(length, 2);
    } else {
      frame[1] = 0x80 | 127;
      frame.writeBigUInt64BE(BigInt(length), 2);
    }
    const mask = this.#mask;
    frame.set(mask, head - 4);
    frame.write(text, head, 'latin1');
    for (let i = 0; i < length; i++) frame[head + i]! ^= mask[i & 3]!;
    this.#socket.write(frame);
  }
}
