/** One client that asks for all it can must not keep the others waiting for an answer. */
import { afterAll, beforeAll, expect, it } from 'vitest';
import { enrol, startGateway, type TestGateway } from '../support/gateway.ts';

const FLOOD = 300;

let gateway: TestGateway;

beforeAll(async () => {
  gateway = await startGateway();
});

afterAll(async () => {
  await gateway?.stop();
});

it('serves everybody else while one socket uploads as much as it can', async () => {
  const flooder = await enrol(gateway, { userId: 'flooder', deviceId: 1 });
  const input = flooder.device.morePreKeys(0, { pqOneTimePreKeys: 100 });
  const flood = Promise.all(Array.from({ length: FLOOD }, () => flooder.client.ask('addPreKeys', input)));
  const bystander = await enrol(gateway, { userId: 'bystander', deviceId: 1 }, { oneTimePreKeys: 20 });
  expect(await bystander.client.call('keyStatus')).toMatchObject({ preKeyCount: 20 });
  const codes = (await flood).map((reply) => (reply.ok ? 'ok' : reply.error.code));
  // What is more than a socket may have waiting is its own affair: it is told to come back.
  expect(codes).toContain('ok');
  expect(codes.filter((code) => code !== 'ok' && code !== 'RATE_LIMITED')).toEqual([]);
});
