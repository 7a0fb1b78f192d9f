/** Revocation: a device that is lost or was taken from its user is shut out, and its keys go. */
import type { Clock } from '../lib/clock.ts';
import type { KeyStore } from '../ports/key-store.ts';
import type { DeviceLocks } from '../ports/lock.ts';
import type { DeviceAddress } from '../protocol/ids.ts';
import { type KeyChange, wipeKeySet, withCourtesyLock } from './key-set.ts';

/**
 * Ends every token of the device that was issued until now, wipes its key set, and turns what waits for it into
 * bounces. Ids that were used stay used, versions go on rising: a token issued later may start afresh. Doing it twice
 * ends the tokens of the time between.
 *
 * @throws GatewayError UNAVAILABLE; nothing has changed then
 */
export async function revokeDevice(
  parts: { store: KeyStore; locks: DeviceLocks; clock: Clock },
  device: DeviceAddress,
): Promise<KeyChange<{ keyVersion: number; revokedAtMs: number; hadKeys: boolean }>> {
  return await withCourtesyLock(parts.locks, device, async () =>
    parts.store.change(device, async (keys) => {
      const nowMs = parts.clock.nowMs();
      await keys.revoke(nowMs);
      const hadKeys = keys.current.identity !== null;
      const keyVersion = hadKeys ? await wipeKeySet(keys, 'DEVICE_REVOKED', nowMs) : keys.current.keyVersion;
      return {
        data: { keyVersion, revokedAtMs: nowMs, hadKeys },
        keysChanged: true,
        rotation: false,
        ranLow: false,
        wiped: hadKeys,
      };
    }),
  );
}
