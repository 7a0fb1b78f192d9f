/** The gateway: devices that fill their pools up, as each does after some ninety claims of its one-time prekeys. */
import { VALIDATE_PRE_KEYS_MAX } from '../../../src/protocol/limits.ts';
import type { Build, Contestant, Kind, Scale } from '../contest.ts';
import { refillPools, seedDevices, tokensFor, userIds } from '../seed.ts';
import type { Stage } from '../stage.ts';
import { socketProfile, socketRun } from './socket-run.ts';

const ADDED = 90;
/** The most that a gateway allows: pools are emptied before each turn, and not during it. */
const POOL_MAX = VALIDATE_PRE_KEYS_MAX;

export const refillsKind: Kind = {
  name: 'refills',
  what: `devices that add ${ADDED} one-time prekeys at a time`,
  make: refillsContestant,
};

async function refillsContestant(
  stage: Stage,
  { sockets }: Scale,
  { distDir, ...about }: Build,
): Promise<Contestant> {
  const { name } = about;
  const { sql, url: databaseUrl } = await stage.createDatabase(name.replaceAll('-', '_'));
  const server = await stage.startGateway({
    databaseUrl,
    distDir,
    env: { PREKEY_POOL_MAX: String(POOL_MAX) },
  });
  const users = userIds(`${name}-owner`, sockets);
  await seedDevices(sql, stage.pool, users);
  const devices = await tokensFor(users, stage.tokenSecret);
  await stage.load.call('open', { name, urls: [server.url], devices });
  const [upload] = stage.pool.uploads;
  const publicKeys = upload!.oneTimePreKeys.slice(0, ADDED).map(({ publicKey }) => publicKey);
  const contestant: Contestant = {
    ...about,
    operation: 'refill',
    reset: () => refillPools(sql, stage.pool, users, 0),
    async run(timing) {
      const { run, measurement } = await socketRun(stage, [server], 'refills', {
        ...timing,
        name,
        ratePerSecond: null,
        publicKeys,
        refillsMax: Math.floor(POOL_MAX / ADDED),
      });
      const [books] = await sql<{ pooled: number }[]>`SELECT count(*)::int4 AS pooled FROM one_time_prekeys`;
      const added = measurement.operationsInAll * ADDED;
      if (books!.pooled !== added) run.remarks.push(`${books!.pooled} keys are pooled, ${added} were added`);
      return run;
    },
    profile: (timing, file) => socketProfile(server, contestant, timing, file),
  };
  return contestant;
}
