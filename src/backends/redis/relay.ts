/** The relay of many nodes: one channel for all and one for each, on a link that nothing else waits for. */
import type { Clock, Timer } from '../../lib/clock.ts';
import type { Relay } from '../../ports/relay.ts';
import { isRefusal, isUp, type RedisLink, within } from './connect.ts';

const SUBSCRIBE_WAIT_MAX_MS = 2_000;
/** A user that may not listen asks again so much later. */
const REFUSED_WAIT_MS = 15_000;
const MESSAGE_LENGTH_MAX = 4 * 1024 * 1024;
const EVERY_NODE = 'keygate:inspector';

/**
 * @param parts.commands may be shared with others; the relay doesn't close it
 * @param parts.subscriber the relay's own: it subscribes on it, and `stop` closes it
 */
export function createRedisRelay(parts: {
  nodeId: string;
  commands: RedisLink;
  subscriber: RedisLink;
  clock: Clock;
}): Relay {
  const { nodeId, commands, subscriber, clock } = parts;
  let onMessage: (from: string, text: string) => void = () => {};
  let isStopped = false;
  let again: Timer | null = null;

  function hear(_channel: string, message: string): void {
    if (message.length > MESSAGE_LENGTH_MAX) return;
    const space = message.indexOf(' ');
    const from = message.slice(0, space);
    if (space > 0 && from !== nodeId) onMessage(from, message.slice(space + 1));
  }

  async function subscribe(): Promise<void> {
    again?.cancel();
    if (isStopped || !isUp(subscriber)) return;
    try {
      const subscribed = Promise.resolve(subscriber.subscribe(EVERY_NODE, channelOf(nodeId)));
      await within(subscribed, SUBSCRIBE_WAIT_MAX_MS, clock);
    } catch (error) {
      // A connection that is lost tries again when it is back; one that only says nothing is made anew.
      if (isStopped || !isUp(subscriber)) return;
      if (isRefusal(error)) again = clock.after(REFUSED_WAIT_MS, () => void subscribe());
      else subscriber.disconnect(true);
    }
  }

  const onReady = (): void => void subscribe();

  return {
    nodeId,

    async start(listener) {
      onMessage = listener;
      subscriber.on('message', hear);
      subscriber.on('ready', onReady);
      if (isUp(subscriber)) await subscribe();
    },

    async broadcast(text) {
      if (!isUp(commands)) return 0;
      try {
        const heard = await commands.publish(EVERY_NODE, `${nodeId} ${text}`);
        return Math.max(0, heard - 1);
      } catch {
        return 0;
      }
    },

    send(to, text) {
      if (isUp(commands)) commands.publish(channelOf(to), `${nodeId} ${text}`).catch(() => {});
    },

    async stop() {
      isStopped = true;
      again?.cancel();
      subscriber.off('message', hear);
      subscriber.off('ready', onReady);
      subscriber.disconnect();
    },
  };
}

function channelOf(node: string): string {
  return `${EVERY_NODE}:${node}`;
}
