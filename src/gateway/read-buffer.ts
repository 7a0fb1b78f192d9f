/**
 * One buffer into which all sockets are read, one chunk after the other. For each chunk Node makes 64 KiB of memory and
 * gives most of it back, which takes more time than the chunk's request is parsed in: bundles a second 1.06, time of the
 * process per bundle 0.91.
 *
 * Node has this for the sockets that a process opens, as `onread`; here it is switched on for one that was accepted, by
 * the same means. Where Node is not built as it is looked at here, chunks stay as they were.
 *
 * @see https://nodejs.org/docs/latest-v20.x/api/net.html#new-netsocketoptions
 */
import type { Socket as TcpSocket } from 'node:net';

/** As much as Node itself reads at once. */
const buffer = Buffer.allocUnsafeSlow(64 * 1024);

/** From now on the chunks of `tcp` lie in the one buffer: whoever hears of one and keeps it keeps {@link ownOf} it. */
export function readIntoOneBuffer(tcp: TcpSocket): void {
  const socket = tcp as TcpSocket & Record<symbol, unknown> & { _handle?: { useUserBuffer?: unknown } };
  const handle = socket._handle;
  const [bufferKey, listenerKey] = [symbolOf(tcp, 'kBuffer'), symbolOf(tcp, 'kBufferCb')];
  if (bufferKey === undefined || listenerKey === undefined) return;
  if (typeof handle?.useUserBuffer !== 'function') return;
  handle.useUserBuffer(buffer);
  socket[bufferKey] = buffer;
  socket[listenerKey] = hearChunk;
}

/** @returns the chunk, or a copy of one that the next chunk overwrites */
export function ownOf(chunk: Buffer): Buffer {
  return chunk.buffer === buffer.buffer ? Buffer.from(chunk) : chunk;
}

/** Where `onread` keeps what it was given. */
function symbolOf(tcp: TcpSocket, name: string): symbol | undefined {
  return Object.getOwnPropertySymbols(tcp).find(({ description }) => description === name);
}

/** @returns whether reading goes on: who stops it pauses the socket */
function hearChunk(this: TcpSocket, length: number): boolean {
  this.emit('data', buffer.subarray(0, length));
  return true;
}
