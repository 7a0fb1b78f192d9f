/** Devices that come back: from the connection to `queueEmpty`, so many under way at once. Then they go again. */
import { setTimeout as wait } from 'node:timers/promises';
import type { Watched } from '../cpu.ts';
import type { DeviceToken } from '../seed.ts';
import { type Measurement, startMeter, type Timing } from './measurement.ts';
import { RawSocket, SILENT } from './raw-socket.ts';
import { validationOf } from './ready.ts';

export interface ReturnsInput extends Timing {
  url: string;
  /** They take turns, and are gone in between. */
  devices: readonly DeviceToken[];
  /** What each says to have its gate opened. */
  validateInputs: readonly string[];
  watched: Record<string, Watched>;
}

/** Returns under way at once. */
const RETURNS_MAX = 64;
const SETTLE_MS = 1_000;

export async function driveReturns(input: ReturnsInput): Promise<Measurement> {
  const { url, devices, validateInputs } = input;
  const meter = startMeter(input, input.watched);
  let next = 0;
  async function returnInTurn(): Promise<void> {
    while (!meter.isOver()) {
      const index = next++ % devices.length;
      const startMs = performance.now();
      const socket = await RawSocket.open({ url, token: devices[index]!.token });
      const fault = await untilEmpty(socket, validateInputs[index]!);
      if (fault === null) meter.done(startMs);
      else meter.fault(fault);
      socket.close();
    }
  }
  await Promise.all(Array.from({ length: RETURNS_MAX }, returnInTurn));
  await wait(SETTLE_MS);
  return meter.result();
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
