/** What a call of the kit rejects with. */
import type { ErrorCode, ErrorDetails, ErrorObject } from '../protocol/errors.ts';

/** The gateway refused; `code` and `details` are the contract's. */
export class KeygateError extends Error {
  readonly code: ErrorCode;
  readonly retryable: boolean;
  readonly retryAfterMs: number | undefined;
  readonly details: ErrorDetails | undefined;

  constructor(error: ErrorObject) {
    super(error.message);
    this.name = 'KeygateError';
    this.code = error.code;
    this.retryable = error.retryable;
    this.retryAfterMs = error.retryAfterMs;
    this.details = error.details;
  }
}

export type KitErrorCode =
  /** As many requests wait as may; this one was not taken in. */
  | 'OUTBOX_FULL'
  /** The connection broke after the request was sent, and it is not safe to ask again: it may have been carried out. */
  | 'UNANSWERED'
  /** A newer connection of this device took over. */
  | 'DISPLACED'
  /** `close` was called. */
  | 'CLOSED'
  /** Client and gateway did not come to agree on the keys. */
  | 'NO_AGREEMENT';

/** There is no answer that counts, for a reason on this side. */
export class KitError extends Error {
  readonly code: KitErrorCode;

  constructor(code: KitErrorCode, message: string) {
    super(message);
    this.name = 'KitError';
    this.code = code;
  }
}

/** Keys changed elsewhere meanwhile: another pass finds what is to be done. */
export function isOutOfStep(error: unknown): boolean {
  return (
    error instanceof KeygateError &&
    ['KEYS_OUT_OF_SYNC', 'KEYS_NOT_VALIDATED', 'KEYS_NOT_UPLOADED', 'IDENTITY_MISMATCH'].includes(error.code)
  );
}
