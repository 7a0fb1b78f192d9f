/**
 * The way between nodes. A device is leased to the node that holds its newest connection; pokes say
 * "look at this device" and carry nothing else. Pokes and displacements may be lost: the store is the truth,
 * and whoever serves a device looks again after a gap and on a slow sweep.
 */
import type { DeviceAddress } from '../protocol/ids.ts';

export interface Lease {
  device: DeviceAddress;
  /** The connection's number, from the store's sequence: the higher one wins on every node. */
  fence: number;
}

export interface BusListener {
  /** Something of this device changed: its queue, its keys or its counts. */
  onPoke(device: DeviceAddress): void;
  /** A newer connection of the device took over, here or elsewhere; `lease` is the one that was lost. */
  onDisplaced(lease: Lease): void;
  /** Pokes may have been lost: look at every device that is served here. */
  onGap(): void;
}

export interface BusProbes {
  /** Round trip of the last one that came back; null before the first. */
  lagMs: number | null;
  /** Those that did not come back in time. */
  failureCount: number;
}

export interface Bus {
  /**
   * Resolves when pokes for this node can arrive; with the link away, after a bounded wait, and `onGap` follows.
   *
   * @throws Error with one sentence for the operator where the link can never come as it is configured
   */
  start(listener: BusListener): Promise<void>;

  /**
   * Leases the device to this node. From when it resolves, pokes for the device reach this node's listener,
   * and every connection with a lower number has been told `onDisplaced`, or will be told once its node can be
   * reached. Resolves false where a higher number holds the lease. While the link is away the lease holds on
   * this node alone and is announced when the link is back.
   */
  acquire(lease: Lease): Promise<boolean>;

  /** Gives the lease up; does nothing where a higher number holds it. Never throws. */
  release(lease: Lease): void;

  /** Tells whoever serves these devices to look. Returns at once, never throws. */
  poke(devices: readonly DeviceAddress[]): void;

  /** Null while the link works; otherwise why not, for `/readyz`. */
  trouble(): string | null;

  /** How the link's own probes fare, since the start; null where there is no link that could lag. */
  probes(): BusProbes | null;

  stop(): Promise<void>;
}
