/** Answers a request to become a WebSocket with a refusal that is plain HTTP. */
import { STATUS_CODES } from 'node:http';
import type { Socket } from 'node:net';
import { ERRORS, type GatewayError } from '../protocol/errors.ts';

/** A client that doesn't read the answer is not waited for longer. */
const ANSWER_TIMEOUT_MS = 5_000;

export function refuseUpgrade(socket: Socket, refusal: GatewayError): void {
  const status = ERRORS[refusal.code].httpStatus;
  const error = refusal.toObject();
  const body = JSON.stringify({ success: false, error });
  const head = [
    `HTTP/1.1 ${status} ${STATUS_CODES[status]}`,
    'content-type: application/json; charset=utf-8',
    `content-length: ${Buffer.byteLength(body)}`,
    'cache-control: no-store',
    'x-content-type-options: nosniff',
    'connection: close',
    ...(error.retryAfterMs === undefined ? [] : [`retry-after: ${Math.ceil(error.retryAfterMs / 1000)}`]),
  ];
  socket.setTimeout(ANSWER_TIMEOUT_MS, () => socket.destroy());
  socket.end(`${head.join('\r\n')}\r\n\r\n${body}`, () => socket.destroy());
}
