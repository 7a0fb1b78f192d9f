/** The usual way: a Redis lock and a transaction for every request, through the same sockets. */
import { textArray } from '../../../src/backends/postgres/array-literal.ts';
import type { Contestant, Scale } from '../contest.ts';
import { uploadOf, userIds } from '../seed.ts';
import { CREATE_USUAL_TABLES } from '../servers/usual-way-schema.ts';
import type { Stage } from '../stage.ts';
import { socketRun } from './socket-run.ts';

export async function usualWay(stage: Stage, scale: Scale): Promise<Contestant> {
  const { sql, url } = await stage.createDatabase('usual_way');
  await sql.unsafe(CREATE_USUAL_TABLES);
  const targets = userIds('target', scale.targetDevices);
  const { registrationId, identityKey, signedPreKey, oneTimePreKeys } = uploadOf(stage.pool, 0);
  await sql`
    INSERT INTO usual_devices
    SELECT u, 1, ${registrationId}, ${identityKey}, ${signedPreKey.keyId}, ${signedPreKey.publicKey},
           ${signedPreKey.signature}
    FROM unnest(${textArray(targets)}::text[]) AS u`;
  const server = await stage.startServer('usual-way-server', {
    BENCH_DATABASE_URL: url,
    BENCH_REDIS_URL: stage.redis.url,
  });
  const devices = userIds('claimer', scale.sockets).map((userId) => ({ userId, token: '' }));
  await stage.load.call('open', { name: 'usual-way', url: server.url, devices });
  return {
    name: 'usual-way',
    what: 'the usual way: a Redis lock and a Drizzle transaction (SELECT … FOR UPDATE, UPDATE) per request',
    operation: 'bundle',
    async reset() {
      await sql`TRUNCATE usual_prekeys`;
      await sql`
        INSERT INTO usual_prekeys (user_id, device_id, key_id, public_key)
        SELECT u, 1, n, ${oneTimePreKeys[0]!.publicKey}
        FROM unnest(${textArray(targets)}::text[]) WITH ORDINALITY AS t (u, nth)
        CROSS JOIN generate_series(1, ${scale.preKeysPerDevice}::int4) AS n
        ORDER BY nth, n`;
      await sql`VACUUM (ANALYZE) usual_prekeys`;
    },
    async run(timing) {
      const { run } = await socketRun(stage, server, 'claims', {
        ...timing,
        name: 'usual-way',
        userIds: targets,
        claimsPerUser: scale.preKeysPerDevice,
      });
      return run;
    },
  };
}
