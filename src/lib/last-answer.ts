/** An answer of plain HTTP on a socket that no HTTP server answers on any more. */
import { STATUS_CODES } from 'node:http';
import type { Socket } from 'node:net';

/** A client that doesn't read the answer is not waited for longer. */
const ANSWER_TIMEOUT_MS = 5_000;

/** Writes `answer` as JSON, and ends the connection. */
export function answerLast(
  socket: Socket,
  { status, headers, answer }: { status: number; headers: Readonly<Record<string, string>>; answer: object },
): void {
  const body = JSON.stringify(answer);
  const all = {
    'content-type': 'application/json; charset=utf-8',
    'content-length': Buffer.byteLength(body),
    connection: 'close',
    ...headers,
  };
  const lines = Object.entries(all).map(([name, value]) => `${name}: ${value}`);
  const head = [`HTTP/1.1 ${status} ${STATUS_CODES[status]}`, ...lines].join('\r\n');
  socket.setTimeout(ANSWER_TIMEOUT_MS, () => socket.destroy());
  socket.end(`${head}\r\n\r\n${body}`, () => socket.destroy());
}
