/** Withdrawal: ids whose private halves are lost leave the pool and may never be offered again. */
import type { Clock } from '../lib/clock.ts';
import type { KeyStore } from '../ports/key-store.ts';
import { GatewayError } from '../protocol/errors.ts';
import type { ParsedInput, RequestData } from '../protocol/events.ts';
import type { DeviceAddress } from '../protocol/ids.ts';
import { draftOf, fellLow, type KeyChange, untouched } from './key-set.ts';

/** @throws GatewayError BAD_REQUEST where too many ids were never seen here, UNAVAILABLE; nothing was withdrawn then */
export async function withdrawPreKeys(
  parts: { store: KeyStore; clock: Clock; lowThreshold: number },
  device: DeviceAddress,
  input: ParsedInput<'withdrawPreKeys'>,
): Promise<KeyChange<RequestData<'withdrawPreKeys'>>> {
  return await parts.store.change(device, async (keys) => {
    const draft = draftOf(keys.current);
    let withdrawnCount = 0;
    let ranLow = false;
    if (keys.current.identity !== null) {
      const { canonicalKey } = keys.current.identity;
      const lists = [
        ['ec', 'preKeyIds', input.preKeyIds ?? []],
        ['pq', 'pqPreKeyIds', input.pqPreKeyIds ?? []],
      ] as const;
      for (const [kind, field, keyIds] of lists) {
        const removed = await keys.withdraw(kind, canonicalKey, keyIds);
        if (removed === null) {
          const message = 'too many ids were withdrawn that the server had never seen';
          throw new GatewayError('BAD_REQUEST', `${field}: ${message}`, {
            details: { issues: [{ path: [field], message }] },
          });
        }
        draft.availableCounts[kind] -= removed;
        withdrawnCount += removed;
      }
      if (withdrawnCount > 0) draft.countVersion += 1;
      draft.updatedAtMs = parts.clock.nowMs();
      ranLow = fellLow(keys.current.availableCounts, draft.availableCounts, parts.lowThreshold);
      await keys.save(draft, { ranLow });
    }
    const data = {
      withdrawnCount,
      availableCount: draft.availableCounts.ec,
      pqAvailableCount: draft.availableCounts.pq,
      countVersion: draft.countVersion,
    };
    return { ...untouched(data), ranLow };
  });
}
