/** The open loop on a clock that is moved by hand: what leaves when, and what is measured of it. */
import { describe, expect, it } from 'vitest';
import type { Clock } from '../../src/lib/clock.ts';
import { partOf } from '../../src/load-test/load-plan.ts';
import { intervalFor, Meter } from '../../src/load-test/meter.ts';
import { type Departure, pace } from '../../src/load-test/pacer.ts';
import { scheduleOf } from '../../src/load-test/schedule.ts';
import { createManualClock } from '../support/manual-clock.ts';

const PART = partOf('chat', { ratePerSecond: 100, durationMs: 1_000 });
const never = new AbortController().signal;

function meterOf(clock: Clock): Meter {
  const meter = new Meter({ clock, durationMs: PART.durationMs, steps: ['answered'] });
  meter.begin(clock.nowMs());
  return meter;
}

/** Percentiles of a histogram are true to three digits. */
function near(ms: number) {
  return { min: ms * 0.999, max: ms * 1.001 };
}

describe('the open loop', () => {
  it('lets every operation leave when it is due, to the millisecond, and counts its latency from then', async () => {
    const clock = createManualClock();
    const startMs = clock.nowMs();
    const departures: (Departure & { atMs: number })[] = [];
    const paced = pace({
      clock,
      startMs,
      schedule: scheduleOf(PART),
      signal: never,
      depart: (departure) => departures.push({ ...departure, atMs: clock.nowMs() - startMs }),
    });
    await clock.advance(1_000);
    await paced;
    expect(departures.map(({ index }) => index)).toEqual(Array.from({ length: 100 }, (_, index) => index));
    for (const { index, atMs, startMs: from, lateMs } of departures) {
      expect(Math.abs(atMs - index * 10)).toBeLessThanOrEqual(1);
      expect(from - startMs).toBe(atMs);
      expect(lateMs).toBe(0);
    }
  });

  it('goes on sending while a gateway stands still, and counts what each operation waited', async () => {
    const clock = createManualClock();
    const startMs = clock.nowMs();
    const meter = meterOf(clock);
    // A gateway that answers nothing in the first half second, and at once afterwards.
    const waiting: Departure[] = [];
    const answer = ({ startMs: from }: Departure): void => {
      meter.step('answered', from);
      meter.completed();
    };
    clock.after(500, () => {
      for (const departure of waiting.splice(0)) answer(departure);
    });
    const paced = pace({
      clock,
      startMs,
      schedule: scheduleOf(PART),
      signal: never,
      depart(departure) {
        meter.offered(departure);
        if (clock.nowMs() - startMs < 500) waiting.push(departure);
        else answer(departure);
      },
    });
    await clock.advance(1_000);
    await paced;
    const result = meter.result();
    expect(result).toMatchObject({ offered: 100, completed: 100, failed: 0, unfinished: 0, lateCount: 0 });
    const [step] = result.steps;
    // Half of them waited from 0 to 500 ms: a closed loop would have had one long wait and 50 short ones.
    expect(step!.count).toBe(100);
    expect(step!.ms.max).toBeGreaterThanOrEqual(near(500).min);
    expect(step!.ms.p90).toBeGreaterThan(390);
    expect(step!.ms.p90).toBeLessThan(411);
    expect(step!.ms.p50).toBeLessThan(12);
    expect(step!.meanMs).toBeGreaterThan(125);
    expect(step!.meanMs).toBeLessThan(131);
    // By when they were due: the first interval holds the longest wait, the last none.
    expect(step!.overTime[0]!.ms.max).toBeGreaterThan(490);
    expect(step!.overTime.at(-1)!.ms.max).toBeLessThan(2);
    expect(result.rates.offered.reduce((sum, count) => sum + count)).toBe(100);
    expect(result.rates.achieved[0]).toBe(0);
    expect(result.rates.achieved.reduce((sum, count) => sum + count)).toBe(100);
  });

  it('counts from when operations were due also where the load process itself was held up', async () => {
    const clock = createManualClock();
    let heldUpMs = 0;
    const held: Clock = { nowMs: () => clock.nowMs() + heldUpMs, after: clock.after };
    const startMs = held.nowMs();
    const meter = meterOf(held);
    const paced = pace({
      clock: held,
      startMs,
      schedule: scheduleOf(PART),
      signal: never,
      depart(departure) {
        meter.offered(departure);
        // The eleventh holds the process up for 300 ms.
        if (departure.index === 10) heldUpMs = 300;
        meter.step('answered', departure.startMs);
        meter.completed();
      },
    });
    await clock.advance(1_000);
    await paced;
    const result = meter.result();
    expect(result).toMatchObject({ offered: 100, completed: 100 });
    // Those that were due from 110 to 380 ms, and left at 399.
    expect(result.lateCount).toBe(28);
    expect(result.lateMs.max).toBeGreaterThan(285);
    expect(result.steps[0]!.ms.max).toBeGreaterThanOrEqual(near(300).min);
    // Not the one alone that held it up: those that could not leave meanwhile have waited too.
    expect(result.steps[0]!.ms.p90).toBeGreaterThan(185);
    expect(result.steps[0]!.ms.p50).toBeLessThan(2);
    // The last one was late by nothing any more.
    expect(result.offeringMs).toBeGreaterThanOrEqual(989);
  });

  it('ends where it is interrupted', async () => {
    const clock = createManualClock();
    const interrupted = new AbortController();
    let count = 0;
    const paced = pace({
      clock,
      startMs: clock.nowMs(),
      schedule: scheduleOf(PART),
      signal: interrupted.signal,
      depart() {
        count += 1;
      },
    });
    await clock.advance(200);
    interrupted.abort();
    await paced;
    await clock.advance(1_000);
    expect(count).toBeGreaterThanOrEqual(20);
    expect(count).toBeLessThanOrEqual(22);
  });
});

describe('a schedule', () => {
  it('makes a storm of all devices at once, each ten seconds', () => {
    const { count, offsetMs } = scheduleOf(partOf('storm', { deviceCount: 50, durationMs: 25_000 }));
    expect(count).toBe(100);
    expect([0, 49, 50, 99].map(offsetMs)).toEqual([0, 0, 10_000, 10_000]);
  });

  it('spreads a storm where a rate is given, and the next one waits for it', () => {
    const part = partOf('storm', { deviceCount: 50, ratePerSecond: 2, durationMs: 60_000 });
    const { count, offsetMs } = scheduleOf(part);
    expect(count).toBe(100);
    expect([0, 1, 49, 50].map(offsetMs)).toEqual([0, 500, 24_500, 25_000]);
  });

  it('drains each backlog once', () => {
    expect(scheduleOf(partOf('backlog', { deviceCount: 7, ratePerSecond: 100 })).count).toBe(7);
    expect(scheduleOf(partOf('backlog', { deviceCount: 700, ratePerSecond: 10 })).count).toBe(300);
  });

  it('has one operation at least', () => {
    for (const scenario of ['chat', 'backlog'] as const) {
      expect(scheduleOf(partOf(scenario, { ratePerSecond: 0.1, durationMs: 1_000 })).count).toBe(1);
    }
  });
});

describe('the meter', () => {
  it('takes intervals in which a plot is readable', () => {
    expect(intervalFor(1_000)).toBe(250);
    expect(intervalFor(30_000)).toBe(500);
    expect(intervalFor(60_000)).toBe(1_000);
    expect(intervalFor(24 * 3_600_000)).toBe(900_000);
  });

  it('tells no percentile for which there are too few values', () => {
    const clock = createManualClock();
    const meter = meterOf(clock);
    for (let index = 0; index < 100; index++) meter.step('answered', clock.nowMs() - index);
    const [step] = meter.result().steps;
    expect(Math.max(...step!.curve.map(({ percentile }) => percentile))).toBe(99);
    const latencies = step!.curve.map(({ ms }) => ms);
    expect(latencies).toEqual([...latencies].sort((a, b) => a - b));
  });

  it('tells each percentile by its own name', () => {
    const clock = createManualClock();
    const meter = meterOf(clock);
    for (let ms = 1; ms <= 1_000; ms++) meter.step('answered', clock.nowMs() - ms);
    const { ms } = meter.result().steps[0]!;
    for (const [told, expected] of [
      [ms.p50, 500],
      [ms.p90, 900],
      [ms.p99, 990],
      [ms.p999, 999],
      [ms.max, 1_000],
    ] as const) {
      expect(told).toBeGreaterThanOrEqual(near(expected).min);
      expect(told).toBeLessThanOrEqual(near(expected).max);
    }
  });

  it('takes what was withheld for neither failed nor unfinished, and counts failures from the most on', () => {
    const clock = createManualClock();
    const meter = meterOf(clock);
    for (let index = 0; index < 7; index++) meter.offered({ startMs: clock.nowMs(), lateMs: 0 });
    meter.withheld();
    meter.completed();
    meter.failed('DISCONNECTED');
    for (let index = 0; index < 2; index++) meter.failed('QUEUE_FULL');
    expect(meter.underWay()).toBe(2);
    const result = meter.result();
    expect(result).toMatchObject({ offered: 7, withheld: 1, completed: 1, failed: 3, unfinished: 2 });
    expect(Object.entries(result.failures)).toEqual([
      ['QUEUE_FULL', 2],
      ['DISCONNECTED', 1],
    ]);
  });

  it('tells when the last operation left, how late it ever was, and when the last one was completed', async () => {
    const clock = createManualClock();
    const meter = meterOf(clock);
    meter.offered({ startMs: clock.nowMs() + 100, lateMs: 30 });
    expect(meter.result()).toMatchObject({ offeringMs: 130, completingMs: 0 });
    await clock.advance(400);
    meter.completed();
    expect(meter.result()).toMatchObject({ offeringMs: 130, completingMs: 400 });
  });

  it('shows while it runs the last step that an operation has', () => {
    const clock = createManualClock();
    const meter = new Meter({ clock, durationMs: 1_000, steps: ['stored', 'delivered'] });
    meter.begin(clock.nowMs());
    meter.step('stored', clock.nowMs() - 10);
    expect(meter.latestPercentiles()).toBeNull();
    meter.step('delivered', clock.nowMs() - 70);
    expect(meter.latestPercentiles()!.max).toBeGreaterThanOrEqual(near(70).min);
  });
});
