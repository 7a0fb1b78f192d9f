/** What delivery tells of itself. Whoever composes decides who listens; nobody's answer is waited for. */
import type { BouncedMessage, QueuedEnvelope, Reader } from '../ports/message-store.ts';
import type { GateClosedReason, MessagesAcknowledgement } from '../protocol/events.ts';
import type { DeviceAddress } from '../protocol/ids.ts';
import type { GateState } from './gate.ts';

/** A message and those of its recipient's devices that it is about. */
export interface SentMessage {
  sender: DeviceAddress;
  messageId: string;
  recipientUserId: string;
  deviceIds: readonly number[];
}

/** Every call gets what is at hand, so that a report that nobody hears costs a call. Listeners keep no reference to content. */
export interface DeliveryReports {
  /** It is durable; the recipients' nodes are about to be told. */
  stored(message: SentMessage): void;
  /** The nodes that serve the recipients know of it: it was handed over here, or they were told to look. */
  poked(message: SentMessage): void;
  /** `reason` is why it closed; null for steps forward. */
  gateMoved(reader: Reader, from: GateState, to: GateState, reason: GateClosedReason | null): void;
  pushed(reader: Reader, envelopes: readonly QueuedEnvelope[]): void;
  /** What became of a push is stored: `processed` is deleted, `failed` is offered again or bounced. */
  settled(reader: Reader, acknowledgement: MessagesAcknowledgement): void;
  /** Their copies wait in their senders' queues. */
  bounced(messages: readonly BouncedMessage[]): void;
}

export const noReports: DeliveryReports = {
  stored() {},
  poked() {},
  gateMoved() {},
  pushed() {},
  settled() {},
  bounced() {},
};
