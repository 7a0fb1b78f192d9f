/** The gateway: new devices that upload a whole key set, post-quantum keys and all. */
import type { Build, Contestant, Kind, Scale } from '../contest.ts';
import { tokensFor, userIds } from '../seed.ts';
import type { Stage } from '../stage.ts';
import { socketProfile, socketRun } from './socket-run.ts';

/** More than enrol in a turn. */
const DEVICES = 3_000;

export const enrolmentsKind: Kind = {
  name: 'enrolments',
  what: 'devices that connect, upload 100 one-time prekeys and 100 signed PQ ones for the first time and go, 64 under way',
  make: enrolmentsContestant,
};

async function enrolmentsContestant(
  stage: Stage,
  _: Scale,
  { distDir, ...about }: Build,
): Promise<Contestant> {
  const { name } = about;
  const { sql, url: databaseUrl } = await stage.createDatabase(name.replaceAll('-', '_'));
  const server = await stage.startGateway({ databaseUrl, distDir });
  const devices = await tokensFor(userIds(`${name}-newcomer`, DEVICES), stage.tokenSecret);
  const uploadInputs = stage.pool.uploads.map((upload) => JSON.stringify(upload));
  const [upload] = stage.pool.uploads;
  const keysEach = upload!.oneTimePreKeys.length + upload!.pqOneTimePreKeys.length;
  const contestant: Contestant = {
    ...about,
    operation: 'enrolment',
    reset: async () => {
      await sql`TRUNCATE devices, signed_prekeys, one_time_prekeys, used_prekey_ids`;
    },
    async run(timing) {
      const { run, measurement } = await socketRun(stage, [server], 'enrolments', {
        ...timing,
        url: server.url,
        devices,
        uploadInputs,
      });
      const [books] = await sql<{ pooled: number }[]>`SELECT count(*)::int4 AS pooled FROM one_time_prekeys`;
      const added = measurement.operationsInAll * keysEach;
      if (books!.pooled !== added)
        run.remarks.push(`${books!.pooled} keys are pooled, ${added} were uploaded`);
      return run;
    },
    profile: (timing, file) => socketProfile(server, contestant, timing, file),
  };
  return contestant;
}
