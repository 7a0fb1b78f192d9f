/** One device of the load test, at a gateway that answers as it is told to. */
import { once } from 'node:events';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { beforeEach, expect, it, onTestFinished } from 'vitest';
import { LoadDevice } from '../../src/load-test/device.ts';
import { VALIDATION_LIFETIME_MS } from '../../src/protocol/limits.ts';
import { eventually } from '../support/eventually.ts';
import { tokenFor } from '../support/gateway.ts';
import { createManualClock, type ManualClock } from '../support/manual-clock.ts';
import { refusal, startToldGateway } from './told-gateway.ts';

const alice = { userId: 'alice', deviceId: 1 };

let clock: ManualClock;
beforeEach(() => {
  clock = createManualClock();
});

async function deviceAt(url: string): Promise<LoadDevice> {
  const device = new LoadDevice({ url, address: alice, token: await tokenFor(alice), clock });
  onTestFinished(() => device.close());
  return device;
}

it('opens its gate again with the validation that it has, for as long as that is good', async () => {
  const gateway = await startToldGateway();
  const device = await deviceAt(gateway.url);
  for (const lifetimes of [0, 0.8, 0.3]) {
    await clock.advance(lifetimes * VALIDATION_LIFETIME_MS);
    device.cut();
    await device.connect();
    await device.openGate();
  }
  expect(gateway.names()).toEqual([
    'validateKeys',
    'clientReady',
    'clientReady',
    // More than a lifetime after the first.
    'validateKeys',
    'clientReady',
  ]);
});

it('validates anew where its validation was refused', async () => {
  let isRefused = true;
  const gateway = await startToldGateway({
    clientReady: ({ socket }) => {
      if (isRefused) return refusal('KEYS_OUT_OF_SYNC');
      setImmediate(() => socket.emit('queueEmpty', { deliveredCount: 0 }));
      return { pendingCount: 0, keyVersion: 2 };
    },
  });
  const device = await deviceAt(gateway.url);
  await device.connect();
  await expect(device.openGate()).rejects.toMatchObject({ code: 'KEYS_OUT_OF_SYNC' });
  // Nor does it wait for what will not come.
  expect(device.isWaiting).toBe(false);
  isRefused = false;
  await device.openGate();
  expect(gateway.names()).toEqual(['validateKeys', 'clientReady', 'validateKeys', 'clientReady']);
});

it('has its gate open when the queue is empty, and not before', async () => {
  const gateway = await startToldGateway({ clientReady: () => ({ pendingCount: 1, keyVersion: 1 }) });
  const device = await deviceAt(gateway.url);
  await device.connect();
  let isOpen = false;
  const opening = device.openGate().then(() => {
    isOpen = true;
  });
  await eventually(() => expect(gateway.names()).toContain('clientReady'));
  // By its answer, that to clientReady has come.
  await device.ask('keyStatus', {});
  expect(isOpen).toBe(false);
  gateway.sockets.get('alice')!.emit('queueEmpty', { deliveredCount: 1 });
  await opening;
});

it('tells what it is refused in the gateway’s words, with the time to come back', async () => {
  const gateway = await startToldGateway({ keyStatus: () => refusal('RATE_LIMITED', 1_234) });
  const device = await deviceAt(gateway.url);
  await device.connect();
  await expect(device.ask('keyStatus', {})).rejects.toMatchObject({
    code: 'RATE_LIMITED',
    message: 'told to: RATE_LIMITED',
    retryAfterMs: 1_234,
    isUncertain: false,
  });
});

it.each([
  [429, 'RATE_LIMITED'],
  [503, 'UNAVAILABLE'],
  [404, 'CONNECT_FAILED'],
])('takes the status %d before it is connected for %s', async (status, code) => {
  const server = createServer();
  server.on('upgrade', (_, socket) => socket.end(`HTTP/1.1 ${status} Told\r\nconnection: close\r\n\r\n`));
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  onTestFinished(() => void server.close());
  const device = await deviceAt(`http://127.0.0.1:${(server.address() as AddressInfo).port}`);
  await expect(device.connect()).rejects.toMatchObject({ code });
});

it('gives up at once what it waits for when its connection ends, and tells of every end but its own', async () => {
  const gateway = await startToldGateway({ keyStatus: () => null });
  const device = await deviceAt(gateway.url);
  let ends = 0;
  device.listener.onDisconnect = () => {
    ends += 1;
  };
  for (const round of [1, 2]) {
    await device.connect();
    // Its own way to end is no news; that of the gateway is, also after it.
    device.cut();
    expect(ends).toBe(round - 1);
    await device.connect();
    const asking = device.ask('keyStatus', {});
    await eventually(() => expect(gateway.asked).toHaveLength(round));
    gateway.sockets.get('alice')!.conn.close();
    await expect(asking).rejects.toMatchObject({ code: 'DISCONNECTED', isUncertain: true });
    expect(ends).toBe(round);
  }
});

it('asks nothing without a connection: Socket.IO would keep it for the next one', async () => {
  const gateway = await startToldGateway();
  const device = await deviceAt(gateway.url);
  await expect(device.ask('keyStats', {})).rejects.toMatchObject({ code: 'DISCONNECTED' });
  await device.connect();
  await device.ask('keyStatus', {});
  expect(gateway.names()).toEqual(['keyStatus']);
});

it('gives up after half a minute without an answer', async () => {
  const gateway = await startToldGateway({ keyStatus: () => null });
  const device = await deviceAt(gateway.url);
  expect(device.isWaiting).toBe(true);
  await device.connect();
  expect(device.isWaiting).toBe(false);
  const asking = device.ask('keyStatus', {});
  const failure = expect(asking).rejects.toMatchObject({ code: 'NOT_ANSWERED', isUncertain: true });
  await clock.advance(29_999);
  expect(device.isWaiting).toBe(true);
  await clock.advance(1);
  await failure;
  expect(device.isWaiting).toBe(false);
});
