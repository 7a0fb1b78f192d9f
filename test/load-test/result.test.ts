/** What is made of the figures: when a test has failed, and when its figures are doubtful. */
import { describe, expect, it } from 'vitest';
import { ClaimLedger } from '../../src/load-test/claim-ledger.ts';
import { partOf } from '../../src/load-test/load-plan.ts';
import { MessageLedger } from '../../src/load-test/message-ledger.ts';
import { Meter } from '../../src/load-test/meter.ts';
import { faultsOf, type PartResult, ratesOf, warningsOf } from '../../src/load-test/result.ts';
import { createManualClock } from '../support/manual-clock.ts';

const IDLE = { cores: 0.2, eventLoopDelayP99Ms: 1, eventLoopDelayMaxMs: 5 };
const measured = new Meter({ clock: createManualClock(), durationMs: 10_000, steps: [] }).result();

function part(more: Partial<PartResult> = {}): PartResult {
  return {
    ...measured,
    plan: partOf('chat', { ratePerSecond: 100, durationMs: 10_000 }),
    offered: 1_000,
    completed: 1_000,
    offeredPerSecond: 100,
    achievedPerSecond: 100,
    messages: new MessageLedger().counts(),
    claims: null,
    ...more,
  };
}

function withMessages(more: Partial<NonNullable<PartResult['messages']>>): PartResult {
  return part({ messages: { ...new MessageLedger().counts(), ...more } });
}

describe('the faults of a test', () => {
  it('are none where messages were redelivered, bounced, refused or of earlier runs', () => {
    const fine = withMessages({ redelivered: 3, bounced: 2, foreign: 1 });
    expect(faultsOf([{ ...fine, failed: 5, failures: { RATE_LIMITED: 5 } }])).toEqual([]);
  });

  it.each([
    [withMessages({ lost: 2 }), 'chat: 2 messages were acknowledged as stored and lost'],
    [withMessages({ doubled: 2 }), 'chat: 2 messages came under a second envelope id'],
    [withMessages({ outOfOrder: 2 }), 'chat: 2 messages came after later ones'],
    [withMessages({ unproven: 2 }), 'chat: 2 stored messages have not come'],
    [
      part({ claims: { ...new ClaimLedger().counts(), withOneTimePreKey: 9, handedOutTwice: 1 } }),
      'chat: 1 one-time prekeys were handed out twice',
    ],
    [part({ completed: 0 }), 'chat: nothing succeeded'],
  ])('are each told', (result, beginning) => {
    const faults = faultsOf([result]);
    expect(faults).toHaveLength(1);
    expect(faults[0]!.startsWith(beginning)).toBe(true);
  });
});

it('finds no fault in a part of which nothing was due when the user ended the test', () => {
  const none = part({ offered: 0, completed: 0 });
  expect(faultsOf([none], { wasInterrupted: true })).toEqual([]);
  expect(faultsOf([none])).toEqual(['chat: nothing succeeded']);
  expect(faultsOf([part({ completed: 0 })], { wasInterrupted: true })).toEqual(['chat: nothing succeeded']);
  // Of the instant that such a test takes, the process's own share says nothing.
  expect(warningsOf({ ...IDLE, cores: 0.95 }, [none])).toEqual([]);
  expect(warningsOf({ ...IDLE, cores: 0.95 }, [none, part()])).toHaveLength(1);
});

describe('the warnings of a test', () => {
  it('are none where the load process had time and the gateway kept up', () => {
    expect(warningsOf(IDLE, [part({ lateCount: 10, failed: 10 })])).toEqual([]);
    // Twenty operations in a third of a second, the last of which takes a quarter of a second.
    const short = part({ achievedPerSecond: 60, offeringMs: 330, completingMs: 580 });
    expect(warningsOf(IDLE, [short])).toEqual([]);
  });

  it.each([
    [{ ...IDLE, cores: 0.95 }, part(), /used 0\.95 of a core: it is the limit itself/],
    [{ ...IDLE, eventLoopDelayP99Ms: 80 }, part(), /its timers fired 80 ms late at p99/],
    [IDLE, part({ lateCount: 11 }), /chat: 1\.1 % of the operations left more than 10 ms after/],
    [
      IDLE,
      part({ failed: 500, failures: { RATE_LIMITED: 500 } }),
      /chat: 50 % .* failed; .* ended with RATE_LIMITED 500/,
    ],
    [IDLE, part({ withheld: 4 }), /chat: 4 operations were not sent/],
    [IDLE, part({ unfinished: 7 }), /chat: 0\.7 % of the operations had not ended when the test did/],
    [
      IDLE,
      part({ achievedPerSecond: 90, offeringMs: 9_990, completingMs: 11_000 }),
      /90\/s of 100\/s were achieved; .* the gateway or the way to it/,
    ],
  ])('tell what the figures leave out, and who is the limit', (ownLoad, result, message) => {
    const warnings = warningsOf(ownLoad, [result]);
    expect(warnings).toHaveLength(1);
    expect(warnings[0]).toMatch(message);
  });

  it('blame nobody where the machine was too busy to tell', () => {
    const slow = part({ achievedPerSecond: 50, completed: 500, lateCount: 500 });
    expect(warningsOf(IDLE, [slow])[1]).toMatch(/this machine was too busy to tell/);
    expect(warningsOf({ ...IDLE, cores: 1 }, [slow])[2]).toMatch(/the load process is the reason/);
  });

  it('expect no storm to leave on time', () => {
    const storm = part({
      plan: partOf('storm'),
      lateCount: 200,
      offeredPerSecond: null,
      achievedPerSecond: null,
    });
    expect(warningsOf(IDLE, [storm])).toEqual([]);
  });
});

describe('the rates of a part', () => {
  const plan = partOf('chat', { ratePerSecond: 100 });

  it('are equal where the gateway keeps up', () => {
    const rates = ratesOf(plan, {
      ...measured,
      offered: 1000,
      completed: 1000,
      offeringMs: 9_990,
      completingMs: 9_995,
    });
    expect(rates).toEqual({ offeredPerSecond: 100, achievedPerSecond: 100 });
  });

  it('differ where it takes longer', () => {
    const rates = ratesOf(plan, {
      ...measured,
      offered: 1000,
      completed: 900,
      offeringMs: 9_990,
      completingMs: 18_000,
    });
    expect(rates).toEqual({ offeredPerSecond: 100, achievedPerSecond: 50 });
  });

  it('are not told of what is due all at once', () => {
    const none = { offeredPerSecond: null, achievedPerSecond: null };
    for (const ratePerSecond of [null, 50]) {
      const storm = partOf('storm', { ratePerSecond });
      expect(ratesOf(storm, { ...measured, offered: 200, completed: 200 })).toEqual(none);
    }
    expect(ratesOf(plan, measured)).toEqual(none);
  });
});
