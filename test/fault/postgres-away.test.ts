/** What a client is told while PostgreSQL is away, and what it costs when the connections are all taken. */
import { randomUUID } from 'node:crypto';
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { eventually } from '../support/eventually.ts';
import { FEW_KEYS, someone } from '../support/flow.ts';
import { contents, enrol, open, type Party, send } from '../support/gateway.ts';
import { type ProcessStage, startStage } from './stage.ts';

let stage: ProcessStage;
beforeAll(async () => {
  stage = await startStage({ gateways: 1, env: { LOG_LEVEL: 'warn' } });
});
afterAll(() => stage?.stop());

const gateway = () => stage.gateways[0]!;
const message = (to: Party, messageId: string = randomUUID()) => ({
  messageId,
  userId: to.address.userId,
  envelopes: [{ deviceId: 1, registrationId: to.device.registrationId, type: 1, content: 'AAAA' }],
});
const UNAVAILABLE = {
  ok: false,
  error: { code: 'UNAVAILABLE', retryable: true, retryAfterMs: expect.any(Number) },
};

describe('while PostgreSQL is killed', () => {
  it('every request that needs it is UNAVAILABLE with a time to come back, readyz fails, and all of it recovers', async () => {
    const [alice, bob] = [
      await enrol(gateway(), someone(), FEW_KEYS),
      await enrol(gateway(), someone(), FEW_KEYS),
    ];
    await open(bob);
    await bob.client.next('queueEmpty');
    await stage.postgres.kill('SIGQUIT');
    const sent = message(bob);
    const replies = await Promise.all([
      alice.client.ask('sendMessages', sent),
      alice.client.ask('requestBundle', { claimId: randomUUID(), userId: bob.address.userId }),
      alice.client.ask('keyStatus'),
      alice.client.ask('validateKeys', alice.device.validateInput()),
      alice.client.ask('resetKeys', {}),
    ]);
    expect(replies).toEqual(replies.map(() => expect.objectContaining({ ok: false })));
    for (const reply of replies) expect(reply).toMatchObject(UNAVAILABLE);
    await eventually(async () => expect((await stage.readiness(gateway())).status).toBe(503));
    await expect(gateway().connect(someone())).rejects.toMatchObject({ error: { code: 'UNAVAILABLE' } });

    await stage.postgres.restart();
    // The sockets are the same, and the message that was not acknowledged is sent again under its id.
    await eventually(async () =>
      expect(await alice.client.ask('sendMessages', sent)).toMatchObject({ ok: true }),
    );
    await eventually(() => expect(bob.client.envelopes).toHaveLength(1));
    await eventually(async () => expect((await stage.readiness(gateway())).status).toBe(200));
  });
});

describe('while PostgreSQL is a standby', () => {
  it('what is to be stored is UNAVAILABLE, also a connection, readyz and the log say why, and all of it recovers', async () => {
    const alice = await enrol(gateway(), someone(), FEW_KEYS);
    const bob = await enrol(gateway(), someone(), FEW_KEYS);
    const [{ data_directory: dir }] = await stage.sql<[{ data_directory: string }]>`SHOW data_directory`;
    await stage.postgres.kill('SIGINT');
    await writeFile(join(dir, 'standby.signal'), '');
    await stage.postgres.restart();
    const sent = message(bob);
    await eventually(async () => {
      expect(await alice.client.ask('sendMessages', sent)).toMatchObject(UNAVAILABLE);
      expect(await gateway().output()).toContain('read-only transaction');
    });
    const claim = { claimId: randomUUID(), userId: bob.address.userId };
    expect(await alice.client.ask('requestBundle', claim)).toMatchObject(UNAVAILABLE);
    await expect(gateway().connect(someone())).rejects.toMatchObject({ error: { code: 'UNAVAILABLE' } });
    await eventually(async () => {
      const { status, text } = await stage.readiness(gateway());
      expect(status).toBe(503);
      expect(text).toContain('"postgres":"PostgreSQL is read-only');
    });

    await stage.sql`SELECT pg_promote()`;
    await eventually(async () =>
      expect(await alice.client.ask('sendMessages', sent)).toMatchObject({ ok: true }),
    );
    await eventually(async () => expect((await stage.readiness(gateway())).status).toBe(200));
    await gateway().connect(someone());
  });
});

describe('while all connections to PostgreSQL are taken', () => {
  it('who waits too long is told to come back, nothing is lost, and the others are served when they are free', async () => {
    const bob = await enrol(gateway(), someone(), FEW_KEYS);
    const senders = await Promise.all([1, 2, 3, 4].map(() => enrol(gateway(), someone(), FEW_KEYS)));
    const bystander = await enrol(gateway(), someone(), FEW_KEYS);
    // A rival that stores the same messages and never ends: everybody waits for its end.
    const messageIds = senders.map(() => randomUUID());
    const rival = await stage.sql.reserve();
    await rival`BEGIN`;
    for (const [i, sender] of senders.entries()) {
      await rival`
        INSERT INTO message_receipts
          (user_id, device_id, kind, peer_user_id, peer_device_id, message_id, sequence, stored_at)
        VALUES (${bob.address.userId}, 1, 0, ${sender.address.userId}, 1, ${messageIds[i]!}, 0, now())`;
    }
    const stuck = senders.flatMap(({ client }, i) =>
      Array.from({ length: 32 }, () => client.ask('sendMessages', message(bob, messageIds[i]!))),
    );
    const replies = await Promise.all(stuck);
    for (const reply of replies) expect(reply).toMatchObject(UNAVAILABLE);
    await rival`ROLLBACK`;
    rival.release();

    await eventually(async () => {
      expect(await bystander.client.ask('sendMessages', message(bob))).toMatchObject({ ok: true });
    });
    for (const [i, sender] of senders.entries()) {
      await sender.client.call('sendMessages', message(bob, messageIds[i]!));
    }
    await send(bystander.client, bob, 'last');
    await open(bob);
    await bob.client.next('queueEmpty');
    expect(contents(bob.client)).toHaveLength(6);
    expect(contents(bob.client).at(-1)).toBe('last');
  }, 60_000);
});
