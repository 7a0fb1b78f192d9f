/** Ciphertext on its way: what a sender hands in, and what a recipient or a sender is handed. */
import { z } from 'zod';
import { decodedLength, isStrictBase64 } from './base64.ts';
import { deviceAddress, deviceId, registrationId, time, uuid } from './ids.ts';
import { listWithoutRepeats } from './keys.ts';
import {
  CONTENT_BYTES_MAX,
  ENVELOPE_TYPE_MAX,
  REQUEST_CONTENT_BYTES_MAX,
  USER_DEVICES_MAX,
} from './limits.ts';
import { shown } from './redact.ts';

/** The length of base64 that no permitted ciphertext exceeds: longer text is refused unread. */
const CONTENT_LENGTH_MAX = Math.ceil(CONTENT_BYTES_MAX / 3) * 4;

/** Marks a fault of size, which is answered with PAYLOAD_TOO_LARGE instead of BAD_REQUEST. */
export const TOO_LARGE = { tooLarge: true } as const;

export const content = shown('digest', z.string())
  .superRefine((text, context) => {
    if (text.length > CONTENT_LENGTH_MAX) {
      context.addIssue({
        code: 'custom',
        message: `must be at most ${CONTENT_BYTES_MAX} bytes`,
        params: TOO_LARGE,
      });
    } else if (text.length === 0 || !isStrictBase64(text)) {
      context.addIssue({ code: 'custom', message: 'must be base64 of at least one byte' });
    }
  })
  .meta({
    id: 'Content',
    description: `ciphertext: base64 of at most ${CONTENT_BYTES_MAX} bytes`,
    contentEncoding: 'base64',
    minLength: 4,
    maxLength: CONTENT_LENGTH_MAX,
  });

/** The client's own numbering of message kinds; opaque to the server. */
export const envelopeType = z
  .int()
  .min(0)
  .max(ENVELOPE_TYPE_MAX)
  .meta({ id: 'EnvelopeType', description: 'the client’s own numbering of message kinds' });

export const outgoingEnvelope = z
  .strictObject({ deviceId, registrationId, type: envelopeType, content })
  .meta({ id: 'OutgoingEnvelope' });

export const outgoingEnvelopes = listWithoutRepeats(
  outgoingEnvelope,
  USER_DEVICES_MAX,
  (envelope) => envelope.deviceId,
  'deviceId',
)
  .min(1)
  .superRefine((envelopes, context) => {
    const bytes = envelopes.reduce((sum, envelope) => sum + decodedLength(envelope.content), 0);
    if (bytes > REQUEST_CONTENT_BYTES_MAX) {
      context.addIssue({
        code: 'custom',
        message: `must hold at most ${REQUEST_CONTENT_BYTES_MAX} bytes in all`,
        params: TOO_LARGE,
      });
    }
  });

/** Why a message came back; it can never be delivered under its `messageId`. */
export const bounceReason = z
  .enum(['RECIPIENT_IDENTITY_CHANGED', 'RECIPIENT_KEYS_RESET', 'DEVICE_REVOKED', 'UNDECRYPTABLE', 'EXPIRED'])
  .meta({ id: 'BounceReason' });
export type BounceReason = z.infer<typeof bounceReason>;

/** What a recipient's device is pushed. `id` stays the same over redeliveries. */
export const incomingEnvelope = z
  .discriminatedUnion('kind', [
    z.object({
      id: shown('uuid', z.string()),
      kind: z.literal('message'),
      messageId: uuid,
      sender: deviceAddress,
      type: envelopeType,
      content: shown('digest', z.string()),
      storedAt: time,
    }),
    z.object({
      id: shown('uuid', z.string()),
      kind: z.literal('bounce'),
      messageId: uuid,
      recipient: deviceAddress,
      reason: bounceReason,
      storedAt: time,
    }),
  ])
  .meta({ id: 'IncomingEnvelope', description: 'id stays the same over redeliveries' });
export type IncomingEnvelope = z.infer<typeof incomingEnvelope>;

/**
 * JSON of envelopes, as `JSON.stringify` has it: ids, user ids, times and base64 hold nothing that is to be escaped, and
 * ciphertext is long to look through.
 */
export function envelopesJson(envelopes: readonly IncomingEnvelope[]): string {
  return `[${envelopes.map(envelopeJson).join(',')}]`;
}

function envelopeJson(envelope: IncomingEnvelope): string {
  if (envelope.kind === 'bounce') return JSON.stringify(envelope);
  const { id, messageId, sender, type, content: text, storedAt } = envelope;
  return (
    `{"id":"${id}","kind":"message","messageId":"${messageId}",` +
    `"sender":{"userId":"${sender.userId}","deviceId":${sender.deviceId}},` +
    `"type":${type},"content":"${text}","storedAt":"${storedAt}"}`
  );
}
