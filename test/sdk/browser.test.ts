/**
 * The kit in a browser: what its bundle holds and weighs, and a real headless Chromium against a real gateway.
 * libsignal's library runs on Node alone, so that the page's keys are made here, and what it received is decrypted
 * here; everything else is the kit's own code in the page.
 */
import { randomUUID } from 'node:crypto';
import { createServer, type Server } from 'node:http';
import { isBuiltin } from 'node:module';
import { fileURLToPath } from 'node:url';
import { gzipSync } from 'node:zlib';
import type { Browser } from 'playwright-core';
import { type OutputChunk, rolldown } from 'rolldown';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { launchChromium } from '../support/chromium.ts';
import { redisUrl } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { startGateway, type TestGateway } from '../support/gateway.ts';
import type * as Page from './browser-page.ts';
import { closePhones, enrolPhone } from './phone.ts';

const BUNDLE_GZIPPED_BYTES_MAX = 20 * 1024;
const SDK = fileURLToPath(new URL('../../src/sdk/index.ts', import.meta.url));
const HTML = `<!doctype html><title>chat</title>
<script type="module">import { run } from './page.js'; globalThis.run = run;</script>`;
const PAGE = fileURLToPath(new URL('./browser-page.ts', import.meta.url));

/** One minified module of everything that `entry` needs, as a page would load it. */
async function bundle(entry: string, external: string[] = []): Promise<OutputChunk> {
  const warnings: unknown[] = [];
  const built = await rolldown({
    input: entry,
    external,
    platform: 'browser',
    // A module that can't be resolved for a browser, a Node one say, is a warning: here it is a fault.
    onwarn: (warning) => warnings.push(warning),
  });
  const { output } = await built.generate({ format: 'esm', minify: true, codeSplitting: false });
  await built.close();
  expect(warnings).toEqual([]);
  expect(output).toHaveLength(1);
  return output[0];
}

describe('the bundle', () => {
  it('holds no Node module, and nothing of the gateway but the contract', async () => {
    const { moduleIds, imports, code } = await bundle(SDK);
    expect(imports).toEqual([]);
    expect(moduleIds.filter((id) => isBuiltin(id))).toEqual([]);
    expect(code).not.toMatch(/\bnode:[a-z]+|require\(/);
    const rooms = moduleIds.flatMap((id) => /\/src\/(\w+)\//.exec(id)?.[1] ?? []);
    expect([...new Set(rooms)].sort()).toEqual(['protocol', 'sdk']);
  });

  it('weighs at most 20 KB beyond socket.io-client and zod', async () => {
    const { code, imports } = await bundle(SDK, ['socket.io-client', 'zod']);
    const bytes = gzipSync(code).length;
    console.info(
      `keygate/sdk: ${code.length} bytes minified, ${bytes} gzipped, beside ${imports.join(', ')}`,
    );
    expect(bytes).toBeLessThanOrEqual(BUNDLE_GZIPPED_BYTES_MAX);
    // The checks of the wire are the gateway's: not even zod is needed.
    expect(imports).toEqual(['socket.io-client']);
  });
});

describe('in Chromium', () => {
  let site: Server;
  let origin: string;
  let gateway: TestGateway;
  let browser: Browser;

  beforeAll(async () => {
    const { code } = await bundle(PAGE);
    site = createServer((request, response) => {
      const isScript = request.url === '/page.js';
      response.setHeader('content-type', isScript ? 'text/javascript' : 'text/html');
      response.end(isScript ? code : HTML);
    });
    await new Promise<void>((resolve) => site.listen(0, '127.0.0.1', resolve));
    const address = site.address();
    origin = `http://127.0.0.1:${typeof address === 'object' ? address?.port : ''}`;
    gateway = await startGateway({ redisUrl: redisUrl(), env: { ALLOWED_ORIGINS: origin } });
    browser = await launchChromium();
  });
  afterAll(async () => {
    await browser?.close();
    closePhones();
    await gateway?.stop();
    await new Promise((resolve) => site.close(resolve));
  });

  it('connects, validates, and receives what waited', async () => {
    const bob = { userId: `bob-${randomUUID()}`, deviceId: 1 };
    const phone = await enrolPhone(gateway.url, bob);
    const { keys } = phone;
    const material: Page.KeyMaterial = {
      identity: (await keys.identity())!,
      signedPreKey: (await keys.signedPreKey.read())!,
      pqLastResortPreKey: (await keys.pqLastResortPreKey.read())!,
      oneTimePreKeyIds: await keys.oneTimePreKeys.ids(),
      pqOneTimePreKeyIds: await keys.pqOneTimePreKeys.ids(),
    };
    phone.close();
    const friend = await enrolPhone(gateway.url, { userId: `alice-${randomUUID()}`, deviceId: 1 });
    const texts = ['hello, browser', 'can you read this?', '…'];
    for (const text of texts) await friend.say(bob.userId, text);

    const page = await browser.newPage();
    const faults: string[] = [];
    page.on('pageerror', (error) => faults.push(error.message));
    await page.goto(origin);
    await page.waitForFunction(() => 'run' in globalThis);
    const result = await page.evaluate((options) => (globalThis as unknown as typeof Page).run(options), {
      url: gateway.url,
      token: await gateway.token(bob),
      material,
      messageCount: texts.length,
    });
    expect(faults).toEqual([]);
    expect(result.verdict).toEqual({ needsSetup: false, missingKeys: [], reason: null, offline: false });
    expect(result.states.filter((state) => state !== 'connecting')).toEqual([
      'checkingKeys',
      'syncingKeys',
      'ready',
      'closed',
    ]);
    for (const envelope of result.envelopes) await keys.receive(envelope);
    expect(phone.shown.map((line) => line.split(': ')[1])).toEqual(texts);

    // The page acknowledged them: nothing waits any more.
    await phone.restart();
    await phone.client.start();
    await eventually(() => expect(phone.client.snapshot().drainProgress).toBeNull());
    expect(phone.shown).toHaveLength(texts.length);
  });

  it('is refused where the page’s origin is not allowed', async () => {
    const page = await browser.newPage();
    await page.goto(origin.replace('127.0.0.1', 'localhost'));
    const answer = await page.evaluate(
      async (url) => {
        const socket = new WebSocket(url);
        return await new Promise<string>((resolve) => {
          socket.onopen = () => resolve('open');
          socket.onclose = () => resolve('closed before it was open');
        });
      },
      `${gateway.url.replace('http', 'ws')}/socket.io/?EIO=4&transport=websocket`,
    );
    expect(answer).toBe('closed before it was open');
  });
});
