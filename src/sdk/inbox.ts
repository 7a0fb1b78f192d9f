/** Incoming envelopes: handed to the application once and in order, and acknowledged only then. */
import type { MessagesAcknowledgement, PushPayload } from '../protocol/events.ts';
import { DuplicateMessageError, UndecryptableError } from './device-keys.ts';
import type { Metrics } from './metrics.ts';
import type { Notebook } from './storage.ts';

export type Envelope = PushPayload<'messages'>['envelopes'][number];
export type MessageEnvelope = Extract<Envelope, { kind: 'message' }>;
export type BounceEnvelope = Extract<Envelope, { kind: 'bounce' }>;

export interface InboxParts {
  metrics: Metrics;
  notebook: Notebook;
  onMessage(envelope: MessageEnvelope): Promise<void>;
  onBounce(envelope: BounceEnvelope): Promise<void>;
  /** An envelope is through. */
  onHandled(): void;
}

export interface Inbox {
  /** @returns what to answer; never rejects */
  take(page: PushPayload<'messages'>): Promise<MessagesAcknowledgement>;
}

/**
 * What comes again is what the gateway had in its window, 256 envelopes, when an acknowledgement was lost. But before it
 * come the older ones that the application put off, which may be many times that, and must not make it forgotten.
 */
const SEEN_MAX = 2_000;

export function createInbox(parts: InboxParts): Inbox {
  const { metrics, notebook } = parts;
  const { seenEnvelopes } = notebook.memory;
  const seen = new Set(seenEnvelopes);
  let last: Promise<unknown> = Promise.resolve();

  async function handle(envelope: Envelope): Promise<'processed' | 'undecryptable' | 'temporary'> {
    if (seen.has(envelope.id)) {
      metrics.duplicatesDropped += 1;
      return 'processed';
    }
    try {
      if (envelope.kind === 'message') await parts.onMessage(envelope);
      else await parts.onBounce(envelope);
    } catch (error) {
      if (error instanceof UndecryptableError) {
        metrics.decryptionFailures += 1;
        return 'undecryptable';
      }
      if (!(error instanceof DuplicateMessageError)) return 'temporary';
      // The application ended after decrypting, before it was noted here.
      metrics.duplicatesDropped += 1;
    }
    seen.add(envelope.id);
    seenEnvelopes.push(envelope.id);
    for (const id of seenEnvelopes.splice(0, seenEnvelopes.length - SEEN_MAX)) seen.delete(id);
    parts.onHandled();
    return 'processed';
  }

  async function takePage(page: PushPayload<'messages'>): Promise<MessagesAcknowledgement> {
    const processed: string[] = [];
    const failed: NonNullable<MessagesAcknowledgement['failed']> = [];
    for (const envelope of page.envelopes) {
      const outcome = await handle(envelope);
      if (outcome === 'processed') processed.push(envelope.id);
      else failed.push({ id: envelope.id, reason: outcome });
    }
    // Where it can't be noted, the crypto library still knows a message that comes again.
    await notebook.save().catch(() => {});
    return failed.length === 0 ? { processed } : { processed, failed };
  }

  return {
    take(page) {
      // One page after the other: what was sent first is shown first.
      const taken = last.then(() => takePage(page));
      last = taken;
      return taken;
    },
  };
}
