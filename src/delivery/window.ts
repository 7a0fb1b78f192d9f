/** What was pushed over one socket until what became of it is stored: how much it is, and what the client says of it. */
import type { QueuedEnvelope } from '../ports/message-store.ts';
import { decodedLength } from '../protocol/base64.ts';
import type { FailedReason, MessagesAcknowledgement } from '../protocol/events.ts';
import { CONTENT_BYTES_MAX, WINDOW_BYTES_MAX, WINDOW_ENVELOPES_MAX } from '../protocol/limits.ts';

/** Envelopes that were pushed together, until what became of them is stored. */
export interface PushedPage {
  /** Of its envelopes, in the order in which they were pushed. */
  ids: string[];
  sequences: number[];
  bytes: number;
  pushedAtMs: number;
  /** The gate was closed after it was pushed: the client may have dropped it, and it may be offered again. */
  isVoid: boolean;
  /** Its acknowledgement has come and is being stored. */
  isSettling: boolean;
}

/** What was pushed and not yet acknowledged. */
export interface WindowFacts {
  count: number;
  bytes: number;
  /** Whether nothing more is pushed before the client acknowledges something. */
  isFull: boolean;
  oldestPushAtMs: number | null;
}

/** A class, because every open socket has one. */
export class PushWindow {
  /** A list, which holds less than a set while it is empty, as it is on an idle socket. */
  readonly #pages: PushedPage[] = [];

  /** A page that is about to be pushed, of nothing yet. */
  open(pushedAtMs: number): PushedPage {
    const page: PushedPage = {
      ids: [],
      sequences: [],
      bytes: 0,
      pushedAtMs,
      isVoid: false,
      isSettling: false,
    };
    this.#pages.push(page);
    return page;
  }

  close(page: PushedPage): void {
    const at = this.#pages.indexOf(page);
    if (at >= 0) this.#pages.splice(at, 1);
  }

  /** The gate was closed: what was pushed may be offered again. */
  voidAll(): void {
    for (const page of this.#pages) page.isVoid = true;
  }

  /**
   * What the window still takes; null where an acknowledgement must come first, or its deletion where many are under
   * way. A page holds its first envelope whatever its size.
   */
  room(): { envelopes: number; bytes: number } | null {
    let envelopes = WINDOW_ENVELOPES_MAX;
    let bytes = WINDOW_BYTES_MAX;
    let settling = 0;
    for (const page of this.#pages) {
      if (page.isSettling) settling += page.sequences.length;
      else {
        envelopes -= page.sequences.length;
        bytes -= page.bytes;
      }
    }
    const isFull = envelopes <= 0 || bytes < CONTENT_BYTES_MAX || settling >= WINDOW_ENVELOPES_MAX;
    return isFull ? null : { envelopes, bytes };
  }

  /** What is not to be read again. */
  inFlight(): number[] {
    return this.#pages.flatMap((page) => (page.isVoid ? [] : page.sequences));
  }

  /** Whether it is in flight. */
  has(sequence: number): boolean {
    for (const page of this.#pages) {
      if (page.isVoid) continue;
      for (const pushed of page.sequences) if (pushed === sequence) return true;
    }
    return false;
  }

  /** Whether something that counts is not settled, of a number up to `boundary`. */
  holdsUpTo(boundary: number): boolean {
    for (const page of this.#pages) {
      if (page.isVoid && !page.isSettling) continue;
      for (const sequence of page.sequences) if (sequence <= boundary) return true;
    }
    return false;
  }

  facts(): WindowFacts {
    let count = 0;
    let bytes = 0;
    let oldestPushAtMs: number | null = null;
    for (const page of this.#pages) {
      if (page.isSettling) continue;
      oldestPushAtMs ??= page.pushedAtMs;
      count += page.sequences.length;
      bytes += page.bytes;
    }
    const isFull = count >= WINDOW_ENVELOPES_MAX || bytes > WINDOW_BYTES_MAX - CONTENT_BYTES_MAX;
    return { count, bytes, isFull, oldestPushAtMs };
  }
}

export function addTo(page: PushedPage, envelope: QueuedEnvelope): void {
  page.ids.push(envelope.id);
  page.sequences.push(envelope.sequence);
  page.bytes += contentBytesOf(envelope);
}

export function contentBytesOf({ body }: QueuedEnvelope): number {
  return body.kind === 'message' ? decodedLength(body.content) : 0;
}

/** By the numbers of its envelopes. */
export interface PageOutcome {
  processed: number[];
  failures: { sequence: number; reason: FailedReason }[];
}

/** What a client said of a page. What it left out is offered again. */
export function sortedOut(
  { ids, sequences }: PushedPage,
  acknowledgement: MessagesAcknowledgement,
): PageOutcome {
  /** Null from when the client has said what became of it. */
  const left: (number | null)[] = [...sequences];
  let places: Map<string, number> | null = null;
  /** @param at where it stands if the client answers in the order of the push, as most do */
  const take = (id: string, at: number): number | null => {
    let place: number | undefined = at;
    if (ids[at] !== id) {
      places ??= new Map(ids.map((each, nth) => [each, nth]));
      place = places.get(id);
    }
    const sequence = place === undefined ? null : left[place]!;
    if (place !== undefined) left[place] = null;
    return sequence;
  };
  const processed: number[] = [];
  acknowledgement.processed.forEach((id, at) => {
    const sequence = take(id, at);
    if (sequence !== null) processed.push(sequence);
  });
  const failures: { sequence: number; reason: FailedReason }[] = [];
  acknowledgement.failed?.forEach(({ id, reason }, at) => {
    const sequence = take(id, at);
    if (sequence !== null) failures.push({ sequence, reason });
  });
  for (const sequence of left) if (sequence !== null) failures.push({ sequence, reason: 'temporary' });
  return { processed, failures };
}

/** The acknowledgement as it counts: of the page's envelopes alone, whatever else it names or leaves out. */
export function ofPage(
  { ids, sequences }: PushedPage,
  acknowledgement: MessagesAcknowledgement,
  { processed, failures }: PageOutcome,
): MessagesAcknowledgement {
  // As most are: all of it and nothing else.
  if (processed.length === ids.length && acknowledgement.processed.length === ids.length) {
    return { processed: acknowledgement.processed };
  }
  const idOf = new Map(sequences.map((sequence, nth) => [sequence, ids[nth]!]));
  return {
    processed: processed.map((sequence) => idOf.get(sequence)!),
    failed: failures.map(({ sequence, reason }) => ({ id: idOf.get(sequence)!, reason })),
  };
}
