/** The live stream’s events: payloads come redacted, and nothing of a key, a ciphertext or a token is in any. */
import { z } from 'zod';
import { bounceReason } from '../envelope.ts';
import { errorCode } from '../errors.ts';
import { gateClosedReason, type PushName, pushes, type RequestName, requests } from '../events.ts';
import { time } from '../ids.ts';
import { redactedValue } from '../redact.ts';
import { count, deviceKey, gateName, socketNumber } from './values.ts';

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
