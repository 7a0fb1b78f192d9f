/** A bare Socket.IO echo: the floor under everything that goes through a socket. */
import type { Contestant, Scale } from '../contest.ts';
import { uploadOf, userIds } from '../seed.ts';
import type { Stage } from '../stage.ts';
import { socketProfile, socketRun } from './socket-run.ts';

export async function echo(stage: Stage, scale: Scale): Promise<Contestant> {
  const server = await stage.startServer('echo-server', { BENCH_REPLY: JSON.stringify(bundleLike(stage)) });
  const devices = userIds('caller', scale.sockets).map((userId) => ({ userId, token: '' }));
  await stage.load.call('open', { name: 'echo', url: server.url, devices });
  const targets = userIds('target', scale.targetDevices);
  const contestant: Contestant = {
    name: 'echo',
    what: 'a bare Socket.IO echo with acknowledgement, replies of the size of a bundle',
    operation: 'echo',
    reset: async () => {},
    async run(timing) {
      // An echo runs out of nothing.
      const claimsPerUser = Math.ceil(((timing.warmUpMs + timing.measureMs) * 100) / targets.length);
      const { run } = await socketRun(stage, server, 'claims', {
        ...timing,
        name: 'echo',
        userIds: targets,
        claimsPerUser,
      });
      return run;
    },
    profile: (timing, file) => socketProfile(server, contestant, timing, file),
  };
  return contestant;
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
