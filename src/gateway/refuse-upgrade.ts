/** Answers a request to become a WebSocket with a refusal that is plain HTTP. */
import type { Socket } from 'node:net';
import { answerLast } from '../lib/last-answer.ts';
import { ERRORS, type GatewayError } from '../protocol/errors.ts';

/** @param status of the table of codes, unless HTTP has one of its own for it */
export function refuseUpgrade(
  socket: Socket,
  refusal: GatewayError,
  status: number = ERRORS[refusal.code].httpStatus,
): void {
  const error = refusal.toObject();
  answerLast(socket, {
    status,
    headers: {
      'cache-control': 'no-store',
      'x-content-type-options': 'nosniff',
      ...(error.retryAfterMs !== undefined && {
        'retry-after': String(Math.ceil(error.retryAfterMs / 1000)),
      }),
    },
    answer: { success: false, error },
  });
}
