/** What delivery needs of storage: a durable queue per device whose reads and deletions prove who is asking. */
import type { BounceReason } from '../protocol/envelope.ts';
import type { DeviceLists } from '../protocol/errors.ts';
import type { FailedReason } from '../protocol/events.ts';
import type { DeviceAddress } from '../protocol/ids.ts';

export interface MessageToStore {
  deviceId: number;
  registrationId: number;
  type: number;
  /** Base64, as it came: nobody between two clients has a use for the bytes. */
  content: string;
}

export interface StoreRequest {
  sender: DeviceAddress;
  messageId: string;
  recipientUserId: string;
  messages: readonly MessageToStore[];
  /** Store for the devices that match although others don't. */
  sendAnyway: boolean;
  nowMs: number;
  expiresAtMs: number;
  /** A device that holds this many messages takes no more. */
  queueMax: number;
}

export interface StoreResult extends DeviceLists {
  storedAtMs: number;
  /** Stored now, or by an earlier request with this `messageId`. */
  accepted: number[];
  /** Matched, but their queue is full. */
  full: number[];
  /** False where the lists forbade it: then nothing was stored. */
  stored: boolean;
  /** What was stored now, with what the storing statement itself knows of the recipient device. */
  fresh: StoredMessage[];
}

/** A message that was just stored, and what may spare reading it back: it proves as much as a read does. */
export interface StoredMessage {
  deviceId: number;
  sequence: number;
  id: string;
  keyVersion: number;
  identityVersion: number;
  /** The number of the connection that was served last. */
  fence: number;
  /** Everything else of the device that waited, in flight or not; null where it was more than WAITING_TOLD_MAX. */
  waiting: number[] | null;
}

/** Of so many waiting envelopes a just-stored message tells. */
export const WAITING_TOLD_MAX = 32;

/** A queued envelope. `sequence` orders a device's queue and names a row; it is no commit order. */
export interface QueuedEnvelope {
  sequence: number;
  /** UUID; the same over redeliveries. */
  id: string;
  messageId: string;
  storedAtMs: number;
  body:
    | { kind: 'message'; sender: DeviceAddress; type: number; content: string }
    | { kind: 'bounce'; recipient: DeviceAddress; reason: BounceReason };
}

/** A message on its way back to its sender. */
export interface BouncedMessage {
  recipient: DeviceAddress;
  sender: DeviceAddress;
  messageId: string;
  reason: BounceReason;
}

/** Who asks: the device and the number of its connection. A superseded number reads and deletes nothing. */
export interface Reader {
  device: DeviceAddress;
  fence: number;
}

/** What every read proves about the device, in the same statement that reads. */
export interface DeviceProof {
  keyVersion: number;
  identityVersion: number;
  /** False for a device that never uploaded, and from a reset until the next upload. */
  hasKeys: boolean;
  /** The number of the connection that was served last. */
  fence: number;
  availableCounts: { ec: number; pq: number };
  /** Whether the device has ever offered one-time PQ prekeys under its present identity. */
  offersPq: boolean;
  countVersion: number;
  /** `countVersion` when a pool last crossed the threshold or reached zero. */
  lowNoticeVersion: number;
  /** Tokens issued until then speak for the device no more; null where it was never revoked. */
  revokedAtMs: number | null;
}

export interface Page {
  proof: DeviceProof;
  /** In order; nothing stale, expired or not yet due. */
  envelopes: QueuedEnvelope[];
  /** Messages of an older key set, and expired ones, found on the way: to be bounced. */
  unreadable: { sequence: number; reason: BounceReason }[];
  /** The lowest sequence that waits, in flight or not; null for an empty queue. */
  oldestSequence: number | null;
  /** When the next envelope that was put off falls due; null where none was. */
  nextDueAtMs: number | null;
  /** Whether anything may be due beyond the page and what was in flight. */
  more: boolean;
}

/**
 * Every call may throw GatewayError UNAVAILABLE when the store can't be reached: whether it was done is unknown then, and
 * doing it again does no harm.
 */
export interface MessageStore {
  /**
   * Stores the messages for the recipient's devices, each stamped with its device's identity version, unless
   * the addressed devices don't match. Durable when it resolves. A repeated (sender, messageId, device) is
   * stored once, also after the first copy was processed.
   *
   * @returns null where the recipient user has no device with keys
   */
  store(request: StoreRequest): Promise<StoreResult | null>;

  /**
   * Numbers a new connection of the device.
   *
   * @returns `fence`, which rises over all nodes and restarts, and how things stand with its low-key notices and its
   *   revocation
   */
  connect(
    device: DeviceAddress,
  ): Promise<{ fence: number; lowNoticeVersion: number; revokedAtMs: number | null }>;

  /**
   * Makes `reader.fence` the one that may read and delete, if the key version is still `keyVersion` and no
   * newer connection was served.
   *
   * @returns what was proven, how many envelopes wait, and the highest sequence among them (0 for none);
   *   `served` is false where the proof failed, and nothing has changed then; null for an unknown device
   */
  serve(
    reader: Reader,
    keyVersion: number,
    nowMs: number,
  ): Promise<{ proof: DeviceProof; served: boolean; pendingCount: number; newestSequence: number } | null>;

  /** The first envelopes of the queue that are not in `inFlight`; at most `envelopesMax`, and `bytesMax` beyond the first. */
  read(
    reader: Reader,
    page: { inFlight: readonly number[]; envelopesMax: number; bytesMax: number; nowMs: number },
  ): Promise<Page | null>;

  /** @returns the proof without a page: what a look at a device whose gate is closed needs; null for an unknown device */
  prove(device: DeviceAddress): Promise<DeviceProof | null>;

  /** Deletes what was processed. @returns how many were still there and this reader's to delete */
  acknowledge(reader: Reader, sequences: readonly number[]): Promise<number>;

  /**
   * Puts failed envelopes off by the delays of their reason, counted per envelope; `undecryptable` ones that
   * were offered often enough turn into bounces. Bounces that fail are dropped after as many offers.
   *
   * @returns when the earliest falls due (null where none was put off), and whether anything became a bounce
   */
  putOff(
    reader: Reader,
    failures: readonly { sequence: number; reason: FailedReason }[],
    nowMs: number,
  ): Promise<{ nextDueAtMs: number | null; bounced: boolean }>;

  /** Turns pending messages into bounces: first a state of the recipient's row, which an acknowledgement may beat. */
  bounce(
    device: DeviceAddress,
    unreadable: readonly { sequence: number; reason: BounceReason }[],
  ): Promise<void>;

  /**
   * Copies bounced messages to their senders, each exactly once however often it is tried, and removes the rows.
   *
   * @param of one recipient device, or null for any
   * @returns what bounced, the senders whose queues grew, and whether more is left
   */
  settleBounces(
    of: DeviceAddress | null,
    now: { nowMs: number; expiresAtMs: number; limit: number },
  ): Promise<{ bounced: BouncedMessage[]; senders: DeviceAddress[]; more: boolean }>;

  /**
   * Turns messages that bear the stamp of a key set that was wiped into bounces, at most `limit` of them.
   *
   * @param of one device, or null for all whose keys were wiped within the last hour
   * @returns how many
   */
  bounceStale(of: DeviceAddress | null, cut: { nowMs: number; limit: number }): Promise<number>;

  /**
   * Turns messages that expired into bounces, drops expired bounces, and forgets message ids that were finished before
   * `forgetBeforeMs`; at most `limit` rows of each. A kind that fails keeps none of the others from being swept.
   *
   * @returns rows touched
   * @throws what failed first, when the others are done
   */
  sweep(cut: { nowMs: number; forgetBeforeMs: number; limit: number }): Promise<number>;

  /** Notes that `readers` are still served, for those of whom that was not noted for half a day. */
  noteServed(readers: readonly Reader[], nowMs: number): Promise<void>;

  /** Devices that were revoked since then, the latest first. */
  revokedSince(sinceMs: number, limit: number): Promise<DeviceAddress[]>;

  /**
   * Of `readers`, those whose device has changed its keys, ran low, is served under another number or gone, or has an
   * envelope due beyond those in flight.
   */
  inNeedOfALook(
    readers: readonly (Reader & { keyVersion: number; lowNoticeVersion: number; inFlight: number })[],
    nowMs: number,
  ): Promise<DeviceAddress[]>;
}
