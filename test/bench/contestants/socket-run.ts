/** A run of the load process against a server: what all contestants with sockets share. */
import type { Child } from '../calls.ts';
import type { Contestant, OwnRun } from '../contest.ts';
import type { Measurement, Timing } from '../load/measurement.ts';
import type { Stage } from '../stage.ts';

export async function socketRun(
  stage: Stage,
  server: Child,
  call: string,
  input: Timing & Record<string, unknown>,
): Promise<{ run: OwnRun; measurement: Measurement }> {
  const watching = setTimeout(() => void server.call('startLoopWatch').catch(() => {}), input.warmUpMs);
  let loopShare = 0;
  const looking = setTimeout(
    () =>
      void server.call<number>('loopUtilization').then(
        (share) => {
          loopShare = share;
        },
        () => {},
      ),
    input.warmUpMs + input.measureMs * 0.9,
  );
  const measurement = await stage.load.call<Measurement>(call, { ...input, watched: stage.watched(server) });
  clearTimeout(watching);
  clearTimeout(looking);
  return { run: toRun(measurement, loopShare), measurement };
}

export async function socketProfile(
  server: Child,
  contestant: Pick<Contestant, 'reset' | 'run'>,
  timing: Timing,
  file: string,
): Promise<void> {
  await contestant.reset();
  const starting = setTimeout(() => void server.call('startProfile'), timing.warmUpMs);
  await contestant.run(timing);
  clearTimeout(starting);
  await server.call('stopProfile', { file });
}

function toRun(measurement: Measurement, loopShare: number): OwnRun {
  const { operations, elapsedMs, cpuMs, latencyMs, faults, endedEarly } = measurement;
  return {
    perSecond: (operations / elapsedMs) * 1000,
    latencyMs,
    cpuPerOperationUs: Object.fromEntries(
      Object.entries(cpuMs).map(([name, ms]) => [name, (ms * 1000) / Math.max(1, operations)]),
    ),
    loadShare: cpuMs.load! / elapsedMs,
    loopShare,
    remarks: [
      ...Object.entries(faults).map(([what, count]) => `${what}: ${count}`),
      ...(endedEarly ? [`everything was claimed after ${(elapsedMs / 1000).toFixed(1)} s`] : []),
    ],
  };
}
