/**
 * Which node serves a device, as a lease in Redis that this node renews as long as it serves it. Redis may lose it at any
 * time: what was not confirmed over the present connection may be another node's by now.
 */
import type { Clock } from '../../lib/clock.ts';
import { createGatherer } from '../../lib/gather.ts';
import type { Log } from '../../lib/log.ts';
import type { Lease } from '../../ports/bus.ts';
import { addressKey } from '../../protocol/ids.ts';
import { CALL_WAIT_MAX_MS, isRefusal, isUp, linkFault, type RedisLink, within } from './connect.ts';
import { runOnEach, script } from './scripts.ts';

const ACQUIRE_WAIT_MAX_MS = 500;
const LEASES_PER_BATCH_MAX = 512;

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

export function leaseKey(key: string): string {
  return `keygate:lease:{${key}}`;
}

export interface Leases {
  /** The lease that this node holds of a device, by its key; undefined where it holds none. */
  get(key: string): Lease | undefined;
  /** Whether Redis confirmed it over the present connection. Otherwise it may be another node's by now. */
  isConfirmed(key: string): boolean;

  /** As the bus's own. */
  acquire(lease: Lease): Promise<boolean>;
  release(lease: Lease): void;

  /** Another node says that it holds this device under `fence`. */
  yieldTo(key: string, fence: number): void;

  /** Announces all of them again, now or, where that fails, with the next `renewIfDue`. */
  renew(): Promise<void>;
  /** The same where some lease was not confirmed, or a node of a Cluster was lost. */
  renewIfDue(): Promise<void>;
  nodeLost(): void;
  /** What Redis confirmed until now may be gone. */
  connectionLost(): void;
  /** Why Redis, or a node of a Cluster, takes no leases of this node: it is full, say. Null where it takes all of them. */
  refusal(): string | null;

  /** Resolves when Redis knows, or can't be told. */
  giveUpAll(): Promise<void>;
}

export interface LeasesParts {
  commands: RedisLink;
  nodeId: string;
  leaseMs: number;
  clock: Clock;
  log: Log;
  /** A newer connection took a device over that this node served. */
  onDisplaced(lease: Lease): void;
  /** A lease was away from Redis, and pokes passed its device by until now. */
  onRegained(key: string): void;
  /** `node` held what this node has taken over. */
  tellDisplaced(node: string, key: string, fence: number): void;
}

interface HeldLease extends Lease {
  key: string;
  /** While `acquire` is under way, its answer tells of the loss; from then on, `onDisplaced` does. */
  isPending: boolean;
  /** During which connection Redis confirmed it; null until it did. */
  confirmedIn: number | null;
}

export function createLeases(parts: LeasesParts): Leases {
  const { commands, nodeId, leaseMs, clock, log, onDisplaced, onRegained, tellDisplaced } = parts;
  const leases = new Map<string, HeldLease>();
  /** Some lease was not confirmed, though no connection was lost; at first the node's own. */
  let isRenewalDue = true;
  /** Counts the connections of `commands`: what Redis confirmed over an older one may be gone. */
  let connection = 0;
  let refusedBecause: string | null = null;
  let refusalCount = 0;

  function drop(lease: HeldLease): void {
    if (leases.get(lease.key) !== lease) return;
    leases.delete(lease.key);
    if (!lease.isPending) onDisplaced({ device: lease.device, fence: lease.fence });
  }

  /** Nothing else would ever tell: pokes and probes pass a Redis that stores nothing. */
  function noteRefusal(error: unknown): void {
    if (!isRefusal(error)) return;
    refusalCount++;
    const reason = linkFault(error);
    if (refusedBecause === null) log.warn({ reason }, 'bus: Redis refuses leases');
    refusedBecause = reason;
  }

  /** Puts leases into Redis, tells those that they displace, and drops those that were lost. */
  async function announce(batch: readonly HeldLease[], mode: 'acquire' | 'renew'): Promise<void> {
    if (batch.length === 0) return;
    const sentIn = connection;
    const each = batch.map((lease) => ({ key: leaseKey(lease.key), arg: lease.fence }));
    const answers = await runOnEach(commands, LEASE, [nodeId, leaseMs, mode], each, noteRefusal);
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
      if (answer.startsWith('from ')) tellDisplaced(answer.slice('from '.length), lease.key, lease.fence);
      if (mode === 'renew' && answer !== 'kept') onRegained(lease.key);
    }
  }

  /** What connects at once is announced at once. */
  const acquisitions = createGatherer<HeldLease, void>({
    batchMax: LEASES_PER_BATCH_MAX,
    lingersBy: clock,
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
    const refusalsBefore = refusalCount;
    if (all.length === 0) {
      // Nothing else would tell that it takes none, as a replica doesn't, before somebody connects.
      const own = [{ key: leaseKey(nodeId), arg: 0 }];
      const renewing = runOnEach(commands, LEASE, [nodeId, leaseMs, 'renew'], own, noteRefusal);
      await within(renewing, CALL_WAIT_MAX_MS, clock);
    }
    for (let i = 0; i < all.length; i += LEASES_PER_BATCH_MAX) {
      const batch = all
        .slice(i, i + LEASES_PER_BATCH_MAX)
        .filter((lease) => leases.get(lease.key) === lease && !lease.isPending);
      await within(announce(batch, 'renew'), CALL_WAIT_MAX_MS, clock);
    }
    // Not sooner: one node of a Cluster may refuse what the others take.
    if (refusedBecause === null || refusalCount > refusalsBefore) return;
    refusedBecause = null;
    log.info({}, 'bus: Redis takes leases again');
  }

  async function renew(): Promise<void> {
    isRenewalDue = false;
    await renewAll().catch(() => {
      isRenewalDue = true;
    });
  }

  /** What disconnects at once is given up at once. */
  const releases = createGatherer<Lease, void>({
    batchMax: LEASES_PER_BATCH_MAX,
    lingersBy: clock,
    async run(batch) {
      const each = batch.map((lease) => ({ key: leaseKey(addressKey(lease.device)), arg: lease.fence }));
      await runOnEach(commands, GIVE_UP, [nodeId, leaseMs], each);
      return batch.map(() => undefined);
    },
  });
  /** Settles when everything is given up: batches of releases run one after the other. */
  let lastRelease: Promise<void> = Promise.resolve();

  function giveUpSoon(lease: Lease): void {
    if (isUp(commands)) lastRelease = releases.submit(lease).catch(() => {});
  }

  return {
    get: (key) => leases.get(key),

    isConfirmed: (key) => leases.get(key)?.confirmedIn === connection,

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

    yieldTo(key, fence) {
      const lease = leases.get(key);
      if (lease !== undefined && fence > lease.fence) drop(lease);
    },

    renew,

    async renewIfDue() {
      if (isRenewalDue) await renew();
    },

    nodeLost() {
      isRenewalDue = true;
    },

    connectionLost() {
      connection++;
    },

    refusal: () => refusedBecause,

    async giveUpAll() {
      for (const lease of leases.values()) giveUpSoon(lease);
      leases.clear();
      await within(lastRelease, CALL_WAIT_MAX_MS, clock).catch(() => {});
    },
  };
}
