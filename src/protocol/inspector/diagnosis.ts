/** Why a device does not get its messages. */
import { z } from 'zod';
import { bounceReason } from '../envelope.ts';
import { time } from '../ids.ts';
import { count, socketNumber } from './values.ts';

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
