/** What waited when the gate opened: how it goes on, and when it is over. */
import { beforeEach, describe, expect, it } from 'vitest';
import { createDrain, type Drain } from '../../src/sdk/drain.ts';
import { createManualClock, type ManualClock } from '../support/manual-clock.ts';

let time: ManualClock;
let drain: Drain;
let told: string[];

beforeEach(() => {
  time = createManualClock();
  told = [];
  drain = createDrain({
    clock: {
      nowMs: time.nowMs,
      random: Math.random,
      after(delayMs, action) {
        const timer = time.after(delayMs, action);
        return () => timer.cancel();
      },
    },
    onProgress: () => told.push('progress'),
    onEnd: () => told.push('end'),
  });
});

describe('a drain', () => {
  it('counts what is handed over from when the gate was asked to open', () => {
    drain.handled();
    const begin = drain.expect();
    // Pushed right behind the answer, and taken in before it.
    drain.handled();
    expect(told).toEqual([]);
    begin(5);
    expect(drain.progress()).toEqual({ handled: 1, pending: 5 });
    drain.handled();
    expect(drain.progress()).toEqual({ handled: 2, pending: 5 });
    expect(told).toEqual(['progress']);
  });

  it('is over when the queue is empty, once', async () => {
    drain.expect()(5);
    drain.emptied();
    expect(drain.progress()).toBeNull();
    await time.advance(60_000);
    expect(told).toEqual(['progress', 'end']);
  });

  it('does not begin where the queue was empty before the answer was taken in', () => {
    const begin = drain.expect();
    drain.emptied();
    begin(0);
    expect(drain.progress()).toBeNull();
    expect(time.timerCount()).toBe(0);
  });

  it('is waited for no longer than a minute', async () => {
    drain.expect()(5);
    await time.advance(59_999);
    expect(told).toEqual([]);
    await time.advance(1);
    expect(told).toEqual(['progress', 'end']);
    expect(drain.progress()).toBeNull();
  });

  it('is waited for anew where the gate opens again', async () => {
    drain.expect()(5);
    await time.advance(59_000);
    drain.expect()(3);
    await time.advance(59_999);
    expect(told).toEqual([]);
    expect(drain.progress()).toEqual({ handled: 0, pending: 3 });
  });

  it('that is abandoned does not end', async () => {
    drain.expect()(5);
    drain.abandon();
    expect(drain.progress()).toBeNull();
    await time.advance(60_000);
    expect(told).toEqual([]);
  });
});
