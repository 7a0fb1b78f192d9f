import { beforeEach, describe, expect, it } from 'vitest';
import { createDrainAlarm, type DrainAlarm } from '../../src/keys/drain-alarm.ts';
import { createManualClock, type ManualClock } from '../support/manual-clock.ts';

const WINDOW_MS = 10 * 60_000;
const bob = { userId: 'bob', deviceId: 1 };

describe('the drain alarm', () => {
  let clock: ManualClock;
  let alarms: { device: typeof bob; claimCount: number; usualCount: number }[];
  let alarm: DrainAlarm;

  function watching(claimsMin = 20): void {
    alarm = createDrainAlarm({ claimsMin, clock, onAlarm: (event) => alarms.push(event) });
  }
  const claims = (times: number, device = bob): void => {
    for (let i = 0; i < times; i++) alarm.noteClaim(device);
  };

  beforeEach(() => {
    clock = createManualClock(0);
    alarms = [];
    watching();
  });

  it('tells once in ten minutes of a device that is claimed far more often than is usual', async () => {
    claims(19);
    expect(alarms).toEqual([]);
    claims(500);
    expect(alarms).toEqual([{ device: bob, claimCount: 20, usualCount: 0 }]);
    await clock.advance(WINDOW_MS);
    claims(500);
    expect(alarms).toHaveLength(2);
  });

  it('tells nothing of a device for which as many are usual', async () => {
    for (let window = 0; window < 144; window++) {
      claims(15);
      await clock.advance(WINDOW_MS);
    }
    claims(100);
    expect(alarms).toEqual([]);
    claims(100);
    expect(alarms).toMatchObject([{ device: bob, claimCount: expect.any(Number) }]);
    expect(alarms[0]!.usualCount).toBeGreaterThan(14);
    expect(alarms[0]!.usualCount).toBeLessThan(15);
  });

  it('forgets what was usual when it has not been so for days', async () => {
    for (let window = 0; window < 144; window++) {
      claims(15);
      await clock.advance(WINDOW_MS);
    }
    await clock.advance(3 * 86_400_000);
    claims(20);
    expect(alarms).toHaveLength(1);
  });

  it('watches each device by itself, and no more devices than it can hold', () => {
    claims(19);
    claims(19, { userId: 'bob', deviceId: 2 });
    expect(alarms).toEqual([]);
    for (let i = 0; i < 100_000; i++) claims(1, { userId: `u${i}`, deviceId: 1 });
    claims(1);
    expect(alarms).toEqual([]);
  });

  it('tells also of a device that was claimed of before the clock was set back', async () => {
    const { nowMs } = clock;
    await clock.advance(86_400_000);
    claims(15);
    clock.nowMs = () => nowMs() - 86_400_000;
    claims(100);
    expect(alarms).toMatchObject([{ device: bob }]);
  });

  it('is off where 0 says so', async () => {
    watching(0);
    claims(1_000);
    // By now some number is usual.
    await clock.advance(WINDOW_MS);
    claims(1_000);
    expect(alarms).toEqual([]);
  });
});
