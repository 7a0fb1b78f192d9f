/**
 * How the inspector bears a flood: 20,000 events a second into one viewer, with its page open in Chromium and its table
 * scrolled all the while. Not in the suite: `npm run build && tsx test/admin/web/flood.ts [seconds]`.
 */
import { randomBytes, randomUUID } from 'node:crypto';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import type { Page } from 'playwright-core';
import { createInspector } from '../../../src/admin/inspector.ts';
import { createInProcessRelay } from '../../../src/backends/in-process/relay.ts';
import { systemClock } from '../../../src/lib/clock.ts';
import { silentLog } from '../../../src/lib/log.ts';
import { createObserver } from '../../../src/requests/observe.ts';
import { launchChromium } from '../../support/chromium.ts';

const EVENTS_PER_SECOND = 20_000;
const TICK_MS = 10;
const SECONDS = Number(process.argv[2] ?? 10);
const TOKEN = 'the-admin-token-of-the-flood';

const observer = createObserver(silentLog, { logsDebug: false });
const secret = randomBytes(32);
const inspector = await createInspector({
  observer,
  relay: createInProcessRelay('flooded'),
  keys: { read: async () => null, sharedSecret: async () => secret },
  store: {
    claimsOf: async () => [],
    waitingOf: async () => ({ count: 0, first: [] }),
    trace: async () => [],
    waitingCounts: async () => new Map(),
    lowDevices: async () => [],
  },
  token: TOKEN,
  writable: false,
  version: '0',
  lowThreshold: 10,
  clock: systemClock,
  log: silentLog,
});
const server = createServer((request, response) => inspector.handle(request, response));
await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;

const browser = await launchChromium(['--enable-precise-memory-info']);
const page = await browser.newPage({ locale: 'en-GB', viewport: { width: 1600, height: 1000 } });
await page.goto(`${url}/#/events`);
await page.getByLabel('Admin token').fill(TOKEN);
await page.keyboard.press('Enter');
await page.getByText('Nothing has happened yet.').waitFor();
const heapBefore = await heapBytes(page);
await page.evaluate(`
  globalThis.frames = [];
  let last = performance.now();
  const onFrame = (now) => { frames.push(now - last); last = now; requestAnimationFrame(onFrame); };
  requestAnimationFrame(onFrame);
`);

const flood = startFlood();
await page.mouse.move(600, 500);
const endAt = performance.now() + SECONDS * 1000;
for (let turn = 0; performance.now() < endAt; turn++) {
  // Up, to read, and down again to the newest: both ways of standing in the list.
  await page.mouse.wheel(0, turn % 20 < 10 ? -400 : 900);
  await new Promise((resolve) => setTimeout(resolve, 50));
}
const fed = flood.stop();
// What came last is drawn with the frame after the next.
await page.evaluate('new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))');
const taken = await page.evaluate<number[]>('globalThis.frames');
const frames = taken.toSorted((one, other) => one - other);
const quantile = (part: number): string =>
  frames[Math.min(frames.length - 1, Math.floor(frames.length * part))]!.toFixed(1);
const heapAfter = await heapBytes(page);

console.info(
  `fed         ${fed.count} events in ${fed.seconds.toFixed(1)} s: ${Math.round(fed.count / fed.seconds)} a second`,
);
console.info(`status line ${(await page.locator('.status').textContent())!.split('/')[0]}`);
console.info(
  `frames      ${frames.length} in ${SECONDS} s; p50 ${quantile(0.5)}, p95 ${quantile(0.95)}, p99 ${quantile(0.99)}, longest ${quantile(1)} ms; ${frames.filter((ms) => ms > 100).length} over 100 ms, the longest was the ${taken.indexOf(frames.at(-1)!)}th`,
);
console.info(`page's heap ${mebibytes(heapBefore)} before, ${mebibytes(heapAfter)} after a collection`);
console.info(
  `server      ${mebibytes(process.memoryUsage().heapUsed)} heap, ${mebibytes(process.memoryUsage().rss)} resident`,
);

await browser.close();
await inspector.close();
server.closeAllConnections();
server.close();

async function heapBytes(of: Page): Promise<number> {
  const session = await of.context().newCDPSession(of);
  await session.send('HeapProfiler.collectGarbage');
  const bytes = await of.evaluate<number>('performance.memory.usedJSHeapSize');
  await session.detach();
  return bytes;
}

function mebibytes(bytes: number): string {
  return `${(bytes / 1024 / 1024).toFixed(1)} MiB`;
}

/** Requests as a busy node reports them, evenly in time; what a tick came too late for is made good. */
function startFlood(): { stop(): { count: number; seconds: number } } {
  const content = randomBytes(600).toString('base64');
  const startedMs = performance.now();
  let count = 0;
  const timer = setInterval(() => {
    const due = ((performance.now() - startedMs) / 1000) * EVENTS_PER_SECOND;
    for (; count < due; count++) {
      observer.requestEnded({
        door: 'socket',
        device: { userId: `user-${count % 5000}`, deviceId: 1 },
        name: 'sendMessages',
        code: null,
        durationMs: count % 40,
        fence: count % 5000,
        bytes: 1_100,
        input: {
          messageId: randomUUID(),
          userId: `user-${(count * 7) % 5000}`,
          envelopes: [{ deviceId: 1, registrationId: 4711, type: 2, content }],
        },
        reply: { ok: true, data: { storedAt: new Date().toISOString(), accepted: [1], rejected: [] } },
      });
    }
  }, TICK_MS);
  return {
    stop() {
      clearInterval(timer);
      return { count, seconds: (performance.now() - startedMs) / 1000 };
    },
  };
}
