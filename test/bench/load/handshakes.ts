/** Connections, so many under way at once, each kept until the end: what is measured is their beginning. */
import { setTimeout as wait } from 'node:timers/promises';
import type { Watched } from '../cpu.ts';
import type { DeviceToken } from '../seed.ts';
import { type Measurement, startMeter, type Timing } from './measurement.ts';
import { RawSocket } from './raw-socket.ts';

export interface HandshakesInput extends Timing {
  url: string;
  /** One connection each; then the run ends. */
  devices: readonly DeviceToken[];
  watched: Record<string, Watched>;
}

const SETTLE_MS = 2_000;
/** Handshakes under way at once. */
const HANDSHAKES_MAX = 64;

/**
 * Connects all of them.
 *
 * @param options.goesOn asked before each handshake
 * @param options.done told of each, with its beginning
 * @returns in the order of the devices
 */
export async function connectAll(
  devices: readonly DeviceToken[],
  urlOf: (index: number) => string,
  { goesOn = () => true, done = () => {} }: { goesOn?(): boolean; done?(startMs: number): void } = {},
): Promise<RawSocket[]> {
  const sockets: RawSocket[] = [];
  let next = 0;
  await Promise.all(
    Array.from({ length: HANDSHAKES_MAX }, async () => {
      for (let index = next++; index < devices.length && goesOn(); index = next++) {
        const startMs = performance.now();
        sockets[index] = await RawSocket.open({ url: urlOf(index), token: devices[index]!.token });
        done(startMs);
      }
    }),
  );
  return sockets;
}

export async function driveHandshakes(input: HandshakesInput): Promise<Measurement> {
  const meter = startMeter(input, input.watched);
  const sockets = await connectAll(input.devices, () => input.url, {
    goesOn: () => !meter.isOver(),
    done: meter.done,
  });
  if (!meter.isOver()) meter.endEarly();
  for (const socket of sockets) socket.close();
  // The server has that many ends to attend to, which are not the next contestant's.
  await wait(SETTLE_MS);
  return meter.result();
}
