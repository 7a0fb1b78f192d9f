/** A run of the load process against a server: what all contestants with sockets share. */
import type { Child } from '../calls.ts';
import type { Contestant, OwnRun } from '../contest.ts';
import type { DriveInput } from '../load/drive.ts';
import type { Measurement, Timing } from '../load/measurement.ts';
import type { Stage } from '../stage.ts';

/** Of the offered rate, what must have been achieved. */
const ACHIEVED_SHARE_MIN = 0.98;

/** @param servers one or two; the first is `server` in the report, the second `peer` */
export async function socketRun(
  stage: Stage,
  servers: readonly Child[],
  call: 'claims' | 'messages' | 'backlog' | 'handshakes' | 'returns' | 'refills' | 'enrolments',
  input: Timing & Partial<DriveInput> & Record<string, unknown>,
): Promise<{ run: OwnRun; measurement: Measurement }> {
  const loopShares: number[] = [];
  const watchLoops = (): void => {
    for (const server of servers) void server.call('startLoopWatch').catch(() => {});
  };
  const lookAtLoops = (): void => {
    for (const server of servers) {
      void server.call<number>('loopUtilization').then(
        (share) => {
          loopShares.push(share);
        },
        () => {},
      );
    }
  };
  const timers = [
    setTimeout(watchLoops, input.warmUpMs),
    setTimeout(lookAtLoops, input.warmUpMs + input.measureMs * 0.9),
  ];
  const measurement = await stage.load.call<Measurement>(call, { ...input, watched: stage.watched(servers) });
  for (const timer of timers) clearTimeout(timer);
  const run = toRun(measurement, loopShares.length === 0 ? null : Math.max(...loopShares));
  const { ratePerSecond = null } = input;
  if (ratePerSecond !== null && run.perSecond < ratePerSecond * ACHIEVED_SHARE_MIN) {
    run.remarks.push(`${run.perSecond.toFixed(0)} a second of the ${ratePerSecond} that were offered`);
  }
  return { run, measurement };
}

/** A processor profile of the first server over one run. */
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

function toRun(measurement: Measurement, loopShare: number | null): OwnRun {
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
      ...(endedEarly ? [`nothing was left to ask for after ${(elapsedMs / 1000).toFixed(1)} s`] : []),
    ],
  };
}
