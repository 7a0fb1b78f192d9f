/** The requests of the admin listener. */
import { z } from 'zod';
import { bounceReason } from '../envelope.ts';
import { errorObject } from '../errors.ts';
import { time, uuid } from '../ids.ts';
import { diagnosis } from './diagnosis.ts';
import { streamEvent } from './events.ts';
import { claimFacts, keySetFacts, pendingFacts, socketFacts } from './facts.ts';
import { nodeState } from './stream.ts';
import { count, deviceKey, gateName, socketNumber } from './values.ts';

const { retryAfterMs } = errorObject.shape;

/**
 * The admin API. Success is 200 and `answer`; failure is another status and {@link adminError}. All but `login` need
 * the session cookie that `login` sets, or `Authorization: Bearer <ADMIN_TOKEN>`.
 */
export const adminRoutes = {
  /** Throttled: after a few wrong tokens in a row 429 with `retryAfterMs`, also for the right one. */
  login: {
    method: 'POST',
    path: '/api/login',
    body: z.strictObject({ token: z.string().max(1024) }),
    answer: z.object({ writable: z.boolean() }),
  },
  /** Ends the session: the cookie is worth nothing afterwards, wherever it went. */
  logout: { method: 'POST', path: '/api/logout', answer: z.object({}) },
  session: {
    method: 'GET',
    path: '/api/session',
    answer: z.object({
      /** Whether `disconnect` is allowed. */
      writable: z.boolean(),
      node: z.string(),
      version: z.string(),
      expiresAt: time,
    }),
  },
  /** Query: a {@link streamFilter}. Answers server-sent events of {@link streamFrame}. */
  stream: { method: 'GET', path: '/api/stream' },
  /** Server-sent events of {@link overviewSample}, one a second; a sample covers all nodes. */
  overview: { method: 'GET', path: '/api/overview' },
  sockets: {
    method: 'GET',
    path: '/api/sockets',
    query: z.strictObject({
      /** A device or a user, as in the filter. */
      device: z.string().max(140).optional(),
      gate: gateName.optional(),
    }),
    answer: z.object({
      nodes: z.array(nodeState),
      /** Sorted by device; at most {@link SOCKETS_MAX}. */
      sockets: z.array(
        socketFacts.extend({
          /** In the device's queue; null where the store did not say in time. */
          pendingCount: count.nullable(),
        }),
      ),
      /** How many match in all. */
      total: count,
    }),
  },
  /** One device, whether or not it was ever heard of. */
  device: {
    method: 'GET',
    /** `:device` is `alice.1`, percent-encoded. */
    path: '/api/devices/:device',
    query: z.strictObject({
      /** Asks why this very message is not delivered. */
      messageId: uuid.optional(),
    }),
    answer: z.object({
      device: deviceKey,
      time,
      /** `uploaded` goes with `keySet`. */
      state: z.enum(['neverUploaded', 'reset', 'uploaded']),
      keyVersion: z.int(),
      countVersion: z.int(),
      keySet: keySetFacts.nullable(),
      sockets: z.array(socketFacts),
      nodes: z.array(nodeState),
      /** Newest first; at most 50. */
      claims: z.array(claimFacts),
      pending: z.object({
        count,
        /** In the order of delivery; at most 50. */
        first: z.array(pendingFacts),
      }),
      /** The reason first, then what else is worth knowing. */
      diagnoses: z.array(diagnosis).min(1),
    }),
  },
  /** A message's life: what the store remembers of it, and what was seen while any viewer looked. */
  message: {
    method: 'GET',
    path: '/api/messages/:messageId',
    query: z.strictObject({
      /** The recipient's user id, or one device of it; without it the store is asked only where the events name it. */
      recipient: z.string().max(140).optional(),
    }),
    answer: z.object({
      messageId: z.string(),
      /** One per recipient device that the store knows of. */
      recipients: z.array(
        z.object({
          device: deviceKey,
          sender: deviceKey,
          storedAt: time,
          state: z.enum(['waiting', 'putOff', 'bounced', 'delivered']),
          reason: bounceReason.nullable(),
        }),
      ),
      /** Of all nodes, in the order of time. */
      events: z.array(streamEvent),
    }),
  },
  /** Audited; FORBIDDEN unless ADMIN_WRITE is set. The client may come back at once. */
  disconnect: {
    method: 'POST',
    path: '/api/sockets/disconnect',
    body: z.strictObject({ node: z.string().max(64), socket: socketNumber }),
    /** False where the socket was gone already. */
    answer: z.object({ disconnected: z.boolean() }),
  },
} as const;

/** What a refused admin request gets. */
export const adminError = z.object({
  error: z.object({
    code: z.enum([
      'UNAUTHENTICATED',
      'FORBIDDEN',
      'BAD_REQUEST',
      'NOT_FOUND',
      'RATE_LIMITED',
      'UNAVAILABLE',
      'INTERNAL',
    ]),
    message: z.string(),
    retryAfterMs,
  }),
});
export type AdminError = z.infer<typeof adminError>;

export type AdminAnswer<Name extends Exclude<keyof typeof adminRoutes, 'stream' | 'overview'>> = z.infer<
  (typeof adminRoutes)[Name]['answer']
>;
