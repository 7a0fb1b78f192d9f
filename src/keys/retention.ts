/** What of keys is kept, and how long: claims as records for a while, their ids for good. */
import type { Clock } from '../lib/clock.ts';
import type { KeyStore } from '../ports/key-store.ts';
import { CLAIM_MEMORY_MS } from '../protocol/limits.ts';

/** Replaced signed prekeys stay readable: an old claim's bundle names them. */
const REPLACED_RETENTION_MS = 30 * 24 * 3_600_000;
const SWEEP_ROWS_MAX = 500;

/** Before which times claims and replaced signed prekeys are due. */
export function keysCut(nowMs: number, claimedPreKeyRetentionMs: number) {
  return {
    // A repeated claim must find its answer, however short the retention is set.
    claimedBeforeMs: nowMs - Math.max(claimedPreKeyRetentionMs, CLAIM_MEMORY_MS),
    replacedBeforeMs: nowMs - REPLACED_RETENTION_MS,
  };
}

/**
 * Folds old claims into used ids, and drops signed prekeys that were replaced long ago.
 *
 * @param parts.onBatch is told how many rows went, batch by batch
 * @returns rows removed
 */
export async function sweepKeys(parts: {
  store: KeyStore;
  clock: Clock;
  claimedPreKeyRetentionMs: number;
  onBatch?: (rowCount: number) => void;
}): Promise<number> {
  const cut = keysCut(parts.clock.nowMs(), parts.claimedPreKeyRetentionMs);
  let total = 0;
  for (;;) {
    const removed = await parts.store.sweep({ ...cut, limit: SWEEP_ROWS_MAX });
    total += removed;
    parts.onBatch?.(removed);
    if (removed < SWEEP_ROWS_MAX) return total;
  }
}
