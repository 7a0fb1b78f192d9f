/** What of messages is kept, and how long: what expires goes back to its sender. */
import type { Clock } from '../lib/clock.ts';
import type { MessageStore } from '../ports/message-store.ts';
import { MESSAGE_ID_MEMORY_MS } from '../protocol/limits.ts';
import type { Bounces } from './bounce.ts';

/** Each row is on pages of its own in the table and its indexes: locks of more would last too long. */
const SWEEP_ROWS_MAX = 64;

/** Before which time finished message ids are forgotten. */
export function messagesCut(nowMs: number): { forgetBeforeMs: number } {
  return { forgetBeforeMs: nowMs - MESSAGE_ID_MEMORY_MS };
}

/**
 * Brings home what an interrupted bounce left, bounces expired and stale messages, and forgets message ids that were
 * finished long ago. A step that fails keeps none of the others from being done.
 *
 * @param parts.onBatch is told how many rows were touched, batch by batch
 * @returns rows touched
 * @throws what failed first, when the others are done
 */
export async function sweepMessages(parts: {
  messages: MessageStore;
  bounces: Bounces;
  clock: Clock;
  onBatch?: (rowCount: number) => void;
}): Promise<number> {
  let total = 0;
  const failures: unknown[] = [];
  // What waits on its way back is settled although the sweep may fail, and what the sweep bounces is settled after it.
  for (const step of [settle, bounceStale, sweep, settle]) {
    try {
      await step();
    } catch (error) {
      failures.push(error);
    }
  }
  if (failures.length > 0) throw failures[0];
  return total;

  async function settle(): Promise<void> {
    await parts.bounces.settle(null);
  }

  async function bounceStale(): Promise<void> {
    const bounced = await parts.bounces.bounceStale(null);
    total += bounced;
    parts.onBatch?.(bounced);
  }

  async function sweep(): Promise<void> {
    for (;;) {
      const nowMs = parts.clock.nowMs();
      const touched = await parts.messages.sweep({
        nowMs,
        ...messagesCut(nowMs),
        limit: SWEEP_ROWS_MAX,
      });
      total += touched;
      parts.onBatch?.(touched);
      // Fewer than asked for may mean that others were held just then.
      if (touched === 0) return;
      // What is on its way back leaves the front of the queue, or each batch would walk over all before it.
      await settle();
    }
  }
}
