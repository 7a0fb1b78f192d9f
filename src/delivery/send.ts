/** Sending: durable for every device of the recipient, or refused for a reason that the sender can mend. */
import type { Clock } from '../lib/clock.ts';
import type { Bus } from '../ports/bus.ts';
import type { MessageStore, QueuedEnvelope, StoreResult } from '../ports/message-store.ts';
import { decodedLength } from '../protocol/base64.ts';
import { GatewayError } from '../protocol/errors.ts';
import type { ParsedInput, RequestData } from '../protocol/events.ts';
import type { DeviceAddress } from '../protocol/ids.ts';
import type { Courier, HandOver } from './courier.ts';
import type { DeliveryReports } from './reports.ts';

export interface SendParts {
  messages: MessageStore;
  courier: Pick<Courier, 'handOverTo'>;
  bus: Bus;
  clock: Clock;
  messageLifetimeMs: number;
  /** Messages that one device may have waiting. */
  queueMax: number;
  reports: DeliveryReports;
  /** Is told of the ciphertext that a send has stored, repeated ones not. */
  onStored(recipientUserId: string, bytes: number): void;
}

/** A full queue empties when its owner comes back; asking every second helps nobody. */
const QUEUE_FULL_RETRY_MS = 60_000;

/**
 * Stores one envelope per device of the recipient; on disk when it resolves. The caller has shown that the sender
 * itself has keys.
 *
 * @throws GatewayError USER_NOT_FOUND, DEVICES_MISMATCHED, QUEUE_FULL, UNAVAILABLE; nothing was stored then
 */
export async function sendMessages(
  parts: SendParts,
  sender: DeviceAddress,
  input: ParsedInput<'sendMessages'>,
): Promise<RequestData<'sendMessages'>> {
  const { messages, courier, clock } = parts;
  const nowMs = clock.nowMs();
  const handOvers = input.envelopes.map(({ deviceId }) =>
    courier.handOverTo({ userId: input.userId, deviceId }),
  );
  const result = await messages.store({
    sender,
    messageId: input.messageId,
    recipientUserId: input.userId,
    messages: input.envelopes,
    sendAnyway: input.onMismatch === 'sendAnyway',
    nowMs,
    expiresAtMs: nowMs + parts.messageLifetimeMs,
    queueMax: parts.queueMax,
  });
  return passOn(parts, { sender, input, handOvers, result });
}

/** Hands over what was stored, or has it looked at. A function of its own, so that a send that waits holds little. */
function passOn(
  { bus, reports, onStored }: SendParts,
  sending: {
    sender: DeviceAddress;
    input: ParsedInput<'sendMessages'>;
    /** For each envelope. */
    handOvers: readonly (HandOver | null)[];
    result: StoreResult | null;
  },
): RequestData<'sendMessages'> {
  const { sender, input, handOvers, result } = sending;
  if (result === null) throw new GatewayError('USER_NOT_FOUND');
  const { missingDevices, extraDevices, staleDevices, accepted, full } = result;
  const lists = { missingDevices, extraDevices, staleDevices };
  if (!result.stored) throw new GatewayError('DEVICES_MISMATCHED', undefined, { details: lists });
  if (full.length === input.envelopes.length) {
    throw new GatewayError('QUEUE_FULL', undefined, { retryAfterMs: QUEUE_FULL_RETRY_MS });
  }
  const sent = { sender, messageId: input.messageId, recipientUserId: input.userId, deviceIds: accepted };
  reports.stored(sent);
  const handedOver = new Set<number>();
  let bytes = 0;
  for (const stored of result.fresh) {
    const nth = input.envelopes.findIndex(({ deviceId }) => deviceId === stored.deviceId);
    const { type, content } = input.envelopes[nth]!;
    bytes += decodedLength(content);
    const envelope: QueuedEnvelope = {
      sequence: stored.sequence,
      id: stored.id,
      messageId: input.messageId,
      storedAtMs: result.storedAtMs,
      body: { kind: 'message', sender, type, content },
    };
    if (handOvers[nth]?.(envelope, stored)) handedOver.add(stored.deviceId);
  }
  if (bytes > 0) onStored(input.userId, bytes);
  bus.poke(
    accepted.flatMap((deviceId) => (handedOver.has(deviceId) ? [] : [{ userId: input.userId, deviceId }])),
  );
  reports.poked(sent);
  return {
    storedAt: new Date(result.storedAtMs).toISOString(),
    accepted,
    rejected: full.map((deviceId) => ({ deviceId, code: 'QUEUE_FULL' as const })),
    ...(input.onMismatch === 'sendAnyway' ? lists : {}),
  };
}
