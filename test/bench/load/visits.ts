/** Devices that connect, do something and go, so many under way at once. */
import { setTimeout as wait } from 'node:timers/promises';
import type { Watched } from '../cpu.ts';
import type { DeviceToken } from '../seed.ts';
import { type Measurement, startMeter, type Timing } from './measurement.ts';
import { RawSocket } from './raw-socket.ts';

export interface VisitsInput extends Timing {
  url: string;
  /** They take turns, and are gone in between. */
  devices: readonly DeviceToken[];
  watched: Record<string, Watched>;
}

const VISITS_MAX = 64;
const SETTLE_MS = 1_000;

/**
 * @param visit of the device with this index; what went wrong, or null. It counts from before the connection on.
 * @param visitsMax then the run ends
 */
export async function driveVisits(
  input: VisitsInput,
  visit: (socket: RawSocket, index: number) => Promise<string | null>,
  { visitsMax = Number.POSITIVE_INFINITY } = {},
): Promise<Measurement> {
  const { url, devices, watched } = input;
  const meter = startMeter(input, watched);
  let next = 0;
  async function visitInTurn(): Promise<void> {
    while (!meter.isOver() && next < visitsMax) {
      const index = next++ % devices.length;
      const startMs = performance.now();
      const socket = await RawSocket.open({ url, token: devices[index]!.token });
      const fault = await visit(socket, index);
      if (fault === null) meter.done(startMs);
      else meter.fault(fault);
      socket.close();
    }
    if (!meter.isOver()) meter.endEarly();
  }
  await Promise.all(Array.from({ length: VISITS_MAX }, visitInTurn));
  await wait(SETTLE_MS);
  return meter.result();
}
