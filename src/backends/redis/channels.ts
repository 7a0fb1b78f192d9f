/** Each node listens on a channel of its own; whoever has something for it alone says it there. */
import type { RedisLink } from './connect.ts';

/** In a Cluster any node passes a message on: where one is away, the next attempt finds another. */
const CLUSTER_PUBLISH_ATTEMPTS = 3;

/** How the channel of every node begins; its node follows. */
export const CHANNEL_PREFIX = 'keygate:node:';

export function channelOf(node: string): string {
  return CHANNEL_PREFIX + node;
}

/** Rejects where Redis does not take it. Whether the node heard it, nobody is told. */
export async function publish(link: RedisLink, node: string, message: string): Promise<void> {
  for (let attempt = link.isCluster ? CLUSTER_PUBLISH_ATTEMPTS : 1; ; attempt--) {
    try {
      await link.publish(channelOf(node), message);
      return;
    } catch (error) {
      if (attempt === 1) throw error;
    }
  }
}
