/**
 * The bus of many nodes. Each node listens on one channel; a lease in Redis says which node serves a device, so that
 * a poke reads the leases and goes to the channels of those nodes alone. No subscription is made per device.
 *
 * Redis may lose anything at any time: leases are renewed, and announced again whenever a connection was lost.
 */
import { randomBytes } from 'node:crypto';
import type { Redis } from 'ioredis';
import { type Clock, every, type Timer } from '../../lib/clock.ts';
import { createGatherer } from '../../lib/gather.ts';
import type { Log } from '../../lib/log.ts';
import type { Bus, BusListener, Lease } from '../../ports/bus.ts';
import { addressKey } from '../../protocol/ids.ts';
import { isUp, type RedisLink, recycle, within } from './connect.ts';
import { answeredOf, KEYS_PER_CALL_MAX, run, runOnEach, script } from './scripts.ts';

const ACQUIRE_WAIT_MAX_MS = 500;
const BATCH_WAIT_MAX_MS = 2_000;
const LEASES_PER_BATCH_MAX = 512;
/** One call of a script, which is carried out as a whole or not at all. */
const POKES_PER_BATCH_MAX = KEYS_PER_CALL_MAX;
/** Pokes that wait for Redis; more than these are lost, and found by the sweeps of the nodes that they were for. */
const POKES_WAITING_MAX = 10_000;
const MESSAGE_LENGTH_MAX = 256 * 1024;
/** In a Cluster any node passes a message on: where one is away, the next attempt finds another. */
const CLUSTER_PUBLISH_ATTEMPTS = 3;

/**
 * A lease is `<number> <node>`; one that was given up keeps its number and names no node until it expires.
 *
 * KEYS: leases. ARGV: node, milliseconds, `acquire` or `renew`, then for each lease its number.
 * Returns for each: `kept`, `new`, `lost` to a higher number, or `from <node>` where another node held it.
 * One that was given up is free for a new connection with a lower number. But a connection that only renews was
 * displaced by it, and may not have heard so.
 */
const LEASE = script(`
local answers = {}
for i = 1, #KEYS do
  local number = ARGV[i + 3]
  local heldNumber, holder = string.match(redis.call('GET', KEYS[i]) or '', '^(%d+) (.*)$')
  local isHigher = heldNumber and tonumber(heldNumber) > tonumber(number)
  if isHigher and (holder ~= '' or ARGV[3] == 'renew') then
    answers[i] = 'lost'
  else
    redis.call('SET', KEYS[i], number .. ' ' .. ARGV[1], 'PX', ARGV[2])
    if not heldNumber or holder == '' then answers[i] = 'new'
    elseif holder == ARGV[1] then answers[i] = 'kept'
    else answers[i] = 'from ' .. holder end
  end
end
return answers`);

/** KEYS: leases. ARGV: node, milliseconds, then for each lease its number. */
const GIVE_UP = script(`
for i = 1, #KEYS do
  local number = ARGV[i + 2]
  if redis.call('GET', KEYS[i]) == number .. ' ' .. ARGV[1] then
    redis.call('SET', KEYS[i], number .. ' ', 'PX', ARGV[2])
  end
end
return {}`);

/**
 * Tells each node which of its devices to look at. Redis does it: the poking node would have to read the leases first, and at
 * a few messages a second that round trip is a good part of what a poke costs. Not for a Cluster, where a script sees one
 * lease, and a message for each device would go to every node of it.
 *
 * KEYS: leases. ARGV: the poking node, how a channel begins, then for each lease its device.
 */
const PASS_ON = script(`
local pokes = {}
for i = 1, #KEYS do
  local node = string.match(redis.call('GET', KEYS[i]) or '', '^%d+ (.+)$')
  if node and node ~= ARGV[1] then
    pokes[node] = pokes[node] or { 'poke' }
    table.insert(pokes[node], ARGV[i + 2])
  end
end
for node, words in pairs(pokes) do redis.call('PUBLISH', ARGV[2] .. node, table.concat(words, ' ')) end
return {}`);

export interface RedisBusTiming {
  /** After so long without renewal a lease is free; it is renewed three times as often. */
  leaseMs: number;
  /** How often the node pokes itself, and how long it waits for that. */
  probeMs: number;
  probeWaitMaxMs: number;
  /** A node that finds no Redis starts all the same after so long, and serves its own devices. */
  startWaitMaxMs: number;
}

export interface RedisBusOptions {
  /** May be shared with others; the bus doesn't close it. */
  commands: RedisLink;
  /** The bus's own: it subscribes on it, and `stop` closes it. */
  subscriber: Redis;
  clock: Clock;
  log: Log;
  timing?: Partial<RedisBusTiming>;
}

export interface RedisBus extends Bus {
  /** Random per start: a node that comes back holds none of the leases that it held before. */
  readonly nodeId: string;
}

interface HeldLease extends Lease {
  key: string;
  /** While `acquire` is under way, its answer tells of the loss; from then on, `onDisplaced` does. */
  isPending: boolean;
  /** During which connection Redis confirmed it; null until it did. */
  confirmedIn: number | null;
}

export function createRedisBus({ commands, subscriber, clock, log, ...options }: RedisBusOptions): RedisBus {
  const timing: RedisBusTiming = {
    leaseMs: 60_000,
    probeMs: 3_000,
    probeWaitMaxMs: 2_000,
    startWaitMaxMs: 5_000,
    ...options.timing,
  };
  const nodeId = randomBytes(12).toString('hex');
  const channel = channelOf(nodeId);
  const leases = new Map<string, HeldLease>();
  const toLookAt = new Set<string>();
  const toForward = new Set<string>();
  const timers: Timer[] = [];
  let listener: BusListener | null = null;
  let isStopped = false;
  let isSubscribed = false;
  let isSubscribing = false;
  /** The link is connected, and yet the node's own poke did not come back. */
  let isDeaf = false;
  /** A connection was lost since the listener was last told to look at everything. */
  let isGapDue = false;
  /** Some lease was not confirmed, though no connection was lost. */
  let isRenewalDue = false;
  let isRestoring = false;
  let isLooking = false;
  /** Under way until nothing is to be forwarded, or Redis does not answer. */
  let forwarding: Promise<void> | null = null;
  /** Counts the connections of `commands`: what Redis confirmed over an older one may be gone. */
  let connection = 0;
  let probes = 0;
  let lagMs: number | null = null;
  let failureCount = 0;
  let hearProbe: (probe: string) => void = () => {};
  let reportOpen: () => void = () => {};

  function tell(say: (to: BusListener) => void): void {
    if (listener === null) return;
    try {
      say(listener);
    } catch (error) {
      log.error({ error: String(error) }, 'a listener of the bus threw');
    }
  }

  // ——— leases

  function drop(lease: HeldLease): void {
    if (leases.get(lease.key) !== lease) return;
    leases.delete(lease.key);
    if (!lease.isPending) tell((to) => to.onDisplaced({ device: lease.device, fence: lease.fence }));
  }

  /** Puts leases into Redis, tells those that they displace, and drops those that were lost. */
  async function announce(batch: readonly HeldLease[], mode: 'acquire' | 'renew'): Promise<void> {
    const sentIn = connection;
    const each = batch.map((lease) => ({ key: leaseKey(lease.key), arg: lease.fence }));
    const answers = await runOnEach(commands, LEASE, [nodeId, timing.leaseMs, mode], each);
    for (const [i, lease] of batch.entries()) {
      const answer = answers[i];
      if (typeof answer !== 'string') {
        isRenewalDue = true;
        continue;
      }
      if (answer === 'lost') {
        drop(lease);
        continue;
      }
      lease.confirmedIn = sentIn;
      if (answer.startsWith('from ')) {
        publish(answer.slice('from '.length), `displaced ${lease.key} ${lease.fence}`).catch(() => {});
      }
      // Until now, pokes passed it by.
      if (mode === 'renew' && answer !== 'kept') lookAt(lease.key);
    }
  }

  /** What connects at once is announced at once. */
  const acquisitions = createGatherer<HeldLease, void>({
    batchMax: LEASES_PER_BATCH_MAX,
    async run(batch) {
      // Those that ended while they waited are nobody's any more.
      const held = batch.filter((lease) => leases.get(lease.key) === lease);
      await announce(held, 'acquire');
      return batch.map(() => undefined);
    },
  });

  async function renewAll(): Promise<void> {
    if (!isUp(commands)) return;
    const all = [...leases.values()];
    for (let i = 0; i < all.length; i += LEASES_PER_BATCH_MAX) {
      const batch = all
        .slice(i, i + LEASES_PER_BATCH_MAX)
        .filter((lease) => leases.get(lease.key) === lease && !lease.isPending);
      await within(announce(batch, 'renew'), BATCH_WAIT_MAX_MS, clock);
    }
  }

  /** Renews all, now or, where that fails, with the next probe. */
  async function renewSoon(): Promise<void> {
    isRenewalDue = false;
    await renewAll().catch(() => {
      isRenewalDue = true;
    });
  }

  /** What disconnects at once is given up at once. */
  const releases = createGatherer<Lease, void>({
    batchMax: LEASES_PER_BATCH_MAX,
    async run(batch) {
      const each = batch.map((lease) => ({ key: leaseKey(addressKey(lease.device)), arg: lease.fence }));
      await runOnEach(commands, GIVE_UP, [nodeId, timing.leaseMs], each);
      return batch.map(() => undefined);
    },
  });
  /** Settles when everything is given up: batches of releases run one after the other. */
  let lastRelease: Promise<void> = Promise.resolve();

  function giveUpSoon(lease: Lease): void {
    if (isUp(commands)) lastRelease = releases.submit(lease).catch(() => {});
  }

  // ——— pokes

  function lookAt(key: string): void {
    toLookAt.add(key);
    scheduleLook();
  }

  function scheduleLook(): void {
    if (isLooking) return;
    isLooking = true;
    // Pokes of one tick are one look here, and mostly one message to each other node.
    setImmediate(look);
  }

  function look(): void {
    isLooking = false;
    const keys = [...toLookAt];
    toLookAt.clear();
    for (const key of keys) {
      const lease = leases.get(key);
      if (lease !== undefined) tell((to) => to.onPoke(lease.device));
    }
    void forwardAll();
  }

  /** Resolves when everything is passed on that waits by then, or can't be. */
  async function forwardAll(): Promise<void> {
    if (canForward()) forwarding ??= forwardUntilDone();
    await forwarding;
  }

  function canForward(): boolean {
    return toForward.size > 0 && isUp(commands);
  }

  async function forwardUntilDone(): Promise<void> {
    while (canForward()) {
      const keys = [...take(toForward, POKES_PER_BATCH_MAX)];
      try {
        await within(forward(keys), BATCH_WAIT_MAX_MS, clock);
      } catch {
        // They wait for the connection, or for the next probe.
        for (const key of keys) forwardLater(key);
        break;
      }
    }
    forwarding = null;
  }

  async function forward(keys: readonly string[]): Promise<void> {
    if (commands.isCluster) return await forwardInCluster(keys);
    await run(commands, PASS_ON, keys.map(leaseKey), [nodeId, channelOf(''), ...keys]);
  }

  async function forwardInCluster(keys: readonly string[]): Promise<void> {
    const found = await answeredOf(
      keys.map(async (key) => ({ key, lease: await commands.get(leaseKey(key)) })),
    );
    const keysByNode = new Map<string, string[]>();
    for (const { key, lease } of found) {
      const node = lease?.slice(lease.indexOf(' ') + 1) ?? '';
      if (node === '' || node === nodeId) continue;
      const ofNode = keysByNode.get(node);
      if (ofNode === undefined) keysByNode.set(node, [key]);
      else ofNode.push(key);
    }
    await Promise.all([...keysByNode].map(([node, ofNode]) => publish(node, `poke ${ofNode.join(' ')}`)));
  }

  function forwardLater(key: string): void {
    if (toForward.size < POKES_WAITING_MAX) toForward.add(key);
  }

  // ——— the node's channel

  async function publish(node: string, message: string): Promise<void> {
    for (let attempt = commands.isCluster ? CLUSTER_PUBLISH_ATTEMPTS : 1; ; attempt--) {
      try {
        await commands.publish(channelOf(node), message);
        return;
      } catch (error) {
        if (attempt === 1) throw error;
      }
    }
  }

  /** Whatever stands on the channel, nothing but a look, a displacement or a probe comes of it. */
  function hear(from: string, message: string): void {
    if (from !== channel || message.length > MESSAGE_LENGTH_MAX) return;
    const [kind, ...words] = message.split(' ');
    if (kind === 'poke') {
      for (const key of words) if (leases.has(key)) lookAt(key);
    } else if (kind === 'displaced') {
      const lease = leases.get(words[0] ?? '');
      const fence = Number(words[1]);
      if (lease !== undefined && Number.isSafeInteger(fence) && fence > lease.fence) drop(lease);
    } else if (kind === 'probe') {
      hearProbe(words[0] ?? '');
    }
  }

  async function subscribe(): Promise<void> {
    if (isSubscribed || isSubscribing || isStopped) return;
    isSubscribing = true;
    try {
      await within(Promise.resolve(subscriber.subscribe(channel)), BATCH_WAIT_MAX_MS, clock);
      isSubscribed = isUp(subscriber);
    } catch {
      // The next connection, or the next probe, tries again.
    }
    isSubscribing = false;
    await restore();
  }

  /** After a loss: first the leases, then the look that finds what was missed while there were none. */
  async function restore(): Promise<void> {
    if (!isOpen()) return;
    reportOpen();
    if (isRestoring) return;
    isRestoring = true;
    while (isGapDue && isOpen() && !isStopped) {
      isGapDue = false;
      await renewSoon();
      tell((to) => to.onGap());
    }
    isRestoring = false;
  }

  function isOpen(): boolean {
    return isSubscribed && isUp(commands);
  }

  /** A connection may look alive and carry nothing: only what comes back proves that it works. */
  async function probe(): Promise<void> {
    if (!isUp(commands)) return recycle(commands);
    void forwardAll();
    if (!isUp(subscriber)) return recycle(subscriber);
    if (!isSubscribed) return subscribe();
    const number = String(++probes);
    const sentAtMs = clock.nowMs();
    const heard = new Promise<void>((resolve) => {
      hearProbe = (probe) => {
        if (probe === number) resolve();
      };
    });
    let isSent = false;
    const sent = publish(nodeId, `probe ${number}`).then(() => {
      isSent = true;
    });
    try {
      await within(Promise.all([sent, heard]), timing.probeWaitMaxMs, clock);
      lagMs = clock.nowMs() - sentAtMs;
      if (isDeaf) log.info({}, 'bus: Redis delivers again');
      isDeaf = false;
      if (isRenewalDue) await renewSoon();
    } catch {
      failureCount++;
      if (!isOpen() || isStopped) return;
      if (!isDeaf) log.warn({}, 'bus: Redis is connected but delivers nothing; connecting anew');
      isDeaf = true;
      isGapDue = true;
      recycle(isSent ? subscriber : commands);
    }
  }

  // ——— the two connections

  const onSubscriberReady = (): void => void subscribe();
  const onSubscriberClose = (): void => {
    isSubscribed = false;
    isGapDue = true;
  };
  const onCommandsReady = (): void => {
    void forwardAll();
    void restore();
  };
  const onCommandsClose = (): void => {
    connection++;
    isGapDue = true;
  };
  /** One node of a Cluster was lost, and may come back without its leases: they are renewed with every probe until then. */
  const onNodeLost = (): void => {
    isRenewalDue = true;
  };

  return {
    nodeId,

    async start(to) {
      listener = to;
      subscriber.on('ready', onSubscriberReady);
      subscriber.on('close', onSubscriberClose);
      subscriber.on('message', hear);
      commands.on('ready', onCommandsReady);
      commands.on('close', onCommandsClose);
      commands.on('-node', onNodeLost);
      timers.push(every(clock, timing.probeMs, probe), every(clock, timing.leaseMs / 3, renewSoon));
      const opened = new Promise<void>((resolve) => {
        reportOpen = resolve;
      });
      if (isUp(subscriber)) void subscribe();
      await within(opened, timing.startWaitMaxMs, clock).catch(() => {
        isGapDue = true;
        log.warn({}, 'bus: starting without Redis; devices of other nodes are reached when it is back');
      });
    },

    async acquire(lease) {
      const key = addressKey(lease.device);
      const held = leases.get(key);
      if (held !== undefined && held.fence >= lease.fence) return held.fence === lease.fence;
      if (held !== undefined) drop(held);
      const mine: HeldLease = { ...lease, key, isPending: true, confirmedIn: null };
      leases.set(key, mine);
      const announcing = isUp(commands) ? acquisitions.submit(mine) : Promise.reject(new Error('no link'));
      await within(announcing, ACQUIRE_WAIT_MAX_MS, clock).catch(() => {
        // It holds on this node, and is announced as soon as Redis answers.
        isRenewalDue = true;
      });
      mine.isPending = false;
      return leases.get(key) === mine;
    },

    release(lease) {
      const key = addressKey(lease.device);
      if (leases.get(key)?.fence !== lease.fence) return;
      leases.delete(key);
      giveUpSoon(lease);
    },

    poke(devices) {
      if (isStopped) return;
      for (const device of devices) {
        const key = addressKey(device);
        const lease = leases.get(key);
        if (lease !== undefined) toLookAt.add(key);
        // A lease that Redis has not confirmed may be another node's by now: then both are told.
        if (lease === undefined || lease.confirmedIn !== connection) forwardLater(key);
      }
      scheduleLook();
    },

    probes: () => ({ lagMs, failureCount }),

    trouble() {
      if (!isUp(commands)) return 'no connection to Redis';
      if (!isSubscribed) return 'not subscribed at Redis';
      if (isDeaf) return 'Redis is connected but delivers nothing';
      return null;
    },

    async stop() {
      // What was poked just before, as by a command that runs beside the gateways, is passed on first.
      await within(forwardAll(), BATCH_WAIT_MAX_MS, clock).catch(() => {});
      isStopped = true;
      listener = null;
      for (const timer of timers) timer.cancel();
      subscriber.off('ready', onSubscriberReady);
      subscriber.off('close', onSubscriberClose);
      subscriber.off('message', hear);
      commands.off('ready', onCommandsReady);
      commands.off('close', onCommandsClose);
      commands.off('-node', onNodeLost);
      toForward.clear();
      for (const lease of leases.values()) giveUpSoon(lease);
      leases.clear();
      // Other nodes need not poke a node that is gone; but nobody waits for Redis to say goodbye.
      await within(lastRelease, BATCH_WAIT_MAX_MS, clock).catch(() => {});
      subscriber.disconnect();
    },
  };
}

function channelOf(node: string): string {
  return `keygate:node:${node}`;
}

function leaseKey(key: string): string {
  return `keygate:lease:{${key}}`;
}

/** Removes and returns up to `max` members. */
function take<T>(from: Set<T>, max: number): T[] {
  const taken: T[] = [];
  for (const item of from) {
    if (taken.length === max) break;
    from.delete(item);
    taken.push(item);
  }
  return taken;
}
