/**
 * The registry: every request with its input and its data, every push with its payload and acknowledgement.
 * Dispatch, both doors, the SDK, the inspector and the generated reference derive from it.
 */
import { z } from 'zod';
import { bounceReason, incomingEnvelope, outgoingEnvelopes } from './envelope.ts';
import { deviceLists, errorCode, type errorObject } from './errors.ts';
import { deviceId, keyId, registrationId, time, userId, uuid, version } from './ids.ts';
import {
  deviceBundle,
  ecPublicKey,
  keySet,
  listWithoutRepeats,
  oneTimePreKeys,
  pqOneTimePreKeys,
  pqPreKey,
  signedPreKey,
  verdict,
} from './keys.ts';
import {
  REASON_LENGTH_MAX,
  TOKEN_LENGTH_MAX,
  VALIDATE_PRE_KEYS_MAX,
  WINDOW_ENVELOPES_MAX,
  WITHDRAW_PRE_KEYS_MAX,
} from './limits.ts';
import { shown } from './redact.ts';

const nothing = z.strictObject({});
/** Text that every store can hold: PostgreSQL has no NUL, and UTF-8 no half of a pair. */
const reason = z
  .string()
  .max(REASON_LENGTH_MAX)
  .regex(/^[^\0\p{Surrogate}]*$/u, 'must hold no NUL and no lone surrogate');
const count = z.int().min(0);
/** The caller's last seen `keyVersion`: a late repeat can't undo a newer change. */
const ifKeyVersion = version
  .meta({ description: 'the keyVersion that was seen last: an older one than the server’s changes nothing' })
  .optional();

function idList(lengthMax: number) {
  return listWithoutRepeats(keyId, lengthMax, (id) => id);
}

const poolCounts = { availableCount: count, pqAvailableCount: count, countVersion: version };
const uploadVerdicts = z.object({
  keyVersion: version,
  oneTimePreKeys: verdict,
  pqOneTimePreKeys: verdict,
  ...poolCounts,
});

export const missingKey = z.enum(['identity', 'signedPreKey', 'pqLastResortPreKey', 'rolledBack']);
export type MissingKey = z.infer<typeof missingKey>;

export const requests = {
  uploadKeys: {
    meaning:
      'Stores a key set: the first one, more one-time prekeys or a newer signed prekey of the same identity, or, with replaceIdentity, another identity in place of the old one.',
    input: keySet.extend({ replaceIdentity: z.boolean().optional(), ifKeyVersion }),
    data: uploadVerdicts,
  },
  addPreKeys: {
    meaning: 'Adds one-time prekeys to the pools.',
    input: z.strictObject({
      oneTimePreKeys: oneTimePreKeys.optional(),
      pqOneTimePreKeys: pqOneTimePreKeys.optional(),
    }),
    data: uploadVerdicts,
  },
  withdrawPreKeys: {
    meaning: 'Takes back ids whose private halves are lost: they are never handed out again.',
    input: z.strictObject({
      preKeyIds: idList(WITHDRAW_PRE_KEYS_MAX).optional(),
      pqPreKeyIds: idList(WITHDRAW_PRE_KEYS_MAX).optional(),
    }),
    data: z.object({ withdrawnCount: count, ...poolCounts }),
  },
  rotateSignedPreKey: {
    meaning: 'Makes another signed or last-resort prekey the active one; the one before it stays readable.',
    input: z
      .strictObject({
        signedPreKey: signedPreKey.optional(),
        pqLastResortPreKey: pqPreKey.optional(),
        ifKeyVersion,
      })
      .refine(
        (input) => input.signedPreKey !== undefined || input.pqLastResortPreKey !== undefined,
        'needs at least one of signedPreKey, pqLastResortPreKey',
      ),
    data: z.object({ keyVersion: version, signedPreKeyExpiresAt: time }),
  },
  resetKeys: {
    meaning: 'Deletes all keys of this device; what waits for it goes back to its senders.',
    input: z.strictObject({ reason: reason.optional(), ifKeyVersion }),
    data: z.object({ keyVersion: version }),
  },
  keyStatus: {
    meaning: 'Tells which keys of this device the server has.',
    input: nothing,
    data: z.object({
      identityKey: ecPublicKey.nullable(),
      signedPreKeyId: keyId.nullable(),
      pqLastResortPreKeyId: keyId.nullable(),
      preKeyCount: count,
      pqPreKeyCount: count,
      keyVersion: version,
      countVersion: version,
      signedPreKeyExpiresAt: time.nullable(),
    }),
  },
  keyStats: {
    meaning: 'Counts the one-time prekeys of this device.',
    input: nothing,
    data: z.object({
      totalPreKeys: count,
      availablePreKeys: count,
      consumedPreKeys: count,
      lastUpdated: time.nullable(),
    }),
  },
  checkPreKeys: {
    meaning: 'Tells whether more one-time prekeys are needed.',
    input: nothing,
    data: z.object({ needsMorePreKeys: z.boolean(), threshold: count, ...poolCounts }),
  },
  validateKeys: {
    meaning:
      'Compares what the client holds with what the server has, and names every fault; without one, its validation opens the gate.',
    input: z.strictObject({
      localIdentityKey: ecPublicKey,
      localSignedPreKeyId: keyId,
      localSignedPreKeyPublicKey: ecPublicKey.optional(),
      localRegistrationId: registrationId.optional(),
      localPqLastResortPreKeyId: keyId.optional(),
      localPreKeyIds: idList(VALIDATE_PRE_KEYS_MAX).optional(),
      localPreKeyCount: count.optional(),
      localPqPreKeyIds: idList(VALIDATE_PRE_KEYS_MAX).optional(),
      lastKeyVersion: version.optional(),
      lastCountVersion: version.optional(),
    }),
    data: z.object({
      keysValid: z.boolean(),
      missingKeys: z.array(missingKey),
      preKeyIdsToDelete: z.array(keyId),
      preKeyIdsToUpload: z.array(keyId),
      preKeyIdsNotHeld: z.array(keyId),
      pqPreKeyIdsToDelete: z.array(keyId),
      pqPreKeyIdsToUpload: z.array(keyId),
      pqPreKeyIdsNotHeld: z.array(keyId),
      rotationDue: z.boolean(),
      reason: shown('plain', z.string()).optional(),
      keyVersion: version,
      countVersion: version,
      validation: z.string().optional(),
    }),
  },
  requestBundle: {
    meaning:
      'Claims what a session with a user’s devices is begun with; the same claimId gets the same answer and spends nothing more.',
    input: z.strictObject({ claimId: uuid, userId, deviceId: deviceId.optional() }),
    data: z.object({ userId, devices: z.array(deviceBundle) }),
  },
  listDevices: {
    meaning: 'Lists a user’s devices that have keys.',
    input: z.strictObject({ userId }),
    data: z.object({ devices: z.array(z.object({ deviceId: z.int(), registrationId })) }),
  },
  sendMessages: {
    meaning: 'Stores ciphertext for the devices of a user, durably before it is answered.',
    input: z.strictObject({
      messageId: uuid,
      userId,
      envelopes: outgoingEnvelopes,
      onMismatch: z.enum(['reject', 'sendAnyway']).optional(),
    }),
    data: z.object({
      storedAt: time,
      accepted: z.array(z.int()),
      rejected: z.array(z.object({ deviceId: z.int(), code: errorCode })),
      ...deviceLists.partial().shape,
    }),
  },
  clientReady: {
    meaning: 'Opens the gate: from now on what waits is pushed.',
    input: z.strictObject({ validation: z.string().max(TOKEN_LENGTH_MAX).optional() }),
    data: z.object({ pendingCount: count, keyVersion: version }),
  },
  refreshToken: {
    meaning: 'Goes on under a newer token of the same device.',
    input: z.strictObject({ token: z.string().max(TOKEN_LENGTH_MAX) }),
    data: z.object({ expiresAt: time }),
  },
} as const satisfies Record<string, { meaning: string; input: z.ZodType; data: z.ZodType }>;

export type RequestName = keyof typeof requests;
/** What a client sends. */
export type RequestInput<Name extends RequestName> = z.input<(typeof requests)[Name]['input']>;
/** What a handler gets: parsed, normalised, bounded. */
export type ParsedInput<Name extends RequestName> = z.output<(typeof requests)[Name]['input']>;
export type RequestData<Name extends RequestName> = z.output<(typeof requests)[Name]['data']>;

export const requestNames = Object.keys(requests) as RequestName[];

/** One fault of an input, as the schemas tell it. */
export type InputIssue = z.core.$ZodIssue;

/** Checks what came over the wire against the registry; never throws. */
export function parseRequest<Name extends RequestName>(
  name: Name,
  input: unknown,
): z.ZodSafeParseResult<ParsedInput<Name>> {
  const schema = requests[name].input as unknown as z.ZodType<ParsedInput<Name>>;
  try {
    return schema.safeParse(input);
  } catch {
    // zod compares the `length` of whatever stands in a text's place, and that may be an object that is no number.
    return schema.safeParse(undefined);
  }
}

/** Whether the event may come with the acknowledgement alone: its input holds nothing that must be there. */
export function inputIsOptional(name: RequestName): boolean {
  return requests[name].input === nothing || name === 'resetKeys' || name === 'clientReady';
}

export type Reply<Name extends RequestName> =
  | { ok: true; data: RequestData<Name> }
  | { ok: false; error: z.output<typeof errorObject> };

export const gateClosedReason = z.enum([
  'identityReplaced',
  'keysReset',
  'keysRotated',
  'deviceRevoked',
  'serverRestored',
]);
export type GateClosedReason = z.infer<typeof gateClosedReason>;

export const failedReason = z.enum(['undecryptable', 'temporary']);
export type FailedReason = z.infer<typeof failedReason>;

export const pushes = {
  messages: {
    meaning: 'Envelopes for this device; they are deleted when they are acknowledged as processed.',
    payload: z.object({ envelopes: z.array(incomingEnvelope) }),
    acknowledgement: z.object({
      processed: z.array(shown('uuid', z.string())).max(WINDOW_ENVELOPES_MAX),
      failed: z
        .array(z.object({ id: shown('uuid', z.string()), reason: failedReason }))
        .max(WINDOW_ENVELOPES_MAX)
        .optional(),
    }),
  },
  queueEmpty: {
    meaning: 'Everything that was stored before clientReady has been delivered.',
    payload: z.object({ deliveredCount: count }),
  },
  preKeysLow: {
    meaning: 'A pool of one-time prekeys fell below the threshold, or to zero.',
    payload: z.object({ threshold: count, ...poolCounts }),
  },
  gateClosed: {
    meaning: 'The keys changed: nothing is pushed before the next validation and clientReady.',
    payload: z.object({ reason: gateClosedReason, keyVersion: version }),
  },
  tokenExpiring: {
    meaning: 'The token runs out soon: bring a newer one with refreshToken.',
    payload: z.object({ expiresAt: time }),
  },
  displaced: {
    meaning: 'A newer connection of this device took over; do not reconnect by yourself.',
    payload: z.object({}),
  },
  serverDraining: {
    meaning: 'This node is about to stop: reconnect after retryAfterMs.',
    payload: z.object({ retryAfterMs: count }),
  },
} as const satisfies Record<string, { meaning: string; payload: z.ZodType; acknowledgement?: z.ZodType }>;

export type PushName = keyof typeof pushes;
export type PushPayload<Name extends PushName> = z.output<(typeof pushes)[Name]['payload']>;
export type MessagesAcknowledgement = z.output<(typeof pushes)['messages']['acknowledgement']>;

export type { BounceReason } from './envelope.ts';
export { bounceReason };
