/** The gateway: claims through 200 sockets, each of its own device, over devices with full pools. */
import type { Contestant, Scale } from '../contest.ts';
import { refillPools, seedDevices, tokensFor, userIds } from '../seed.ts';
import type { Stage } from '../stage.ts';
import { socketProfile, socketRun } from './socket-run.ts';

export async function gatewayClaims(
  stage: Stage,
  scale: Scale,
  options: { name: string; what: string; distDir: string },
): Promise<Contestant> {
  const { name, what, distDir } = options;
  const { sql, url: databaseUrl } = await stage.createDatabase(`claims_${name.replaceAll('-', '_')}`);
  const server = await stage.startGateway({ databaseUrl, distDir });
  const targets = userIds('target', scale.targetDevices);
  await seedDevices(sql, stage.pool, targets);
  // Gateways that share a Redis are nodes of one cluster: a device that comes to the next one leaves the last.
  const claimers = await tokensFor(userIds(`${name}-claimer`, scale.sockets), stage.tokenSecret);
  await stage.load.call('open', { name, url: server.url, devices: claimers });

  const contestant: Contestant = {
    name,
    what,
    operation: 'bundle',
    reset: () => refillPools(sql, stage.pool, targets, scale.preKeysPerDevice),
    async run(timing) {
      const { run, measurement } = await socketRun(stage, server, 'claims', {
        ...timing,
        name,
        userIds: targets,
        claimsPerUser: scale.preKeysPerDevice,
      });
      const [books] = await sql<{ counted: number; recorded: number; left: number }[]>`
        SELECT (SELECT sum(ec_claimed)::int4 FROM devices) AS counted,
               (SELECT count(*)::int4 FROM prekey_claims WHERE ec_key_id IS NOT NULL) AS recorded,
               (SELECT count(*)::int4 FROM one_time_prekeys) AS left`;
      const { counted, recorded, left } = books!;
      const seeded = scale.targetDevices * scale.preKeysPerDevice;
      const answered = measurement.operationsInAll;
      if (counted !== answered || recorded !== answered || seeded - left !== answered) {
        run.remarks.push(
          `the books don't agree: ${answered} answered, ${counted} counted, ${recorded} recorded, ${seeded - left} gone`,
        );
      }
      return run;
    },
    profile: (timing, file) => socketProfile(server, contestant, timing, file),
  };
  return contestant;
}
