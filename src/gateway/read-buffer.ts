/**
 * One buffer that all sockets are read into, one chunk after the other. Node makes 64 KiB of memory for each chunk and
 * gives most of it back, which takes up to a tenth of a claim's time. It has this as `onread` for the sockets that a process
 * opens itself; for those that it accepts it is switched on here by the same means.
 *
 * @see https://nodejs.org/docs/latest-v20.x/api/net.html#new-netsocketoptions
 */
import type { Socket as TcpSocket } from 'node:net';

/** As much as Node itself reads at once. */
const buffer = Buffer.allocUnsafeSlow(64 * 1024);

/**
 * From now on the chunks that listeners for `data` hear lie in the one buffer: who keeps one keeps {@link ownOf} it. Nothing
 * changes where Node is not built as it is looked at here, and for a socket with chunks that are still to be heard.
 */
export function readIntoOneBuffer(tcp: TcpSocket): void {
  const socket = tcp as TcpSocket & Record<symbol, unknown> & { _handle?: { useUserBuffer?: unknown } };
  const handle = socket._handle;
  const [bufferKey, listenerKey] = [symbolOf(tcp, 'kBuffer'), symbolOf(tcp, 'kBufferCb')];
  if (bufferKey === undefined || listenerKey === undefined) return;
  if (typeof handle?.useUserBuffer !== 'function') return;
  if (tcp.isPaused() || tcp.readableLength > 0) return;
  handle.useUserBuffer(buffer);
  socket[bufferKey] = buffer;
  socket[listenerKey] = hearChunk;
}

/** @returns the chunk, or a copy of one that the next chunk overwrites: in memory of its own, of which slices may stay for long */
export function ownOf(chunk: Buffer): Buffer {
  if (chunk.buffer !== buffer.buffer) return chunk;
  const own = Buffer.allocUnsafeSlow(chunk.length);
  chunk.copy(own);
  return own;
}

/** Where `onread` keeps what it was given; undefined in a Node that keeps it elsewhere. */
function symbolOf(tcp: TcpSocket, name: string): symbol | undefined {
  return Object.getOwnPropertySymbols(tcp).find(({ description }) => description === name);
}

/** @returns whether reading goes on: who stops it pauses the socket, which then hears of its end no sooner than it goes on */
function hearChunk(this: TcpSocket, length: number): boolean {
  this.emit('data', buffer.subarray(0, length));
  return true;
}
