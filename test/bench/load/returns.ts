/** Devices that come back: from the connection to `queueEmpty`. Then they go again. */
import type { Measurement } from './measurement.ts';
import { type RawSocket, SILENT } from './raw-socket.ts';
import { validationOf } from './ready.ts';
import { driveVisits, type VisitsInput } from './visits.ts';

export interface ReturnsInput extends VisitsInput {
  /** What each says to have its gate opened. */
  validateInputs: readonly string[];
}

export async function driveReturns(input: ReturnsInput): Promise<Measurement> {
  return await driveVisits(input, (socket, index) => untilEmpty(socket, input.validateInputs[index]!));
}

/** @returns what came instead of an empty queue; null where it came */
async function untilEmpty(socket: RawSocket, validateInput: string): Promise<string | null> {
  const validation = await validationOf(socket, validateInput);
  return await new Promise((resolve) => {
    socket.listener = {
      ...SILENT,
      onReply(_, text) {
        if (!text.startsWith('[{"ok":true')) resolve(`clientReady: ${text.slice(0, 80)}`);
      },
      onEvent(_, text) {
        if (text.startsWith('["queueEmpty"')) resolve(null);
      },
      onClose: () => resolve('a socket was closed'),
    };
    socket.request('clientReady', JSON.stringify({ validation }));
  });
}
