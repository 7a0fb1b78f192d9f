/** A peer that keeps to no protocol: it writes the bytes that it is told to, and answers nothing by itself. */
import { randomBytes } from 'node:crypto';
import { connect, type Socket } from 'node:net';

export const OPCODE = { continuation: 0, text: 1, binary: 2, close: 8, ping: 9, pong: 10 } as const;

export interface RawPeer {
  readonly socket: Socket;
  /** What came last, as Latin-1; at most {@link KEPT_BYTES_MAX} of it. */
  readonly received: string;
  /** Resolves when the other side has ended the connection. */
  readonly closed: Promise<void>;
  readonly isClosed: boolean;
  /** Whether the other side has said that it is through with this one, or has closed the connection. */
  readonly isCut: boolean;
  /** Resolves when the bytes are handed to the system, or the connection is closed. */
  write(bytes: string | Buffer): Promise<void>;
  /** Resolves true when `text` has come, false when the connection was cut without it. */
  seen(text: string): Promise<boolean>;
  /** Hears of every text message that the other side sends in one frame. */
  onText: (message: string) => void;
  destroy(): void;
}

const NO_MASK = Buffer.alloc(4);
/** Without a reason, or with one of WebSocket's own codes. */
const CLOSE_FRAMES = ['8800', '880203'].map((bytes) => Buffer.from(bytes, 'hex').toString('latin1'));
const KEPT_BYTES_MAX = 64 * 1024;
const PROBE_PERIOD_MS = 500;

/** @param localAddress where the connection seems to come from: any address of this machine */
export function openPeer(url: string, localAddress = '127.0.0.1'): Promise<RawPeer> {
  const { hostname, port } = new URL(url);
  return new Promise((resolve, reject) => {
    // Half-open: the other side's end is not answered with one of its own, so that it must cut the connection.
    const socket = connect({
      host: hostname,
      port: Number(port),
      localAddress,
      noDelay: true,
      allowHalfOpen: true,
    });
    // What is written to a connection that the other side has cut is answered with a reset; to one that it only
    // ended, with nothing.
    socket.once('end', () => {
      const timer = setInterval(() => socket.write('x'), PROBE_PERIOD_MS);
      socket.once('close', () => clearInterval(timer));
    });
    let received = '';
    let rest: Buffer = Buffer.alloc(0);
    const peer: { onText: ((message: string) => void) | null } = { onText: null };
    let isClosed = false;
    const isCut = (): boolean => isClosed || CLOSE_FRAMES.some((close) => received.includes(close));
    const watchers = new Set<() => void>();
    const closed = new Promise<void>((close) => {
      socket.once('close', () => {
        isClosed = true;
        close();
        for (const look of watchers) look();
      });
    });
    socket.on('data', (chunk) => {
      received = (received + chunk.toString('latin1')).slice(-KEPT_BYTES_MAX);
      if (peer.onText !== null) rest = readFrames(Buffer.concat([rest, chunk]), peer.onText);
      for (const look of watchers) look();
    });
    socket.on('error', reject);
    socket.once('connect', () =>
      resolve({
        socket,
        get received() {
          return received;
        },
        closed,
        get isClosed() {
          return isClosed;
        },
        get isCut() {
          return isCut();
        },
        write: (bytes) =>
          new Promise((done) => {
            void closed.then(done);
            if (socket.writable) socket.write(bytes, () => done());
          }),
        seen: (text) =>
          new Promise((found) => {
            const look = (): void => {
              const isThere = received.includes(text);
              if (!isThere && !isCut()) return;
              watchers.delete(look);
              found(isThere);
            };
            watchers.add(look);
            look();
          }),
        get onText() {
          return peer.onText ?? (() => {});
        },
        set onText(listener) {
          peer.onText = listener;
        },
        destroy: () => socket.destroy(),
      }),
    );
  });
}

/** Hands on each text message that is whole. @returns the bytes of what is not whole yet */
function readFrames(bytes: Buffer, onText: (message: string) => void): Buffer {
  let at = 0;
  while (bytes.length - at >= 2) {
    let length = bytes[at + 1]! & 0x7f;
    let start = at + 2;
    if (length === 126) {
      if (bytes.length < start + 2) break;
      length = bytes.readUInt16BE(start);
      start += 2;
    } else if (length === 127) {
      if (bytes.length < start + 8) break;
      length = Number(bytes.readBigUInt64BE(start));
      start += 8;
    }
    if (bytes.length < start + length) break;
    if (bytes[at] === (0x80 | OPCODE.text)) onText(bytes.toString('utf8', start, start + length));
    at = start + length;
  }
  return bytes.subarray(at);
}

export function upgradeRequest(url: string, more: { query?: string; headers?: string[] } = {}): string {
  const { query = '', headers = [] } = more;
  return [
    `GET /socket.io/?EIO=4&transport=websocket${query} HTTP/1.1`,
    `Host: ${new URL(url).host}`,
    'Upgrade: websocket',
    'Connection: Upgrade',
    `Sec-WebSocket-Key: ${randomBytes(16).toString('base64')}`,
    'Sec-WebSocket-Version: 13',
    ...headers,
    '',
    '',
  ].join('\r\n');
}

/**
 * A frame as a client sends it.
 *
 * @param options.mask by default zero, so that what is written is what is meant
 */
export function frame(
  opcode: number,
  payload: string | Buffer,
  {
    isLast = true,
    announcedBytes,
    mask = NO_MASK,
  }: { isLast?: boolean; announcedBytes?: number; mask?: Buffer } = {},
): Buffer {
  const body = Buffer.from(payload as string).map((byte, at) => byte ^ mask[at % mask.length]!);
  const length = announcedBytes ?? body.length;
  const head = Buffer.alloc(length < 126 ? 6 : length < 65_536 ? 8 : 14);
  head[0] = (isLast ? 0x80 : 0) | opcode;
  if (length < 126) head[1] = 0x80 | length;
  else if (length < 65_536) {
    head[1] = 0x80 | 126;
    head.writeUInt16BE(length, 2);
  } else {
    head[1] = 0x80 | 127;
    head.writeBigUInt64BE(BigInt(length), 2);
  }
  mask.copy(head, head.length - mask.length);
  return Buffer.concat([head, body]);
}

export const text = (payload: string): Buffer => frame(OPCODE.text, payload);

/** A WebSocket on which nobody has said who they are. */
export async function openWebSocketPeer(url: string, localAddress?: string): Promise<RawPeer> {
  const peer = await openPeer(url, localAddress);
  await peer.write(upgradeRequest(url));
  if (!(await peer.seen('"maxPayload"'))) throw new Error(`no WebSocket: ${peer.received.slice(0, 200)}`);
  return peer;
}

/** A WebSocket of a device whose token was taken. */
export async function openAdmittedPeer(url: string, token: string, localAddress?: string): Promise<RawPeer> {
  const peer = await openWebSocketPeer(url, localAddress);
  await peer.write(text(`40${JSON.stringify({ token })}`));
  if (!(await peer.seen('40{"sid"'))) throw new Error(`not admitted: ${peer.received.slice(-200)}`);
  return peer;
}
