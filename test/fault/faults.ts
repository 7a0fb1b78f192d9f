/** Everything that a run can break. Each breaks it, waits for what shows that it was felt, mends it, and sees work go on. */
import { fork } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { Redis } from 'ioredis';
import { io, type Socket } from 'socket.io-client';
import { addressKey } from '../../src/protocol/ids.ts';
import { eventually } from '../support/eventually.ts';
import { tokenFor } from '../support/gateway.ts';
import type { HistoryEvent } from './history.ts';
import type { PhoneOrder } from './phone-process.ts';
import type { Fault, Scene } from './run.ts';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const WAIT = { waitMaxMs: 90_000 };
const CONNECTIONS_PER_GATEWAY_MAX = 12;

export const gatewayKilled: Fault = async ({ stage, random, actions, broken }) => {
  const gateway = random.pick(stage.gateways);
  stage.expectEnd(gateway);
  await gateway.kill('SIGKILL');
  await broken(actions(5));
  await stage.restart(gateway);
  await actions(5);
};

/** Its clients are served by another one as soon as they have connected to it, long before it is back. */
export const clientsServedElsewhere: Fault = async ({ stage, random, phones, actions }) => {
  const [lost] = stage.gateways;
  const faithful = phones.map((phone) => phone.openedAfterMs.length);
  stage.expectEnd(lost!);
  await lost!.kill('SIGKILL');
  for (const phone of phones) phone.reconnect();
  await eventually(
    () => phones.every((phone, i) => phone.openedAfterMs.length > faithful[i]! && phone.isOpen()),
    {
      ...WAIT,
      that: 'every client being served by the other gateway',
    },
  );
  const tookMs = phones.flatMap((phone, i) => phone.openedAfterMs.slice(faithful[i]));
  process.stdout.write(`served ${Math.round(Math.max(...tookMs))} ms after the connection, at most\n`);
  for (const phone of phones.slice(1)) await phones[0]!.send(phone, random.uuid());
  await actions(5);
  await stage.restart(lost!);
};

/** Its connections stay open, and their clients listen to them still when they are served elsewhere. */
export const gatewayFrozen: Fault = async (scene) => {
  const { stage, random, phones, actions, broken } = scene;
  const gateway = random.pick(stage.gateways);
  // Nobody serves this one while the gateway is frozen: its lease runs out.
  const faithful = await scene.guest(gateway.url);
  const redis = new Redis(stage.redis.url);
  const lease = `keygate:lease:{${addressKey(faithful.address)}}`;
  // A gateway that this machine held up for longer than a lease holds it anew.
  await eventually(async () => (await redis.exists(lease)) === 1, { ...WAIT, that: 'the lease being there' });
  await gateway.kill('SIGSTOP');
  try {
    for (const phone of phones) phone.abandon();
    await eventually(async () => (await redis.exists(lease)) === 0, {
      ...WAIT,
      that: 'the lease running out',
    });
    await phones[0]!.send(faithful, random.uuid());
    await broken(actions(15));
  } finally {
    await gateway.kill('SIGCONT');
    redis.disconnect();
  }
  await faithful.probe();
  await phones[0]!.send(faithful, random.uuid());
  await actions(10);
};

export const gatewayDrained: Fault = async ({ stage, random, actions, broken }) => {
  const gateway = random.pick(stage.gateways);
  stage.expectEnd(gateway);
  const ended = gateway.kill('SIGTERM');
  // Work goes on while it drains.
  await broken(actions(5));
  await ended;
  const end = await gateway.ended;
  if (end.cause !== 'ended' || end.code !== 0)
    throw new Error(`it drained and ended with ${JSON.stringify(end)}`);
  await stage.restart(gateway);
  await actions(5);
};

/** Every connection there is, and so many idle ones besides, is cut in one moment and comes back. */
export function reconnectsAtOnce(idleCount: number): Fault {
  return async ({ stage, actions, prefix }) => {
    const idle: Socket[] = [];
    let isOver = false;
    try {
      for (let i = 0; i < idleCount; i++) {
        const token = await tokenFor({ userId: `${prefix}idle${i}`, deviceId: 1 });
        const socket = io(stage.clientLink.url, {
          ...{ transports: ['websocket'], auth: { token }, forceNew: true },
          ...{ reconnectionDelay: 10, reconnectionDelayMax: 2_000 },
        });
        socket.on('connect_error', (error: Error & { data?: { retryAfterMs?: number } }) => {
          // What the gateway refuses, as it does without its store, Socket.IO does not try again by itself.
          const retryAfterMs = error.data?.retryAfterMs;
          if (socket.active || retryAfterMs === undefined) return;
          setTimeout(() => isOver || socket.connect(), retryAfterMs);
        });
        idle.push(socket);
      }
      const allConnected = (): boolean => idle.every((socket) => socket.connected);
      await eventually(allConnected, { ...WAIT, that: `${idleCount} connections` });
      const before = idle.map((socket) => socket.id);
      stage.clientLink.cut();
      await eventually(() => allConnected() && idle.every((socket, i) => socket.id !== before[i]), {
        ...WAIT,
        that: `${idleCount} reconnections`,
      });
      await actions(10);
    } finally {
      isOver = true;
      for (const socket of idle) socket.disconnect();
    }
  };
}

/** In an order of the seed's choice: at every place where a request, a page or an acknowledgement can be lost. */
export const linkCutAtEachStep: Fault = async ({ stage, random, actions }) => {
  const { clientLink } = stage;
  const steps = [
    () => clientLink.loseRequest('requestBundle'),
    () => clientLink.loseAnswerOf('requestBundle'),
    () => clientLink.loseRequest('sendMessages'),
    () => clientLink.loseAnswerOf('sendMessages'),
    () => clientLink.losePush(),
    () => clientLink.loseAcknowledgement(),
    () => clientLink.loseAnswerOf('clientReady'),
    () => clientLink.loseAnswerOf('rotateSignedPreKey'),
  ];
  while (steps.length > 0) {
    const [step] = steps.splice(random.below(steps.length), 1);
    await step!();
    await actions(2);
  }
};

export const linkCutAfterBytes: Fault = async ({ stage, random, actions, broken }) => {
  stage.clientLink.impair({ cutAfterBytes: 3_000 + random.below(6_000) });
  await broken(actions(25));
  stage.clientLink.impair(null);
  await actions(5);
};

export const linkSlowAndNarrow: Fault = async ({ stage, random, actions, broken }) => {
  stage.clientLink.impair({ delayMs: 10 + random.below(60), bytesPerSecond: 20_000 + random.below(40_000) });
  await broken(actions(25));
  stage.clientLink.impair(null);
  await actions(5);
};

/** Half-open: neither side learns that the other has gone; or one way alone carries nothing. */
export const linkSilent: Fault = async ({ stage, random, phones, troubles, actions, broken }) => {
  stage.clientLink.impair({ swallow: random.pick(['both', 'toServer', 'toClient'] as const) });
  // Every phone that is connected learns of it, also where all work waits for one that is connecting.
  await broken(Promise.all([troubles('broken', 1), ...phones.map((phone) => phone.probe())]));
  stage.clientLink.impair(null);
  await actions(5);
};

export const clientsReadNothing: Fault = async ({ random, phones, actions, broken }) => {
  const slow = phones.filter((_, index) => index < 2);
  for (const phone of slow) phone.pauseReading();
  const [, , sender] = phones;
  for (let i = 0; i < 20; i++) await sender!.send(random.pick(slow), random.uuid());
  await broken(actions(5));
  for (const phone of slow) phone.resumeReading();
  await actions(5);
};

/** A phone that was put away: its program stands still, its connection does not. */
export const clientFrozen: Fault = async ({ stage, random, phones, actions, broken, record, prefix }) => {
  const address = { userId: `${prefix}frozen`, deviceId: 1 };
  const order: PhoneOrder = {
    userId: address.userId,
    url: stage.clientLink.url,
    token: await tokenFor(address),
    seed: random.below(1_000),
    countFrom: 1_000_000,
  };
  const child = fork('test/fault/phone-process.ts', [JSON.stringify(order)], {
    cwd: ROOT,
    execArgv: ['--import', 'tsx'],
  });
  try {
    const delivered = new Set<string>();
    let isReady = false;
    child.on('message', (event: HistoryEvent) => {
      record(event);
      if (event.event === 'answered' && event.answer.ok && event.answer.name === 'ready') isReady = true;
      if (event.event === 'delivered') for (const { messageId } of event.envelopes) delivered.add(messageId);
    });
    await eventually(() => isReady, { ...WAIT, that: 'the phone being ready' });
    const sent: string[] = [];
    const sendSome = async (): Promise<void> => {
      for (let i = 0; i < 10; i++) {
        const messageId = random.uuid();
        await random.pick(phones).send({ address }, messageId);
        sent.push(messageId);
      }
    };
    await sendSome();
    child.kill('SIGSTOP');
    await sendSome();
    await broken(actions(5));
    child.kill('SIGCONT');
    await sendSome();
    await eventually(() => sent.every((messageId) => delivered.has(messageId)), {
      ...WAIT,
      that: 'the delivery of what was sent to the frozen phone',
    });
    // What it said last has to have been heard: the queue is empty.
    await eventually(
      async () => (await stage.sql`SELECT 1 FROM messages WHERE user_id = ${address.userId}`).length === 0,
      { ...WAIT, that: 'its queue being empty' },
    );
  } finally {
    child.kill('SIGKILL');
  }
};

async function saysDegraded({ stage }: Pick<Scene, 'stage'>): Promise<void> {
  await eventually(
    async () => {
      for (const gateway of stage.gateways) {
        const { status, text } = await stage.readiness(gateway);
        if (status !== 200 || !text.includes('degraded')) throw new Error(`${status} ${text}`);
      }
    },
    { ...WAIT, that: 'readyz saying that it is degraded' },
  );
}

async function saysReady({ stage }: Pick<Scene, 'stage'>): Promise<void> {
  await eventually(
    async () => {
      for (const gateway of stage.gateways) {
        const { status, text } = await stage.readiness(gateway);
        if (status !== 200 || text.includes('degraded')) throw new Error(`${status} ${text}`);
      }
    },
    { ...WAIT, that: 'readyz saying that all is well' },
  );
}

/** It comes back empty: leases, locks and subscriptions are gone. */
export const redisKilled: Fault = async (scene) => {
  const { stage, actions, broken } = scene;
  await stage.redis.kill('SIGKILL');
  await saysDegraded(scene);
  await broken(actions(15));
  await stage.redis.restart();
  await saysReady(scene);
  await actions(5);
};

/** Killed and restarted before anybody has looked. */
export const redisRestarted: Fault = async (scene) => {
  for (let i = 0; i < 3; i++) {
    await scene.stage.redis.restart();
    await scene.actions(4);
  }
  await saysReady(scene);
};

/** Its connections stay open and answer nothing. */
export const redisSilent: Fault = async (scene) => {
  const { stage, random, actions, broken } = scene;
  const isFrozen = random.happens(0.5);
  if (isFrozen) await stage.redis.kill('SIGSTOP');
  else stage.redisLink.impair({ swallow: 'both' });
  await saysDegraded(scene);
  await broken(actions(15));
  if (isFrozen) await stage.redis.kill('SIGCONT');
  else stage.redisLink.impair(null);
  await saysReady(scene);
  await actions(5);
};

export const postgresKilled: Fault = async (scene) => {
  const { stage, random, troubles, actions, broken } = scene;
  // SIGQUIT is the immediate mode: no goodbye, recovery from the log at the next start.
  await stage.postgres.kill(random.pick(['SIGQUIT', 'SIGKILL'] as const));
  await broken(troubles('UNAVAILABLE', 5));
  await stage.postgres.restart();
  await saysReady(scene);
  await actions(5);
  // On its return nobody storms it. The stage's own connections died with it, and may hear of that late.
  const [row] = await eventually(
    () =>
      stage.sql<{ count: number }[]>`
        SELECT count(*)::int AS count FROM pg_stat_activity WHERE application_name = 'keygate'`,
    { ...WAIT, that: 'the stage’s own way to PostgreSQL' },
  );
  if (row!.count > stage.gateways.length * CONNECTIONS_PER_GATEWAY_MAX) {
    throw new Error(`${row!.count} connections from ${stage.gateways.length} gateways`);
  }
};

/** At moments that fall into the midst of statements and transactions. */
export const postgresConnectionsCut: Fault = async ({ stage, random, actions }) => {
  for (let i = 0; i < 6; i++) {
    if (random.happens(0.4)) {
      await stage.sql`SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'keygate'`;
    } else if (random.happens(0.5)) await stage.postgresLink.cutOneAfter(2_000 + random.below(8_000));
    else stage.postgresLink.cut();
    await actions(3);
  }
};

export const postgresSlow: Fault = async ({ stage, random, actions, broken }) => {
  stage.postgresLink.impair({ delayMs: 20 + random.below(60) });
  await broken(actions(15));
  stage.postgresLink.impair(null);
  await actions(5);
};

/** Its connections stay open and answer nothing: what was asked ends by a bound, and with it the connections. */
export const postgresSilent: Fault = async (scene) => {
  const { stage, troubles, actions, broken } = scene;
  stage.postgresLink.impair({ swallow: 'both' });
  // No more than one: without the store nobody is taken in again, and who is not connected asks little.
  await broken(troubles('broken', 1));
  stage.postgresLink.impair(null);
  await saysReady(scene);
  await actions(5);
};
