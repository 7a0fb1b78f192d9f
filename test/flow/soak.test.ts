/** A long backlog, a client that fails, forgets and reconnects at random, and two nodes: what must hold at the end. */
import { describe, expect, it } from 'vitest';
import type { MessagesAcknowledgement, PushPayload } from '../../src/protocol/events.ts';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import { eventually } from '../support/eventually.ts';
import { FEW_KEYS, gatewayFor, opened, redisFor, reopened, someone, undoAfterEach } from '../support/flow.ts';
import { type Client, connectClient, enrol, open, send, type TestGateway } from '../support/gateway.ts';
import { createManualClock } from '../support/manual-clock.ts';

type Envelope = PushPayload<'messages'>['envelopes'][number];

const undo = undoAfterEach();
const ROUNDS = 25;
const BACKLOG_PER_SENDER = 250;
const LIVE_PER_SENDER = 4;
const MONTH_MS = 30 * 86_400_000;

/** A small generator, so that a failing seed fails again. */
function seeded(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** A client that keeps what it has processed, as the contract asks, and says so when it is offered again. */
function forgetfulReader(random: () => number) {
  const firstOffers: string[] = [];
  const offered = new Set<string>();
  const processed = new Map<string, string>();
  const undecryptableCounts = new Map<string, number>();

  function verdict(envelope: Envelope): 'processed' | 'undecryptable' | 'temporary' | 'left out' {
    if (processed.has(envelope.id)) return 'processed';
    const chance = random();
    if (chance < 0.65) return 'processed';
    if (chance < 0.8) return 'temporary';
    if (chance < 0.9) return 'left out';
    // A third time would turn it into a bounce.
    const count = (undecryptableCounts.get(envelope.id) ?? 0) + 1;
    if (count > 2) return 'processed';
    undecryptableCounts.set(envelope.id, count);
    return 'undecryptable';
  }

  function textOf(envelope: Envelope): string {
    return envelope.kind === 'message' ? Buffer.from(envelope.content, 'base64').toString() : envelope.reason;
  }

  return {
    firstOffers,
    processed,
    isSteady: false,
    onMessages(page: PushPayload<'messages'>): MessagesAcknowledgement | null {
      for (const envelope of page.envelopes) {
        if (!offered.has(envelope.id)) firstOffers.push(textOf(envelope));
        offered.add(envelope.id);
      }
      if (!this.isSteady && random() < 0.1) return null;
      const answer = {
        processed: [] as string[],
        failed: [] as NonNullable<MessagesAcknowledgement['failed']>,
      };
      for (const envelope of page.envelopes) {
        const said = this.isSteady ? 'processed' : verdict(envelope);
        if (said === 'processed') {
          processed.set(envelope.id, textOf(envelope));
          answer.processed.push(envelope.id);
        } else if (said !== 'left out') answer.failed.push({ id: envelope.id, reason: said });
      }
      return answer;
    },
  };
}

describe('a backlog of a thousand messages and a client that does everything wrong', () => {
  it.each([1, 2, 3])('loses nothing and confuses no order (seed %i)', { timeout: 90_000 }, async (seed) => {
    const random = seeded(seed);
    const clock = createManualClock();
    const redis = await redisFor(undo);
    const first = await gatewayFor(undo, { redisUrl: redis.url, clock });
    const second = await gatewayFor(undo, { redisUrl: redis.url, clock, databaseUrl: first.databaseUrl });
    const anyNode = (): TestGateway => (random() < 0.5 ? first : second);
    const lasting = (at: TestGateway) => ({
      async connect(device: DeviceAddress): Promise<Client> {
        const client = await connectClient(at.url, await at.token(device, MONTH_MS));
        undo.push(() => client.close());
        return client;
      },
    });

    const senders = await Promise.all([first, first, second, second].map((at) => opened(lasting(at))));
    const bob = await enrol(lasting(first), someone(), FEW_KEYS);
    const sent = senders.map((): string[] => []);
    const sendMore = (count: number) =>
      Promise.all(
        senders.map(async (sender, index) => {
          for (let i = 0; i < count; i++) {
            const text = `${index} ${sent[index]!.length}`;
            await send(sender.client, bob, text);
            sent[index]!.push(text);
          }
        }),
      );
    await sendMore(BACKLOG_PER_SENDER);

    const reader = forgetfulReader(random);
    for (let round = 0; round < ROUNDS; round++) {
      const { client } = await reopened(lasting(anyNode()), bob, (page) => reader.onMessages(page));
      const live = sendMore(LIVE_PER_SENDER);
      const pages = 1 + Math.floor(random() * 8);
      // Until it has seen enough, has nothing to do, or was cut for its silence.
      await eventually(async () => {
        await clock.advance(500);
        const seen = client.pushes.filter((push) => push.name === 'messages').length;
        return seen >= pages || !client.socket.connected || client.waiting('queueEmpty') > 0;
      });
      await live;
      if (random() < 0.5) client.close();
    }

    reader.isSteady = true;
    const last = await reopened(lasting(anyNode()), bob, (page) => reader.onMessages(page));
    await eventually(async () => {
      await clock.advance(10_000);
      return last.client.waiting('queueEmpty') > 0;
    });

    const total = senders.length * (BACKLOG_PER_SENDER + ROUNDS * LIVE_PER_SENDER);
    expect(reader.processed.size).toBe(total);
    expect([...reader.processed.values()].sort()).toEqual(sent.flat().sort());
    for (const [index, texts] of sent.entries()) {
      expect(reader.firstOffers.filter((text) => text.startsWith(`${index} `))).toEqual(texts);
    }
    for (const sender of senders) expect(sender.client.envelopes).toEqual([]);
    await eventually(async () => expect(await open(last)).toMatchObject({ pendingCount: 0 }));
  });
});
