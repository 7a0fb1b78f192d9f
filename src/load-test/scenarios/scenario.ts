/** What a scenario is: how its devices get ready, what one operation does, and how it ends. */
import type { Clock } from '../../lib/clock.ts';
import type { ClaimCounts } from '../claim-ledger.ts';
import type { LoadDevice } from '../device.ts';
import type { PartPlan } from '../load-plan.ts';
import type { MessageCounts } from '../message-ledger.ts';
import type { Meter } from '../meter.ts';
import type { Departure } from '../pacer.ts';

/** What a scenario has to work with. */
export interface Stage {
  part: PartPlan;
  devices: readonly LoadDevice[];
  clock: Clock;
  meter: Meter;
  /** From 0 to 1. */
  random(): number;
  /** Raised when the user wants the test to end: what is left of it is left out. */
  interrupted: AbortSignal;
  /** Raised when nothing is waited for any more: whoever tries again and again gives up. */
  over: AbortSignal;
}

export interface Scenario {
  /** Brings one device to where its operations can begin. @throws Failure */
  prepare(device: LoadDevice): Promise<void>;
  /** What needs all devices to be prepared. @throws Failure */
  prepareAll?(): Promise<void>;
  /** The first operation is about to be due. */
  start?(): void;
  /**
   * Carries out one operation, and tells the meter of its steps.
   *
   * @returns null where it can't begin, since no device is free for it; else resolves when it has succeeded
   * @throws Failure where it has not
   */
  operate(departure: Departure): Promise<void> | null;
  /** No operation will be due any more. */
  stop?(): void;
  /** Nothing is under way any more, or not waited for: asks the gateway for what has not arrived. */
  collect?(): Promise<void>;
  messages?(): MessageCounts;
  claims?(): ClaimCounts;
}
