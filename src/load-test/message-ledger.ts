/** The books of messages: what was promised of each, and what came of it. Knows no socket and no clock. */

export interface MessageCounts {
  sent: number;
  /** Acknowledged by the gateway as stored. */
  stored: number;
  /** Arrived at least once. */
  delivered: number;
  /** Arrived again under the same envelope id, as "at least once" allows: a client drops it by that id. */
  redelivered: number;
  /** Stored, and neither arrived nor came back until the gateway said that the recipient's queue is empty. */
  lost: number;
  /** Stored, and neither arrived nor came back, where the recipient's queue could not be emptied to the end. */
  unproven: number;
  /** Arrived under a second envelope id: no client could tell that it is the same. */
  doubled: number;
  /** Arrived after one that its sender sent only when this one was acknowledged as stored. */
  outOfOrder: number;
  /** Came back as a bounce. */
  bounced: number;
  /** Of no message of this run: left over from an earlier one, say. */
  foreign: number;
}

export interface Message {
  readonly messageId: string;
  /** From when its latency counts. */
  readonly startMs: number;
}

interface Entry extends Message {
  /** Messages of one lane come from one device and go to one device. */
  readonly lane: Lane;
  /** Number in the order of everything that happened in these books. */
  readonly sentAt: number;
  storedAt: number | null;
  hasBounced: boolean;
  envelopeId: string | null;
  isDoubled: boolean;
}

interface Lane {
  readonly recipient: string;
  /** The largest `sentAt` of what has arrived. */
  latestSentAt: number;
}

export class MessageLedger {
  readonly #entries = new Map<string, Entry>();
  readonly #lanes = new Map<string, Lane>();
  #time = 0;
  /** By recipient: as of when its queue was emptied. */
  readonly #emptied = new Map<string, number>();
  #stored = 0;
  #delivered = 0;
  #redelivered = 0;
  #doubled = 0;
  #outOfOrder = 0;
  #bounced = 0;
  #foreign = 0;

  sent(message: { messageId: string; sender: string; recipient: string; startMs: number }): void {
    const { sender, recipient } = message;
    const laneName = `${sender} ${recipient}`;
    let lane = this.#lanes.get(laneName);
    if (lane === undefined) {
      lane = { recipient, latestSentAt: 0 };
      this.#lanes.set(laneName, lane);
    }
    this.#entries.set(message.messageId, {
      messageId: message.messageId,
      startMs: message.startMs,
      lane,
      sentAt: ++this.#time,
      storedAt: null,
      hasBounced: false,
      envelopeId: null,
      isDoubled: false,
    });
  }

  /** The gateway said that it is stored. */
  stored(messageId: string): void {
    const entry = this.#entries.get(messageId);
    if (entry === undefined || entry.storedAt !== null) return;
    entry.storedAt = ++this.#time;
    this.#stored += 1;
  }

  /** @returns the message where this is its first arrival; null for every other one */
  arrived({ messageId, envelopeId }: { messageId: string; envelopeId: string }): Message | null {
    const entry = this.#entries.get(messageId);
    if (entry === undefined) {
      this.#foreign += 1;
      return null;
    }
    if (entry.envelopeId !== null) {
      if (entry.envelopeId === envelopeId) this.#redelivered += 1;
      else if (!entry.isDoubled) {
        entry.isDoubled = true;
        this.#doubled += 1;
      }
      return null;
    }
    entry.envelopeId = envelopeId;
    this.#delivered += 1;
    // Only where it was stored first is an order promised: what was under way at once may arrive as it likes.
    if (entry.storedAt !== null && entry.storedAt < entry.lane.latestSentAt) this.#outOfOrder += 1;
    entry.lane.latestSentAt = Math.max(entry.lane.latestSentAt, entry.sentAt);
    return entry;
  }

  bounced(messageId: string): void {
    const entry = this.#entries.get(messageId);
    if (entry === undefined) {
      this.#foreign += 1;
      return;
    }
    if (entry.hasBounced) return;
    entry.hasBounced = true;
    this.#bounced += 1;
  }

  /** Recipients of stored messages that have neither arrived nor come back. */
  awaitedRecipients(): Set<string> {
    return new Set(this.#missing().map(({ lane }) => lane.recipient));
  }

  /** The present number in the order of everything that happened in these books. */
  get time(): number {
    return this.#time;
  }

  /** All that the recipient had stored by `asOf` has been handed over, on a connection that was made after it. */
  queueWasEmptied(recipient: string, asOf: number): void {
    this.#emptied.set(recipient, asOf);
  }

  #missing(): Entry[] {
    return [...this.#entries.values()].filter(
      ({ storedAt, envelopeId, hasBounced }) => storedAt !== null && envelopeId === null && !hasBounced,
    );
  }

  counts(): MessageCounts {
    const missing = this.#missing();
    const lost = missing.filter(
      ({ storedAt, lane }) => storedAt! <= (this.#emptied.get(lane.recipient) ?? -1),
    ).length;
    return {
      sent: this.#entries.size,
      stored: this.#stored,
      delivered: this.#delivered,
      redelivered: this.#redelivered,
      lost,
      unproven: missing.length - lost,
      doubled: this.#doubled,
      outOfOrder: this.#outOfOrder,
      bounced: this.#bounced,
      foreign: this.#foreign,
    };
  }
}
