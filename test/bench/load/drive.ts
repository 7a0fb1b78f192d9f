/** Drives sockets through one run: in a closed loop, each as fast as it is answered, or in an open one at a given rate. */
import { setTimeout as wait } from 'node:timers/promises';
import { systemClock } from '../../../src/lib/clock.ts';
import { pace } from '../../../src/load-test/pacer.ts';
import type { Watched } from '../cpu.ts';
import { type Measurement, type Meter, startMeter, type Timing } from './measurement.ts';
import { type RawSocket, SILENT } from './raw-socket.ts';

export interface DriveInput extends Timing {
  /** The sockets that `open` opened under this name. */
  name: string;
  /** Null is a closed loop. */
  ratePerSecond: number | null;
  watched: Record<string, Watched>;
}

/** What one socket does. */
export interface Player {
  /** Starts an operation, whose latency counts from `startMs`. */
  begin(startMs: number): void;
  onReply(id: number, text: string): void;
  onEvent(id: number | null, text: string): void;
}

export interface Part {
  socket: RawSocket;
  index: number;
  meter: Meter;
  /** An operation has come to its end, good or bad: in a closed loop the next one begins. */
  again(): void;
}

/** What is under way when the time is over may still come in. */
const SETTLE_MS = 1_000;

export async function drive(
  sockets: readonly RawSocket[],
  input: DriveInput,
  playerOf: (part: Part) => Player,
): Promise<Measurement> {
  const { ratePerSecond } = input;
  const meter = startMeter(input, input.watched);
  const players = sockets.map((socket, index) => {
    const again = (): void => {
      if (ratePerSecond === null && !meter.isOver()) player.begin(performance.now());
    };
    const player = playerOf({ socket, index, meter, again });
    socket.listener = {
      onReply: player.onReply,
      onEvent: player.onEvent,
      onClose: () => meter.fault('a socket was closed'),
    };
    return player;
  });
  if (ratePerSecond === null) for (const player of players) player.begin(performance.now());
  else await keepPace(players, meter, input, ratePerSecond);
  await meter.over;
  await wait(SETTLE_MS);
  for (const socket of sockets) socket.listener = SILENT;
  return meter.result();
}

async function keepPace(
  players: readonly Player[],
  meter: Meter,
  { warmUpMs, measureMs }: Timing,
  ratePerSecond: number,
): Promise<void> {
  const over = new AbortController();
  void meter.over.then(() => over.abort());
  await pace({
    clock: { nowMs: () => performance.now(), after: systemClock.after },
    startMs: performance.now(),
    schedule: {
      count: Math.floor(((warmUpMs + measureMs) / 1000) * ratePerSecond),
      offsetMs: (index) => (index / ratePerSecond) * 1000,
    },
    signal: over.signal,
    depart: ({ index, startMs }) => players[index % players.length]!.begin(startMs),
  });
}
