/** Sending and receiving with books: what every scenario of messages does in the same way. */
import { randomBytes, randomUUID } from 'node:crypto';
import type { LoadDevice } from '../device.ts';
import { Failure } from '../device.ts';
import { type Message, MessageLedger } from '../message-ledger.ts';
import type { Presence } from './presence.ts';
import type { Stage } from './scenario.ts';

export interface Sending {
  /** Resolves when the gateway says that it is stored. @throws Failure */
  stored: Promise<void>;
  /** Resolves at its first arrival. */
  delivered: Promise<void>;
}

export interface Messaging {
  readonly ledger: MessageLedger;
  /** From now on, what this device is handed is entered and acknowledged. */
  receive(device: LoadDevice, onArrival?: (message: Message) => void): void;
  send(message: { sender: LoadDevice; recipient: LoadDevice; startMs: number }): Sending;
  /** Connects every recipient that still awaits something anew and empties its queue. */
  collect(): Promise<void>;
}

/** The client's own number of its kinds of messages; the gateway does not look at it. */
const ENVELOPE_TYPE = 2;

export function createMessaging(stage: Stage, presence: Presence): Messaging {
  const { devices, part } = stage;
  const ledger = new MessageLedger();
  const arrivals = new Map<string, () => void>();
  // Nobody decrypts it, so one text serves all; random, as ciphertext is.
  const content = randomBytes(part.contentBytes).toString('base64');

  return {
    ledger,

    receive(device, onArrival = () => {}) {
      device.listener.onMessages = (envelopes, processed) => {
        for (const envelope of envelopes) {
          if (envelope.kind === 'bounce') {
            ledger.bounced(envelope.messageId);
            continue;
          }
          const message = ledger.arrived({ messageId: envelope.messageId, envelopeId: envelope.id });
          if (message === null) continue;
          onArrival(message);
          arrivals.get(message.messageId)?.();
          arrivals.delete(message.messageId);
        }
        processed();
      };
    },

    send({ sender, recipient, startMs }) {
      const messageId = randomUUID();
      ledger.sent({ messageId, sender: nameOf(sender), recipient: nameOf(recipient), startMs });
      const { userId, deviceId } = recipient.address;
      const envelope = {
        deviceId,
        registrationId: recipient.keys.registrationId,
        type: ENVELOPE_TYPE,
        content,
      };
      const request = {
        messageId,
        userId,
        envelopes: [envelope],
        // Further devices of the user are no part of the test.
        onMismatch: 'sendAnyway' as const,
      };
      const delivered = new Promise<void>((resolve) => arrivals.set(messageId, resolve));
      // The same id each time: however often it is asked, it is to be stored and delivered once.
      const stored = presence
        .untilAnswered(sender, () => sender.ask('sendMessages', request))
        .then(({ accepted, rejected }) => {
          if (!accepted.includes(deviceId)) throw new Failure(rejected[0]?.code ?? 'WRONG_ANSWER');
          ledger.stored(messageId);
        });
      // Nobody waits for what was refused.
      stored.catch(() => arrivals.delete(messageId));
      return { stored, delivered };
    },

    async collect() {
      const awaited = ledger.awaitedRecipients();
      await Promise.all(
        devices
          .filter((device) => awaited.has(nameOf(device)))
          .map(async (device) => {
            device.cut();
            const asOf = ledger.time;
            if (await presence.comeBack(device)) ledger.queueWasEmptied(nameOf(device), asOf);
          }),
      );
    },
  };
}

function nameOf({ address }: LoadDevice): string {
  return `${address.userId}/${address.deviceId}`;
}

/** The devices form a ring: everyone sends to the next, and each order of delivery is tested. */
export function neighbourOf(devices: readonly LoadDevice[], index: number): LoadDevice {
  return devices[(index + 1) % devices.length]!;
}
