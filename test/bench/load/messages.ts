/** A ring of users with open gates: each device sends to the next user's, in a closed loop when its message was stored and handed out. */
import { randomBytes, randomUUID } from 'node:crypto';
import type { DeviceToken } from '../seed.ts';
import { faultOf } from './claims.ts';
import { type DriveInput, drive } from './drive.ts';
import type { Measurement } from './measurement.ts';
import type { RawSocket } from './raw-socket.ts';

export interface MessagesInput extends DriveInput {
  /** Of each socket's device. */
  registrationIds: readonly number[];
  /** Each user has so many, whose sockets lie side by side. */
  devicesEach: number;
  contentBytes: number;
}

/** A message on its way. */
interface Flight {
  startMs: number;
  /** That it is stored, and that it is delivered to each device. */
  stepsLeft: number;
  again(): void;
}

/** An operation is an envelope that is handed out; its latency is from sending on. */
export async function driveMessages(
  sockets: readonly RawSocket[],
  devices: readonly DeviceToken[],
  input: MessagesInput,
): Promise<Measurement> {
  const flights = new Map<string, Flight>();

  function advance(messageId: string, flight: Flight): void {
    flight.stepsLeft -= 1;
    if (flight.stepsLeft > 0) return;
    flights.delete(messageId);
    flight.again();
  }

  const measurement = await drive(sockets, input, ({ socket, index, meter, again }) => {
    const { devicesEach, registrationIds, contentBytes } = input;
    const to = (Math.floor(index / devicesEach + 1) * devicesEach) % sockets.length;
    const { userId } = devices[to]!;
    const envelopes = registrationIds.slice(to, to + devicesEach).map((registrationId, nth) => {
      // As ciphertext is: what looks through the same bytes over and over has them foreseen by the processor.
      const content = randomBytes(contentBytes).toString('base64');
      return `{"deviceId":${nth + 1},"registrationId":${registrationId},"type":2,"content":"${content}"}`;
    });
    const requests = new Map<number, string>();
    return {
      begin(startMs) {
        const messageId = randomUUID();
        flights.set(messageId, { startMs, stepsLeft: 1 + devicesEach, again });
        const id = socket.request(
          'sendMessages',
          `{"messageId":"${messageId}","userId":"${userId}","envelopes":[${envelopes}]}`,
        );
        requests.set(id, messageId);
      },
      onReply(id, text) {
        const messageId = requests.get(id)!;
        requests.delete(id);
        if (!text.startsWith('[{"ok":true')) meter.fault(faultOf(text));
        advance(messageId, flights.get(messageId)!);
      },
      onEvent(id, text) {
        if (!text.startsWith('["messages"') || id === null) return;
        const [, { envelopes }] = JSON.parse(text) as [
          string,
          { envelopes: { id: string; messageId: string }[] },
        ];
        socket.acknowledge(id, JSON.stringify({ processed: envelopes.map((each) => each.id) }));
        for (const { messageId } of envelopes) {
          const flight = flights.get(messageId);
          if (flight === undefined) {
            meter.fault('a message that nobody waits for');
            continue;
          }
          meter.done(flight.startMs);
          advance(messageId, flight);
        }
      },
    };
  });
  if (flights.size > 0) measurement.faults['messages not stored or not delivered'] = flights.size;
  return measurement;
}
