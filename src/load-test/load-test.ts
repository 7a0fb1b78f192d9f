/** One load test: devices get ready, operations leave when they are due, and the books are closed. */
import { setMaxListeners } from 'node:events';
import { availableParallelism, cpus } from 'node:os';
import { type Clock, pause } from '../lib/clock.ts';
import { createSlots } from '../lib/slots.ts';
import type { DeviceAddress } from '../protocol/ids.ts';
import { Failure, type FailureCode, LoadDevice } from './device.ts';
import type { LoadPlan, PartPlan } from './load-plan.ts';
import { Meter, type Percentiles } from './meter.ts';
import { type OwnLoad, watchOwnLoad } from './own-load.ts';
import { type Departure, pace } from './pacer.ts';
import { faultsOf, type LoadResult, type PartResult, ratesOf, warningsOf } from './result.ts';
import { scenarioKinds } from './scenarios/index.ts';
import type { Scenario } from './scenarios/scenario.ts';
import { scheduleOf } from './schedule.ts';

export interface Credential {
  address: DeviceAddress;
  token: string;
}

export interface LoadTestOptions {
  plan: LoadPlan;
  /** One for each device of the plan, in the order of its parts. */
  credentials: readonly Credential[];
  /** Tells fractions of a millisecond. */
  clock: Clock;
  /** From 0 to 1. */
  random(): number;
  /** Raised when no further operation is to leave; what was measured is still reported. */
  interrupted: AbortSignal;
  keygateVersion: string;
}

/** A moment of a test that is under way. */
export interface Progress {
  phase: 'preparing' | 'running' | 'ending';
  preparedCount: number;
  deviceCount: number;
  /** Why a device is not prepared yet, where the last one to try was told to come back later; null else. */
  refusal: FailureCode | null;
  /** Since the first operation could be due. */
  elapsedMs: number;
  durationMs: number;
  parts: {
    name: string;
    offered: number;
    completed: number;
    failed: number;
    underWay: number;
    /** Of the last step of the operations. */
    latencyMs: Percentiles | null;
  }[];
}

export interface LoadTest {
  progress(): Progress;
  /** @throws LoadTestError where the devices can't be prepared */
  readonly result: Promise<LoadResult>;
}

/** The test could not begin. The message tells the user what to do. */
export class LoadTestError extends Error {}

/** Devices that are prepared at once. */
const PREPARING_MAX = 32;
/** A device that is told to come back later is tried for so long. */
const PREPARE_MAX_MS = 10 * 60_000;
const PREPARE_RETRY_MS = 1_000;
/** Operations of a part that are under way at once: beyond, the gateway is not hurt more, only this process. */
const UNDER_WAY_MAX = 20_000;
/**
 * What is under way when the last operation has left may still come in: as long as anything does, and where the user
 * didn't end the test, as long as an answer or a connection is waited for.
 */
const SETTLE_MAX_MS = 30_000;
const SETTLE_QUIET_MS = 2_000;
/** Devices that miss something may connect anew and ask for it. */
const COLLECT_MAX_MS = 20_000;

interface RunningPart {
  plan: PartPlan;
  devices: LoadDevice[];
  meter: Meter;
  scenario: Scenario;
}

export function startLoadTest(options: LoadTestOptions): LoadTest {
  const { plan, clock, interrupted } = options;
  const over = new AbortController();
  const wasInterrupted = raised(interrupted);
  // Every device that waits to try again listens; Node would take them for a leak.
  setMaxListeners(0, over.signal, interrupted);
  let phase: Progress['phase'] = 'preparing';
  let preparedCount = 0;
  let refusal: FailureCode | null = null;
  let startMs = clock.nowMs();
  const parts = createParts(options, over.signal);
  const allDevices = parts.flatMap(({ devices }) => devices);

  async function run(): Promise<LoadResult> {
    try {
      await prepareParts();
      phase = 'running';
      const ownLoadSinceStart = watchOwnLoad(clock);
      startMs = clock.nowMs();
      await Promise.all(parts.map(runPart));
      phase = 'ending';
      const ownLoad = ownLoadSinceStart();
      await atMost(COLLECT_MAX_MS, Promise.all(parts.map(({ scenario }) => scenario.collect?.())));
      return resultOf(ownLoad);
    } finally {
      over.abort();
      for (const device of allDevices) device.close();
    }
  }

  async function prepareParts(): Promise<void> {
    const slots = createSlots({
      clock,
      slotCount: PREPARING_MAX,
      waitingMax: allDevices.length,
      waitMaxMs: Number.MAX_SAFE_INTEGER,
    });
    const work = parts.flatMap((part) => part.devices.map((device) => ({ part, device })));
    const [first, ...rest] = work;
    if (first === undefined) return;
    // Alone, so that what is wrong for all of them is told at once.
    await prepareDevice(first.part, first.device, { isFirst: true });
    await Promise.all(rest.map(({ part, device }) => slots.run(() => prepareDevice(part, device))));
    const filling = Promise.all(parts.map(({ scenario }) => scenario.prepareAll?.()));
    try {
      await Promise.race([filling, wasInterrupted]);
      // What is under way then must be in the books before they are closed.
      if (!(await atMost(SETTLE_MAX_MS, filling))) {
        throw new LoadTestError('the gateway does not answer, and the queues were not filled yet');
      }
    } catch (error) {
      throw error instanceof Failure
        ? new LoadTestError(`the devices can not be prepared: ${error.message}`)
        : error;
    }
  }

  async function prepareDevice(
    { scenario }: RunningPart,
    device: LoadDevice,
    { isFirst = false } = {},
  ): Promise<void> {
    const untilMs = clock.nowMs() + PREPARE_MAX_MS;
    while (!interrupted.aborted) {
      try {
        const preparing = scenario.prepare(device).then(() => {
          preparedCount += 1;
          refusal = null;
        });
        await Promise.race([preparing, wasInterrupted]);
        return;
      } catch (error) {
        if (!(error instanceof Failure)) throw error;
        refusal = error.code;
        const isAbsent = error.code === 'CONNECT_FAILED' || error.code === 'NOT_ANSWERED';
        if ((isFirst && isAbsent) || !passesByItself(error) || clock.nowMs() > untilMs)
          throw hintOf(error, plan.url);
        device.close();
        const jitter = 1 + options.random() / 2;
        await pause(clock, (error.retryAfterMs ?? PREPARE_RETRY_MS) * jitter, interrupted);
      }
    }
  }

  async function runPart({ plan: part, devices, meter, scenario }: RunningPart): Promise<void> {
    const partStartMs = startMs + part.delayMs;
    await pause(clock, partStartMs - clock.nowMs(), interrupted);
    meter.begin(partStartMs);
    if (!interrupted.aborted) scenario.start?.();
    let onIdle = (): void => {};

    function depart(departure: Departure): void {
      meter.offered(departure);
      const operation = meter.underWay() > UNDER_WAY_MAX ? null : scenario.operate(departure);
      if (operation === null) {
        meter.withheld();
        return;
      }
      operation
        .then(
          () => meter.completed(),
          // What is thrown besides is what an answer of another shape than the contract's led to.
          (error: unknown) => meter.failed(error instanceof Failure ? error.code : 'WRONG_ANSWER'),
        )
        .finally(() => {
          if (meter.underWay() === 0) onIdle();
        });
    }

    await pace({ clock, startMs: partStartMs, schedule: scheduleOf(part), signal: interrupted, depart });
    scenario.stop?.();
    const idle = new Promise<void>((resolve) => {
      onIdle = resolve;
      if (meter.underWay() === 0) resolve();
    });
    const untilMs = clock.nowMs() + SETTLE_MAX_MS;
    const isAnswerDue = () => !interrupted.aborted && devices.some((device) => device.isWaiting);
    let before = Number.POSITIVE_INFINITY;
    while (meter.underWay() > 0 && (meter.underWay() < before || isAnswerDue()) && clock.nowMs() < untilMs) {
      before = meter.underWay();
      await atMost(SETTLE_QUIET_MS, idle);
    }
  }

  /** @returns whether the work was done in time */
  async function atMost(waitMaxMs: number, work: Promise<unknown>): Promise<boolean> {
    const enough = new AbortController();
    try {
      return await Promise.race([
        work.then(() => true),
        pause(clock, waitMaxMs, enough.signal).then(() => false),
      ]);
    } finally {
      enough.abort();
    }
  }

  function resultOf(ownLoad: OwnLoad): LoadResult {
    const results = parts.map(({ plan: part, meter, scenario }): PartResult => {
      const measured = meter.result();
      return {
        plan: part,
        ...ratesOf(part, measured),
        messages: scenario.messages?.() ?? null,
        claims: scenario.claims?.() ?? null,
        ...measured,
      };
    });
    return {
      formatVersion: 1,
      keygateVersion: options.keygateVersion,
      startedAt: new Date(startMs).toISOString(),
      url: plan.url,
      wasInterrupted: interrupted.aborted,
      machine: {
        node: process.version,
        cpu: cpus()[0]?.model ?? 'unknown',
        cpuCount: availableParallelism(),
      },
      ownLoad,
      parts: results,
      warnings: warningsOf(ownLoad, results),
      faults: faultsOf(results, { wasInterrupted: interrupted.aborted }),
    };
  }

  return {
    result: run(),
    progress: () => ({
      phase,
      preparedCount,
      deviceCount: allDevices.length,
      refusal,
      elapsedMs: phase === 'preparing' ? 0 : clock.nowMs() - startMs,
      durationMs: Math.max(...plan.parts.map(({ delayMs, durationMs }) => delayMs + durationMs)),
      parts: parts.map(({ plan: { name }, meter }) => ({
        name,
        ...meter.counts(),
        underWay: meter.underWay(),
        latencyMs: meter.latestPercentiles(),
      })),
    }),
  };
}

function createParts(options: LoadTestOptions, over: AbortSignal): RunningPart[] {
  const { plan, clock, random, interrupted } = options;
  let dealt = 0;
  return plan.parts.map((part) => {
    const devices = options.credentials
      .slice(dealt, dealt + part.deviceCount)
      .map((credential) => new LoadDevice({ url: plan.url, ...credential, clock, hasPq: part.hasPq }));
    dealt += part.deviceCount;
    const kind = scenarioKinds[part.scenario];
    const meter = new Meter({ clock, durationMs: part.durationMs, steps: kind.steps });
    const scenario = kind.create({ part, devices, clock, meter, random, interrupted, over });
    return { plan: part, devices, meter, scenario };
  });
}

/** Resolves when it is. */
function raised(signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    if (signal.aborted) resolve();
    else signal.addEventListener('abort', () => resolve(), { once: true });
  });
}

function passesByItself({ code }: Failure): boolean {
  switch (code) {
    case 'RATE_LIMITED':
    case 'UNAVAILABLE':
    case 'CONNECT_FAILED':
    case 'DISCONNECTED':
    case 'NOT_ANSWERED':
      return true;
    default:
      return false;
  }
}

function hintOf(failure: Failure, url: string): LoadTestError {
  const { code, message } = failure;
  if (code === 'CONNECT_FAILED') {
    return new LoadTestError(`no gateway serves at ${url} (${message}): start it, or name its --url`);
  }
  if (code === 'NOT_ANSWERED') {
    return new LoadTestError(`what serves at ${url} does not answer: is it a gateway, and is it well?`);
  }
  if (code === 'UNAUTHENTICATED' || code === 'TOKEN_EXPIRED') {
    return new LoadTestError(
      `the gateway refuses the tokens (${message}): they must be signed with its own secret, see --secret-file and --tokens`,
    );
  }
  return new LoadTestError(`the devices can not be prepared: ${code}: ${message}`);
}
