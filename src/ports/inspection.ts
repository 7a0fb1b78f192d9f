/** What the inspector asks of storage: facts on one device or one message, never a key or a ciphertext. Reads only. */
import type { BounceReason } from '../protocol/envelope.ts';
import type { DeviceAddress } from '../protocol/ids.ts';

export interface ClaimRecord {
  claimer: DeviceAddress;
  claimId: string;
  claimedAtMs: number;
  signedPreKeyId: number;
  keyId: number | null;
  pqKeyId: number | null;
  pqLastResortPreKeyId: number | null;
}

export interface WaitingEnvelope {
  envelopeId: string;
  messageId: string;
  kind: 'message' | 'bounce';
  /** The sender of a message; the recipient that a bounce tells of. */
  peer: DeviceAddress;
  bytes: number;
  storedAtMs: number;
  expiresAtMs: number;
  /** Null unless it was put off. */
  dueAtMs: number | null;
  undecryptableCount: number;
  temporaryCount: number;
  /** Set while it is on its way back to its sender. */
  bounceReason: BounceReason | null;
}

/** What the store remembers of a message to one device. */
export interface MessageTrace {
  recipient: DeviceAddress;
  sender: DeviceAddress;
  storedAtMs: number;
  /** `delivered`: processed by the recipient, and not bounced as far as the sender's queue and memory tell. */
  state: 'waiting' | 'putOff' | 'bounced' | 'delivered';
  /** Null unless it bounced and the bounce still waits for its sender. */
  reason: BounceReason | null;
}

export interface LowDevice {
  device: DeviceAddress;
  availableCount: number;
  pqAvailableCount: number;
}

export interface InspectionStore {
  /** The newest first. */
  claimsOf(device: DeviceAddress, limit: number): Promise<ClaimRecord[]>;

  /** The first in the order of delivery, and how many there are. */
  waitingOf(device: DeviceAddress, limit: number): Promise<{ count: number; first: WaitingEnvelope[] }>;

  /**
   * How many envelopes wait for each of the devices.
   *
   * @returns by `addressKey`, without those for whom none waits; null where they could not be counted in half a second
   */
  waitingCounts(devices: readonly DeviceAddress[]): Promise<ReadonlyMap<string, number> | null>;

  /** One per recipient device that the message was stored for, as long as it is remembered; sorted by device. */
  trace(messageId: string, recipient: { userId: string; deviceId: number | null }): Promise<MessageTrace[]>;

  /**
   * Devices with keys and a pool below `threshold`, lowest first; a PQ pool counts where PQ prekeys were ever offered.
   *
   * @returns null where they could not be found in half a second: nothing may wait for an overview
   */
  lowDevices(threshold: number, limit: number): Promise<LowDevice[] | null>;
}
