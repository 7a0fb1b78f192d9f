/** What of messages is kept, and how long: what expires goes back to its sender. */
import type { Clock } from '../lib/clock.ts';
import type { MessageStore } from '../ports/message-store.ts';
import { MESSAGE_ID_MEMORY_MS } from '../protocol/limits.ts';
import type { Bounces } from './bounce.ts';

const SWEEP_ROWS_MAX = 500;

/**
 * Bounces expired and stale messages, forgets message ids that were finished long ago, and brings home what an
 * interrupted bounce left.
 *
 * @returns rows touched
 */
export async function sweepMessages(parts: {
  messages: MessageStore;
  bounces: Bounces;
  clock: Clock;
}): Promise<number> {
  let total = 0;
  for (;;) {
    const nowMs = parts.clock.nowMs();
    const touched = await parts.messages.sweep({
      nowMs,
      forgetBeforeMs: nowMs - MESSAGE_ID_MEMORY_MS,
      limit: SWEEP_ROWS_MAX,
    });
    total += touched;
    if (touched < SWEEP_ROWS_MAX) break;
  }
  await parts.bounces.settle(null);
  return total;
}
