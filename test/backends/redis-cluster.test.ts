/** Bus and locks on a real Redis Cluster of three nodes: the contracts, the cost, and one of the nodes killed. */
import { once } from 'node:events';
import { Redis } from 'ioredis';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createRedisBus, type RedisBus } from '../../src/backends/redis/bus.ts';
import { connectRedis, connectSubscriber, type RedisLink } from '../../src/backends/redis/connect.ts';
import { examineRedis } from '../../src/backends/redis/examine.ts';
import { createRedisLocks } from '../../src/backends/redis/locks.ts';
import { type Clock, systemClock } from '../../src/lib/clock.ts';
import { type Log, silentLog } from '../../src/lib/log.ts';
import { addressKey } from '../../src/protocol/ids.ts';
import { describeBus, device, type RecordedBus, recorder } from '../contract/bus.ts';
import { describeLocks } from '../contract/lock.ts';
import { type LocalStage, startLocalStage } from '../fault/local-stage.ts';
import { type Fault, run } from '../fault/run.ts';
import { type RedisCluster, startRedisCluster } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { createManualClock } from '../support/manual-clock.ts';

/** Where Redis works, its answer is waited for, however long a busy machine takes for it. */
const STANDING = createManualClock();

let cluster: RedisCluster;
beforeAll(async () => {
  cluster = await startRedisCluster();
});
afterAll(() => cluster?.stop());

function options() {
  return { url: cluster.url, name: 'test', log: silentLog, retryDelayMaxMs: 50 };
}

async function ready(...links: RedisLink[]): Promise<void> {
  await eventually(() => links.every((one) => one.status === 'ready'));
}

async function emptied(): Promise<void> {
  for (const { url } of cluster.nodes) {
    const node = new Redis(url);
    await node.flushall();
    node.disconnect();
  }
}

describeBus('Redis Cluster', async () => {
  await emptied();
  const commands = connectRedis(options());
  const subscriber = connectSubscriber(options());
  const bus = createRedisBus({ commands, subscriber, clock: STANDING, log: silentLog });
  return { bus, close: async () => commands.disconnect() };
});

describeLocks('Redis Cluster', async (lockMs) => {
  await emptied();
  const [one, other] = [connectRedis(options()), connectRedis(options())];
  await ready(one, other);
  const make = (link: RedisLink) => createRedisLocks({ link, clock: STANDING, log: silentLog, lockMs });
  return {
    locks: make(one),
    otherNode: make(other),
    async close() {
      one.disconnect();
      other.disconnect();
    },
  };
});

interface Node {
  bus: RedisBus;
  heard: RecordedBus;
  commands: RedisLink;
  stop(): Promise<void>;
}

const PROBE_MS = 100;

async function startNode({
  log = silentLog,
  clock = systemClock,
}: {
  log?: Log;
  clock?: Clock;
} = {}): Promise<Node> {
  const commands = connectRedis(options());
  const bus = createRedisBus({
    commands,
    subscriber: connectSubscriber(options()),
    ...{ clock, log, timing: { probeMs: PROBE_MS, probeWaitMaxMs: 500 } },
  });
  const heard = recorder();
  await bus.start(heard);
  return {
    bus,
    heard,
    commands,
    async stop() {
      await bus.stop();
      commands.disconnect();
    },
  };
}

describe('over a Redis Cluster', () => {
  const devices = Array.from({ length: 60 }, (_, i) => device(`user${i}`));

  it('a batch of locks, and a poke of many devices, is one round trip per node', async () => {
    await emptied();
    const link = connectRedis(options());
    await ready(link);
    const locks = createRedisLocks({ link, clock: STANDING, log: silentLog });
    // Connections are made and scripts are known.
    await (await locks.acquire(devices)).release();
    const before = await readsByNode();
    const mine = await locks.acquire(devices);
    const after = await readsByNode();
    expect(mine.held.size).toBe(60);
    // Besides the batch, a node reads this question and, now and then, what the other nodes and the link ask it.
    for (const [i, reads] of after.entries()) expect(reads - before[i]!).toBeLessThan(10);
    await mine.release();
    link.disconnect();
  });

  it('says once that one of three nodes stores nothing, until it does', async () => {
    await emptied();
    const told: string[] = [];
    const note = (_: object, text: string): void => void told.push(text);
    const clock = createManualClock();
    const node = await startNode({ clock, log: { ...silentLog, warn: note, info: note } });
    const full = new Redis(cluster.nodes[2]!.url);
    try {
      await full.config('SET', 'maxmemory', '1');
      for (const [i, one] of devices.entries()) {
        expect(await node.bus.acquire({ device: one, fence: i + 1 })).toBe(true);
      }
      expect(node.bus.trouble()).toMatch(/^Redis refuses leases: OOM/);
      const asking = connectRedis(options());
      await expect(examineRedis(asking)).rejects.toThrow(
        /^Redis refuses a script that writes keygate:\*: OOM/,
      );
      asking.disconnect();
    } finally {
      await full.config('SET', 'maxmemory', '0');
      full.disconnect();
    }
    await clock.advance(PROBE_MS);
    await eventually(() => expect(node.bus.trouble()).toBeNull());
    expect(told).toEqual(['bus: Redis refuses leases', 'bus: Redis takes leases again']);
    await node.stop();
  });

  it('renews its leases with the probes when a node was lost, though nobody asked anything of it', async () => {
    await emptied();
    const clock = createManualClock();
    const node = await startNode({ clock });
    for (const [i, one] of devices.entries()) await node.bus.acquire({ device: one, fence: i + 1 });
    const keys = devices.map((one) => `keygate:lease:{${addressKey(one)}}`);
    const leases = async () =>
      (await Promise.all(keys.map((key) => node.commands.get(key)))).filter((lease) => lease !== null);

    const [, lost] = cluster.nodes;
    const noticed = once(node.commands, '-node');
    await lost!.kill('SIGKILL');
    await noticed;
    await lost!.restart();
    await eventually(async () => expect((await leases()).length).toBeLessThan(devices.length));
    await clock.advance(PROBE_MS);
    await eventually(async () => expect(await leases()).toHaveLength(devices.length));
    await node.stop();
  });

  it('goes on while one of three nodes is killed, and is whole again when it is back', async () => {
    await emptied();
    const [one, two] = [await startNode(), await startNode()];
    const isWhole = async (): Promise<void> => {
      for (const node of [one, two]) node.heard.pokes = [];
      // What is published while the nodes of the Cluster find each other again may be lost, and nobody is told.
      await eventually(
        () => {
          two.bus.poke(devices);
          expect(new Set(one.heard.pokes).size).toBe(devices.length);
        },
        { waitMaxMs: 20_000 },
      );
    };
    try {
      for (const [i, one_] of devices.entries()) {
        expect(await one.bus.acquire({ device: one_, fence: i + 1 })).toBe(true);
      }
      await isWhole();

      const [, lost] = cluster.nodes;
      await lost!.kill('SIGKILL');
      // The others' devices are poked; those whose leases were on the lost node wait for a sweep.
      one.heard.pokes = [];
      await eventually(() => {
        two.bus.poke(devices);
        return new Set(one.heard.pokes).size >= devices.length / 2;
      });
      const locks = createRedisLocks({ link: one.commands, clock: systemClock, log: silentLog });
      const held = await locks.acquire(devices);
      expect(held.held.size).toBe(devices.length);
      await held.release();
      // A newer connection on this node needs no Redis; one that only Redis knows of is settled when it is back.
      expect(await one.bus.acquire({ device: devices[0]!, fence: 1_000 })).toBe(true);

      await lost!.restart();
      await eventually(() => expect([one.bus.trouble(), two.bus.trouble()]).toEqual([null, null]));
      await eventually(
        async () => {
          const keys = devices.map((one_) => `keygate:lease:{${addressKey(one_)}}`);
          const leases = await Promise.all(keys.map((key) => one.commands.get(key)));
          expect(leases.filter((lease) => lease?.endsWith(one.bus.nodeId))).toHaveLength(devices.length);
        },
        { waitMaxMs: 30_000 },
      );
      await isWhole();
    } finally {
      await Promise.all([one.stop(), two.stop()]);
    }
  }, 90_000);
});

describe('gateways over a Redis Cluster', () => {
  let stage: LocalStage;
  beforeAll(async () => {
    stage = await startLocalStage(cluster.url);
  });
  afterAll(() => stage?.stop());

  const nodeKilled: Fault<LocalStage> = async ({ random, actions }) => {
    const node = random.pick(cluster.nodes);
    await node.kill('SIGKILL');
    await actions(20);
    await node.restart();
    await actions(10);
  };

  it.each([1, 2, 3])(
    'claims stay exact and delivery goes on while a node is killed (seed %i)',
    { timeout: 150_000 },
    async (seed) => {
      const { violations, counts } = await run({ stage, seed, fault: nodeKilled });
      expect(violations, `seed ${seed}: ${JSON.stringify(counts)}`).toEqual([]);
    },
  );
});

/** How often each node has read from its connections. */
async function readsByNode(): Promise<number[]> {
  return await Promise.all(
    cluster.nodes.map(async ({ url }) => {
      const node = new Redis(url);
      const stats = await node.info('stats');
      node.disconnect();
      return Number(/total_reads_processed:(\d+)/.exec(stats)?.[1]);
    }),
  );
}
