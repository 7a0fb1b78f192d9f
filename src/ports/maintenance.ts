/** What an operator's commands need of storage, beyond what serves clients. */
import type { DeviceAddress } from '../protocol/ids.ts';

export interface Maintenance {
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
   * @returns the devices in order, fewer than `limit` where they are the last
   */
  withdrawAfterRestore(batch: {
    after: DeviceAddress | null;
    restoredAtMs: number;
    versionMin: number;
    limit: number;
  }): Promise<{ devices: DeviceAddress[]; withdrawnCount: number }>;
}
