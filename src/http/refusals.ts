/** How the HTTP door says no: a contract error as an answer, whatever was thrown and however little could be read. */
import type { Socket } from 'node:net';
import type { FastifyReply } from 'fastify';
import { answerLast } from '../lib/last-answer.ts';
import { ERRORS, type ErrorObject, GatewayError } from '../protocol/errors.ts';

/** The headers of every answer. */
export const HEADERS = {
  // A stored answer would hand one prekey to two peers, or tell of keys that are gone.
  'cache-control': 'no-store',
  'content-security-policy': "default-src 'none'; frame-ancestors 'none'",
  'referrer-policy': 'no-referrer',
  vary: 'Origin',
  'x-content-type-options': 'nosniff',
} as const;

/** A refusal of what no field can be named of. */
export function malformed(message: string): GatewayError {
  return new GatewayError('BAD_REQUEST', message, { details: { issues: [{ path: [], message }] } });
}

/** What the client may know of something thrown: Fastify's refusals of a body, and nothing of a fault of ours. */
export function refusalOf(error: unknown, errorId: string): GatewayError {
  if (error instanceof GatewayError) return error;
  const { code, statusCode = 500 } = error as { code?: string; statusCode?: number };
  if (code === 'FST_ERR_CTP_BODY_TOO_LARGE') return new GatewayError('PAYLOAD_TOO_LARGE');
  if (code === 'FST_ERR_CTP_INVALID_MEDIA_TYPE') return malformed('the body must be application/json');
  if (statusCode >= 400 && statusCode < 500) return malformed('the body can not be read as JSON');
  return new GatewayError('INTERNAL', undefined, { details: { errorId } });
}

/** @param httpStatus of the table of codes, unless HTTP has one of its own for it */
export function refuse(
  reply: FastifyReply,
  refusal: GatewayError | ErrorObject,
  httpStatus: number = ERRORS[refusal.code].httpStatus,
): FastifyReply {
  const error = refusal instanceof GatewayError ? refusal.toObject() : refusal;
  if (httpStatus === 401) reply.header('www-authenticate', 'Bearer');
  if (error.retryAfterMs !== undefined) reply.header('retry-after', Math.ceil(error.retryAfterMs / 1000));
  return reply.code(httpStatus).send({ success: false, error });
}

export function refuseMethod(reply: FastifyReply, methods: readonly string[]): FastifyReply {
  reply.header('allow', methods.join(', '));
  return refuse(reply, malformed('this method is not allowed here'), 405);
}

/** Answers what is no HTTP, has too many header lines, or comes too slowly; no hook ever sees it. */
export function refuseUnreadable(error: Error & { code?: string }, socket: Socket): void {
  if (error.code === 'ECONNRESET' || !socket.writable) {
    socket.destroy();
    return;
  }
  const status =
    error.code === 'HPE_HEADER_OVERFLOW' ? 431 : error.code === 'ERR_HTTP_REQUEST_TIMEOUT' ? 408 : 400;
  const refusal =
    status === 431 ? new GatewayError('PAYLOAD_TOO_LARGE') : malformed('the request can not be read');
  answerLast(socket, { status, headers: HEADERS, answer: { success: false, error: refusal.toObject() } });
}
