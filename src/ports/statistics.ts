/** What an operator watches of the store as a whole. Every read is cheap at any size: what can't be counted is estimated. */

export interface StoreStatistics {
  /** Envelopes that wait; an estimate by the engine's own statistics. */
  pendingCount: number;
  /** Of the envelope that expires first; null where none waits. */
  oldestStoredAtMs: number | null;
  /** Devices with keys, by unclaimed one-time prekeys: how many have at most `upTo`, not cumulated; the last has no bound. */
  devicesByAvailable: readonly { upTo: number | null; deviceCount: number }[];
  /** What part of the devices was looked at for it. */
  sampledShare: number;
}

export interface Statistics {
  read(): Promise<StoreStatistics>;
}
