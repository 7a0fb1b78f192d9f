/** What strangers and onlookers learn: nothing of who is here, and nothing secret. */
import { execFile } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { promisify } from 'node:util';
import { describe, expect, it } from 'vitest';
import { GatewayError } from '../../src/protocol/errors.ts';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import { createDirectory } from '../../src/requests/directory.ts';
import { createDatabase } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { FEW_KEYS, gatewayFor, someone, undoAfterEach } from '../support/flow.ts';
import { type Client, enrol, send, TEST_SECRET, type TestGateway } from '../support/gateway.ts';
import { startGatewayProcess } from '../support/gateway-process.ts';
import { createManualClock, type ManualClock } from '../support/manual-clock.ts';

const undo = undoAfterEach();

describe('a private directory', () => {
  /** Every way of asking for somebody. */
  async function askEverywhere(at: TestGateway, asker: Client, token: string, { userId }: DeviceAddress) {
    const bundle = await asker.ask('requestBundle', { claimId: randomUUID(), userId });
    const oneBundle = await asker.ask('requestBundle', { claimId: randomUUID(), userId, deviceId: 1 });
    const devices = await asker.ask('listDevices', { userId });
    const sent = await asker.ask('sendMessages', {
      messageId: randomUUID(),
      userId,
      envelopes: [{ deviceId: 1, registrationId: 1, type: 3, content: 'eA==' }],
    });
    const headers = { authorization: `Bearer ${token}` };
    const http = await fetch(`${at.url}/api/keys/${userId}`, { headers });
    const httpDevice = await fetch(`${at.url}/api/keys/${userId}?deviceId=1`, { headers });
    return [
      bundle,
      oneBundle,
      devices,
      sent,
      [http.status, await http.json()],
      [httpDevice.status, await httpDevice.json()],
    ];
  }

  it('answers alike for a user that is unknown, has no keys any more, never had any, or was revoked', async () => {
    const at = await gatewayFor(undo, { env: { PRIVATE_DIRECTORY: 'true' } });
    const asker = await enrol(at, someone(), FEW_KEYS);
    const token = await at.token(asker.address);
    const reset = await enrol(at, someone(), FEW_KEYS);
    await reset.client.call('resetKeys');
    const connected = someone();
    await at.connect(connected);
    const unknown = await askEverywhere(at, asker.client, token, someone());
    for (const user of [reset.address, connected]) {
      expect(await askEverywhere(at, asker.client, token, user)).toEqual(unknown);
    }
    expect(unknown[0]).toEqual({
      ok: false,
      error: { code: 'USER_NOT_FOUND', message: expect.any(String), retryable: false },
    });
  });

  it('does not tell a missing device from a missing user', async () => {
    const at = await gatewayFor(undo, { env: { PRIVATE_DIRECTORY: 'true' } });
    const [asker, bob] = [await enrol(at, someone(), FEW_KEYS), await enrol(at, someone(), FEW_KEYS)];
    const ask = (userId: string) =>
      asker.client.refusal('requestBundle', { claimId: randomUUID(), userId, deviceId: 9 });
    expect(await ask(bob.address.userId)).toEqual(await ask(someone().userId));
    await asker.client.call('requestBundle', { claimId: randomUUID(), userId: bob.address.userId });
  });

  it('tells both at the end of the same step of time', async () => {
    const manual = createManualClock();
    const delays: number[] = [];
    const clock: ManualClock = {
      ...manual,
      after(delayMs, action) {
        delays.push(delayMs);
        return manual.after(delayMs, action);
      },
    };
    const at = await gatewayFor(undo, { clock, env: { PRIVATE_DIRECTORY: 'true' } });
    const { client } = await enrol(at, someone(), FEW_KEYS);
    const answers: string[] = [];
    const note = (name: string) => () => answers.push(name);
    const asked = [
      client.ask('listDevices', { userId: someone().userId }).then(note('unknown')),
      client.ask('requestBundle', { claimId: randomUUID(), userId: someone().userId }).then(note('bundle')),
    ];
    // Both have been looked up, and wait.
    await eventually(() => expect(delays.filter((delayMs) => delayMs === 50)).toHaveLength(2));
    await clock.advance(49);
    await client.call('keyStatus');
    expect(answers).toEqual([]);
    await clock.advance(1);
    await Promise.all(asked);
    expect(answers.sort()).toEqual(['bundle', 'unknown']);
  });

  it.each([
    [0, 50],
    [20, 30],
    [50, 50],
    [130, 20],
  ])('tells what took %i ms to look up %i ms later', async (tookMs, laterMs) => {
    const clock = createManualClock();
    const directory = createDirectory({ isPrivate: true, clock });
    const startedMs = clock.nowMs();
    await clock.advance(tookMs);
    let told: GatewayError | null = null;
    void Promise.resolve(directory.veiled(new GatewayError('DEVICE_NOT_FOUND'), startedMs)).then(
      (refusal) => {
        told = refusal;
      },
    );
    await clock.advance(laterMs - 1);
    expect(told).toBeNull();
    await clock.advance(1);
    expect(told).toMatchObject({ code: 'USER_NOT_FOUND' });
  });
});

it('the process, its log and its output hold no secret, key, token or ciphertext', async () => {
  const database = await createDatabase();
  undo.push(() => database.drop());
  const url = new URL(database.url);
  url.password = 'pass-of-the-database';
  const gateway = await startGatewayProcess({ databaseUrl: url.href }, { LOG_LEVEL: 'debug' });
  undo.push(() => gateway.stop());
  const alice = await enrol(gateway, someone(), FEW_KEYS);
  const bob = await enrol(gateway, someone(), FEW_KEYS);
  const { validation } = await bob.client.call('validateKeys', bob.device.validateInput());
  await bob.client.call('clientReady', { validation: validation! });
  await send(alice.client, bob, 'a very secret ciphertext');
  await alice.client.refusal('refreshToken', { token: 'aaaa.bbbb.cccc' });
  await alice.client.refusal('clientReady', { validation: 'a-made-up-validation' });
  const { stdout: processes } = await promisify(execFile)('ps', ['-eo', 'pid,args']);
  const line = processes.split('\n').find((text) => text.trim().startsWith(`${gateway.pid} `));
  expect(line).toContain('serve');
  await gateway.kill('SIGTERM');
  const output = await gateway.output();
  expect(output).toContain('"level":"debug"');
  const seen = `${line}\n${output}`;
  const upload = bob.device.uploadInput({ oneTimePreKeys: 0, pqOneTimePreKeys: 0 });
  for (const secret of [
    url.password,
    TEST_SECRET,
    validation!,
    upload.identityKey,
    upload.signedPreKey.publicKey,
    Buffer.from('a very secret ciphertext').toString('base64'),
    'aaaa.bbbb.cccc',
    'a-made-up-validation',
  ]) {
    expect(seen).not.toContain(secret);
  }
});
