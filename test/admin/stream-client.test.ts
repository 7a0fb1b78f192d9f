/** The reader of the inspector's stream, where there is nothing to read. */
import { createServer, type RequestListener, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { afterEach, expect, it } from 'vitest';
import { startAdmin } from '../../src/admin/health.ts';
import { readStream } from '../../src/admin/stream-client.ts';
import { systemClock } from '../../src/lib/clock.ts';
import { eventually } from '../support/eventually.ts';
import { startGateway } from '../support/gateway.ts';
import { createManualClock } from '../support/manual-clock.ts';

const undo: (() => unknown)[] = [];
afterEach(async () => {
  for (const step of undo.splice(0)) await step();
});

async function serverOf(answer: RequestListener): Promise<{ server: Server; url: string }> {
  const server = createServer(answer);
  undo.push(() => server.close().closeAllConnections());
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  return { server, url: `http://127.0.0.1:${(server.address() as AddressInfo).port}` };
}

/** Reads until it is refused, or has lost the connection once. @returns what was said */
async function said(url: string): Promise<string> {
  const ending = new AbortController();
  let lost = '';
  return await readStream({
    url,
    token: 'any',
    filter: {},
    clock: systemClock,
    signal: ending.signal,
    onFrame: () => {},
    onLost(reason) {
      lost = reason;
      ending.abort();
    },
  }).then(
    () => lost,
    (error: Error) => error.message,
  );
}

it('says who answers where there is no stream: the gateway’s own door, an inspector that is off, or a stranger', async () => {
  const gateway = await startGateway();
  undo.push(() => gateway.stop());
  expect(await said(gateway.url)).toBe(
    `${gateway.url} is where the gateway’s clients connect: the inspector is on its second listener, at ADMIN_PORT`,
  );
  const off = await startAdmin({ host: '127.0.0.1', port: 0, probes: [], pages: [], inspector: null });
  undo.push(() => off.close());
  expect(await said(off.url)).toBe(
    `${off.url} has its inspector switched off: set ADMIN_TOKEN for that gateway`,
  );
  const stranger = await serverOf((_, response) => response.writeHead(404).end('<h1>Not Found</h1>'));
  expect(await said(stranger.url)).toBe(
    `${stranger.url} has no inspector: is it the second listener of a gateway?`,
  );
});

it('names the address that it can not reach, or that lets it down', async () => {
  const { url } = await serverOf((_, response) => response.end());
  expect(await said(`${url}/?secret=hunter2`)).toBe(`${url} ended the stream`);
  const busy = await serverOf((_, response) => response.writeHead(503).end());
  expect(await said(busy.url)).toBe(`${busy.url}: HTTP 503`);
  const gone = await serverOf(() => {});
  await new Promise((resolve) => gone.server.close(resolve));
  expect(await said(gone.url)).toBe(`${gone.url} can not be reached (ECONNREFUSED)`);
});

it('leaves nothing behind of each try in a long outage', async () => {
  const clock = createManualClock();
  const ending = new AbortController();
  const warnings: Error[] = [];
  const note = (warning: Error): void => void warnings.push(warning);
  process.on('warning', note);
  const delaysMs: number[] = [];
  const reading = readStream({
    url: 'http://127.0.0.1:1',
    token: 'any',
    filter: {},
    clock,
    signal: ending.signal,
    onFrame: () => {},
    onLost: (_, delayMs) => void delaysMs.push(delayMs),
  });
  for (let tries = 1; tries <= 15; tries++) {
    await eventually(() => expect(delaysMs).toHaveLength(tries));
    await clock.advance(delaysMs.at(-1)!);
  }
  ending.abort();
  await reading;
  await new Promise((resolve) => setImmediate(resolve));
  process.off('warning', note);
  expect(warnings).toEqual([]);
});
