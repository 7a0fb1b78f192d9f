/** Requests for bundles, each of a device that a shuffled deck names. */
import { randomUUID } from 'node:crypto';
import { type DriveInput, drive } from './drive.ts';
import type { Measurement } from './measurement.ts';
import type { RawSocket } from './raw-socket.ts';

export interface ClaimsInput extends DriveInput {
  userIds: readonly string[];
  /** Each user has so many; where they are several, all are asked for at once. */
  devicesEach: number;
  /** So often is each of them asked for; then the run ends. */
  claimsPerUser: number;
}

/** An operation is a bundle. */
export async function driveClaims(sockets: readonly RawSocket[], input: ClaimsInput): Promise<Measurement> {
  const { devicesEach } = input;
  const device = devicesEach === 1 ? ',"deviceId":1' : '';
  const deck = shuffledDeck(input.userIds.length, input.claimsPerUser);
  let dealt = 0;
  return await drive(sockets, input, ({ socket, meter, again }) => {
    const starts = new Map<number, number>();
    return {
      begin(startMs) {
        if (dealt === deck.length) {
          meter.endEarly();
          return;
        }
        const userId = input.userIds[deck[dealt++]!]!;
        const id = socket.request(
          'requestBundle',
          `{"claimId":"${randomUUID()}","userId":"${userId}"${device}}`,
        );
        starts.set(id, startMs);
      },
      onReply(id, text) {
        const startMs = starts.get(id)!;
        starts.delete(id);
        const bundles = text.startsWith('[{"ok":true') ? text.split('"oneTimePreKey":{').length - 1 : 0;
        for (let nth = 0; nth < bundles; nth++) meter.done(startMs);
        if (bundles !== devicesEach) meter.fault(faultOf(text));
        again();
      },
      onEvent() {},
    };
  });
}

/** What a reply was refused with, or what else it was. */
export function faultOf(text: string): string {
  const [, code] = /"code":"([A-Z_]+)"/.exec(text) ?? [];
  return (
    code ?? (text.includes('"oneTimePreKey":null') ? 'bundle without one-time prekey' : text.slice(0, 80))
  );
}

/** Every number below `kinds`, `copies` times, in random order: spread like chance, and never more than there is. */
function shuffledDeck(kinds: number, copies: number): Uint32Array {
  const deck = Uint32Array.from({ length: kinds * copies }, (_, i) => i % kinds);
  for (let i = deck.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [deck[i], deck[j]] = [deck[j]!, deck[i]!];
  }
  return deck;
}
