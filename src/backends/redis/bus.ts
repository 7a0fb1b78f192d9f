/**
 * The bus of many nodes. Each node listens on one channel; a lease in Redis says which node serves a device, so that
 * a poke reads the leases and goes to the channels of those nodes alone. No subscription is made per device.
 *
 * Redis may lose anything at any time: leases are renewed, and announced again whenever a connection was lost.
 */
import { randomBytes } from 'node:crypto';
import type { Redis } from 'ioredis';
import { type Clock, every, type Timer } from '../../lib/clock.ts';
import type { Log } from '../../lib/log.ts';
import type { Bus, BusListener } from '../../ports/bus.ts';
import { addressKey } from '../../protocol/ids.ts';
import { channelOf, publish } from './channels.ts';
import {
  CALL_WAIT_MAX_MS,
  isRefusal,
  isUp,
  linkFault,
  type RedisLink,
  RefusedDatabaseError,
  recycle,
  refusalOf,
  within,
} from './connect.ts';
import { createLeases } from './leases.ts';
import { createPokes } from './pokes.ts';

const MESSAGE_LENGTH_MAX = 256 * 1024;

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
  const timers: Timer[] = [];
  let listener: BusListener | null = null;
  let isStopped = false;
  let isSubscribed = false;
  let isSubscribing = false;
  /** Why Redis refused the last subscription; null where it did not. */
  let refusedBecause: string | null = null;
  /** The link is connected, and yet the node's own poke did not come back. */
  let isDeaf = false;
  /** A connection was lost since the listener was last told to look at everything. */
  let isGapDue = false;
  let isRestoring = false;
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

  const leases = createLeases({
    commands,
    nodeId,
    leaseMs: timing.leaseMs,
    clock,
    log,
    onDisplaced: (lease) => tell((to) => to.onDisplaced(lease)),
    onRegained: (key) => pokes.lookHere(key),
    tellDisplaced(node, key, fence) {
      publish(commands, node, `displaced ${key} ${fence}`).catch(() => {});
    },
  });
  const pokes = createPokes({
    commands,
    nodeId,
    clock,
    onLook(key) {
      const lease = leases.get(key);
      if (lease !== undefined) tell((to) => to.onPoke(lease.device));
    },
  });

  // ——— the node's channel

  /** Whatever stands on the channel, nothing but a look, a displacement or a probe comes of it. */
  function hear(from: string, message: string): void {
    if (from !== channel || message.length > MESSAGE_LENGTH_MAX) return;
    const [kind, ...words] = message.split(' ');
    if (kind === 'poke') {
      for (const key of words) if (leases.get(key) !== undefined) pokes.lookHere(key);
    } else if (kind === 'displaced') {
      const fence = Number(words[1]);
      if (Number.isSafeInteger(fence)) leases.yieldTo(words[0] ?? '', fence);
    } else if (kind === 'probe') {
      hearProbe(words[0] ?? '');
    }
  }

  /** Redis may let this user do everything but listen: nothing else would ever tell. */
  function noteRefusal(error: unknown): void {
    if (!isRefusal(error)) return;
    const reason = linkFault(error);
    if (refusedBecause !== reason) log.warn({ reason }, 'bus: Redis refuses the subscription');
    refusedBecause = reason;
  }

  async function subscribe(): Promise<void> {
    if (isSubscribed || isSubscribing || isStopped) return;
    isSubscribing = true;
    try {
      await within(Promise.resolve(subscriber.subscribe(channel)), CALL_WAIT_MAX_MS, clock);
      isSubscribed = isUp(subscriber);
      if (refusedBecause !== null) log.info({}, 'bus: Redis allows the subscription');
      refusedBecause = null;
    } catch (error) {
      // The next connection, or the next probe, tries again.
      noteRefusal(error);
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
      await leases.renew();
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
    void pokes.forwardAll();
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
    const sent = publish(commands, nodeId, `probe ${number}`).then(() => {
      isSent = true;
    });
    try {
      await within(Promise.all([sent, heard]), timing.probeWaitMaxMs, clock);
      lagMs = clock.nowMs() - sentAtMs;
      if (isDeaf) log.info({}, 'bus: Redis delivers again');
      isDeaf = false;
      await leases.renewIfDue();
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
    void pokes.forwardAll();
    void restore();
  };
  const onCommandsClose = (): void => {
    leases.connectionLost();
    isGapDue = true;
  };
  /** One node of a Cluster was lost, and may come back without its leases: they are renewed with every probe until then. */
  const onNodeLost = (): void => leases.nodeLost();

  async function stop(): Promise<void> {
    // What was poked just before, as by a command that runs beside the gateways, is passed on first.
    await within(pokes.forwardAll(), CALL_WAIT_MAX_MS, clock).catch(() => {});
    isStopped = true;
    listener = null;
    for (const timer of timers) timer.cancel();
    subscriber.off('ready', onSubscriberReady);
    subscriber.off('close', onSubscriberClose);
    subscriber.off('message', hear);
    commands.off('ready', onCommandsReady);
    commands.off('close', onCommandsClose);
    commands.off('-node', onNodeLost);
    pokes.clear();
    // Other nodes need not poke a node that is gone.
    await leases.giveUpAll();
    subscriber.disconnect();
  }

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
      timers.push(every(clock, timing.probeMs, probe), every(clock, timing.leaseMs / 3, leases.renew));
      const opened = new Promise<void>((resolve) => {
        reportOpen = resolve;
      });
      if (isUp(subscriber)) void subscribe();
      try {
        await within(Promise.race([opened, refusalOf(commands)]), timing.startWaitMaxMs, clock);
      } catch (error) {
        if (error instanceof RefusedDatabaseError) {
          await stop();
          throw error;
        }
        isGapDue = true;
        log.warn({}, 'bus: starting without Redis; devices of other nodes are reached when it is back');
      }
    },

    acquire: (lease) => leases.acquire(lease),

    release: (lease) => leases.release(lease),

    poke(devices) {
      if (isStopped) return;
      for (const device of devices) {
        const key = addressKey(device);
        if (leases.get(key) !== undefined) pokes.lookHere(key);
        // A lease that Redis has not confirmed may be another node's by now: then both are told.
        if (!leases.isConfirmed(key)) pokes.lookElsewhere(key);
      }
    },

    probes: () => ({ lagMs, failureCount }),

    trouble() {
      if (!isUp(commands)) return 'no connection to Redis';
      if (!isUp(subscriber)) return 'no connection to Redis to listen on';
      if (!isSubscribed) {
        return refusedBecause === null
          ? 'not subscribed at Redis'
          : `Redis refuses the subscription: ${refusedBecause}`;
      }
      if (isDeaf) return 'Redis is connected but delivers nothing';
      const refusal = leases.refusal();
      return refusal === null ? null : `Redis refuses leases: ${refusal}`;
    },

    stop,
  };
}
