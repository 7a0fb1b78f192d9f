/**
 * Who writes to a user while the user's devices come, go and register anew, over two gateways: whatever the timing, some
 * order of the requests, one after another, must give the very answers that were given.
 */
import { randomUUID } from 'node:crypto';
import { afterAll, beforeAll, it } from 'vitest';
import type { Reply, RequestData, RequestName } from '../../src/protocol/events.ts';
import { type Random, seeded } from '../fault/random.ts';
import { createDatabase, type Engine, startRedis } from '../support/engines.ts';
import { type Client, startGateway, type TestGateway } from '../support/gateway.ts';
import { KeyMaker } from '../support/key-maker.ts';
import { createHistory, lineOf, type Noted } from './history.ts';
import { contradictionIn, type Machine } from './linearize.ts';
import {
  type Devices,
  type Mismatch,
  NOBODY,
  step,
  type UserAnswer,
  type UserRequest,
} from './user-model.ts';

/** The requests of a run follow from it, the timing does not: another one looks elsewhere. */
const SEED = Number(process.env.LINEAR_SEED ?? 1);
const PARTS = 6;
const HISTORIES_PER_PART = 6;
const HISTORIES_AT_ONCE = 4;
const SENDERS = 4;
const DEVICE_IDS = [1, 2, 3];
/** Of each device, while the senders go on. */
const CHANGES = 4;
const SENDS_MAX = 20;
const REGISTRATION_IDS = [1, 2] as const;

const DONE: UserAnswer = { outcome: 'done' };

type UserEntry = Noted<UserRequest, UserAnswer>;

let redis: Engine;
let database: Awaited<ReturnType<typeof createDatabase>>;
let nodes: TestGateway[];
let senders: Client[];

beforeAll(async () => {
  [redis, database] = await Promise.all([startRedis(), createDatabase()]);
  const startNode = () => startGateway({ databaseUrl: database.url, redisUrl: redis.url });
  nodes = await Promise.all([startNode(), startNode()]);
  senders = await Promise.all(
    Array.from({ length: SENDERS }, async (_, nth) => {
      const client = await nodes[nth % nodes.length]!.connect({ userId: `sender-${nth}`, deviceId: 1 });
      await client.call('uploadKeys', new KeyMaker().keySet());
      return client;
    }),
  );
});

afterAll(async () => {
  await Promise.all(nodes.map((node) => node.stop()));
  await Promise.all([redis.stop(), database.drop()]);
});

it.each(Array.from({ length: PARTS }, (_, part) => [SEED + part * HISTORIES_PER_PART]))(
  'sends beside changes of the recipient’s devices are answered as if one came after another, from seed %i',
  async (first) => {
    let next = first;
    const inTurn = async (): Promise<void> => {
      while (next < first + HISTORIES_PER_PART) await judge(next++);
    };
    await Promise.all(Array.from({ length: HISTORIES_AT_ONCE }, inTurn));
  },
);

const machine: Machine<Devices, UserRequest, UserAnswer> = {
  initial: NOBODY,
  explain(devices, request, answer) {
    const outcome = step(devices, request);
    if (answer !== null && JSON.stringify(outcome.answer) !== JSON.stringify(answer)) return null;
    return outcome.devices;
  },
  fingerprint: (devices) => JSON.stringify(devices),
};

async function judge(seed: number): Promise<void> {
  const report = contradictionIn(await historyOf(seed), machine, lineOf);
  if (report !== null) throw new Error(`LINEAR_SEED=${seed}: ${report}`);
}

async function historyOf(seed: number): Promise<UserEntry[]> {
  const random = seeded(seed);
  const userId = `user-${seed}`;
  const history = createHistory<UserRequest, UserAnswer>();
  /** What was told last: whoever writes to it often meets the devices as they are. */
  let seen: Devices = NOBODY;

  async function ask(by: string, door: Door, request: Parameters<Door>[0]): Promise<void> {
    const answer = await history.note(by, request, () => door(request));
    if (answer?.outcome === 'devices') seen = answer.devices;
  }

  /** A refusal tells nothing: beside a change of the keys it may be for that alone. */
  async function askForBundles(by: string, client: Client): Promise<void> {
    const asked = client.ask('requestBundle', { claimId: randomUUID(), userId });
    const ofDevice = async (deviceId: number): Promise<UserAnswer | null> => {
      const reply = await asked;
      if (!reply.ok) return null;
      return found({ devices: reply.data.devices.filter((bundle) => bundle.deviceId === deviceId) });
    };
    await Promise.all(
      DEVICE_IDS.map((deviceId) =>
        history.note(by, { name: 'bundleOf', deviceId }, () => ofDevice(deviceId)),
      ),
    );
  }

  const owners = await Promise.all(
    DEVICE_IDS.map(async (deviceId) => {
      const client = await random.pick(nodes).connect({ userId, deviceId });
      return { deviceId, client, door: doorOf(client, userId), chance: seeded(random.below(2 ** 31)) };
    }),
  );
  const change = ({ deviceId, door, chance }: (typeof owners)[number], resets: number) =>
    chance.happens(resets)
      ? ask(`device ${deviceId}`, door, { name: 'resetKeys', deviceId })
      : ask(`device ${deviceId}`, door, {
          name: 'uploadKeys',
          deviceId,
          registrationId: chance.pick(REGISTRATION_IDS),
        });
  await Promise.all(owners.map((owner) => change(owner, 0.2)));

  let isOver = false;
  const changing = owners.map(async (owner) => {
    for (let count = 0; count < CHANGES; count++) await change(owner, 0.35);
  });
  const writing = senders.map(async (client, nth) => {
    const by = `sender ${nth}`;
    const chance = seeded(random.below(2 ** 31));
    const door = doorOf(client, userId);
    for (let count = 0; count < SENDS_MAX && !isOver; count++) {
      if (chance.happens(0.25)) await ask(by, door, { name: 'listDevices' });
      else if (chance.happens(0.15)) await askForBundles(by, client);
      else await ask(by, door, randomSend(chance, seen));
    }
  });
  await Promise.all(changing);
  isOver = true;
  await Promise.all(writing);
  for (const { client } of owners) client.close();
  // Bundles that were refused.
  return history.entries.filter(({ answer }) => answer !== null);
}

function randomSend(random: Random, seen: Devices): Parameters<Door>[0] {
  const guessed = DEVICE_IDS.filter(() => random.happens(0.6));
  const guess = (guessed.length === 0 ? [1] : guessed).map(
    (deviceId) => [deviceId, random.pick(REGISTRATION_IDS)] as const,
  );
  return {
    name: 'sendMessages',
    envelopes: seen.length > 0 && random.happens(0.7) ? seen : guess,
    sendAnyway: random.happens(0.5),
  };
}

/** Bundles are asked for by themselves. */
type Door = (request: Exclude<UserRequest, { name: 'bundleOf' }>) => Promise<UserAnswer>;

/** @param userId whom a sender asks of, or writes to */
function doorOf(client: Client, userId: string): Door {
  const keySet = new KeyMaker().keySet();
  return async (request) => {
    switch (request.name) {
      case 'uploadKeys': {
        const { registrationId } = request;
        return await answered(client.ask('uploadKeys', { ...keySet, registrationId }), () => DONE);
      }
      case 'resetKeys':
        return await answered(client.ask('resetKeys'), () => DONE);
      case 'listDevices':
        return await answered(client.ask('listDevices', { userId }), found);
      case 'sendMessages': {
        const reply = await client.ask('sendMessages', {
          messageId: randomUUID(),
          userId,
          envelopes: request.envelopes.map(([deviceId, registrationId]) => ({
            ...{ deviceId, registrationId },
            ...{ type: 1, content: 'AAAA' },
          })),
          onMismatch: request.sendAnyway ? 'sendAnyway' : 'reject',
        });
        if (reply.ok)
          return { outcome: 'sent', accepted: reply.data.accepted, mismatch: mismatchIn(reply.data) };
        if (reply.error.code !== 'DEVICES_MISMATCHED') return { outcome: 'refused', code: reply.error.code };
        return { outcome: 'mismatched', accepted: [], mismatch: mismatchIn(reply.error.details) };
      }
    }
  };
}

async function answered<Name extends RequestName>(
  asked: Promise<Reply<Name>>,
  tell: (data: RequestData<Name>) => UserAnswer,
): Promise<UserAnswer> {
  const reply = await asked;
  return reply.ok ? tell(reply.data) : { outcome: 'refused', code: reply.error.code };
}

function found(data: { devices: readonly { deviceId: number; registrationId: number }[] }): UserAnswer {
  return {
    outcome: 'devices',
    devices: data.devices.map(({ deviceId, registrationId }) => [deviceId, registrationId]),
  };
}

function mismatchIn(lists: unknown): Mismatch {
  const { missingDevices, extraDevices, staleDevices } = lists as Record<string, number[] | undefined>;
  return { missing: missingDevices ?? [], extra: extraDevices ?? [], stale: staleDevices ?? [] };
}
