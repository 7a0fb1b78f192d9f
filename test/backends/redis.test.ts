// Bus and locks over a real Redis: the contracts, several nodes, and a Redis that breaks.
import { once } from 'node:events';
import { type AddressInfo, connect, createServer, type Server, type Socket } from 'node:net';
import { inspect } from 'node:util';
import { Redis } from 'ioredis';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it, onTestFinished, vi } from 'vitest';
import { createRedisBus, type RedisBus, type RedisBusTiming } from '../../src/backends/redis/bus.ts';
import { connectSubscriber } from '../../src/backends/redis/connect.ts';
import { examineRedis } from '../../src/backends/redis/examine.ts';
import { createRedisLocks } from '../../src/backends/redis/locks.ts';
import { createRedisRelay } from '../../src/backends/redis/relay.ts';
import { type Clock, systemClock } from '../../src/lib/clock.ts';
import { type Log, silentLog } from '../../src/lib/log.ts';
import { addressKey } from '../../src/protocol/ids.ts';
import { describeBus, device, type RecordedBus, recorder } from '../contract/bus.ts';
import { describeLocks } from '../contract/lock.ts';
import { keygate } from '../support/command-line.ts';
import { createDatabase, type Engine, startRedis, startRedisSentinel } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { testEnvironment } from '../support/gateway.ts';
import { createManualClock } from '../support/manual-clock.ts';
import { freePort } from '../support/ports.ts';

/** How many pokes wait for Redis at most. */
const POKES_WAITING_MAX = 10_000;
const QUICK: Partial<RedisBusTiming> = { probeMs: 100, probeWaitMaxMs: 500 };
/** Where Redis works, its answer is waited for, however long a busy machine takes for it. */
const STANDING = createManualClock();

let redis: Engine;
let admin: Redis;
const unhandled: unknown[] = [];
const noteUnhandled = (reason: unknown): void => void unhandled.push(reason);

beforeAll(async () => {
  process.on('unhandledRejection', noteUnhandled);
  redis = await startRedis();
  // Unlike the gateway's links, the test's own waits for Redis.
  admin = new Redis(redis.url, { maxRetriesPerRequest: null, retryStrategy: () => 20 });
  admin.on('error', () => {});
});
afterAll(async () => {
  process.off('unhandledRejection', noteUnhandled);
  admin.disconnect();
  await redis.stop();
});
beforeEach(async () => {
  await admin.flushall();
});
afterEach(() => {
  expect(unhandled).toEqual([]);
});

function link(options: { url?: string; log?: Log } = {}): Redis {
  return connectSubscriber({ url: redis.url, name: 'test', log: silentLog, retryDelayMaxMs: 20, ...options });
}

interface Node {
  bus: RedisBus;
  heard: RecordedBus;
  commands: Redis;
  subscriber: Redis;
  stop(): Promise<void>;
}

async function startNode(
  options: { url?: string; log?: Log; clock?: Clock; timing?: Partial<RedisBusTiming> } = {},
): Promise<Node> {
  const [commands, subscriber] = [link(options), link(options)];
  const timing = { ...QUICK, ...options.timing };
  const { log = silentLog, clock = systemClock } = options;
  const bus = createRedisBus({ commands, subscriber, clock, log, timing });
  const heard = recorder();
  await bus.start(heard);
  return {
    bus,
    heard,
    commands,
    subscriber,
    async stop() {
      await bus.stop();
      commands.disconnect();
    },
  };
}

async function ready(...links: Redis[]): Promise<void> {
  await eventually(() => links.every((one) => one.status === 'ready'));
}

describeBus('Redis', async () => {
  const [commands, subscriber] = [link(), link()];
  const bus = createRedisBus({ commands, subscriber, clock: STANDING, log: silentLog });
  return { bus, close: async () => commands.disconnect() };
});

describeLocks('Redis', async (lockMs) => {
  const [one, other] = [link(), link()];
  await ready(one, other);
  const make = (from: Redis) => createRedisLocks({ link: from, clock: STANDING, log: silentLog, lockMs });
  return {
    locks: make(one),
    otherNode: make(other),
    async close() {
      one.disconnect();
      other.disconnect();
    },
  };
});

describe('two nodes over one Redis', () => {
  const [alice, bob] = [device('alice'), device('bob')];
  let [one, two]: Node[] = [];

  beforeEach(async () => {
    [one, two] = await Promise.all([startNode({ clock: STANDING }), startNode({ clock: STANDING })]);
  });
  afterEach(async () => {
    await Promise.all([one!.stop(), two!.stop()]);
  });

  /** Pokes until the served device hears it: by then the link carries pokes from one node to the other. */
  async function pokeArrives(from: Node, to: Node, name: string): Promise<void> {
    to.heard.pokes = [];
    await eventually(() => {
      from.bus.poke([device(name)]);
      return to.heard.pokes.includes(`${name}.1`);
    });
  }

  it('carries a poke to the node that serves the device, and to no other', async () => {
    const three = await startNode({ clock: STANDING });
    await two!.bus.acquire({ device: alice, fence: 1 });
    await three.bus.acquire({ device: bob, fence: 2 });
    one!.bus.poke([alice]);
    await eventually(() => expect(two!.heard.pokes).toEqual(['alice.1']));
    await pokeArrives(one!, three, 'bob');
    expect(three.heard.pokes).not.toContain('alice.1');
    expect(one!.heard.pokes).toEqual([]);
    await three.stop();
  });

  it('publishes once for each node and tick, whatever the number of devices', async () => {
    const devices = Array.from({ length: 300 }, (_, i) => device(`user${i}`));
    await Promise.all(devices.map((d, i) => two!.bus.acquire({ device: d, fence: i + 1 })));
    const before = await publishCount();
    for (const d of devices) one!.bus.poke([d]);
    await eventually(() => expect(new Set(two!.heard.pokes).size).toBe(300));
    expect((await publishCount()) - before).toBeLessThan(20);
  });

  it('gives the lease to the newest connection on any node, and tells the older one’s node', async () => {
    await one!.bus.acquire({ device: alice, fence: 1 });
    expect(await two!.bus.acquire({ device: alice, fence: 2 })).toBe(true);
    await eventually(() => expect(one!.heard.displaced).toEqual([{ device: alice, fence: 1 }]));
    expect(two!.heard.displaced).toEqual([]);
    one!.bus.poke([alice]);
    await eventually(() => expect(two!.heard.pokes).toEqual(['alice.1']));
    expect(one!.heard.pokes).toEqual([]);
  });

  it('refuses an older connection while a newer one holds the lease on another node', async () => {
    // By their numbers: as text, 9 would be the newer one.
    await two!.bus.acquire({ device: alice, fence: 10 });
    expect(await one!.bus.acquire({ device: alice, fence: 9 })).toBe(false);
    expect(two!.heard.displaced).toEqual([]);
    await pokeArrives(one!, two!, 'alice');
  });

  it('answers each of many that come at once by what stands of its own device', async () => {
    const devices = Array.from({ length: 300 }, (_, i) => device(`user${i}`));
    const isTaken = (_: unknown, i: number): boolean => i % 2 === 0;
    await Promise.all(devices.filter(isTaken).map((each) => two!.bus.acquire({ device: each, fence: 2 })));
    const granted = await Promise.all(devices.map((each) => one!.bus.acquire({ device: each, fence: 1 })));
    expect(granted).toEqual(devices.map((each, i) => !isTaken(each, i)));
  });

  it('lets exactly one of many connections that race over the nodes keep the lease', async () => {
    const fences = Array.from({ length: 40 }, (_, i) => ((i * 17) % 40) + 1);
    const nodeOf = (fence: number): Node => (fence % 2 === 0 ? one! : two!);
    const granted = await Promise.all(
      fences.map((fence) => nodeOf(fence).bus.acquire({ device: alice, fence })),
    );
    await eventually(() => {
      const displaced = new Set([...one!.heard.displaced, ...two!.heard.displaced].map((l) => l.fence));
      expect(fences.filter((fence, i) => granted[i] && !displaced.has(fence))).toEqual([40]);
    });
  });

  it('immunity 26: a late release on the old node leaves the device with the new one', async () => {
    await one!.bus.acquire({ device: alice, fence: 1 });
    await two!.bus.acquire({ device: alice, fence: 2 });
    // Whether or not its node has heard of the newer one by now.
    one!.bus.release({ device: alice, fence: 1 });
    await pokeArrives(one!, two!, 'alice');
    one!.bus.release({ device: alice, fence: 1 });
    await pokeArrives(one!, two!, 'alice');
    expect(two!.heard.displaced).toEqual([]);
    expect(await one!.bus.acquire({ device: alice, fence: 1 })).toBe(false);
  });

  it('lets an older connection in once the newer one has left the other node', async () => {
    await two!.bus.acquire({ device: alice, fence: 2 });
    two!.bus.release({ device: alice, fence: 2 });
    await eventually(async () => expect(await one!.bus.acquire({ device: alice, fence: 1 })).toBe(true));
    await pokeArrives(two!, one!, 'alice');
  });

  it('finds a displacement whose message was lost with the next renewal, also after the newer one left', async () => {
    const slow = await startNode({ timing: { leaseMs: 600 } });
    await slow.bus.acquire({ device: alice, fence: 1 });
    // As if the messages of the other node never came: it writes the lease, and then gives it up.
    await admin.set('keygate:lease:{alice.1}', '2 ', 'PX', 60_000);
    await eventually(() => expect(slow.heard.displaced).toEqual([{ device: alice, fence: 1 }]));
    await slow.stop();
  });

  it('renews its leases for as long as it serves them, and lets those of a dead node expire', async () => {
    const slow = await startNode({ timing: { leaseMs: 300, probeMs: 60_000 } });
    await slow.bus.acquire({ device: alice, fence: 1 });
    const key = 'keygate:lease:{alice.1}';
    await admin.pexpire(key, 100);
    await eventually(async () => expect(await admin.pttl(key)).toBeGreaterThan(150));
    // Its connections end without a goodbye, and no probe wakes them.
    slow.commands.disconnect();
    slow.subscriber.disconnect();
    await eventually(async () => expect(await admin.exists(key)).toBe(0));
    await slow.stop();
  });

  it('rebuilds a lease that Redis lost, and looks at its device', async () => {
    const slow = await startNode({ timing: { leaseMs: 600 } });
    await slow.bus.acquire({ device: alice, fence: 1 });
    await admin.flushall();
    await eventually(() => expect(slow.heard.pokes).toEqual(['alice.1']));
    await pokeArrives(one!, slow, 'alice');
    await slow.stop();
  });

  it('gives its leases up when it stops', async () => {
    await one!.bus.acquire({ device: alice, fence: 5 });
    await one!.bus.stop();
    expect(await two!.bus.acquire({ device: alice, fence: 4 })).toBe(true);
  });

  it('gives up what was released just before it stops, also behind a release under way', async () => {
    const devices = [alice, bob, device('carol')];
    for (const each of devices) await one!.bus.acquire({ device: each, fence: 5 });
    for (const each of devices) {
      one!.bus.release({ device: each, fence: 5 });
      // The next one finds a batch under way.
      await Promise.resolve();
    }
    await one!.stop();
    for (const each of devices) expect(await two!.bus.acquire({ device: each, fence: 4 })).toBe(true);
  });

  it('passes on what was poked just before it stops, also behind a poke under way', async () => {
    await two!.bus.acquire({ device: alice, fence: 1 });
    await two!.bus.acquire({ device: bob, fence: 2 });
    one!.bus.poke([alice]);
    await new Promise((resolve) => setImmediate(resolve));
    one!.bus.poke([bob]);
    await one!.stop();
    await eventually(() => expect(two!.heard.pokes.toSorted()).toEqual(['alice.1', 'bob.1']));
  });

  it('is not harmed by what does not belong on its channel', async () => {
    await one!.bus.acquire({ device: alice, fence: 1 });
    const channel = `keygate:node:${one!.bus.nodeId}`;
    const garbage = [
      ...['', ' ', 'poke', 'poke  ', 'displaced', 'displaced alice.1', 'displaced alice.1 x', 'probe', '{}'],
      ...['displaced alice.1 0', 'displaced alice.1 1e999', 'displaced alice.1 1', '\u0000\uffff', 'null'],
      ...['poke __proto__ constructor toString', `poke ${'x'.repeat(300_000)}`, 'x'.repeat(1_000_000)],
    ];
    for (const text of garbage) await admin.publish(channel, text);
    await admin.publish(channel, Buffer.from([0xff, 0xfe, 0x00, 0x80]));
    await pokeArrives(two!, one!, 'alice');
    expect(one!.heard.displaced).toEqual([]);
    expect(new Set(one!.heard.pokes)).toEqual(new Set(['alice.1']));
  });

  it('is not harmed by what does not belong in a lease', async () => {
    await admin.set('keygate:lease:{alice.1}', 'garbage');
    await admin.rpush('keygate:lease:{bob.1}', 'a list');
    one!.bus.poke([alice, bob]);
    expect(await one!.bus.acquire({ device: alice, fence: 1 })).toBe(true);
    expect(await one!.bus.acquire({ device: bob, fence: 1 })).toBe(true);
    await pokeArrives(two!, one!, 'alice');
  });
});

describe('the bus while Redis breaks', () => {
  const [alice, bob] = [device('alice'), device('bob')];
  let nodes: Node[] = [];

  async function start(options: Parameters<typeof startNode>[0] = {}): Promise<Node> {
    const node = await startNode(options);
    nodes.push(node);
    return node;
  }
  afterEach(async () => {
    await Promise.all(nodes.map((node) => node.stop()));
    nodes = [];
  });

  it('rebuilds the leases after Redis came back empty, then says that pokes may be lost, and pokes again', async () => {
    const [one, two] = [await start({ clock: STANDING }), await start({ clock: STANDING })];
    await one.bus.acquire({ device: alice, fence: 1 });
    await two.bus.acquire({ device: bob, fence: 2 });
    await redis.kill('SIGKILL');
    await eventually(() => one.bus.trouble() !== null && two.bus.trouble() !== null);
    const leasesAtGap: Promise<number>[] = [];
    one.heard.onGap = () => {
      one.heard.gaps++;
      leasesAtGap.push(admin.exists('keygate:lease:{alice.1}'));
    };
    await redis.restart();
    await eventually(() => expect([one.heard.gaps, two.heard.gaps]).toEqual([1, 1]));
    expect(await leasesAtGap[0]).toBe(1);
    one.bus.poke([bob]);
    two.bus.poke([alice]);
    await eventually(() => expect([one.heard.pokes, two.heard.pokes].flat()).toContain('alice.1'));
    await eventually(() => expect(two.heard.pokes).toContain('bob.1'));
    await eventually(() => expect([one.bus.trouble(), two.bus.trouble()]).toEqual([null, null]));
  });

  it('serves this node’s devices while Redis is away, and announces them when it is back', async () => {
    const [one, two] = [await start(), await start()];
    await redis.kill('SIGKILL');
    await eventually(() => one.bus.trouble() !== null && two.bus.trouble() !== null);
    expect(await one.bus.acquire({ device: alice, fence: 1 })).toBe(true);
    expect(await one.bus.acquire({ device: alice, fence: 3 })).toBe(true);
    expect(one.heard.displaced).toEqual([{ device: alice, fence: 1 }]);
    one.bus.poke([alice]);
    await eventually(() => expect(one.heard.pokes).toEqual(['alice.1']));
    one.bus.release({ device: bob, fence: 1 });
    // A newer connection comes to the other node, which can't know of this one.
    expect(await two.bus.acquire({ device: alice, fence: 4 })).toBe(true);
    await redis.restart();
    await eventually(() => expect(one.heard.displaced).toContainEqual({ device: alice, fence: 3 }));
    expect(two.heard.displaced).toEqual([]);
    await eventually(() => {
      one.bus.poke([alice]);
      return two.heard.pokes.includes('alice.1');
    });
  });

  it('sends the pokes that waited for Redis when it is back', async () => {
    const [one, two] = [await start(), await start()];
    await two.bus.acquire({ device: bob, fence: 1 });
    one.commands.disconnect();
    await eventually(() => one.commands.status === 'end');
    one.bus.poke([bob]);
    await eventually(() => expect(two.heard.pokes).toEqual(['bob.1']));
  });

  it('tells both, where another node may have taken a device while this one was cut off', async () => {
    const proxy = await startProxy(redis.port);
    const [one, two] = [
      await start({ url: `redis://127.0.0.1:${proxy.port}`, clock: STANDING }),
      await start({ clock: STANDING }),
    ];
    await one.bus.acquire({ device: alice, fence: 1 });
    await proxy.close();
    await eventually(() => one.bus.trouble() !== null);
    await two.bus.acquire({ device: alice, fence: 2 });
    two.heard.pokes = [];
    one.bus.poke([alice]);
    await eventually(() => expect(one.heard.pokes).toEqual(['alice.1']));
    await proxy.open();
    await eventually(() => expect(two.heard.pokes).toEqual(['alice.1']));
    await eventually(() => expect(one.heard.displaced).toEqual([{ device: alice, fence: 1 }]));
    await proxy.close();
  });

  it('sends the pokes that Redis refused with the next probe, on the same connection', async () => {
    const url = redis.url.replace('//', '//narrow:sesame@');
    await admin.acl('SETUSER', 'narrow', 'on', '>sesame', '&*', '~*', '+@all', '-evalsha');
    onTestFinished(async () => void (await admin.acl('DELUSER', 'narrow')));
    const clock = createManualClock();
    const [one, two] = [await start({ url, clock }), await start({ clock: STANDING })];
    await two.bus.acquire({ device: bob, fence: 1 });
    let losses = 0;
    one.commands.on('close', () => losses++);
    one.bus.poke([bob]);
    await eventually(async () => expect(await admin.acl('LOG')).not.toEqual([]));
    // Answered behind the refusal.
    await one.commands.ping();
    await admin.acl('SETUSER', 'narrow', '+evalsha');
    expect(two.heard.pokes).toEqual([]);
    await clock.advance(QUICK.probeMs!);
    await eventually(() => expect(two.heard.pokes).toEqual(['bob.1']));
    expect(losses).toBe(0);
  });

  it('keeps so many pokes while it is cut off, and forgets the others, which a sweep makes up for', async () => {
    const proxy = await startProxy(redis.port);
    const one = await start({ url: `redis://127.0.0.1:${proxy.port}`, clock: STANDING });
    const two = await start({ clock: STANDING });
    const devices = Array.from({ length: POKES_WAITING_MAX + 1 }, (_, index) => device(`user${index}`));
    const [last, lost] = devices.slice(-2);
    for (const which of [last!, lost!]) await two.bus.acquire({ device: which, fence: 1 });
    await proxy.close();
    await eventually(() => one.bus.trouble() !== null);
    one.bus.poke(devices);
    await proxy.open();
    await eventually(() => expect(two.heard.pokes).toHaveLength(1));
    // Pokes come in order: what was kept came before this one.
    one.bus.poke([last!]);
    await eventually(() => expect(two.heard.pokes).toHaveLength(2));
    expect(new Set(two.heard.pokes)).toEqual(new Set([addressKey(last!)]));
    await proxy.close();
  });

  it('announces a lease that Redis could not take as soon as it can', async () => {
    const [one, two] = [await start(), await start()];
    await admin.config('SET', 'maxmemory', '1');
    try {
      expect(await one.bus.acquire({ device: alice, fence: 1 })).toBe(true);
      expect(await admin.exists('keygate:lease:{alice.1}')).toBe(0);
    } finally {
      await admin.config('SET', 'maxmemory', '0');
    }
    await eventually(() => {
      two.bus.poke([alice]);
      return one.heard.pokes.length > 0;
    });
  });

  it('answers within its bound while Redis is silent', async () => {
    const clock = createManualClock();
    const node = await start({ clock, timing: { probeMs: 60_000 } });
    await redis.kill('SIGSTOP');
    try {
      const acquired = node.bus.acquire({ device: alice, fence: 1 });
      await clock.advance(499);
      expect(await Promise.race([acquired, 'waits'])).toBe('waits');
      await clock.advance(1);
      expect(await acquired).toBe(true);
    } finally {
      await redis.kill('SIGCONT');
    }
  });

  it('pokes its own devices while Redis is silent, and goes on when it speaks again', async () => {
    const [one, two] = [await start(), await start()];
    await redis.kill('SIGSTOP');
    try {
      expect(await one.bus.acquire({ device: alice, fence: 1 })).toBe(true);
      one.bus.poke([alice, bob]);
      await eventually(() => expect(one.heard.pokes).toEqual(['alice.1']));
      await eventually(() => expect(one.bus.trouble()).not.toBeNull());
    } finally {
      await redis.kill('SIGCONT');
    }
    await eventually(() => expect(one.bus.trouble()).toBeNull());
    await eventually(() => {
      two.bus.poke([alice]);
      return one.heard.pokes.length > 1;
    });
    expect(one.heard.gaps).toBeGreaterThan(0);
  });

  it('notices a connection that stays open and carries nothing, and makes a new one', async () => {
    const proxy = await startProxy(redis.port);
    const node = await start({ url: `redis://127.0.0.1:${proxy.port}` });
    const other = await start();
    await node.bus.acquire({ device: alice, fence: 1 });
    proxy.swallowFrom('probe');
    await eventually(() => expect(node.bus.trouble()).not.toBeNull());
    proxy.swallowFrom('nothing that a client says');
    await eventually(() => expect(node.bus.trouble()).toBeNull());
    expect(node.heard.gaps).toBeGreaterThan(0);
    expect(node.bus.probes()?.failureCount).toBeGreaterThan(0);
    await eventually(() => {
      other.bus.poke([alice]);
      return node.heard.pokes.includes('alice.1');
    });
    await proxy.close();
  });

  it('makes the connection anew that did not carry its probe, and keeps the one that it listens on', async () => {
    const proxy = await startProxy(redis.port);
    const clock = createManualClock();
    const node = await start({ url: `redis://127.0.0.1:${proxy.port}`, clock });
    const closed: string[] = [];
    node.commands.on('close', () => closed.push('commands'));
    node.subscriber.on('close', () => closed.push('subscriber'));
    proxy.swallowFrom('probe');
    await clock.advance(QUICK.probeMs!);
    await eventually(() => expect(proxy.swallowedCount()).toBe(1));
    proxy.swallowFrom('nothing that a client says');
    await clock.advance(QUICK.probeWaitMaxMs!);
    await eventually(() => expect(node.heard.gaps).toBe(1));
    expect(closed).toEqual(['commands']);
    await proxy.close();
  });

  it.each([
    ['asks on', 'commands'],
    ['listens on', 'subscriber'],
  ] as const)(
    'wakes the connection that it %s when that gave up, and looks at everything',
    async (_, link) => {
      const clock = createManualClock();
      const node = await start({ clock });
      node[link].disconnect();
      await eventually(() => expect(node[link].status).toBe('end'));
      await clock.advance(QUICK.probeMs!);
      await eventually(() => expect(node.heard.gaps).toBe(1));
      expect(node.bus.trouble()).toBeNull();
    },
  );

  it('looks once more when it has lost a connection while its leases were renewed', async () => {
    const node = await start({ clock: STANDING });
    await node.bus.acquire({ device: alice, fence: 1 });
    await admin.client('PAUSE', 60_000, 'WRITE');
    try {
      for (let losses = 0; losses < 2; losses++) {
        const lost = once(node.subscriber, 'close');
        node.subscriber.disconnect(true);
        await lost;
        await eventually(() => expect(node.bus.trouble()).toBeNull());
      }
    } finally {
      await admin.client('UNPAUSE');
    }
    await eventually(() => expect(node.heard.gaps).toBeGreaterThan(1));
  });

  it('notices a subscription that Redis has forgotten', async () => {
    const node = await start();
    await node.bus.acquire({ device: alice, fence: 1 });
    // The connection stays open and answers, and no message comes.
    await node.subscriber.unsubscribe(`keygate:node:${node.bus.nodeId}`);
    await eventually(() => expect(node.heard.gaps).toBe(1));
    await eventually(() => expect(node.bus.trouble()).toBeNull());
  });

  it('outlives far more failed attempts than ioredis allows by itself, without an unhandled rejection', async () => {
    const proxy = await startProxy(redis.port);
    const node = await start({ url: `redis://127.0.0.1:${proxy.port}` });
    await node.bus.acquire({ device: alice, fence: 1 });
    // The new connection dies with the subscription unanswered: what ioredis does by itself nobody would catch.
    proxy.swallowFrom('subscribe');
    proxy.cut();
    await eventually(() => proxy.swallowedCount() > 0);
    let attempts = 0;
    node.subscriber.on('reconnecting', () => attempts++);
    await proxy.close();
    const locks = createRedisLocks({ link: node.commands, clock: systemClock, log: silentLog });
    await eventually(async () => {
      node.bus.poke([bob]);
      await (await locks.acquire([alice])).release();
      return attempts > 60;
    });
    expect(unhandled).toEqual([]);
    await proxy.open();
    await eventually(() => expect(node.bus.trouble()).toBeNull());
    await proxy.close();
  });

  it('starts with a silent Redis, and looks at everything when it speaks', async () => {
    const clock = createManualClock();
    await redis.kill('SIGSTOP');
    try {
      const starting = start({ clock, timing: { probeMs: 60_000, startWaitMaxMs: 1_000 } });
      await clock.advance(1_000);
      const node = await starting;
      expect(node.bus.trouble()).not.toBeNull();
      await redis.kill('SIGCONT');
      await eventually(() => expect(node.bus.trouble()).toBeNull());
      await eventually(() => expect(node.heard.gaps).toBe(1));
    } finally {
      await redis.kill('SIGCONT');
    }
  });

  it('starts without Redis, serves its own devices, and joins the others when Redis comes', async () => {
    await redis.kill('SIGKILL');
    const node = await start({ timing: { startWaitMaxMs: 200 } });
    expect(node.bus.trouble()).toBe('no connection to Redis');
    expect(await node.bus.acquire({ device: alice, fence: 1 })).toBe(true);
    node.bus.poke([alice]);
    await eventually(() => expect(node.heard.pokes).toEqual(['alice.1']));
    await redis.restart();
    await eventually(() => expect(node.heard.gaps).toBe(1));
    const other = await start();
    await eventually(() => {
      other.bus.poke([alice]);
      return node.heard.pokes.length > 1;
    });
  });
});

describe('what is told of a Redis that can not be used', () => {
  const examined = async (url: string): Promise<unknown> => {
    const asking = link({ url });
    return await examineRedis(asking)
      .catch((error: Error) => error)
      .finally(() => asking.disconnect());
  };

  it('is what its user may not do, once, until it may', async () => {
    const url = redis.url.replace('//', '//narrow:sesame@');
    await admin.acl('SETUSER', 'narrow', 'on', '>sesame', 'resetchannels', '~other:*', '+@all');
    onTestFinished(async () => void (await admin.acl('DELUSER', 'narrow')));
    expect(String(await examined(url))).toMatch(
      /^Error: Redis refuses a script that writes keygate:\*: NOPERM/,
    );
    await admin.acl('SETUSER', 'narrow', '~keygate:*');
    expect(String(await examined(url))).toMatch(
      /^Error: Redis refuses a message on channels keygate:\*: NOPERM/,
    );

    const warnings: object[] = [];
    const log: Log = { ...silentLog, warn: (fields, text) => warnings.push({ ...fields, text }) };
    const clock = createManualClock();
    const starting = startNode({ url, log, clock, timing: { startWaitMaxMs: 300 } });
    await eventually(() => expect(warnings).toHaveLength(1));
    await clock.advance(300);
    const node = await starting;
    onTestFinished(() => node.stop());
    await eventually(() => expect(node.bus.trouble()).toMatch(/^Redis refuses the subscription: NOPERM/));
    await admin.acl('SETUSER', 'narrow', '&keygate:*');
    await eventually(async () => {
      await clock.advance(QUICK.probeMs!);
      expect(node.bus.trouble()).toBeNull();
    });
    expect(warnings).toEqual([
      { text: 'bus: Redis refuses the subscription', reason: expect.stringMatching(/^NOPERM/) },
      { text: expect.stringContaining('starting without Redis') },
    ]);
    await admin.acl('SETUSER', 'narrow', '-subscribe');
    expect(String(await examined(url))).toMatch(
      /^Error: Redis refuses a subscription to channels keygate:\*: NOPERM/,
    );
    await admin.acl('SETUSER', 'narrow', '+subscribe');
    expect(await examined(url)).toMatchObject({ version: expect.any(String) });
  });

  it('is that it is a Sentinel, to the doctor and in the log', async () => {
    const sentinel = await startRedisSentinel();
    onTestFinished(() => sentinel.stop());
    const hint = / \(as a Sentinel answers: REDIS_URL must name the Redis itself\)$/;
    expect(String(await examined(sentinel.url))).toMatch(hint);
    const warnings: object[] = [];
    const log: Log = { ...silentLog, warn: (fields, text) => warnings.push({ ...fields, text }) };
    const node = await startNode({ url: sentinel.url, log, timing: { startWaitMaxMs: 300 } });
    onTestFinished(() => node.stop());
    await node.bus.acquire({ device: { userId: 'alice', deviceId: 1 }, fence: 1 });
    await eventually(() =>
      expect(warnings).toContainEqual(
        expect.objectContaining({ text: 'bus: Redis refuses leases', reason: expect.stringMatching(hint) }),
      ),
    );
  });

  it('does not have its link connect anew at each refusal, as of a replica', async () => {
    const own = link();
    await ready(own);
    let endings = 0;
    own.on('close', () => {
      endings += 1;
    });
    await admin.replicaof('127.0.0.1', '1');
    onTestFinished(async () => void (await admin.replicaof('NO', 'ONE')));
    for (let i = 0; i < 10; i++) {
      await eventually(() => expect(own.set('keygate:refused', '')).rejects.toThrow('READONLY'));
    }
    expect(endings).toBe(1);
    own.disconnect();
  });

  it('is that it is a replica, also while nobody is connected, until it takes changes', async () => {
    await admin.replicaof('127.0.0.1', '1');
    onTestFinished(async () => void (await admin.replicaof('NO', 'ONE')));
    const node = await startNode();
    onTestFinished(() => node.stop());
    await eventually(() => expect(node.bus.trouble()).toMatch(/^Redis refuses leases: READONLY/));
    await admin.replicaof('NO', 'ONE');
    await eventually(() => expect(node.bus.trouble()).toBeNull());
  });

  it('is that it stores nothing, until it does', async () => {
    const warnings: object[] = [];
    const log: Log = { ...silentLog, warn: (fields, text) => warnings.push({ ...fields, text }) };
    const node = await startNode({ log });
    onTestFinished(() => node.stop());
    await node.bus.acquire({ device: { userId: 'alice', deviceId: 1 }, fence: 1 });
    await admin.config('SET', 'maxmemory', '1');
    try {
      expect(String(await examined(redis.url))).toMatch(
        /^Error: Redis refuses a script that writes keygate:\*: OOM/,
      );
      expect(await node.bus.acquire({ device: { userId: 'bob', deviceId: 1 }, fence: 2 })).toBe(true);
      expect(node.bus.trouble()).toMatch(/^Redis refuses leases: OOM/);
      expect(await node.bus.acquire({ device: { userId: 'carol', deviceId: 1 }, fence: 3 })).toBe(true);
    } finally {
      await admin.config('SET', 'maxmemory', '0');
    }
    await eventually(() => expect(node.bus.trouble()).toBeNull());
    expect(warnings).toEqual([{ text: 'bus: Redis refuses leases', reason: expect.stringMatching(/^OOM/) }]);
  });

  it('is asked again for the inspector’s channels, on the same connection', async () => {
    await admin.acl('SETUSER', 'narrow', 'on', '>sesame', 'resetchannels', '+@all');
    onTestFinished(async () => void (await admin.acl('DELUSER', 'narrow')));
    const [commands, subscriber] = [link(), link({ url: redis.url.replace('//', '//narrow:sesame@') })];
    await ready(commands, subscriber);
    let losses = 0;
    subscriber.on('close', () => losses++);
    const clock = createManualClock();
    const relay = createRedisRelay({ nodeId: 'one', commands, subscriber, clock });
    onTestFinished(() => relay.stop().then(() => commands.disconnect()));
    await relay.start(() => {});
    expect(losses).toBe(0);
    // However often the connection was lost meanwhile, it asks once.
    for (let count = 1; count <= 3; count++) {
      subscriber.disconnect(true);
      await eventually(() => expect(losses).toBe(count));
      await ready(subscriber);
      // Answered behind the refusal.
      await subscriber.ping();
    }
    await eventually(() => expect(clock.timerCount()).toBe(1));
    await admin.acl('SETUSER', 'narrow', '&keygate:*');
    await clock.advance(15_000);
    await eventually(async () =>
      expect(await admin.pubsub('CHANNELS', 'keygate:inspector*')).toEqual(
        expect.arrayContaining(['keygate:inspector', 'keygate:inspector:one']),
      ),
    );
    expect(losses).toBe(3);
  });

  it('is its own reason', async () => {
    expect(await examined(redis.url)).toMatchObject({ version: expect.stringMatching(/^\d+\./) });
    expect(await examined(`${redis.url}/99`)).toEqual(
      new Error('no connection to Redis: ERR DB index is out of range'),
    );
    expect(await examined('redis://127.0.0.1:1')).toEqual(
      new Error('no connection to Redis: connect ECONNREFUSED 127.0.0.1:1'),
    );
    await admin.config('SET', 'requirepass', 'sesame');
    const url = (password: string) => redis.url.replace('//', `//:${password}@`);
    const wrong = await examined(url('hunter2')).finally(() => admin.config('SET', 'requirepass', ''));
    expect(wrong).toEqual(
      new Error('no connection to Redis: WRONGPASS invalid username-password pair or user is disabled.'),
    );
    expect(inspect(wrong, { depth: null })).not.toContain('hunter2');
  });

  it('says nothing of what was sent, where that is repeated', async () => {
    const server = createServer((socket) => {
      socket.on('error', () => {});
      socket.on('data', (text) => {
        const commandCount = text.toString().match(/\*\d+\r\n/g)?.length ?? 0;
        const answer = "-ERR unknown command 'AUTH', with args beginning with: 'hunter2' \r\n";
        socket.write(answer.repeat(commandCount));
      });
    });
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    const { port } = server.address() as AddressInfo;
    const warnings: object[] = [];
    const log: Log = { ...silentLog, warn: (facts) => void warnings.push(facts) };
    const url = `redis://:hunter2@127.0.0.1:${port}`;
    const logging = link({ url, log });
    expect(await examined(url)).toEqual(new Error("no connection to Redis: ERR unknown command 'AUTH'"));
    await eventually(() => expect(warnings).toEqual([{ link: 'test', error: "ERR unknown command 'AUTH'" }]));
    logging.disconnect();
    server.close();
  });
});

describe('a database that Redis refuses', () => {
  const url = (): string => `${redis.url}/99`;

  it('is not exchanged for another one, however often the link tries', async () => {
    const warnings: object[] = [];
    const log: Log = { ...silentLog, warn: (facts) => void warnings.push(facts) };
    const refused = link({ url: url(), log });
    const seen: string[] = [];
    refused.on('ready', () => seen.push('ready'));
    refused.on('reconnecting', () => seen.push('reconnecting'));
    await eventually(() => seen.length > 3);
    await expect(refused.set('mine', 'yes')).rejects.toThrow();
    refused.disconnect();
    expect(seen).not.toContain('ready');
    expect(await admin.keys('*')).toEqual([]);
    expect(warnings).toContainEqual({ link: 'test', error: 'ERR DB index is out of range' });
  });

  it('lets no bus start, and leaves nothing behind of it', async () => {
    const [commands, subscriber] = [link({ url: url() }), link({ url: url() })];
    const bus = createRedisBus({ commands, subscriber, clock: systemClock, log: silentLog, timing: QUICK });
    await expect(bus.start(recorder())).rejects.toThrow(
      /^Redis refuses database 99 of REDIS_URL: ERR DB index is out of range$/,
    );
    expect(subscriber.listenerCount('message')).toBe(0);
    commands.disconnect();
  });

  it('ends a start with one line', async () => {
    const database = await createDatabase();
    const ended = await keygate(['serve'], testEnvironment({ databaseUrl: database.url, redisUrl: url() }));
    await database.drop();
    expect(ended).toEqual({
      code: 1,
      stdout: '',
      stderr: 'keygate: Redis refuses database 99 of REDIS_URL: ERR DB index is out of range\n',
    });
  });

  it('is used where there is one', async () => {
    const node = await startNode({ url: `${redis.url}/15` });
    expect(node.bus.trouble()).toBeNull();
    await node.bus.acquire({ device: device('alice'), fence: 1 });
    expect(await admin.keys('*')).toEqual([]);
    const there = new Redis(`${redis.url}/15`);
    expect(await there.keys('*')).toHaveLength(1);
    there.disconnect();
    await node.stop();
  });

  it('that is refused is told also after Redis had been away', async () => {
    const warnings: { error?: string }[] = [];
    const log: Log = { ...silentLog, warn: (facts) => void warnings.push(facts) };
    await redis.kill('SIGKILL');
    const refused = link({ url: url(), log });
    await eventually(() => expect(warnings[0]?.error).toContain('ECONNREFUSED'));
    await redis.restart();
    await eventually(() =>
      expect(warnings.map(({ error }) => error)).toContain('ERR DB index is out of range'),
    );
    refused.disconnect();
  });
});

describe('the locks while Redis breaks', () => {
  const devices = Array.from({ length: 64 }, (_, i) => device(`user${i}`));

  it('count every device as held, and say so once, while Redis is away', async () => {
    const { log, lines } = recordingLog();
    const own = link();
    await ready(own);
    const locks = createRedisLocks({ link: own, clock: systemClock, log });
    const before = await locks.acquire(devices);
    await redis.kill('SIGKILL');
    await before.release();
    for (let i = 0; i < 100; i++) {
      const mine = await locks.acquire(devices);
      expect(mine.held.size).toBe(64);
      await mine.release();
    }
    expect(lines).toEqual(['warn: device locks: Redis is away, working without them']);
    await redis.restart();
    await eventually(async () => {
      await (await locks.acquire(devices)).release();
      return lines.includes('info: device locks: Redis is back');
    });
    own.disconnect();
  });

  it('make one batch wait for a silent Redis, and not those that follow', async () => {
    const clock = createManualClock();
    const [own, second] = [link(), link()];
    await ready(own, second);
    const locks = createRedisLocks({ link: own, clock, log: silentLog });
    const other = createRedisLocks({ link: second, clock, log: silentLog });
    const lockOnce = async () => await (await locks.acquire(devices)).release();
    await lockOnce();
    await redis.kill('SIGSTOP');
    try {
      const asked = vi.spyOn(own, 'evalsha');
      const first = lockOnce();
      await clock.advance(99);
      expect(await Promise.race([first, 'waits'])).toBe('waits');
      await clock.advance(1);
      await first;
      // Nothing ends these but themselves: the clock stands still.
      for (let trials = 0; trials < 3; trials++) {
        for (let i = 0; i < 100; i++) await lockOnce();
        await clock.advance(1_000);
      }
      // The first batch and the trials after a second each: what they asked for they gave back.
      expect(asked.mock.calls.length).toBe(2 + 2 * 2);
    } finally {
      await redis.kill('SIGCONT');
    }
    // So locking works again at once when Redis does.
    await eventually(async () => {
      await clock.advance(1_000);
      const mine = await locks.acquire([device('alice')]);
      const theirs = await other.acquire([device('alice')]);
      await Promise.all([mine.release(), theirs.release()]);
      return mine.held.size === 1 && theirs.held.size === 0;
    });
    own.disconnect();
    second.disconnect();
  });
});

async function publishCount(): Promise<number> {
  const stats = await admin.info('commandstats');
  return Number(/cmdstat_publish:calls=(\d+)/.exec(stats)?.[1] ?? 0);
}

function recordingLog(): { log: Log; lines: string[] } {
  const lines: string[] = [];
  const at = (level: string) => (_fields: unknown, message: string) =>
    void lines.push(`${level}: ${message}`);
  return { log: { debug: at('debug'), info: at('info'), warn: at('warn'), error: at('error') }, lines };
}

interface Proxy {
  port: number;
  /** From the next bytes of a client that hold this text, its present connections carry nothing, and stay open. */
  swallowFrom(text: string): void;
  swallowedCount(): number;
  /** Ends the connections; new ones are taken. */
  cut(): void;
  /** Ends the connections and refuses new ones. */
  close(): Promise<void>;
  /** Takes connections again, and swallows nothing. */
  open(): Promise<void>;
}

async function startProxy(targetPort: number): Promise<Proxy> {
  const sockets = new Set<Socket>();
  let swallowText: string | null = null;
  let swallowed = 0;
  // One of the system's could go to another while it is closed, even to the link itself that tries to connect.
  const port = await freePort();
  const server: Server = createServer((client) => {
    const target = connect(targetPort, '127.0.0.1');
    let isSwallowing = false;
    client.on('data', (bytes) => {
      if (!isSwallowing && swallowText !== null && bytes.toString('latin1').includes(swallowText)) {
        isSwallowing = true;
        swallowed++;
      }
      if (!isSwallowing) target.write(bytes);
    });
    target.on('data', (bytes) => {
      if (!isSwallowing) client.write(bytes);
    });
    for (const [from, to] of [
      [client, target],
      [target, client],
    ] as const) {
      sockets.add(from);
      from.on('error', () => {});
      from.on('close', () => {
        sockets.delete(from);
        to.destroy();
      });
    }
  });
  const listen = (): Promise<void> => new Promise((resolve) => server.listen(port, '127.0.0.1', resolve));
  const cut = (): void => {
    for (const socket of sockets) socket.destroy();
  };
  await listen();
  return {
    port,
    swallowFrom(text) {
      swallowText = text;
    },
    swallowedCount: () => swallowed,
    cut,
    async close() {
      cut();
      if (server.listening) await new Promise((resolve) => server.close(resolve));
    },
    async open() {
      swallowText = null;
      await listen();
    },
  };
}
