/**
 * Requests on one device's keys, several at once, over two gateways and both doors: whatever the timing, some order of
 * them one after another must give the very answers that were given.
 */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import { type Random, seeded } from '../fault/random.ts';
import { createDatabase, type Engine, startRedis } from '../support/engines.ts';
import { type Client, startGateway, type TestGateway, tokenFor } from '../support/gateway.ts';
import { brokenKeyInvariants } from '../support/key-invariants.ts';
import { type Door, httpDoor, isForHttp, socketDoor } from './doors.ts';
import { createHistory } from './history.ts';
import { contradiction, type KeyEntry } from './key-history.ts';
import { KEY_LIMITS, KEY_LIMITS_ENVIRONMENT } from './key-limits.ts';
import type { KeyAnswer, KeyRequest } from './key-model.ts';
import { createKeyRing } from './key-ring.ts';
import {
  closingRequests,
  type Hindsight,
  learn,
  NOTHING_SEEN,
  randomClaim,
  randomOwnRequest,
  randomUpload,
} from './requests.ts';

/** The requests of a run follow from it, the timing does not: another one looks elsewhere. */
const SEED = Number(process.env.LINEAR_SEED ?? 1);
const PARTS = 10;
const HISTORIES_PER_PART = 12;
/** Devices whose histories are made beside one another: each is noise for the others. */
const DEVICES_AT_ONCE = 4;
const CLAIMERS = 3;

interface Claimer {
  name: string;
  socket: Client;
  token: string;
}

const ring = createKeyRing();
let redis: Engine;
let database: Awaited<ReturnType<typeof createDatabase>>;
let nodes: TestGateway[];
let claimers: Claimer[];

beforeAll(async () => {
  [redis, database] = await Promise.all([startRedis(), createDatabase()]);
  const startNode = () =>
    startGateway({ databaseUrl: database.url, redisUrl: redis.url, env: KEY_LIMITS_ENVIRONMENT });
  nodes = await Promise.all([startNode(), startNode()]);
  claimers = await Promise.all(
    Array.from({ length: CLAIMERS }, async (_, nth): Promise<Claimer> => {
      const device = { userId: `claimer-${nth}`, deviceId: 1 };
      const socket = await nodes[nth % nodes.length]!.connect(device);
      return { name: device.userId, socket, token: await tokenFor(device) };
    }),
  );
});

afterAll(async () => {
  await Promise.all(nodes.map((node) => node.stop()));
  await Promise.all([redis.stop(), database.drop()]);
});

describe('requests on one device’s keys, made at once', () => {
  it.each(Array.from({ length: PARTS }, (_, part) => [SEED + part * HISTORIES_PER_PART]))(
    'are answered as if one came after another, from seed %i',
    async (first) => {
      let next = first;
      const inTurn = async (): Promise<void> => {
        while (next < first + HISTORIES_PER_PART) await judge(next++);
      };
      await Promise.all(Array.from({ length: DEVICES_AT_ONCE }, inTurn));
    },
  );

  it('leave counters, pools and records that agree', async () => {
    expect(await brokenKeyInvariants(database.url)).toEqual([]);
  });
});

async function judge(seed: number): Promise<void> {
  const history = await historyOf(seed);
  const found = contradiction(history, KEY_LIMITS);
  if (found !== null) throw new Error(`LINEAR_SEED=${seed}: ${found}`);
}

async function historyOf(seed: number): Promise<KeyEntry[]> {
  const random = seeded(seed);
  const target: DeviceAddress = { userId: `target-${seed}`, deviceId: 1 };
  const history = createHistory<KeyRequest, KeyAnswer>();
  const seen: Hindsight = { ...NOTHING_SEEN };
  const token = await tokenFor(target);
  const byHttp = (node: number, of: string) => httpDoor(nodes[node]!.url, of, target, ring);
  const bySocket = (client: Client) => socketDoor(client, target, ring);

  async function ask(by: string, door: Door, request: KeyRequest): Promise<void> {
    learn(seen, await history.note(by, request, () => door.ask(request)));
  }

  /** Each asks one after another, all of them at once. */
  const workers: (() => Promise<void>)[] = [];
  const work = (asks: (chance: Random) => Promise<unknown>): void => {
    const chance = seeded(random.below(2 ** 31));
    const count = 2 + chance.below(3);
    workers.push(async () => {
      for (let nth = 0; nth < count; nth++) await asks(chance);
    });
  };

  let home = random.below(nodes.length);
  let own = await nodes[home]!.connect(target);
  if (random.happens(0.9)) await ask('own socket', bySocket(own), randomUpload(random, ring, seen));
  work(async (chance) => {
    const burst = Array.from({ length: 1 + chance.below(2) }, () => randomOwnRequest(chance, ring, seen));
    const isCut = chance.happens(0.1);
    const asked = burst.map((request) => ask(`own socket on ${home}`, bySocket(own), request));
    if (isCut) own.close();
    await Promise.all(asked);
    if (!isCut) return;
    // It comes back elsewhere, and repeats what it does not know the fate of.
    home = (home + 1) % nodes.length;
    own = await nodes[home]!.connect(target);
    for (const request of burst) await ask(`own socket, back on ${home}`, bySocket(own), request);
  });
  work(async (chance) => {
    const node = chance.below(nodes.length);
    // What only looks sees a change by half, or too late, the more the more often it looks.
    let request: KeyRequest = { name: chance.happens(0.7) ? 'keyStatus' : 'checkPreKeys' };
    if (chance.happens(0.5)) {
      do request = randomOwnRequest(chance, ring, seen);
      while (!isForHttp(request));
    }
    await ask(`own HTTP on ${node}`, byHttp(node, token), request);
  });

  // The same for all: a claimId is the caller's, whoever else uses it.
  const claimIds = [random.uuid(), random.uuid(), random.uuid()];
  const clients = [0, 1, 2, ...(random.happens(0.5) ? [random.below(3)] : [])];
  // Where the last is one of the others again, it asks what that one asks.
  for (const { name, socket, token: of } of clients.map((nth) => claimers[nth]!)) {
    work(async (chance) => {
      const request = randomClaim(chance, name, claimIds);
      const node = chance.below(nodes.length);
      if (isForHttp(request) && chance.happens(0.4)) {
        await ask(`${name} by HTTP on ${node}`, byHttp(node, of), request);
        return;
      }
      // The same claim in other words, at once.
      const isTwofold = request.name === 'requestBundle' && chance.happens(0.3);
      const requests = isTwofold ? [request, { ...request, ofAll: !request.ofAll }] : [request];
      await Promise.all(requests.map((one) => ask(`${name} by socket`, bySocket(socket), one)));
    });
  }
  if (random.happens(0.25)) {
    const device = { userId: `cut-${seed}`, deviceId: 1 };
    const [of, socket] = [await tokenFor(device), await nodes[home]!.connect(device)];
    const request = randomClaim(random, device.userId, claimIds);
    workers.push(async () => {
      const asked = ask('cut claimer', bySocket(socket), request);
      socket.close();
      await asked;
      if (isForHttp(request)) await ask('cut claimer, back by HTTP', byHttp(home, of), request);
    });
  }
  await Promise.all(workers.map((run) => run()));

  for (const request of closingRequests(ring, seen, claimers[0]!.name)) {
    const node = random.below(nodes.length);
    const of = request.name === 'requestBundle' ? claimers[0]!.token : token;
    await ask(`in the end by HTTP on ${node}`, byHttp(node, of), request);
  }
  own.close();
  return history.entries;
}
