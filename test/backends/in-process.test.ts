// The backends of a single node, held to the contracts that the distributed ones are held to.
import { describe, expect, it } from 'vitest';
import { createInProcessBus } from '../../src/backends/in-process/bus.ts';
import { createInProcessLocks } from '../../src/backends/in-process/locks.ts';
import { createInProcessRateLimiter, type SharedCounts } from '../../src/backends/in-process/rate-limiter.ts';
import { type Clock, systemClock } from '../../src/lib/clock.ts';
import { type Log, type LogFields, silentLog } from '../../src/lib/log.ts';
import { describeBus, device, recorder } from '../contract/bus.ts';
import { describeLocks } from '../contract/lock.ts';
import { describeRateLimiter, WINDOW_MS } from '../contract/rate-limiter.ts';
import { eventually } from '../support/eventually.ts';
import { createManualClock } from '../support/manual-clock.ts';

describeBus('in process', async () => ({
  bus: createInProcessBus({ log: silentLog }),
  close: async () => {},
}));

describe('the in-process bus', () => {
  it('looks at no device that was released since it was poked', async () => {
    const { log, errors } = noted();
    const bus = createInProcessBus({ log });
    const heard = recorder();
    await bus.start(heard);
    const [alice, bob] = [device('alice'), device('bob')];
    for (const each of [alice, bob]) await bus.acquire({ device: each, fence: 1 });
    bus.poke([alice, bob]);
    bus.release({ device: alice, fence: 1 });
    await eventually(() => expect(heard.pokes).toEqual(['bob.1']));
    expect(errors).toEqual([]);
  });

  it('has the log tell what a listener throws', async () => {
    const { log, errors } = noted();
    const bus = createInProcessBus({ log });
    const alice = device('alice');
    const onDisplaced = () => {
      throw new Error('a fault of the listener');
    };
    await bus.start({ ...recorder(), onDisplaced });
    await bus.acquire({ device: alice, fence: 1 });
    expect(await bus.acquire({ device: alice, fence: 2 })).toBe(true);
    expect(errors).toEqual([{ error: 'Error: a fault of the listener' }]);
  });

  it('tells nothing once it has stopped', async () => {
    const bus = createInProcessBus({ log: silentLog });
    const heard = recorder();
    await bus.start(heard);
    await bus.stop();
    for (const fence of [1, 2]) await bus.acquire({ device: device('alice'), fence });
    expect(heard.displaced).toEqual([]);
  });
});

/** A log, and what it was told of errors. */
function noted(): { log: Log; errors: LogFields[] } {
  const errors: LogFields[] = [];
  return { errors, log: { ...silentLog, error: (fields) => errors.push(fields) } };
}

describeLocks('in process', async (lockMs) => {
  const locks = createInProcessLocks({ clock: systemClock, lockMs });
  return { locks, otherNode: locks, close: async () => {} };
});

describeRateLimiter('in process', async (limits) => {
  const clock = createManualClock();
  const limiter = createInProcessRateLimiter({ limits, clock });
  return {
    limiter,
    otherNode: limiter,
    endWindows: () => clock.advance(WINDOW_MS),
    close: async () => {},
  };
});

describe('the in-process rate limiter', () => {
  const limits = [{ name: 'few', points: 3, windowMs: 60_000 }];
  const charge = { limit: 'few', points: 1 };

  it('answers at once', () => {
    const limiter = createInProcessRateLimiter({ limits, clock: createManualClock() });
    expect(limiter.charge([{ ...charge, key: 'alice' }])).toEqual([]);
  });

  it('is not stuck after the clock was set back by an hour', () => {
    let nowMs = 10_000_000;
    const limiter = createInProcessRateLimiter({
      limits,
      clock: { nowMs: () => nowMs, after: () => ({ cancel() {} }) },
    });
    const spend = () => [1, 2, 3, 4].map(() => limiter.charge([{ ...charge, key: 'alice' }]));
    expect(spend().filter((hits) => 'length' in hits && hits.length === 1)).toHaveLength(1);
    nowMs -= 3_600_000;
    expect(spend().filter((hits) => 'length' in hits && hits.length === 1)).toHaveLength(1);
  });

  it('forgets the oldest of more keys than it can hold', () => {
    const limiter = createInProcessRateLimiter({ limits, clock: createManualClock() });
    const spend = (key: string) => limiter.charge([{ limit: 'few', key, points: 3 }]);
    spend('first');
    expect(spend('first')).toHaveLength(1);
    for (let i = 0; i < 100_000; i++) spend(`key ${i}`);
    expect(spend('first')).toHaveLength(0);
    expect(spend('key 99999')).toHaveLength(1);
  });
});

type Told = Awaited<ReturnType<SharedCounts['add']>>;

/** A limit of 100 that is told of at once from the 95th on, and whose answers come when the test says so. */
function limiterOf() {
  const clock = createManualClock();
  const answers: ((told: Told) => void)[] = [];
  const limiter = createInProcessRateLimiter({
    limits: [{ name: 'hour', points: 100, windowMs: 3_600_000 }],
    clock,
    shared: {
      isThere: () => true,
      add: () => new Promise((resolve) => answers.push(resolve)),
    },
  });
  const charge = (points: number) => limiter.charge([{ limit: 'hour', key: 'alice', points }]);
  return { clock, answers, charge };
}

describe('charges that are told to the other nodes', () => {
  it('are told one by one in the last sixteenth of the limit, and in shares before', async () => {
    const { answers, charge } = limiterOf();
    for (let count = 0; count < 6; count++) expect(charge(1)).toEqual([]);
    const told = [charge(88), charge(1), charge(1)];
    expect(answers).toHaveLength(3);
    answers.forEach((answer, nth) => {
      answer({ count: 94 + nth, endsInMs: 3_600_000 });
    });
    expect(await Promise.all(told)).toEqual([[], [], []]);
  });

  it('count as the highest answer says, in whatever order the answers come', async () => {
    const { answers, charge } = limiterOf();
    const told = [charge(50), charge(40)];
    answers[1]!({ count: 90, endsInMs: 3_600_000 });
    answers[0]!({ count: 50, endsInMs: 3_600_000 });
    expect(await Promise.all(told)).toEqual([[], []]);
    expect(charge(11)).toEqual([{ limit: 'hour', retryAfterMs: 3_600_000 }]);
  });

  it('count for nothing in the window that the other nodes have begun meanwhile', async () => {
    const { clock, answers, charge } = limiterOf();
    const last = charge(90);
    answers[0]!({ count: 90, endsInMs: 1_000 });
    await last;
    await clock.advance(900);
    const first = charge(7);
    answers[1]!({ count: 7, endsInMs: 3_600_000 });
    expect(await first).toEqual([]);
    const second = charge(93);
    answers[2]!({ count: 100, endsInMs: 3_600_000 });
    expect(await second).toEqual([]);
    expect(charge(1)).toEqual([{ limit: 'hour', retryAfterMs: 3_600_000 }]);
  });
});

describe('a window that ends while its charges are told to the other nodes', () => {
  it('is followed by one with all its points, whatever becomes of them', async () => {
    for (const told of [null, { count: 99, endsInMs: 8 }]) {
      const { clock, answers, charge } = limiterOf();
      const last = charge(99);
      await clock.advance(3_600_000);
      const next = [charge(1), charge(1)];
      answers[0]!(told);
      expect(await last).toEqual([]);
      next.push(charge(4));
      expect(next).toEqual([[], [], []]);
    }
  });

  it('takes nothing with it that is charged in the next', async () => {
    const { clock, answers, charge } = limiterOf();
    const last = charge(90);
    await clock.advance(3_600_000);
    expect(charge(6)).toEqual([]);
    answers[0]!({ count: 90, endsInMs: 8 });
    await last;
    await clock.advance(1_000);
    const second = charge(94);
    expect(charge(1)).toEqual([{ limit: 'hour', retryAfterMs: 3_599_000 }]);
    answers[1]!({ count: 100, endsInMs: 3_599_000 });
    expect(await second).toEqual([]);
  });
});

describe('in-process locks', () => {
  it('are not stuck after the clock was set back by an hour', async () => {
    let nowMs = 10_000_000;
    const clock: Clock = { nowMs: () => nowMs, after: () => ({ cancel() {} }) };
    const locks = createInProcessLocks({ clock, lockMs: 1_000 });
    await locks.acquire([device('alice')]);
    nowMs -= 3_600_000;
    expect((await locks.acquire([device('alice')])).held.size).toBe(1);
  });
});
