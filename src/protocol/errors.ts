/** The one table of error codes, and the error that rules throw. */
import { z } from 'zod';
import { keyId } from './ids.ts';
import { signedKeyKind } from './keys.ts';
import { shown } from './redact.ts';

/** `retryable`: the same request may succeed later without any change of it. */
export const ERRORS = {
  UNAUTHENTICATED: { httpStatus: 401, retryable: false, meaning: 'no valid token' },
  TOKEN_EXPIRED: { httpStatus: 401, retryable: false, meaning: 'the token ran out' },
  FORBIDDEN: {
    httpStatus: 403,
    retryable: false,
    meaning: 'not yours, device revoked, or origin not allowed',
  },
  BAD_REQUEST: {
    httpStatus: 400,
    retryable: false,
    meaning: 'the request is malformed; details.issues names each fault',
  },
  SIGNATURE_INVALID: {
    httpStatus: 422,
    retryable: false,
    meaning: 'details.keys names each key whose signature fails',
  },
  IDENTITY_MISMATCH: {
    httpStatus: 409,
    retryable: false,
    meaning: 'another identity key is stored; replaceIdentity: true replaces the whole key set',
  },
  PREKEY_CONFLICT: {
    httpStatus: 409,
    retryable: false,
    meaning: 'a signed or last-resort prekey id is stored with another public key, or was retired',
  },
  USER_NOT_FOUND: { httpStatus: 404, retryable: false, meaning: 'no such user with keys' },
  DEVICE_NOT_FOUND: { httpStatus: 404, retryable: false, meaning: 'no such device of that user' },
  KEYS_NOT_UPLOADED: { httpStatus: 409, retryable: false, meaning: 'this device has no key set' },
  KEYS_NOT_VALIDATED: { httpStatus: 409, retryable: false, meaning: 'clientReady without a validation' },
  KEYS_OUT_OF_SYNC: {
    httpStatus: 409,
    retryable: false,
    meaning: 'the validation, ifKeyVersion, or a request that took long, is of an older key set',
  },
  DEVICES_MISMATCHED: {
    httpStatus: 409,
    retryable: false,
    meaning: 'details lists missing, extra and stale devices; nothing was stored',
  },
  QUEUE_FULL: { httpStatus: 429, retryable: true, meaning: 'the recipient device holds its most messages' },
  RATE_LIMITED: { httpStatus: 429, retryable: true, meaning: 'too often; see retryAfterMs' },
  PAYLOAD_TOO_LARGE: { httpStatus: 413, retryable: false, meaning: 'larger than the wire allows' },
  UNAVAILABLE: { httpStatus: 503, retryable: true, meaning: 'store down or server draining; safe to retry' },
  INTERNAL: {
    httpStatus: 500,
    retryable: false,
    meaning: 'a fault of the server, with an id that its log has',
  },
} as const satisfies Record<string, { httpStatus: number; retryable: boolean; meaning: string }>;

export type ErrorCode = keyof typeof ERRORS;
export const errorCode = z.enum(Object.keys(ERRORS) as [ErrorCode, ...ErrorCode[]]).meta({ id: 'ErrorCode' });

/** Where a fault lies in the input: object keys and list indexes from the outside in. */
export const issue = z.object({
  path: z.array(z.union([shown('fieldName', z.string()), z.int()])),
  message: shown('plain', z.string()),
});
export type Issue = z.infer<typeof issue>;

export const deviceLists = z.object({
  /** Devices with keys that no envelope addresses. */
  missingDevices: z.array(z.int()),
  /** Addressed devices that have no keys. */
  extraDevices: z.array(z.int()),
  /** Addressed devices whose registration id is another. */
  staleDevices: z.array(z.int()),
});
export type DeviceLists = z.infer<typeof deviceLists>;

export const invalidKey = z.object({ kind: signedKeyKind, keyId: keyId.optional() });
export type InvalidKey = z.infer<typeof invalidKey>;

/** `details` of each code that has any. */
export const errorDetails = z.union([
  z.object({ issues: z.array(issue) }),
  z.object({ keys: z.array(invalidKey) }),
  deviceLists,
  z.object({ errorId: shown('uuid', z.string()) }),
  z.object({ keyVersion: z.int() }),
]);
export type ErrorDetails = z.infer<typeof errorDetails>;

export const errorObject = z
  .object({
    code: errorCode,
    message: z.string(),
    retryable: z.boolean(),
    retryAfterMs: z.int().optional(),
    details: errorDetails.optional(),
  })
  .meta({ id: 'Error' });
export type ErrorObject = z.infer<typeof errorObject>;

/** A refusal that a client is to see. Everything else that is thrown becomes INTERNAL in dispatch. */
export class GatewayError extends Error {
  readonly code: ErrorCode;
  readonly details: ErrorDetails | undefined;
  readonly retryAfterMs: number | undefined;

  constructor(
    code: ErrorCode,
    message: string = ERRORS[code].meaning,
    extra: { details?: ErrorDetails; retryAfterMs?: number; cause?: unknown } = {},
  ) {
    super(message, extra.cause === undefined ? undefined : { cause: extra.cause });
    this.name = 'GatewayError';
    this.code = code;
    this.details = extra.details;
    this.retryAfterMs = extra.retryAfterMs;
  }

  /** The wire form. */
  toObject(): ErrorObject {
    return {
      code: this.code,
      message: this.message,
      retryable: ERRORS[this.code].retryable,
      ...(this.retryAfterMs === undefined ? {} : { retryAfterMs: Math.ceil(this.retryAfterMs) }),
      ...(this.details === undefined ? {} : { details: this.details }),
    };
  }
}
