/** Two gateways over one PostgreSQL and one Redis: claims through both, and messages from one to the other. */
import type { Company } from '../contest.ts';
import { openHouse, spreadClaims } from './gateway-claims.ts';
import { openRing, ringContestant } from './messages.ts';

/** A lone message costs several times one of a batch: four times as many would fill two cores with two nodes. */
const MESSAGES_PER_SECOND = 250;

export const nodesCompany: Company = {
  names: ['two-nodes', 'one-node-messages', 'cross-node-messages'],
  async make(stage, scale) {
    const house = await openHouse(stage, scale, {
      name: 'two-nodes',
      devices: scale.pools.devices,
      nodes: 2,
    });
    const { sql, servers } = house;
    const { sockets } = scale;
    const local = await openRing(stage, {
      name: 'one-node-messages',
      sql,
      servers: servers.slice(0, 1),
      sockets,
    });
    // An even number of sockets, dealt out by turns: every message goes from one node to the other.
    const across = await openRing(stage, {
      name: 'cross-node-messages',
      sql,
      servers,
      sockets: sockets + (sockets % 2),
    });
    const paced = { ratePerSecond: MESSAGES_PER_SECOND };
    const rate = `${MESSAGES_PER_SECOND} messages a second in an open loop`;
    return [
      spreadClaims(house, scale.pools, {
        name: 'two-nodes',
        what: 'claims through two gateway processes, half of the sockets on each',
      }),
      ringContestant(stage, local, { ...paced, what: `${rate}, sender and recipient on one node` }),
      ringContestant(stage, across, { ...paced, what: `${rate}, sender and recipient on two nodes` }),
    ];
  },
};
