/**
 * What the inspector shows and how it is asked: the live stream's events, the filter that runs on the server, and the
 * admin listener's API. Nothing here can carry key material, ciphertext or a token: payloads come redacted.
 */
import { z } from 'zod';
import { bounceReason } from './envelope.ts';
import { errorCode, errorObject } from './errors.ts';
import { gateClosedReason, type PushName, pushes, type RequestName, requests } from './events.ts';
import { time, uuid } from './ids.ts';
import { redactedValue } from './redact.ts';

const count = z.int().min(0);
/** `alice.1`, as `addressKey` writes it. */
const deviceKey = z.string();
/** The number of a connection, unique over all nodes and restarts; a newer connection has a higher one. */
const socketNumber = z.int();

export const gateName = z.enum(['connected', 'validated', 'open']);
export type GateName = z.infer<typeof gateName>;

// ── Events ──────────────────────────────────────────────────────────────────────────────────────────────

export const direction = z.enum(['in', 'out', 'server']);
/** `in`: a client asked. `out`: the server pushed. `server`: it happened inside. */
export type Direction = z.infer<typeof direction>;

const common = {
  time,
  /** Of the node that saw it. */
  node: z.string(),
  /** Rises by one with each event of a node while anybody watches; gaps were filtered out or dropped. */
  number: count,
  /** Whom it is about; null where nobody has shown who they are. */
  device: deviceKey.nullable(),
  /** Null for what came by HTTP or has no socket. */
  socket: socketNumber.nullable(),
  /** Of the device's socket when it happened; null without one. */
  gate: gateName.nullable(),
};

/** Stages of a message's life, in order; a message may be pushed more than once, and ends acknowledged or bounced. */
export const messageStage = z.enum([
  /** Durable; the sender is about to be told. */
  'stored',
  /** The node that serves the recipient was told to look. */
  'poked',
  /** Handed to the recipient's socket. */
  'pushed',
  /** The recipient processed it; it is deleted. */
  'acknowledged',
  /** The recipient could not take it now; it is offered again. */
  'putOff',
  /** Given up: on its way back to the sender. */
  'bounced',
]);
export type MessageStage = z.infer<typeof messageStage>;

/** One thing that happened. `event` is what a filter names: a request, a push, or the kind itself. */
export const streamEvent = z.discriminatedUnion('kind', [
  /** A request and its acknowledgement, told when it was answered. */
  z.object({
    ...common,
    kind: z.literal('request'),
    event: z.string(),
    direction: z.literal('in'),
    door: z.enum(['socket', 'http']),
    /** Of the frame that brought it; null for HTTP. */
    bytes: count.nullable(),
    latencyMs: z.number(),
    /** Null for success. */
    code: errorCode.nullable(),
    /** Null where the input was not even well-formed, or payloads came faster than they can be redacted. */
    input: redactedValue,
    answer: redactedValue,
  }),
  /** A push; `messages` is told when its acknowledgement came, or was given up. */
  z.object({
    ...common,
    kind: z.literal('push'),
    event: z.string(),
    direction: z.literal('out'),
    bytes: count.nullable(),
    /** Until the acknowledgement; null for pushes without one. */
    latencyMs: z.number().nullable(),
    /** Null for pushes that take no acknowledgement. */
    acknowledged: z.boolean().nullable(),
    input: redactedValue,
    answer: redactedValue,
  }),
  z.object({
    ...common,
    kind: z.literal('gate'),
    event: z.literal('gate'),
    direction: z.literal('server'),
    from: gateName,
    to: gateName,
    keyVersion: z.int().nullable(),
    /** Why it closed; null for steps forward. */
    reason: gateClosedReason.nullable(),
  }),
  /** One device's share of a `requestBundle`: `device` is the target, `peer` the claimer. */
  z.object({
    ...common,
    kind: z.literal('claim'),
    event: z.literal('claim'),
    direction: z.literal('server'),
    peer: deviceKey,
    claimId: z.string(),
    /** Null where the bundle went out without a one-time prekey. */
    keyId: z.int().nullable(),
    absent: z.enum(['noneLeft', 'limited']).nullable(),
    pqKeyId: z.int().nullable(),
    /** The PQ key is the last-resort one. */
    pqFallback: z.boolean(),
  }),
  /** A step in a message's life: `device` is the recipient, `peer` the sender. */
  z.object({
    ...common,
    kind: z.literal('message'),
    event: z.literal('message'),
    direction: z.literal('server'),
    /** Null where it was pushed before anybody looked: then `envelopeId` alone is known. */
    messageId: z.string().nullable(),
    /** Null for `stored`, `poked` and `bounced`. */
    envelopeId: z.string().nullable(),
    peer: deviceKey.nullable(),
    stage: messageStage,
    /** For `putOff` and `bounced`. */
    reason: z.union([bounceReason, z.enum(['undecryptable', 'temporary'])]).nullable(),
  }),
  z.object({
    ...common,
    kind: z.literal('handshakeRefused'),
    event: z.literal('handshakeRefused'),
    direction: z.literal('in'),
    code: errorCode,
    errorId: z.string().nullable(),
  }),
  z.object({
    ...common,
    kind: z.literal('socketOpened'),
    event: z.literal('socketOpened'),
    direction: z.literal('in'),
  }),
  z.object({
    ...common,
    kind: z.literal('socketClosed'),
    event: z.literal('socketClosed'),
    direction: z.literal('server'),
    reason: z.string(),
  }),
]);
export type StreamEvent = z.infer<typeof streamEvent>;
export type StreamEventKind = StreamEvent['kind'];

/** Everything that a filter's `event` may name. */
export const streamEventNames: readonly string[] = [
  ...(Object.keys(requests) as RequestName[]),
  ...(Object.keys(pushes) as PushName[]),
  'gate',
  'claim',
  'message',
  'handshakeRefused',
  'socketOpened',
  'socketClosed',
];

// ── The stream ──────────────────────────────────────────────────────────────────────────────────────────

export const nodeState = z.object({
  node: z.string(),
  /** False for a node whose last sign of life is older than its lease: what it sees is missing here. */
  answering: z.boolean(),
});
export type NodeState = z.infer<typeof nodeState>;

/** `GET /api/stream`, server-sent events: the `data` of each is one frame as JSON. */
export const streamFrame = z.discriminatedUnion('type', [
  /** The first frame of every connection: what came before it, and since an earlier connection ended, is not shown. */
  z.object({ type: z.literal('hello'), node: z.string(), time }),
  z.object({
    type: z.literal('events'),
    events: z.array(streamEvent),
    /** Events that matched and were left out since the frame before, on any node: the viewer, or its line, is too slow. */
    dropped: count,
  }),
  /** At least every two seconds, so that a dead connection is noticed. */
  z.object({ type: z.literal('beat'), time, nodes: z.array(nodeState), droppedTotal: count }),
]);
export type StreamFrame = z.infer<typeof streamFrame>;

// ── The filter ──────────────────────────────────────────────────────────────────────────────────────────

const LIST_LENGTH_MAX = 32;

/** All parts must hold; a part that is absent always holds. */
export const streamFilter = z.strictObject({
  /** Devices (`alice.1`) or users (`alice`, every device of hers); also matches the other party of a claim or message. */
  device: z.array(z.string().min(1).max(140)).max(LIST_LENGTH_MAX).optional(),
  /** Names of {@link streamEventNames}. */
  event: z
    .array(
      z.string().refine((name) => streamEventNames.includes(name), 'is no request, push or kind of event'),
    )
    .max(LIST_LENGTH_MAX)
    .optional(),
  direction: z.array(direction).max(LIST_LENGTH_MAX).optional(),
  /** Error codes, or `ok`: what was answered, or refused at the handshake. */
  code: z
    .array(z.enum([...errorCode.options, 'ok'], `must be ok or one of ${errorCode.options.join(', ')}`))
    .max(LIST_LENGTH_MAX)
    .optional(),
  /** Only what took longer than so many milliseconds. */
  slowerThanMs: z.number().min(0).max(3_600_000).optional(),
  /** The gate's state when it happened. */
  gate: z.array(gateName).max(LIST_LENGTH_MAX).optional(),
  /** One message's life: the requests and pushes around it are not matched. */
  messageId: uuid.optional(),
});
export type StreamFilter = z.infer<typeof streamFilter>;

/** Whether a viewer with `filter` is shown `event`. */
export function matchesFilter(filter: StreamFilter, event: StreamEvent): boolean {
  if (filter.event !== undefined && !filter.event.includes(event.event)) return false;
  if (filter.direction !== undefined && !filter.direction.includes(event.direction)) return false;
  if (filter.gate !== undefined && (event.gate === null || !filter.gate.includes(event.gate))) return false;
  if (filter.device !== undefined) {
    const peer = 'peer' in event ? event.peer : null;
    if (!filter.device.some((name) => isOfDevice(name, event.device) || isOfDevice(name, peer))) return false;
  }
  if (filter.code !== undefined) {
    if (!('code' in event) || !filter.code.includes(event.code ?? 'ok')) return false;
  }
  if (filter.slowerThanMs !== undefined) {
    const latencyMs = 'latencyMs' in event ? event.latencyMs : null;
    if (latencyMs === null || latencyMs <= filter.slowerThanMs) return false;
  }
  if (filter.messageId !== undefined) {
    return event.kind === 'message' && event.messageId === filter.messageId;
  }
  return true;
}

/** Whether `key` (`alice.1`) is the device, or a device of the user, that `name` names. */
export function isOfDevice(name: string, key: string | null): boolean {
  return key !== null && (key === name || key.slice(0, key.lastIndexOf('.')) === name);
}

/** The filter as a page's or a stream's address holds it: `device=alice.1&event=requestBundle,gate&slowerThanMs=100`. */
export function filterToQuery(filter: StreamFilter): string {
  const query = new URLSearchParams();
  for (const name of FILTER_FIELDS) {
    const value = filter[name];
    if (value === undefined || (Array.isArray(value) && value.length === 0)) continue;
    query.set(name, Array.isArray(value) ? value.join(',') : String(value));
  }
  // Commas, colons and the like stand in a query as they are; it is meant to be read.
  return query.toString().replaceAll('%2C', ',').replaceAll('%3A', ':').replaceAll('%40', '@');
}

/**
 * The inverse of {@link filterToQuery}. Fields that are not a filter's are passed over.
 *
 * @returns the filter, or for a bad value one sentence that names its field
 */
export function filterFromQuery(
  query: string | URLSearchParams,
): { ok: true; filter: StreamFilter } | { ok: false; message: string } {
  const given = new URLSearchParams(query);
  const raw: Record<string, unknown> = {};
  for (const name of FILTER_FIELDS) {
    const values = given
      .getAll(name)
      .flatMap((text) => text.split(','))
      .map((text) => text.trim())
      .filter((text) => text !== '');
    if (values.length === 0) continue;
    if (name === 'slowerThanMs') raw[name] = Number(values[0]);
    else if (name === 'messageId') raw[name] = values[0];
    else raw[name] = values;
  }
  const parsed = streamFilter.safeParse(raw);
  if (parsed.success) return { ok: true, filter: parsed.data };
  const [issue] = parsed.error.issues;
  return { ok: false, message: `${String(issue?.path[0])}: ${issue?.message}` };
}

const FILTER_FIELDS = Object.keys(streamFilter.shape) as (keyof StreamFilter)[];

// ── Sockets ─────────────────────────────────────────────────────────────────────────────────────────────

export const gateStep = z.object({
  time,
  to: gateName,
  keyVersion: z.int().nullable(),
  reason: gateClosedReason.nullable(),
});
export type GateStepSeen = z.infer<typeof gateStep>;

/** One served socket, as its node sees it. */
export const socketFacts = z.object({
  node: z.string(),
  socket: socketNumber,
  device: deviceKey,
  openedAt: time,
  gate: gateName,
  /** What the gate stands on; null while nothing is proven. */
  keyVersion: z.int().nullable(),
  /** The latest steps, oldest first; at most {@link GATE_HISTORY_MAX}. */
  gateHistory: z.array(gateStep),
  /** Pushed and not yet acknowledged. */
  windowCount: count,
  windowBytes: count,
  /** Nothing more is pushed until an acknowledgement makes room. */
  windowFull: z.boolean(),
  /** When the oldest push without an acknowledgement left; null where there is none. */
  oldestPushAt: time.nullable(),
  /** Of the latest ping; null before the first. */
  roundTripMs: z.number().nullable(),
  /** Written and not yet taken by the network. */
  bufferedBytes: count,
  tokenExpiresAt: time,
  /** The token ran out: nothing is handed out until a new one comes. */
  paused: z.boolean(),
});
export type SocketFacts = z.infer<typeof socketFacts>;
export const GATE_HISTORY_MAX = 16;

/** Sockets in one answer. */
export const SOCKETS_MAX = 500;

// ── Devices ─────────────────────────────────────────────────────────────────────────────────────────────

/** A device's key set: ids, counts, versions and times; never a key. */
export const keySetFacts = z.object({
  registrationId: z.int(),
  signedPreKeyId: z.int().nullable(),
  signedPreKeyExpiresAt: time.nullable(),
  pqLastResortPreKeyId: z.int().nullable(),
  availableCount: count,
  pqAvailableCount: count,
  /** Handed out under the present identity. */
  claimedCount: count,
  pqClaimedCount: count,
  /** Below it, a pool is low. */
  lowThreshold: count,
  updatedAt: time.nullable(),
});
export type KeySetFacts = z.infer<typeof keySetFacts>;

export const claimFacts = z.object({
  claimer: deviceKey,
  claimId: z.string(),
  claimedAt: time,
  signedPreKeyId: z.int(),
  /** Null where none was left. */
  keyId: z.int().nullable(),
  /** Null where it went out with the last-resort key, or with none. */
  pqKeyId: z.int().nullable(),
  pqFallback: z.boolean(),
});
export type ClaimFacts = z.infer<typeof claimFacts>;

/** An envelope that waits in a device's queue; its content is a number of bytes. */
export const pendingFacts = z.object({
  envelopeId: z.string(),
  messageId: z.string(),
  kind: z.enum(['message', 'bounce']),
  /** The sender of a message; the recipient that a bounce tells of. */
  peer: deviceKey,
  bytes: count,
  storedAt: time,
  expiresAt: time,
  /** Set after it failed: not offered before then. */
  dueAt: time.nullable(),
  undecryptableCount: count,
  temporaryCount: count,
  /** Set while it is on its way back to its sender. */
  bounceReason: bounceReason.nullable(),
});
export type PendingFacts = z.infer<typeof pendingFacts>;

// ── Diagnosis ───────────────────────────────────────────────────────────────────────────────────────────

const told = {
  /** What is the matter, in a sentence or two. */
  text: z.string(),
  /** What to do next. */
  nextStep: z.string(),
};

/** Why a device does not get its messages, from facts. */
export const diagnosis = z.discriminatedUnion('kind', [
  z.object({ ...told, kind: z.literal('neverUploaded') }),
  z.object({ ...told, kind: z.literal('keysReset'), keyVersion: z.int() }),
  z.object({ ...told, kind: z.literal('noSocket'), pendingCount: count }),
  /** A socket without any validation. */
  z.object({ ...told, kind: z.literal('neverValidated'), socket: socketNumber }),
  z.object({
    ...told,
    kind: z.literal('validatedOlderKeySet'),
    socket: socketNumber,
    validatedVersion: z.int(),
    keyVersion: z.int(),
  }),
  /** Validated the current key set, and never said `clientReady` since. */
  z.object({ ...told, kind: z.literal('notReady'), socket: socketNumber, keyVersion: z.int() }),
  z.object({ ...told, kind: z.literal('tokenExpired'), socket: socketNumber, expiredAt: time }),
  z.object({
    ...told,
    kind: z.literal('windowFull'),
    socket: socketNumber,
    windowCount: count,
    oldestPushAt: time.nullable(),
  }),
  /** The network does not take what was written. */
  z.object({ ...told, kind: z.literal('slow'), socket: socketNumber, bufferedBytes: count }),
  /** Pushed; the acknowledgement is still to come. */
  z.object({ ...told, kind: z.literal('notAcknowledged'), socket: socketNumber, oldestPushAt: time }),
  /** The client said that it failed; it is offered again. */
  z.object({
    ...told,
    kind: z.literal('putOff'),
    messageId: z.string(),
    dueAt: time,
    undecryptableCount: count,
    temporaryCount: count,
  }),
  /** Another node leads the device's socket; `answering` is false where its facts are missing. */
  z.object({ ...told, kind: z.literal('otherNode'), node: z.string(), answering: z.boolean() }),
  /** `reason` is null once the sender has taken the bounce. */
  z.object({
    ...told,
    kind: z.literal('bounced'),
    messageId: z.string(),
    reason: bounceReason.nullable(),
  }),
  z.object({ ...told, kind: z.literal('delivered'), messageId: z.string() }),
  /** No node has heard of such a message for this device, or it is long finished. */
  z.object({ ...told, kind: z.literal('neverStored'), messageId: z.string() }),
  /** The gate is open and nothing holds it up. */
  z.object({ ...told, kind: z.literal('onItsWay'), pendingCount: count }),
  z.object({ ...told, kind: z.literal('nothingPending') }),
]);
export type Diagnosis = z.infer<typeof diagnosis>;
export type DiagnosisKind = Diagnosis['kind'];

// ── Requests of the admin listener ──────────────────────────────────────────────────────────────────────

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

/** One second of the whole installation. */
export const overviewSample = z.object({
  time,
  nodes: z.array(nodeState),
  sockets: count,
  gates: z.object({ connected: count, validated: count, open: count }),
  /** In the last second. */
  eventsPerSecond: z.number(),
  requests: z.array(
    z.object({
      event: z.string(),
      count,
      errorCount: count,
      p50Ms: z.number(),
      p99Ms: z.number(),
    }),
  ),
  /** Handed out in the last second; `fallback` went out without a one-time prekey. */
  preKeys: z.object({ ec: count, pq: count, fallback: count }),
  messages: z.object({ stored: count, pushed: count, acknowledged: count, bounced: count }),
  /** Devices with a pool below the threshold, lowest first, at most 20; null where the store did not say in time. */
  lowDevices: z
    .array(z.object({ device: deviceKey, availableCount: count, pqAvailableCount: count }))
    .nullable(),
  /** Events that the viewers of the asked node were not sent, since it started. */
  droppedTotal: count,
});
export type OverviewSample = z.infer<typeof overviewSample>;
