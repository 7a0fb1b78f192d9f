/** What is answered, by its bytes, where no hook of the framework is reached any more. */
import { once } from 'node:events';
import { type AddressInfo, connect, createServer, type Socket } from 'node:net';
import { afterEach, expect, it } from 'vitest';
import { refuseUpgrade } from '../../src/gateway/refuse-upgrade.ts';
import { refuseUnreadable } from '../../src/http/refusals.ts';
import { GatewayError } from '../../src/protocol/errors.ts';

const undo: (() => void)[] = [];
afterEach(() => {
  for (const step of undo.splice(0)) step();
});

/** What a client reads, to the end, where its connection is treated so. */
async function readWhere(treat: (socket: Socket) => void): Promise<string> {
  const server = createServer(treat).listen(0, '127.0.0.1');
  undo.push(() => server.close());
  await once(server, 'listening');
  const client = connect((server.address() as AddressInfo).port, '127.0.0.1');
  let text = '';
  client.setEncoding('utf8').on('data', (chunk: string) => {
    text += chunk;
  });
  await once(client, 'close');
  return text;
}

it.each([
  ['HPE_HEADER_OVERFLOW', '431 Request Header Fields Too Large', 'PAYLOAD_TOO_LARGE'],
  ['ERR_HTTP_REQUEST_TIMEOUT', '408 Request Timeout', 'BAD_REQUEST'],
  ['HPE_INVALID_METHOD', '400 Bad Request', 'BAD_REQUEST'],
])('%s is answered with %s', async (code, status, contractCode) => {
  const answer = await readWhere((socket) => refuseUnreadable(Object.assign(new Error(), { code }), socket));
  expect(answer).toMatch(new RegExp(`^HTTP/1\\.1 ${status}\r\n`));
  for (const header of [
    'cache-control: no-store',
    'x-content-type-options: nosniff',
    'referrer-policy: no-referrer',
    "content-security-policy: default-src 'none'; frame-ancestors 'none'",
  ]) {
    expect(answer).toContain(`\r\n${header}\r\n`);
  }
  expect(JSON.parse(answer.split('\r\n\r\n')[1]!)).toMatchObject({
    success: false,
    error: { code: contractCode },
  });
});

it('a connection that was reset is answered with nothing', async () => {
  const reset = Object.assign(new Error(), { code: 'ECONNRESET' });
  expect(await readWhere((socket) => refuseUnreadable(reset, socket))).toBe('');
});

it('a refused upgrade says when to come back, in whole seconds and not too soon', async () => {
  const refusal = new GatewayError('RATE_LIMITED', undefined, { retryAfterMs: 1_200 });
  const answer = await readWhere((socket) => refuseUpgrade(socket, refusal));
  expect(answer).toMatch(/^HTTP\/1\.1 429 Too Many Requests\r\n/);
  for (const header of ['retry-after: 2', 'cache-control: no-store', 'x-content-type-options: nosniff']) {
    expect(answer).toContain(`\r\n${header}\r\n`);
  }
  expect(JSON.parse(answer.split('\r\n\r\n')[1]!)).toEqual({ success: false, error: refusal.toObject() });
});
