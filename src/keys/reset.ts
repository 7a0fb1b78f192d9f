/** Reset: all of a device's keys go; what remains is its versions and the ids that may never come back. */
import type { Clock } from '../lib/clock.ts';
import type { KeyStore } from '../ports/key-store.ts';
import type { DeviceLocks } from '../ports/lock.ts';
import type { ParsedInput, RequestData } from '../protocol/events.ts';
import type { DeviceAddress } from '../protocol/ids.ts';
import { type KeyChange, refuseLateChange, untouched, wipeKeySet, withCourtesyLock } from './key-set.ts';

/**
 * Wipes the key set; messages that wait for it turn into bounces. Doing it twice is one reset.
 *
 * @throws GatewayError KEYS_OUT_OF_SYNC, UNAVAILABLE; nothing has changed then
 */
export async function resetKeys(
  parts: { store: KeyStore; locks: DeviceLocks; clock: Clock },
  device: DeviceAddress,
  input: ParsedInput<'resetKeys'>,
): Promise<KeyChange<RequestData<'resetKeys'>>> {
  return await withCourtesyLock(parts.locks, device, async () =>
    parts.store.change(device, async (keys) => {
      const { current } = keys;
      if (current.identity === null) return untouched({ keyVersion: current.keyVersion });
      refuseLateChange(input.ifKeyVersion, current, true);
      const keyVersion = await wipeKeySet(keys, 'RECIPIENT_KEYS_RESET', parts.clock.nowMs());
      return { data: { keyVersion }, keysChanged: true, rotation: false, ranLow: false, wiped: true };
    }),
  );
}
