/** What tests of the gate and of delivery share: people with open gates, and clients that answer when they are told. */
import { randomUUID } from 'node:crypto';
import { afterEach } from 'vitest';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import { type Engine, startRedis } from './engines.ts';
import { eventually } from './eventually.ts';
import {
  type Client,
  contents,
  enrol,
  open,
  type Party,
  send,
  startGateway,
  type TestGateway,
  type TestGatewayOptions,
} from './gateway.ts';
import type { ManualClock } from './manual-clock.ts';

/** As few as a device can do with: what is not needed need not be made. */
export const FEW_KEYS = { oneTimePreKeys: 1, pqOneTimePreKeys: 0 };
export const NO_MORE_KEYS = { oneTimePreKeys: 0, pqOneTimePreKeys: 0 };

export type Undo = (() => Promise<unknown> | unknown)[];

/** Steps that are run, last to first, after each test of the file that calls this. */
export function undoAfterEach(): Undo {
  const undo: Undo = [];
  afterEach(async () => {
    for (const step of undo.splice(0).reverse()) await step();
  });
  return undo;
}

export type FlowGatewayOptions = TestGatewayOptions & { clock?: ManualClock };

/** A gateway that ends with the test; a clock that stands still is moved for it to end. */
export async function gatewayFor(undo: Undo, options: FlowGatewayOptions = {}): Promise<TestGateway> {
  const gateway = await startGateway(options);
  undo.push(() => stopMoving(gateway, options.clock));
  return gateway;
}

export async function stopMoving(gateway: Pick<TestGateway, 'stop'>, clock?: ManualClock): Promise<void> {
  let hasStopped = false;
  const stopping = gateway.stop().finally(() => {
    hasStopped = true;
  });
  if (clock !== undefined) {
    await eventually(async () => {
      await clock.advance(100);
      return hasStopped;
    });
  }
  await stopping;
}

export async function redisFor(undo: Undo): Promise<Engine> {
  const redis = await startRedis();
  undo.push(() => redis.stop());
  return redis;
}

export const someone = (deviceId = 1): DeviceAddress => ({ userId: `u-${randomUUID()}`, deviceId });

/** Somebody with keys and an open gate. */
export async function opened(at: Pick<TestGateway, 'connect'>, address = someone()): Promise<Party> {
  const party = await enrol(at, address, FEW_KEYS);
  await open(party);
  await party.client.next('queueEmpty');
  return party;
}

/** Another connection of the party's device, its gate open. */
export async function reopened(
  at: Pick<TestGateway, 'connect'>,
  party: Party,
  onMessages?: Client['onMessages'],
): Promise<Party> {
  const client = await at.connect(party.address);
  if (onMessages !== undefined) client.onMessages = onMessages;
  await open({ client, device: party.device });
  return { ...party, client };
}

/** Resolves when a message that was sent just now has arrived elsewhere: what was to come before it has come. */
export async function afterOthersGotTheirs(at: Pick<TestGateway, 'connect'>, sender: Client): Promise<void> {
  const other = await opened(at);
  await send(sender, other, 'marker');
  await eventually(() => contents(other.client).includes('marker'));
  other.client.close();
}

/** Resolves when the gateway has heard all that this client said, acknowledgements too: it answers what comes behind. */
export async function heard(client: Client): Promise<void> {
  await client.call('keyStatus');
}

/** Leaves pages unanswered until it is told to answer them. */
export function hold(client: Client): {
  /** Pages that wait for an answer. */
  pages: number;
  /** Answers the oldest page. */
  answerOne(): void;
  answerAll(): void;
  /** From now on pages are answered at once. */
  letGo(): void;
} {
  const answerNow = client.onMessages;
  const answers: (() => void)[] = [];
  let isHolding = true;
  client.onMessages = (page) => (isHolding ? null : answerNow(page));
  client.socket.on('messages', (page, acknowledge) => {
    if (!isHolding) return;
    answers.push(() => acknowledge({ processed: page.envelopes.map((envelope) => envelope.id) }));
  });
  return {
    get pages() {
      return answers.length;
    },
    answerOne: () => answers.shift()?.(),
    answerAll() {
      for (const answer of answers.splice(0)) answer();
    },
    letGo() {
      isHolding = false;
      this.answerAll();
    },
  };
}
