/** A database whose defaults somebody chose for something else: the gateway's own connections hold to what they need. */
import { randomUUID } from 'node:crypto';
import postgres from 'postgres';
import { expect, it } from 'vitest';
import type { RequestData } from '../../src/protocol/events.ts';
import { createDatabase } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { contents, enrol, open, startGateway } from '../support/gateway.ts';

const CLAIMERS = 8;
const PRE_KEYS = [1, 2, 3, 4, 5, 6];

it.each([
  ['default_transaction_isolation', 'serializable'],
  ['bytea_output', 'escape'],
  ['datestyle', 'German'],
  ['extra_float_digits', '-6'],
  ['idle_session_timeout', '1ms'],
  ['lock_timeout', '1ms'],
  ['statement_timeout', '3ms'],
])('where %s is %s keys are claimed once, messages arrive, and times are told', async (name, value) => {
  const database = await createDatabase();
  const holder = postgres(database.url, { max: 2, onnotice: () => {} });
  // Both of its connections are from before.
  await Promise.all([holder`SELECT 1`, holder`SELECT 1`]);
  await holder.unsafe(`ALTER DATABASE ${holder.options.database} SET ${name} = '${value}'`);
  const gateway = await startGateway({ databaseUrl: database.url });
  try {
    const bob = await enrol(gateway, { userId: 'bob', deviceId: 1 }, { oneTimePreKeys: PRE_KEYS.length });
    // All that is stored is compared with what was uploaded.
    await open(bob);
    const others = await Promise.all(
      Array.from({ length: CLAIMERS }, (_, nth) => enrol(gateway, { userId: `other-${nth}`, deviceId: 1 })),
    );
    let claiming: Promise<RequestData<'requestBundle'>[]> | undefined;
    // While another transaction has the device, a claim waits for it.
    await holder.begin(async (tx) => {
      await tx`SELECT 1 FROM devices WHERE user_id = 'bob' FOR UPDATE`;
      claiming = Promise.all(
        others.map(({ client }) => client.call('requestBundle', { claimId: randomUUID(), userId: 'bob' })),
      );
      const isWaiting = async (): Promise<boolean> =>
        (
          await holder`SELECT 1 FROM pg_stat_activity
                       WHERE datname = current_database() AND wait_event_type = 'Lock'`
        ).length > 0;
      await Promise.race([claiming, eventually(isWaiting)]);
    });
    const bundles = await claiming!;
    const keyIds = bundles.map(({ devices }) => devices[0]!.oneTimePreKey?.keyId ?? 'none');
    expect(keyIds.filter((keyId) => keyId !== 'none').sort()).toEqual(PRE_KEYS);

    const [{ client }] = others as [(typeof others)[0]];
    const message = {
      messageId: randomUUID(),
      userId: 'bob',
      envelopes: [
        { deviceId: 1, registrationId: bob.device.registrationId, type: 3 as const, content: 'aGk=' },
      ],
    };
    const sent = await client.call('sendMessages', message);
    await eventually(() => expect(contents(bob.client)).toEqual(['hi']));
    // What it was stored at is read back to the millisecond.
    expect((await client.call('sendMessages', message)).storedAt).toBe(sent.storedAt);
    const { availablePreKeys, lastUpdated } = await bob.client.call('keyStats');
    expect({ availablePreKeys, lastUpdated }).toEqual({
      availablePreKeys: 0,
      lastUpdated: expect.any(String),
    });
  } finally {
    await gateway.stop();
    await holder.end();
    await database.drop();
  }
});

it('where DATABASE_URL names others, and its host by an address of IPv6, the gateway’s own are in force', async () => {
  const database = await createDatabase();
  const url = new URL(database.url);
  url.hostname = '[::ffff:127.0.0.1]';
  for (const [name, value] of [
    ['application_name', 'app'],
    ['statement_timeout', '1'],
    ['Lock_Timeout', '1'],
    ['synchronous_commit', 'off'],
  ] as const) {
    url.searchParams.set(name, value);
  }
  const gateway = await startGateway({ databaseUrl: url.href });
  const admin = postgres(database.url, { max: 1 });
  try {
    await enrol(gateway, { userId: 'alice', deviceId: 1 });
    const sessions = await admin`
      SELECT DISTINCT application_name FROM pg_stat_activity
      WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'`;
    expect([...sessions]).toEqual([{ application_name: 'keygate' }]);
  } finally {
    await admin.end();
    await gateway.stop();
    await database.drop();
  }
});
