/** New connections of authenticated devices: the gateway's, and those of a bare server that verifies the same token. */
import type { Company, Contestant } from '../contest.ts';
import { tokensFor, userIds } from '../seed.ts';
import { DIST_DIR, type Server } from '../stage.ts';
import { startBareServer } from './bare.ts';
import { socketProfile, socketRun } from './socket-run.ts';

/** In one turn: all of them are open at its end, and file descriptors are few. */
const CONNECTIONS_MAX = 10_000;

export const handshakesCompany: Company = {
  names: ['handshakes', 'bare-handshakes'],
  async make(stage) {
    const { url: databaseUrl } = await stage.createDatabase('handshakes');
    const gateway = await stage.startGateway({ databaseUrl, distDir: DIST_DIR });
    const bare = await startBareServer(stage);
    const devices = await tokensFor(userIds('newcomer', CONNECTIONS_MAX), stage.tokenSecret);
    const handshakes = (server: Server, about: Pick<Contestant, 'name' | 'what' | 'isGateway'>) => {
      const contestant: Contestant = {
        ...about,
        operation: 'handshake',
        reset: async () => {},
        async run(timing) {
          const { run, measurement } = await socketRun(stage, [server], 'handshakes', {
            ...timing,
            url: server.url,
            devices,
          });
          // A fast server takes all of them in before the time is over.
          return { ...run, remarks: measurement.endedEarly ? [] : run.remarks };
        },
        profile: (timing, file) => socketProfile(server, contestant, timing, file),
      };
      return contestant;
    };
    return [
      handshakes(gateway, {
        name: 'handshakes',
        what: `the gateway: connections of up to ${CONNECTIONS_MAX} devices, 64 under way`,
        isGateway: true,
      }),
      handshakes(bare, {
        name: 'bare-handshakes',
        what: 'the same connections to a bare Socket.IO server that verifies the same token',
        isGateway: false,
      }),
    ];
  },
};
