/** Pokes on their way: those for devices of this node, and those that Redis passes on to the others. */
import type { Clock } from '../../lib/clock.ts';
import { CHANNEL_PREFIX, publish } from './channels.ts';
import { CALL_WAIT_MAX_MS, isUp, type RedisLink, within } from './connect.ts';
import { leaseKey } from './leases.ts';
import { answeredOf, KEYS_PER_CALL_MAX, run, script } from './scripts.ts';

/** One call of a script, which is carried out as a whole or not at all. */
const POKES_PER_BATCH_MAX = KEYS_PER_CALL_MAX;
/** Pokes that wait for Redis; more than these are lost, and found by the sweeps of the nodes that they were for. */
const POKES_WAITING_MAX = 10_000;

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

export interface Pokes {
  /** A device of this node is looked at with the end of this turn, once however often it is named. */
  lookHere(key: string): void;
  /** Whoever else holds the device's lease is told with the end of this turn. */
  lookElsewhere(key: string): void;
  /** Resolves when everything is passed on that waits by then, or can't be. */
  forwardAll(): Promise<void>;
  /** Forgets what waits for Redis. */
  clear(): void;
}

export interface PokesParts {
  commands: RedisLink;
  nodeId: string;
  clock: Clock;
  /** A device is to be looked at, if this node still serves it. */
  onLook(key: string): void;
}

export function createPokes({ commands, nodeId, clock, onLook }: PokesParts): Pokes {
  const toLookAt = new Set<string>();
  const toForward = new Set<string>();
  let isLooking = false;
  /** Under way until nothing is to be forwarded, or Redis does not answer. */
  let forwarding: Promise<void> | null = null;

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
    for (const key of keys) onLook(key);
    void forwardAll();
  }

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
        await within(forward(keys), CALL_WAIT_MAX_MS, clock);
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
    await run(commands, PASS_ON, keys.map(leaseKey), [nodeId, CHANNEL_PREFIX, ...keys]);
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
    await Promise.all(
      [...keysByNode].map(([node, ofNode]) => publish(commands, node, `poke ${ofNode.join(' ')}`)),
    );
  }

  function forwardLater(key: string): void {
    if (toForward.size < POKES_WAITING_MAX) toForward.add(key);
  }

  return {
    lookHere(key) {
      toLookAt.add(key);
      scheduleLook();
    },
    lookElsewhere(key) {
      forwardLater(key);
      scheduleLook();
    },
    forwardAll,
    clear: () => toForward.clear(),
  };
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
