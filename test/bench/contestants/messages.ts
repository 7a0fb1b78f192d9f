/** The gateway: messages from one open socket to the next, stored, handed out, acknowledged and deleted. */
import type { Contestant, Scale } from '../contest.ts';
import { seedDevices, tokensFor, uploadOf, userIds, validateInput } from '../seed.ts';
import { DIST_DIR, type Stage } from '../stage.ts';
import { socketProfile, socketRun } from './socket-run.ts';

const CONTENT_BYTES = 1_000;

export async function messages(stage: Stage, scale: Scale): Promise<Contestant> {
  const { sql, url: databaseUrl } = await stage.createDatabase('messages');
  const server = await stage.startGateway({ databaseUrl, distDir: DIST_DIR });
  const users = userIds('member', scale.sockets);
  await seedDevices(sql, stage.pool, users);
  const devices = await tokensFor(users, stage.tokenSecret);
  await stage.load.call('open', { name: 'messages', url: server.url, devices });
  await stage.load.call('openGates', {
    name: 'messages',
    validateInputs: users.map((_, index) => JSON.stringify(validateInput(stage.pool, index))),
  });
  const registrationIds = users.map((_, index) => uploadOf(stage.pool, index).registrationId);
  const contestant: Contestant = {
    name: 'messages',
    what: `messages of ${CONTENT_BYTES} bytes, each stored, handed out, acknowledged and deleted`,
    operation: 'message',
    async reset() {
      await sql`TRUNCATE messages, message_receipts`;
      await sql`VACUUM (ANALYZE) messages, message_receipts, devices`;
    },
    async run(timing) {
      const { run } = await socketRun(stage, server, 'messages', {
        ...timing,
        name: 'messages',
        registrationIds,
        contentBytes: CONTENT_BYTES,
      });
      const [books] = await sql<{ left: number }[]>`SELECT count(*)::int4 AS left FROM messages`;
      if (books!.left > 0) run.remarks.push(`${books!.left} messages were left`);
      return run;
    },
    profile: (timing, file) => socketProfile(server, contestant, timing, file),
  };
  return contestant;
}
