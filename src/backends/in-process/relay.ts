/** The relay of a single node: there is nobody to talk to. */
import type { Relay } from '../../ports/relay.ts';

export function createInProcessRelay(nodeId: string): Relay {
  return {
    nodeId,
    async start() {},
    broadcast: async () => 0,
    send() {},
    async stop() {},
  };
}
