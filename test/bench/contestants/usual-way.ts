/** What other servers do for each request, through the same sockets: the usual way, and one statement without a lock. */
import type postgres from 'postgres';
import { numberArray, textArray } from '../../../src/backends/postgres/array-literal.ts';
import type { Company, Contestant, Scale } from '../contest.ts';
import { uploadOf, userIds } from '../seed.ts';
import { CREATE_USUAL_TABLES } from '../servers/usual-way-schema.ts';
import type { ServerName, Stage } from '../stage.ts';
import { PACE_PER_SECOND, PACED_TIMES } from './gateway-claims.ts';
import { CONTENT_BYTES } from './messages.ts';
import { socketProfile, socketRun } from './socket-run.ts';

export const usualCompany: Company = {
  names: ['usual-way'],
  make: async (stage, scale) => [
    await claims(stage, scale, 'usual-way-server', {
      name: 'usual-way',
      what: 'the usual way: a Redis lock and a Drizzle transaction (SELECT … FOR UPDATE, UPDATE) per request',
      ratePerSecond: null,
      timesLonger: 1,
    }),
  ],
};

export const statementCompany: Company = {
  names: [`statement-${PACE_PER_SECOND}`],
  make: async (stage, scale) => [
    await claims(stage, scale, 'statement-server', {
      name: `statement-${PACE_PER_SECOND}`,
      what: `one prepared statement per request, without a lock, ${PACE_PER_SECOND} a second in an open loop`,
      ratePerSecond: PACE_PER_SECOND,
      timesLonger: PACED_TIMES,
    }),
  ],
};

export const usualMessagesCompany: Company = {
  names: ['usual-messages'],
  async make(stage, scale) {
    const name = 'usual-messages';
    const { sql, url } = await openDatabase(stage, name);
    const users = userIds('member', scale.sockets);
    await seedUsualDevices(sql, stage, users);
    const server = await stage.startServer('usual-messages-server', { BENCH_DATABASE_URL: url });
    const devices = users.map((userId) => ({ userId, token: userId }));
    await stage.load.call('open', { name, urls: [server.url], devices });
    const contestant: Contestant = {
      name,
      what: 'the same messages the usual way: a look-up of the device, an insert, an emit, a delete on acknowledgement, each a Drizzle query',
      operation: 'message',
      isGateway: false,
      async reset() {
        await sql`TRUNCATE usual_messages`;
        await sql`VACUUM (ANALYZE) usual_messages`;
      },
      async run(timing) {
        const { run } = await socketRun(stage, [server], 'messages', {
          ...timing,
          name,
          ratePerSecond: null,
          registrationIds: users.map((_, index) => uploadOf(stage.pool, index).registrationId),
          devicesEach: 1,
          contentBytes: CONTENT_BYTES,
        });
        return run;
      },
      profile: (timing, file) => socketProfile(server, contestant, timing, file),
    };
    return [contestant];
  },
};

async function claims(
  stage: Stage,
  scale: Scale,
  serverName: ServerName,
  options: { name: string; what: string; ratePerSecond: number | null; timesLonger: number },
): Promise<Contestant> {
  const { name, what, ratePerSecond, timesLonger } = options;
  const { sql, url } = await openDatabase(stage, name);
  const targets = userIds('target', scale.pools.devices);
  await seedUsualDevices(sql, stage, targets);
  const server = await stage.startServer(serverName, {
    BENCH_DATABASE_URL: url,
    BENCH_REDIS_URL: stage.redis.url,
  });
  const devices = userIds('claimer', scale.sockets).map((userId) => ({ userId, token: '' }));
  await stage.load.call('open', { name, urls: [server.url], devices });
  const { publicKey } = uploadOf(stage.pool, 0).oneTimePreKeys[0]!;
  const contestant: Contestant = {
    name,
    what,
    operation: 'bundle',
    isGateway: false,
    async reset() {
      await sql`TRUNCATE usual_prekeys`;
      await sql`
        INSERT INTO usual_prekeys (user_id, device_id, key_id, public_key)
        SELECT u, 1, n, ${publicKey}
        FROM unnest(${textArray(targets)}::text[]) WITH ORDINALITY AS t (u, nth)
        CROSS JOIN generate_series(1, ${scale.pools.perDevice}::int4) AS n
        ORDER BY nth, n`;
      await sql`VACUUM (ANALYZE) usual_prekeys`;
    },
    async run({ warmUpMs, measureMs, isUnpaced }) {
      const { run } = await socketRun(stage, [server], 'claims', {
        warmUpMs,
        measureMs: isUnpaced ? measureMs : measureMs * timesLonger,
        name,
        ratePerSecond: isUnpaced ? null : ratePerSecond,
        userIds: targets,
        devicesEach: 1,
        claimsPerUser: scale.pools.perDevice,
      });
      return run;
    },
    profile: (timing, file) => socketProfile(server, contestant, timing, file),
  };
  return contestant;
}

async function openDatabase(stage: Stage, name: string): Promise<{ sql: postgres.Sql; url: string }> {
  const database = await stage.createDatabase(name.replaceAll('-', '_'));
  await database.sql.unsafe(CREATE_USUAL_TABLES);
  return database;
}

async function seedUsualDevices(sql: postgres.Sql, stage: Stage, users: readonly string[]): Promise<void> {
  const { identityKey, signedPreKey } = uploadOf(stage.pool, 0);
  await sql`
    INSERT INTO usual_devices
    SELECT u, 1, r, ${identityKey}, ${signedPreKey.keyId}, ${signedPreKey.publicKey}, ${signedPreKey.signature}
    FROM unnest(${textArray(users)}::text[],
                ${numberArray(users.map((_, index) => uploadOf(stage.pool, index).registrationId))}::int4[]) AS t (u, r)`;
}
