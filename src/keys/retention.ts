/** What of keys is kept, and how long: claims as records for a while, their ids for good. */
import type { Clock } from '../lib/clock.ts';
import type { KeyStore } from '../ports/key-store.ts';
import { CLAIM_MEMORY_MS } from '../protocol/limits.ts';

/** Replaced signed prekeys stay readable: an old claim's bundle names them. */
const REPLACED_RETENTION_MS = 30 * 24 * 3_600_000;
const SWEEP_ROWS_MAX = 500;

/**
 * Folds old claims into used ids, and drops signed prekeys that were replaced long ago.
 *
 * @returns rows removed
 */
export async function sweepKeys(parts: {
  store: KeyStore;
  clock: Clock;
  claimedPreKeyRetentionMs: number;
}): Promise<number> {
  const nowMs = parts.clock.nowMs();
  let total = 0;
  for (;;) {
    const removed = await parts.store.sweep({
      // A repeated claim must find its answer, however short the retention is set.
      claimedBeforeMs: nowMs - Math.max(parts.claimedPreKeyRetentionMs, CLAIM_MEMORY_MS),
      replacedBeforeMs: nowMs - REPLACED_RETENTION_MS,
      limit: SWEEP_ROWS_MAX,
    });
    total += removed;
    if (removed < SWEEP_ROWS_MAX) return total;
  }
}
