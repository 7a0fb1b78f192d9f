/** Devices that nobody uses: where the operator says after which time, their keys go, and nobody else's. */
import postgres from 'postgres';
import { expect, it } from 'vitest';
import { openDatabase } from '../../src/backends/postgres/database.ts';
import { createKeyStore } from '../../src/backends/postgres/key-store.ts';
import { wipeKeySet } from '../../src/keys/key-set.ts';
import { systemClock } from '../../src/lib/clock.ts';
import { silentLog } from '../../src/lib/log.ts';
import { eventually } from '../support/eventually.ts';
import { FEW_KEYS, gatewayFor, NO_MORE_KEYS, reopened, someone, undoAfterEach } from '../support/flow.ts';
import { connectClient, contents, enrol, open, send, type TestGateway } from '../support/gateway.ts';
import { createManualClock, type ManualClock } from '../support/manual-clock.ts';

const DAY_MS = 86_400_000;
/** A part of the retention's period that is shorter than the patience with a client that acknowledges. */
const STEP_MS = 10_000;
const undo = undoAfterEach();

/** Its clients bear tokens that outlast the test's days. */
async function gatewayOfDays(env: Record<string, string>): Promise<{ at: TestGateway; clock: ManualClock }> {
  const clock = createManualClock();
  const gateway = await gatewayFor(undo, { clock, env });
  const connect: TestGateway['connect'] = async (device) => {
    const client = await connectClient(gateway.url, await gateway.token(device, 60 * DAY_MS));
    undo.push(() => client.close());
    return client;
  };
  return { at: { ...gateway, connect }, clock };
}

it('an idle device loses its keys, its sender is told, and it starts anew; one that is used stays', async () => {
  const { at, clock } = await gatewayOfDays({ IDLE_DEVICE_RETENTION_DAYS: '10' });
  const alice = await enrol(at, someone(), FEW_KEYS);
  await open(alice);
  const idler = await enrol(at, someone(), { oneTimePreKeys: 2, pqOneTimePreKeys: 0 });
  const served = await enrol(at, someone(), FEW_KEYS);
  const uploader = await enrol(at, someone(), FEW_KEYS);
  const { devices } = await alice.client.call('requestBundle', {
    claimId: '7f0f2c0a-5c3e-4d0e-9d6d-3d5b8a4f1c01',
    userId: idler.address.userId,
  });
  const before = await idler.client.call('keyStatus');
  idler.client.close();
  await send(alice.client, idler, 'waits');

  await clock.advance(9 * DAY_MS);
  await reopened(at, served);
  await uploader.client.call('rotateSignedPreKey', { signedPreKey: uploader.device.newSignedPreKey() });
  const sql = postgres(at.databaseUrl, { max: 1, onnotice: () => {} });
  undo.push(() => sql.end());
  // Her gate was open all the time.
  await eventually(async () => {
    await clock.advance(1_000);
    const [row] = await sql`SELECT served_at FROM devices WHERE user_id = ${alice.address.userId}`;
    expect(row!.served_at.getTime()).toBeGreaterThan(clock.nowMs() - DAY_MS);
  });

  await clock.advance(2 * DAY_MS);
  await eventually(async () => {
    await clock.advance(STEP_MS);
    const [row] = await sql`SELECT identity_key FROM devices WHERE user_id = ${idler.address.userId}`;
    expect(row!.identity_key).toBeNull();
  });
  await eventually(() => expect(contents(alice.client)).toEqual(['RECIPIENT_KEYS_RESET']));
  const again = await at.connect(idler.address);
  expect(await again.call('keyStatus')).toMatchObject({
    identityKey: null,
    preKeyCount: 0,
    keyVersion: before.keyVersion + 1,
  });
  for (const { address } of [alice, served, uploader]) {
    const { devices: stay } = await alice.client.call('listDevices', { userId: address.userId });
    expect(stay).toHaveLength(1);
  }
  const claimed = devices[0]!.oneTimePreKey!;
  const upload = await again.call('uploadKeys', {
    ...idler.device.uploadInput(NO_MORE_KEYS),
    oneTimePreKeys: [{ keyId: claimed.keyId, publicKey: claimed.publicKey }],
  });
  expect(upload.oneTimePreKeys.conflicts).toEqual([{ keyId: claimed.keyId, reason: 'alreadyClaimed' }]);
  await open({ client: again, device: idler.device });
  await send(alice.client, idler, 'anew');
  await eventually(() => expect(contents(again)).toEqual(['anew']));
});

it('what waits for one whose sweeper died between its keys and its queue goes home with the next walk', async () => {
  const { at, clock } = await gatewayOfDays({ IDLE_DEVICE_RETENTION_DAYS: '10' });
  const alice = await enrol(at, someone(), FEW_KEYS);
  await open(alice);
  const idler = await enrol(at, someone(), FEW_KEYS);
  idler.client.close();
  await send(alice.client, idler, 'waits');
  const address = { kind: 'url', url: at.databaseUrl } as const;
  const database = openDatabase({ address, clock: systemClock, log: silentLog });
  undo.push(() => database.close());
  // Longer ago than the sweep of messages looks back.
  const wipedAtMs = clock.nowMs() - 2 * 3_600_000;
  await createKeyStore(database).change(idler.address, (keys) =>
    wipeKeySet(keys, 'RECIPIENT_KEYS_RESET', wipedAtMs, { leavesMessages: true }),
  );
  await clock.advance(3_600_000);
  await eventually(async () => {
    await clock.advance(STEP_MS);
    expect(contents(alice.client)).toEqual(['RECIPIENT_KEYS_RESET']);
  });
});

it('no device is ever idle where the operator says nothing', async () => {
  const { at, clock } = await gatewayOfDays({ MESSAGE_TTL_DAYS: '1' });
  const alice = await enrol(at, someone(), FEW_KEYS);
  await open(alice);
  const idler = await enrol(at, someone(), FEW_KEYS);
  idler.client.close();
  await send(alice.client, idler, 'waits');
  await clock.advance(50 * DAY_MS);
  // The retention sweep has run when what expired is back.
  const sql = postgres(at.databaseUrl, { max: 1, onnotice: () => {} });
  undo.push(() => sql.end());
  await eventually(async () => {
    await clock.advance(STEP_MS);
    expect(await sql`SELECT 1 FROM messages WHERE user_id = ${idler.address.userId} AND pending`).toEqual([]);
  });
  await eventually(() => expect(contents(alice.client)).toEqual(['EXPIRED']));
  const { devices } = await alice.client.call('listDevices', { userId: idler.address.userId });
  expect(devices).toHaveLength(1);
});
