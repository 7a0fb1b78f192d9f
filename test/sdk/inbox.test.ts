/** Pages of envelopes: what is answered, and what is remembered of them. */
import { describe, expect, it } from 'vitest';
import { DuplicateMessageError, UndecryptableError } from '../../src/sdk/device-keys.ts';
import { createInbox, type Envelope, type InboxParts } from '../../src/sdk/inbox.ts';
import { newMetrics } from '../../src/sdk/metrics.ts';
import { memoryStorage, openNotebook } from '../../src/sdk/storage.ts';

const sender = { userId: 'alice', deviceId: 1 };
const message = (id: string): Envelope => ({
  ...{ id, kind: 'message', messageId: id, sender, type: 1, content: '', storedAt: '' },
});
const bounce = (id: string): Envelope => ({
  ...{ id, kind: 'bounce', messageId: id, recipient: sender, reason: 'EXPIRED', storedAt: '' },
});
const page = (...envelopes: Envelope[]) => ({ envelopes });

async function openInbox(more: Partial<InboxParts> & { storage?: ReturnType<typeof memoryStorage> } = {}) {
  const shown: string[] = [];
  const metrics = newMetrics();
  const notebook = await openNotebook(more.storage ?? memoryStorage());
  let handledCount = 0;
  const inbox = createInbox({
    metrics,
    notebook,
    onMessage: async ({ id }) => void shown.push(id),
    onBounce: async ({ id }) => void shown.push(id),
    onHandled: () => handledCount++,
    ...more,
  });
  return { inbox, shown, metrics, memory: notebook.memory, handledCount: () => handledCount };
}

describe('a page', () => {
  it('is answered envelope by envelope, by what the application makes of each', async () => {
    const errors: Record<string, Error> = {
      known: new DuplicateMessageError(),
      broken: new UndecryptableError(),
      later: new Error('not now'),
    };
    const outcome = async ({ id }: { id: string }) => {
      if (id in errors) throw errors[id];
    };
    const { inbox, metrics, memory, handledCount } = await openInbox({
      onMessage: outcome,
      onBounce: outcome,
    });
    const envelopes = ['new', 'known', 'broken', 'later'].map(message);
    expect(await inbox.take(page(...envelopes, bounce('back')))).toEqual({
      processed: ['new', 'known', 'back'],
      failed: [
        { id: 'broken', reason: 'undecryptable' },
        { id: 'later', reason: 'temporary' },
      ],
    });
    expect(metrics).toMatchObject({ decryptionFailures: 1, duplicatesDropped: 1 });
    expect(memory.seenEnvelopes).toEqual(['new', 'known', 'back']);
    expect(handledCount()).toBe(3);
    // A bounce that can't be taken in comes again too.
    errors.again = new Error('not now');
    expect(await inbox.take(page(bounce('again')))).toMatchObject({ failed: [{ reason: 'temporary' }] });
  });

  it('is not begun before the one before it is through', async () => {
    let finish = (): void => {};
    const begun: string[] = [];
    const { inbox } = await openInbox({
      onMessage: ({ id }) => {
        begun.push(id);
        return new Promise((resolve) => {
          finish = resolve;
        });
      },
    });
    const [first, second] = [inbox.take(page(message('one'))), inbox.take(page(message('two')))];
    await new Promise((resolve) => setImmediate(resolve));
    expect(begun).toEqual(['one']);
    finish();
    expect(await first).toEqual({ processed: ['one'] });
    await new Promise((resolve) => setImmediate(resolve));
    finish();
    expect(await second).toEqual({ processed: ['two'] });
  });

  it('is answered, and followed by the next, also where nothing can be noted', async () => {
    const storage = memoryStorage();
    storage.save = async () => {
      throw new Error('the disk is full');
    };
    const { inbox, shown } = await openInbox({ storage });
    for (const id of ['one', 'two']) expect(await inbox.take(page(message(id)))).toEqual({ processed: [id] });
    expect(shown).toEqual(['one', 'two']);
  });

  it('is noted before it is answered', async () => {
    const storage = memoryStorage();
    const { inbox } = await openInbox({ storage });
    await inbox.take(page(message('one')));
    expect((await storage.load())?.seenEnvelopes).toEqual(['one']);
  });
});

it('the last 2,000 envelopes are known again, and no more', async () => {
  const { inbox, shown, metrics, memory } = await openInbox();
  const ids = Array.from({ length: 2_001 }, (_, index) => `envelope ${index}`);
  await inbox.take(page(...ids.map(message)));
  expect(memory.seenEnvelopes).toEqual(ids.slice(1));
  await inbox.take(page(message(ids[1]!)));
  expect(metrics.duplicatesDropped).toBe(1);
  await inbox.take(page(message(ids[0]!)));
  expect(shown).toEqual([...ids, ids[0]]);
});
