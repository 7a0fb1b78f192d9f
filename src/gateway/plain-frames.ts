/**
 * WebSocket frames of the plainest kind, past the streams of the WebSocket library: whole texts, unfragmented and of no
 * more than 64 KiB. Everything else, control frames, fragments, halves, goes to the library with all that comes behind it in
 * the same chunk; so does everything where the library is not built as it is looked at here.
 *
 * @see RFC 6455, section 5.2
 */
import { isUtf8 } from 'node:buffer';
import type { Socket as TcpSocket } from 'node:net';
import { ownOf, readIntoOneBuffer } from './read-buffer.ts';

/** What is looked at of the library's WebSocket. */
export interface LibraryWebSocket {
  readonly readyState: number;
  readonly _socket?: TcpSocket;
  readonly _receiver?: {
    _state: number;
    _bufferedBytes: number;
    _fragmented: number;
    writableLength: number;
  };
  send(text: string): void;
}

const OPEN = 1;
/** The library's state between two frames. */
const AWAITS_FRAME = 0;
const LIBRARY_LISTENER = 'socketOnData';

const WHOLE_TEXT = 0x81;
const MASKED = 0x80;
const MASK_BYTES = 4;
/** Lengths up to this stand in the second byte; those up to the next in the two bytes behind it. */
const SHORT_MAX = 125;
const MEDIUM_MAX = 0xffff;
const MEDIUM = 126;

/** Bytes from which on it is faster to take four at a time. */
const WORDS_PAY_FROM = 128;
const NOT_ASCII = 0x80808080;

/**
 * Chunks of the socket are heard out of one buffer from now on, by all who listen for them.
 *
 * @param onText gets each text and its length in UTF-8, in the order in which they came; does not throw
 */
export function readPlainFrames(
  webSocket: LibraryWebSocket,
  onText: (text: string, bytes: number) => void,
): void {
  const { _socket: tcp, _receiver: library } = webSocket;
  const pass = tcp?.listeners('data').find(({ name }) => name === LIBRARY_LISTENER);
  if (tcp === undefined || library === undefined || pass === undefined) return;
  tcp.off('data', pass as () => void);
  const read = (chunk: Buffer): void => {
    let at = 0;
    const isBetweenFrames =
      library._state === AWAITS_FRAME &&
      library._bufferedBytes === 0 &&
      library._fragmented === 0 &&
      library.writableLength === 0;
    while (isBetweenFrames && webSocket.readyState === OPEN) {
      const start = startOfText(chunk, at);
      if (start < 0) break;
      const end =
        start + (start - at > 2 + MASK_BYTES ? chunk.readUInt16BE(at + 2) : chunk[at + 1]! - MASKED);
      if (end > chunk.length) break;
      const isAscii = unmask(chunk, start, end);
      if (!isAscii && !isUtf8(chunk.subarray(start, end))) {
        // The library says what is wrong with it.
        unmask(chunk, start, end);
        break;
      }
      at = end;
      onText(chunk.toString(isAscii ? 'latin1' : 'utf8', start, end), end - start);
    }
    // The library keeps what it can't read yet.
    if (at < chunk.length) pass.call(tcp, ownOf(at === 0 ? chunk : chunk.subarray(at)));
  };
  // As `once` does it: the library's own removal of its listener, when it has read enough, finds ours.
  tcp.on('data', Object.assign(read, { listener: pass }));
  readIntoOneBuffer(tcp);
}

/** @returns the text as a frame, a byte in each character; null where it is the library's to send */
export function plainFrame(text: string): string | null {
  const { length } = text;
  if (length > MEDIUM_MAX) return null;
  const [high, low] = [length >> 8, length & 0xff];
  const isShort = length <= SHORT_MAX;
  const frame = isShort
    ? String.fromCharCode(WHOLE_TEXT, length) + text
    : String.fromCharCode(WHOLE_TEXT, MEDIUM, high, low) + text;
  // Text of one byte a character needs no buffer of its own on its way. The look is at the whole frame, which the engine
  // makes one piece for it: the frame is written as it is then, and the text is not copied twice.
  const headBytesBeyondAscii = isShort ? 1 : 1 + (high >> 7) + (low >> 7);
  return Buffer.byteLength(frame) === frame.length + headBytesBeyondAscii ? frame : null;
}

/** Writes frames after all that was sent before. */
export function writePlainFrames(webSocket: LibraryWebSocket, frames: string): void {
  if (webSocket.readyState === OPEN) webSocket._socket?.write(frames, 'latin1');
}

/** @returns where the text of the frame begins that begins at `at`; -1 where it is not a plain one, or its mask not all there */
function startOfText(chunk: Buffer, at: number): number {
  const short = at + 2 + MASK_BYTES;
  if (chunk.length < short || chunk[at] !== WHOLE_TEXT) return -1;
  const length = chunk[at + 1]! - MASKED;
  if (length < 0 || length > MEDIUM) return -1;
  // Where the length is not all there, the text isn't either.
  return length < MEDIUM ? short : short + 2;
}

/** Applies the mask that stands before `start`, which twice is nothing. @returns whether each byte is ASCII now */
function unmask(chunk: Buffer, start: number, end: number): boolean {
  const mask = start - MASK_BYTES;
  let bits = 0;
  let at = start;
  if (end - start > WORDS_PAY_FROM) {
    const words = new DataView(chunk.buffer, chunk.byteOffset, end);
    const maskWord = words.getInt32(mask);
    for (const last = end - 4; at <= last; at += 4) {
      const word = words.getInt32(at) ^ maskWord;
      words.setInt32(at, word);
      bits |= word;
    }
    bits = (bits & NOT_ASCII) === 0 ? 0 : 0x80;
  }
  for (; at < end; at++) {
    const byte = chunk[at]! ^ chunk[mask + ((at - start) & 3)]!;
    chunk[at] = byte;
    bits |= byte;
  }
  return bits < 0x80;
}
