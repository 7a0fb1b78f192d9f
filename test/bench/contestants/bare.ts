/** A bare Socket.IO server: the floor under everything that goes through a socket. */
import type { Company, Contestant } from '../contest.ts';
import { tokensFor, uploadOf, userIds } from '../seed.ts';
import type { Server, Stage } from '../stage.ts';
import { backlogOf, CONTENT_BYTES } from './messages.ts';
import { socketProfile, socketRun } from './socket-run.ts';

/** More than any such server answers in a millisecond: an echo runs out of nothing. */
const ECHOES_PER_MS_MAX = 100;

export const bareCompany: Company = {
  names: ['echo', 'bare-backlog', 'bare-pages'],
  async make(stage, scale) {
    const { backlog, devices } = backlogOf(scale);
    const server = await startBareServer(stage, {
      BENCH_REPLY: JSON.stringify(bundleLike(stage)),
      BENCH_BACKLOG: String(backlog),
      BENCH_CONTENT_BYTES: String(CONTENT_BYTES),
    });
    const callers = await tokensFor(userIds('caller', scale.sockets), stage.tokenSecret);
    await stage.load.call('open', { name: 'echo', urls: [server.url], devices: callers });
    const targets = userIds('target', scale.pools.devices);
    const readers = await tokensFor(userIds('reader', devices), stage.tokenSecret);
    const echo: Contestant = {
      name: 'echo',
      what: 'a bare Socket.IO echo with acknowledgement, replies of the size of a bundle',
      operation: 'echo',
      isGateway: false,
      reset: async () => {},
      async run(timing) {
        const { run } = await socketRun(stage, [server], 'claims', {
          ...timing,
          name: 'echo',
          ratePerSecond: null,
          userIds: targets,
          devicesEach: 1,
          claimsPerUser: Math.ceil(
            ((timing.warmUpMs + timing.measureMs) * ECHOES_PER_MS_MAX) / targets.length,
          ),
        });
        return run;
      },
      profile: (timing, file) => socketProfile(server, echo, timing, file),
    };
    const drained = (name: string, ready: Record<string, unknown>, what: string): Contestant => ({
      name,
      what: `a bare Socket.IO server, ${backlog} such messages to one socket, ${what}, two pages under way`,
      operation: 'message',
      isGateway: false,
      reset: async () => {},
      async run(timing) {
        const { run } = await socketRun(stage, [server], 'backlog', {
          ...timing,
          url: server.url,
          devices: readers,
          validateInputs: readers.map(() => '{}'),
          ready,
          backlog,
        });
        return run;
      },
    });
    return [
      echo,
      drained('bare-backlog', {}, 'an emit for each, every hundredth acknowledged'),
      drained('bare-pages', { inPages: true }, 'acknowledged emits of a hundred'),
    ];
  },
};

/** @returns a server that admits who has a token of the bench's */
export function startBareServer(stage: Stage, env: Record<string, string> = {}): Promise<Server> {
  return stage.startServer('echo-server', { BENCH_SECRET: stage.tokenSecret, ...env });
}

/** What the gateway would answer. */
function bundleLike({ pool }: Stage): object {
  const { registrationId, identityKey, signedPreKey, oneTimePreKeys } = uploadOf(pool, 0);
  return {
    ok: true,
    data: {
      userId: 'target-1000',
      devices: [
        {
          deviceId: 1,
          registrationId,
          identityKey,
          signedPreKey,
          oneTimePreKey: oneTimePreKeys[0],
          pqPreKey: null,
        },
      ],
    },
  };
}
