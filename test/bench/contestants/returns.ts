/** The gateway: devices that come back, prove their keys, and find their queues empty; as after an outage. */
import type { Build, Contestant, Kind, Scale } from '../contest.ts';
import { refillPools, seedDevices, tokensFor, userIds, validateInput } from '../seed.ts';
import type { Stage } from '../stage.ts';
import { socketProfile, socketRun } from './socket-run.ts';

const DEVICES = 2_000;
/** One-time prekeys that each device has, and lists. */
const LISTED = 100;

export const returnsKind: Kind = {
  name: 'returns',
  what: `devices that connect, have ${LISTED} prekeys validated, open their gates on empty queues and go, 64 under way`,
  make: returnsContestant,
};

async function returnsContestant(stage: Stage, _: Scale, { distDir, ...about }: Build): Promise<Contestant> {
  const { sql, url: databaseUrl } = await stage.createDatabase(about.name.replaceAll('-', '_'));
  const server = await stage.startGateway({ databaseUrl, distDir });
  const users = userIds(`${about.name}-absent`, DEVICES);
  await seedDevices(sql, stage.pool, users);
  await refillPools(sql, stage.pool, users, LISTED);
  const devices = await tokensFor(users, stage.tokenSecret);
  const localPreKeyIds = Array.from({ length: LISTED }, (_, index) => index + 1);
  const validateInputs = users.map((_, index) =>
    JSON.stringify({ ...validateInput(stage.pool, index), localPreKeyIds }),
  );
  const contestant: Contestant = {
    ...about,
    operation: 'return',
    reset: async () => {
      await sql`VACUUM (ANALYZE) devices`;
    },
    async run(timing) {
      const { run } = await socketRun(stage, [server], 'returns', {
        ...timing,
        url: server.url,
        devices,
        validateInputs,
      });
      return run;
    },
    profile: (timing, file) => socketProfile(server, contestant, timing, file),
  };
  return contestant;
}
