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
    expect(result.steps[0]!.ms.p50).toBeLessThan(2);
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
});
