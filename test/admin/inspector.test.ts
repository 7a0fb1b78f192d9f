/** The inspector over whole gateways: what it shows of clients, who may look, and what it never tells. */
import { randomUUID } from 'node:crypto';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { addressKey } from '../../src/protocol/ids.ts';
import { eventually } from '../support/eventually.ts';
import { FEW_KEYS, opened, someone, undoAfterEach } from '../support/flow.ts';
import { connectClient, enrol, send, startGateway, type TestGateway } from '../support/gateway.ts';
import { type InspectorClient, login, WITH_INSPECTOR } from '../support/inspector.ts';

const undo = undoAfterEach();
let shared: TestGateway;
beforeAll(async () => {
  shared = await startGateway({ env: { ...WITH_INSPECTOR, ADMIN_WRITE: 'true' } });
});
afterAll(() => shared.stop());

async function inspector(at: TestGateway = shared): Promise<InspectorClient> {
  const client = await login(at.adminUrl);
  undo.push(() => client.close());
  return client;
}

describe('the stream', () => {
  it('shows a request with its acknowledgement, its claim and its message’s life', async () => {
    const viewer = await inspector();
    const alice = await opened(shared);
    const bob = await opened(shared);
    const stream = await viewer.stream();
    const claimId = randomUUID();
    const bundle = await alice.client.call('requestBundle', { claimId, userId: bob.address.userId });
    const request = await stream.event('request', ({ event }) => event === 'requestBundle');
    expect(request).toMatchObject({
      device: addressKey(alice.address),
      direction: 'in',
      door: 'socket',
      gate: 'open',
      code: null,
      input: { claimId, userId: bob.address.userId },
      answer: {
        devices: [
          { deviceId: 1, identityKey: { bytes: 33, digest: expect.stringMatching(/^[0-9a-f]{10}$/) } },
        ],
      },
    });
    expect(request.bytes).toBeGreaterThan(claimId.length);
    expect(request.latencyMs).toBeGreaterThanOrEqual(0);
    expect(await stream.event('claim')).toMatchObject({
      device: addressKey(bob.address),
      peer: addressKey(alice.address),
      claimId,
      keyId: bundle.devices[0]!.oneTimePreKey!.keyId,
      absent: null,
    });

    const messageId = await send(alice.client, bob, 'hello');
    await stream.event('message', ({ stage }) => stage === 'acknowledged');
    const life = stream.events().filter((event) => event.kind === 'message' && event.messageId === messageId);
    expect(life.map((event) => event.kind === 'message' && event.stage)).toEqual([
      'stored',
      'poked',
      'pushed',
      'acknowledged',
    ]);
    expect(life.every(({ device }) => device === addressKey(bob.address))).toBe(true);
    expect(await stream.event('push', ({ event }) => event === 'messages')).toMatchObject({
      device: addressKey(bob.address),
      acknowledged: true,
      input: { envelopes: [{ kind: 'message', messageId, content: { bytes: 5 } }] },
      answer: { processed: [expect.any(String)] },
    });
  });

  it('shows gates, sockets and refused handshakes, with why', async () => {
    const viewer = await inspector();
    const stream = await viewer.stream();
    const bob = await opened(shared);
    const device = addressKey(bob.address);
    await bob.client.call('resetKeys', {});
    const closed = await stream.event('gate', (event) => event.device === device && event.reason !== null);
    expect(closed).toMatchObject({ from: 'open', to: 'validated', keyVersion: 1, reason: 'keysReset' });
    const steps = stream.events().filter((event) => event.kind === 'gate' && event.device === device);
    expect(steps.map((event) => event.kind === 'gate' && event.to)).toEqual([
      'validated',
      'open',
      'validated',
    ]);
    bob.client.close();
    const opening = await stream.event('socketOpened', (event) => event.device === device);
    expect(await stream.event('socketClosed', (event) => event.device === device)).toMatchObject({
      socket: opening.socket,
      reason: expect.any(String),
    });
    await shared.connect(bob.address).then((client) => client.close());
    await expect(connectClient(shared.url, 'no token')).rejects.toThrow('UNAUTHENTICATED');
    expect(await stream.event('handshakeRefused')).toMatchObject({ code: 'UNAUTHENTICATED', device: null });
  });

  it('filters on the server, by what the address says', async () => {
    const viewer = await inspector();
    const alice = await opened(shared);
    const bob = await opened(shared);
    const all = await viewer.stream();
    const few = await viewer.stream({
      device: [bob.address.userId],
      event: ['keyStatus', 'claim'],
      code: ['ok'],
    });
    const refused = await viewer.stream({ code: ['USER_NOT_FOUND'] });
    await alice.client.call('keyStatus');
    await bob.client.call('keyStats');
    await bob.client.call('keyStatus');
    await alice.client.refusal('requestBundle', { claimId: randomUUID(), userId: 'nobody' });
    await refused.event('request');
    await few.event('request');
    await eventually(() => expect(all.events().length).toBeGreaterThanOrEqual(4));
    expect(few.events()).toMatchObject([{ device: addressKey(bob.address), event: 'keyStatus' }]);
    expect(refused.events()).toMatchObject([{ device: addressKey(alice.address), code: 'USER_NOT_FOUND' }]);
    expect((await viewer.get('/api/stream?event=nonsense')).body?.error).toMatchObject({
      code: 'BAD_REQUEST',
      message: expect.stringContaining('event'),
    });
  });

  it('shows what was refused before it was read, and the bounce of what nobody can decrypt', async () => {
    const viewer = await inspector();
    const stream = await viewer.stream();
    const alice = await opened(shared);
    const bob = await enrol(shared, someone(), FEW_KEYS);
    await new Promise((resolve) =>
      (alice.client.socket as unknown as { emit(...args: unknown[]): void }).emit('nonsense', {}, resolve),
    );
    expect(await stream.event('request', ({ event }) => event === 'unknown')).toMatchObject({
      code: 'BAD_REQUEST',
      input: null,
    });
    const messageId = await send(alice.client, bob, 'lost');
    await bob.client.call('resetKeys', {});
    const bounced = await stream.event('message', ({ stage }) => stage === 'bounced');
    expect(bounced).toMatchObject({
      messageId,
      device: addressKey(bob.address),
      peer: addressKey(alice.address),
      reason: 'RECIPIENT_KEYS_RESET',
    });
  });
});
