/** Marked secrets go in by every way that there is; nothing that a person or a machine may read holds any of them. */
import { randomUUID } from 'node:crypto';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { requestNames } from '../../src/protocol/events.ts';
import { addressKey } from '../../src/protocol/ids.ts';
import { createDatabase } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { FEW_KEYS, someone } from '../support/flow.ts';
import { connectClient, enrol, open, TEST_SECRET, tokenFor } from '../support/gateway.ts';
import { type GatewayProcess, startGatewayProcess } from '../support/gateway-process.ts';
import { ADMIN_TOKEN, type InspectorClient, login } from '../support/inspector.ts';

/** In whatever the server can not read: in field names, ids, free text and tokens. */
const MARK = 'marked-secret';
let gateway: GatewayProcess;
let viewer: InspectorClient;
let drop: () => Promise<void>;

beforeAll(async () => {
  const database = await createDatabase();
  drop = database.drop;
  gateway = await startGatewayProcess(
    { databaseUrl: database.url },
    { LOG_LEVEL: 'debug', ADMIN_TOKEN, PREKEY_LOW_THRESHOLD: '5' },
  );
  viewer = await login(gateway.adminUrl);
});
afterAll(async () => {
  viewer?.close();
  await gateway?.stop();
  await drop?.();
});

/** Every text in `value` that is a key, a signature, a ciphertext or a token, by its length. */
function longTexts(value: unknown, found: Set<string> = new Set()): Set<string> {
  if (typeof value === 'string') {
    const isPublic =
      /^[0-9a-f-]{36}$/.test(value) || /^\d{4}-\d\d-\d\dT/.test(value) || value.startsWith('u-');
    if (value.length >= 40 && !isPublic) found.add(value);
  } else if (typeof value === 'object' && value !== null) {
    for (const part of Object.values(value)) longTexts(part, found);
  }
  return found;
}

it('shows no key, ciphertext, token or free text in stream, pages, log or metrics', async () => {
  const secrets = new Set<string>([TEST_SECRET, ADMIN_TOKEN, viewer.cookie.split('=')[1]!]);
  const note = <Value>(value: Value): Value => {
    longTexts(value, secrets);
    return value;
  };
  const stream = await viewer.stream();
  const { samples } = await viewer.overview();

  // Every request, as clients make them.
  const alice = await enrol(gateway, someone(), FEW_KEYS);
  const bob = await enrol(gateway, someone(), { oneTimePreKeys: 2, pqOneTimePreKeys: 2 });
  for (const party of [alice, bob]) {
    note(party.device.uploadInput(FEW_KEYS));
    const { client, device } = party;
    note(await client.call('addPreKeys', note({ ...device.morePreKeys(2, { pqOneTimePreKeys: 2 }) })));
    const { validation } = note(await client.call('validateKeys', note(device.validateInput())));
    await client.call('clientReady', { validation: validation! });
    await client.next('queueEmpty');
  }
  await alice.client.call('rotateSignedPreKey', note({ signedPreKey: alice.device.newSignedPreKey() }));
  for (const name of ['keyStatus', 'keyStats', 'checkPreKeys'] as const) note(await alice.client.call(name));
  await alice.client.call('withdrawPreKeys', { preKeyIds: [77] });
  await alice.client.call('listDevices', { userId: bob.address.userId });
  note(await alice.client.call('requestBundle', { claimId: randomUUID(), userId: bob.address.userId }));
  const messageId = randomUUID();
  const content = Buffer.from(`${MARK} in a ciphertext, long enough to be found again`).toString('base64');
  note(content);
  await alice.client.call('sendMessages', {
    messageId,
    userId: bob.address.userId,
    envelopes: [{ deviceId: 1, registrationId: bob.device.registrationId, type: 3, content }],
  });
  await eventually(() => bob.client.envelopes.length > 0);
  const token = note(await tokenFor(alice.address));
  await alice.client.call('refreshToken', { token });

  // What is refused, and what carries secrets where none belongs.
  const sloppy = bob.client as unknown as {
    refusal(name: string, input: unknown): Promise<unknown>;
    socket: { emit(...args: unknown[]): void };
  };
  await sloppy.refusal('keyStatus', { [`${MARK}-field`]: `${MARK}-value` });
  await sloppy.refusal('requestBundle', { claimId: `${MARK}-claim`, userId: `${MARK} user` });
  await sloppy.refusal('sendMessages', {
    messageId,
    userId: 'x',
    envelopes: [{ content: `${MARK}-content` }],
  });
  await sloppy.refusal('uploadKeys', { identityKey: `${MARK}-key`, [MARK]: MARK });
  await sloppy.refusal('refreshToken', { token: `${MARK}-token` });
  await sloppy.refusal('clientReady', { validation: `${MARK}-validation` });
  await new Promise((resolve) => sloppy.socket.emit(`${MARK}-event`, {}, resolve));
  await expect(connectClient(gateway.url, `${MARK}-handshake`)).rejects.toThrow('UNAUTHENTICATED');
  bob.client.onMessages = ({ envelopes }) => ({
    processed: [`${MARK}-id`, ...envelopes.map(({ id }) => id)],
    failed: [{ id: `${MARK}-failed`, reason: 'temporary' }],
  });
  await alice.client.call('sendMessages', {
    messageId: randomUUID(),
    userId: bob.address.userId,
    envelopes: [{ deviceId: 1, registrationId: bob.device.registrationId, type: 3, content }],
  });
  await eventually(() => bob.client.envelopes.length > 1);
  const authorization = `Bearer ${await tokenFor(bob.address)}`;
  note(authorization.slice('Bearer '.length));
  for (const headers of [
    { authorization: `Bearer ${MARK}` },
    { authorization, 'idempotency-key': MARK },
  ] as Record<string, string>[]) {
    await fetch(`${gateway.url}/api/keys/${alice.address.userId}?${MARK}=1`, { headers });
    await fetch(`${gateway.url}/api/keys/${alice.address.userId}`, { headers });
  }
  await fetch(`${gateway.adminUrl}/api/session`, { headers: { authorization: `Bearer ${MARK}-admin` } });
  await fetch(`${gateway.adminUrl}/api/stream?event=${MARK}`, { headers: { cookie: viewer.cookie } });

  // A gate that closes, with a reason in the client's own words, and a connection that is displaced.
  const older = bob.client;
  const newer = await gateway.connect(bob.address);
  await older.next('displaced');
  await open({ device: bob.device, client: newer });
  await newer.call('resetKeys', { reason: `${MARK}-reason` });
  await newer.next('gateClosed');

  const seen = () => new Set(stream.events().map(({ event }) => event));
  const pushes = ['messages', 'queueEmpty', 'preKeysLow', 'gateClosed', 'displaced'];
  const kinds = ['gate', 'claim', 'message', 'handshakeRefused', 'socketOpened', 'socketClosed', 'unknown'];
  await eventually(() =>
    expect([...requestNames, ...pushes, ...kinds].filter((name) => !seen().has(name))).toEqual([]),
  );

  const shown: Record<string, string> = {
    stream: JSON.stringify(stream.frames),
    overview: JSON.stringify(samples),
    sockets: (await viewer.get('/api/sockets')).text,
    alice: (await viewer.get(`/api/devices/${addressKey(alice.address)}`)).text,
    bob: (await viewer.get(`/api/devices/${addressKey(bob.address)}?messageId=${messageId}`)).text,
    message: (await viewer.get(`/api/messages/${messageId}?recipient=${bob.address.userId}`)).text,
    metrics: await (await fetch(`${gateway.adminUrl}/metrics`)).text(),
    log: await gateway.output(),
  };
  expect(secrets.size).toBeGreaterThan(20);
  for (const [where, text] of Object.entries(shown)) {
    expect(text.length, where).toBeGreaterThan(0);
    expect(text.toLowerCase(), where).not.toContain(MARK);
    for (const secret of secrets) {
      const bytes = Buffer.from(secret, 'base64');
      for (const form of [secret, bytes.toString('base64url'), bytes.toString('hex')]) {
        expect(text.includes(form), `${where} holds ${form}`).toBe(false);
      }
    }
  }
  // What is looked for is there to be found: ids are shown, and the very same payloads stand as digests.
  expect(shown.stream).toContain(messageId);
  expect(shown.stream).toMatch(/"content":\{"bytes":\d+,"digest":"[0-9a-f]{10}"\}/);
  expect(shown.stream).toMatch(/"validation":\{"withheld":"string","length":\d+\}/);
  expect(shown.log).toContain('"msg":"request"');
});
