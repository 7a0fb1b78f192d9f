/** What an operator's commands need of storage, beyond what serves clients. */
import type { DeviceAddress } from '../protocol/ids.ts';

/** Pools of one-time prekeys; `consumed` counts what was handed out under present identities. */
export interface PoolTotals {
  available: number;
  consumed: number;
}

export interface StoreTotals {
  deviceCount: number;
  /** Devices that have a key set. */
  deviceWithKeysCount: number;
  ec: PoolTotals;
  pq: PoolTotals;
  pendingCount: number;
}

export interface DeviceTotals {
  hasKeys: boolean;
  keyVersion: number;
  countVersion: number;
  ec: PoolTotals;
  pq: PoolTotals;
  updatedAtMs: number | null;
  pendingCount: number;
  /** When the device's gate was opened last, or was last found open; null where it never was. */
  servedAtMs: number | null;
  restoredAtMs: number | null;
}

/** Before which times things are due to be swept. */
export interface SweepCut {
  nowMs: number;
  claimedBeforeMs: number;
  replacedBeforeMs: number;
  forgetBeforeMs: number;
  /** Null where no device is ever idle. */
  idleBeforeMs: number | null;
}

export interface SweepDue {
  claimCount: number;
  signedPreKeyCount: number;
  expiredMessageCount: number;
  rememberedMessageCount: number;
  idleDeviceCount: number;
}

/**
 * Each takes as long as it needs, within a quarter of an hour.
 *
 * @throws GatewayError UNAVAILABLE when the store can't be reached; nothing has changed then
 */
export interface Maintenance {
  /** Counts everything, exactly: seconds at ten million rows. */
  totals(): Promise<StoreTotals>;

  /** Null for a device that never uploaded. */
  totalsOf(device: DeviceAddress): Promise<DeviceTotals | null>;

  /** What a sweep would find; changes nothing. */
  dueForSweep(cut: SweepCut): Promise<SweepDue>;

  /** How many devices there are, with or without keys. */
  countDevices(): Promise<number>;

  /**
   * Lifts the numbers of connections and messages over all that were given in a time that a restored backup lost, so
   * that a lease, or an acknowledgement on its way, that bears an old number means nothing any more.
   */
  liftSequences(restoredAtMs: number): Promise<void>;

  /**
   * Of the next devices in the order of their addresses, in one transaction: makes every unclaimed one-time prekey's id
   * unusable for good, lifts the versions over `versionMin`, takes the served connection's right to read and delete,
   * and notes that the client has to compare its keys.
   *
   * @param batch.after the last device of the batch before; null for the first batch
   * @param batch.keysMax after so many keys no further device is taken
   * @returns the devices in order; none where there are no more
   */
  withdrawAfterRestore(batch: {
    after: DeviceAddress | null;
    restoredAtMs: number;
    versionMin: number;
    devicesMax: number;
    keysMax: number;
  }): Promise<{ devices: DeviceAddress[]; withdrawnCount: number }>;
}
