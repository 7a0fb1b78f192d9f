/** What a stranger learns of who is here, where the directory is private: nothing, neither by an answer nor by its time. */
import type { Clock } from '../lib/clock.ts';
import { GatewayError } from '../protocol/errors.ts';

export interface Directory {
  /** What is told instead of `refusal`, and not before the time at which every refusal of its kind is told. */
  veiled(refusal: GatewayError, startedMs: number): GatewayError | Promise<GatewayError>;
}

/**
 * Refusals of who is not here leave at the end of such a step, counted from the request's arrival. What the store takes
 * for an unknown user, a user without keys and a user without that device differs by less than that.
 */
const STEP_MS = 50;

/** @param parts.isPrivate otherwise every refusal is told as it is, at once */
export function createDirectory({ isPrivate, clock }: { isPrivate: boolean; clock: Clock }): Directory {
  if (!isPrivate) return { veiled: (refusal) => refusal };
  return {
    veiled(refusal, startedMs) {
      if (refusal.code !== 'USER_NOT_FOUND' && refusal.code !== 'DEVICE_NOT_FOUND') return refusal;
      const takenMs = Math.max(0, clock.nowMs() - startedMs);
      const leftMs = STEP_MS - (takenMs % STEP_MS);
      return new Promise((resolve) => {
        clock.after(leftMs, () => resolve(new GatewayError('USER_NOT_FOUND')));
      });
    },
  };
}
