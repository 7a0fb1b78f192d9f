/**
 * Keeps two nodes from crowding one device. A courtesy, never what makes claims exact: that is the row lock's work,
 * so holding on without the lock is slower and still right.
 */
import type { DeviceAddress } from '../protocol/ids.ts';

export interface HeldLocks {
  /** Those of the asked devices that are held now, as `addressKey`s. */
  held: ReadonlySet<string>;
  /** Gives back what is still owned; never throws, never frees another owner's lock. */
  release(): Promise<void>;
}

export interface DeviceLocks {
  /**
   * Tries to lock each of the devices, all in one round trip per engine node, and holds those that were free.
   * Every lock expires by itself. With the engine away, every device counts as held: correctness is the store's.
   *
   * @param devices no duplicates
   * @param lockMs after which time they expire; without it some seconds, more than a claim or an upload takes
   */
  acquire(devices: readonly DeviceAddress[], lockMs?: number): Promise<HeldLocks>;
}
