/**
 * What is done to the keys of every device after a backup was restored. In the time that was lost, keys that the backup
 * offers may have been handed out, and keys that it never saw may have been uploaded and handed out: nobody knows
 * which. So every unclaimed key is withdrawn for good, and each client must compare what it holds before it may offer
 * new ones.
 */
import type { Clock } from '../lib/clock.ts';
import type { Maintenance } from '../ports/maintenance.ts';
import type { DeviceAddress } from '../protocol/ids.ts';

const BATCH_DEVICES_MAX = 200;
/** Half a second's work: gateways that run beside it wait for its rows. */
const BATCH_KEYS_MAX = 20_000;

/**
 * Versions go on from the time of the restore: no device changes its keys once a millisecond, so they lie beyond all
 * that was seen before, also where the same backup is restored a second time.
 */
export function versionAfterRestore(nowMs: number): number {
  return nowMs;
}

/**
 * Withdraws and tombstones every unclaimed one-time prekey, and closes every gate. Safe to be run again, also when
 * gateways have been started since; what was uploaded meanwhile is withdrawn then as well.
 *
 * @param parts.onBatch is told of the devices of each batch, when it is committed
 * @returns how many devices there were, and how many keys were withdrawn
 * @throws GatewayError UNAVAILABLE when the store can't be reached; what is done stays done
 */
export async function withdrawAfterRestore(parts: {
  maintenance: Maintenance;
  clock: Clock;
  onBatch(devices: readonly DeviceAddress[]): void;
}): Promise<{ deviceCount: number; withdrawnCount: number }> {
  const { maintenance, clock, onBatch } = parts;
  const restoredAtMs = clock.nowMs();
  await maintenance.liftSequences(restoredAtMs);
  let deviceCount = 0;
  let withdrawnCount = 0;
  let after: DeviceAddress | null = null;
  for (;;) {
    const batch = await maintenance.withdrawAfterRestore({
      after,
      restoredAtMs,
      versionMin: versionAfterRestore(restoredAtMs),
      devicesMax: BATCH_DEVICES_MAX,
      keysMax: BATCH_KEYS_MAX,
    });
    after = batch.devices.at(-1) ?? null;
    if (after === null) return { deviceCount, withdrawnCount };
    deviceCount += batch.devices.length;
    withdrawnCount += batch.withdrawnCount;
    onBatch(batch.devices);
  }
}
