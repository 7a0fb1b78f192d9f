/** `keygate load-test` as it is typed. */
import { spawn } from 'node:child_process';
import { rmSync } from 'node:fs';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { ConfigError, parseConfig } from '../src/config.ts';
import type { LoadResult } from '../src/load-test/result.ts';
import { runLoadTest } from '../src/load-test-command.ts';
import { UsageError } from '../src/usage-error.ts';
import { startGateway, TEST_SECRET, type TestGateway, tokenFor } from './support/gateway.ts';
import { KEYGATE } from './support/program.ts';

let gateway: TestGateway;
beforeAll(async () => {
  gateway = await startGateway();
});
afterAll(() => gateway?.stop());

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'keygate-load-test-'));
});
afterEach(() => rm(folder, { recursive: true, force: true }));

let shown: string[] = [];

/** In this process: what it prints, where it does not end with an error. */
async function loadTest(
  values: Record<string, string | boolean>,
  env: NodeJS.ProcessEnv = { JWT_SECRET: TEST_SECRET },
): Promise<string> {
  const printed: string[] = [];
  shown = [];
  await runLoadTest(
    { out: join(folder, 'report'), ...values },
    {
      config: parseConfig({ DATA_DIR: folder, ...env }),
      interrupted: new AbortController().signal,
      onBegin() {},
      print: (text) => printed.push(text),
      progress: { isTTY: true, columns: 40, write: (text) => shown.push(text) },
    },
  );
  return printed.join('\n');
}

async function fileWith(text: string): Promise<string> {
  const file = join(folder, 'file');
  await writeFile(file, text);
  return file;
}

async function report(): Promise<{ html: string; json: Pick<LoadResult, 'parts'> }> {
  return {
    html: await readFile(join(folder, 'report', 'report.html'), 'utf8'),
    json: JSON.parse(await readFile(join(folder, 'report', 'report.json'), 'utf8')),
  };
}

const BRIEF = { devices: '4', rate: '40', duration: '500ms' };

describe('keygate load-test', () => {
  it('prints what it measured, and then writes it', async () => {
    const out = join(folder, 'report');
    const printed: string[] = [];
    const running = runLoadTest(
      { out, url: gateway.url, ...BRIEF, pq: true },
      {
        config: parseConfig({ DATA_DIR: folder, JWT_SECRET: TEST_SECRET }),
        interrupted: new AbortController().signal,
        // The files were there and could be written to; now that is over.
        onBegin() {
          rmSync(out, { recursive: true });
        },
        print: (text) => printed.push(text),
        progress: { write() {} },
      },
    );
    await expect(running).rejects.toThrow(/ENOENT.*report\.json/);
    expect(printed.join()).toContain('chat, 4 devices, 40/s, 0.5 s, with PQ prekeys\n  offered 20');
  });

  it('finds the gateway by PORT, signs with JWT_SECRET, and on Ctrl-C reports what it has measured', async () => {
    const child = spawn(
      process.execPath,
      [KEYGATE, 'load-test', '--devices', '5', '--duration', '1h', '--out', join(folder, 'report')],
      {
        env: {
          PATH: process.env.PATH,
          HOME: process.env.HOME,
          DATA_DIR: folder,
          PORT: new URL(gateway.url).port,
          JWT_SECRET: TEST_SECRET,
        },
        stdio: ['ignore', 'pipe', 'pipe'],
      },
    );
    let stdout = '';
    child.stdout.setEncoding('utf8').on('data', (chunk: string) => {
      stdout += chunk;
    });
    let stderr = '';
    let isInterrupted = false;
    child.stderr.setEncoding('utf8').on('data', (chunk: string) => {
      stderr += chunk;
      // Once, since a second one ends it at once; and not before there is something to report.
      if (isInterrupted || !/achieved [1-9]/.test(stderr)) return;
      isInterrupted = true;
      child.kill('SIGINT');
    });
    const code = await new Promise((resolve) => child.on('close', resolve));
    expect(stderr).toMatch(/^preparing: 0 of 5 devices\n/);
    expect(stdout).toContain(`Load test of http://127.0.0.1:${new URL(gateway.url).port}, interrupted`);
    expect(stdout).toContain('lost 0   doubled 0   out of order 0');
    expect(code).toBe(0);
    const { html, json } = await report();
    expect(html).toContain('<b>interrupted</b>');
    expect(json.parts[0]!.completed).toBeGreaterThan(0);
    expect(html + stdout + stderr + JSON.stringify(json)).not.toContain(TEST_SECRET);
  });

  it('runs a mix of scenarios by a file', async () => {
    const mix = await fileWith(
      JSON.stringify({
        parts: [
          { scenario: 'chat', devices: 3, rate: 20 },
          { scenario: 'connect', devices: 2, rate: 10, delay: '100ms' },
        ],
      }),
    );
    const printed = await loadTest({ url: gateway.url, mix, duration: '500ms' });
    expect(printed).toContain('\nchat  chat, 3 devices, 20/s, 0.5 s\n');
    expect(printed).toContain('\nconnect  connect, 2 devices, 10/s, 0.5 s\n');
    const [chat, connect] = (await report()).json.parts;
    expect(chat!.completed).toBe(10);
    // A device that is still connecting when its turn comes again sits it out.
    expect(connect!.completed + connect!.withheld).toBe(5);
    // On a terminal one line, written over and cut to fit.
    const clearLine = '\r\x1b[2K';
    expect(shown[0]).toBe(`${clearLine}preparing: 0 of 5 devices`);
    expect(shown.at(-1)).toBe(clearLine);
    for (const text of shown) {
      expect(text.startsWith(clearLine)).toBe(true);
      expect(text.length).toBeLessThan(clearLine.length + 40);
      expect(text).not.toContain('\n');
    }
  });

  it('takes the secret from a file, or tokens that somebody else made, again and again', async () => {
    const secret = await fileWith(`${TEST_SECRET}\n`);
    await loadTest({ url: gateway.url, ...BRIEF, 'secret-file': secret }, {});
    expect((await report()).json.parts[0]!.completed).toBe(20);

    const devices = ['carol', 'dave', 'erin'].map((userId) => ({ userId, deviceId: 2 }));
    const tokens = await fileWith((await Promise.all(devices.map((one) => tokenFor(one)))).join('\n'));
    for (let run = 0; run < 2; run++) {
      await loadTest({ url: gateway.url, ...BRIEF, devices: '3', tokens }, {});
      expect((await report()).json.parts[0]!.completed).toBe(20);
    }
    await expect(loadTest({ url: gateway.url, ...BRIEF, tokens }, {})).rejects.toThrow(
      /holds 3 tokens, and the test is to have 4 devices/,
    );
  });

  it.each([
    [{ url: 'https://chat.example.org' }, /is not this machine; .*--yes-i-own-this-server/],
    [{ url: 'ftp://localhost' }, /--url must be an address/],
    [{ url: 'nowhere' }, /--url must be an address/],
    [{ url: 'http://localhost:3000/chat' }, /--url must be an address alone, as http:\/\/localhost:3000/],
    [{ out: '/dev/null' }, /--out: .*\/dev\/null/],
    [{ out: '' }, /--out/],
    [{ rate: 'fast' }, /--rate/],
    [{ mix: 'nowhere.json' }, /--mix nowhere\.json: ENOENT/],
    [{ mix: 'mix.json', rate: '5' }, /--rate does not go with --mix/],
    [{ mix: 'mix.json', pq: true }, /--pq does not go with --mix/],
    [{ tokens: 'nowhere' }, /--tokens nowhere: ENOENT/],
    [{ 'secret-file': 'nowhere' }, /--secret-file nowhere: ENOENT/],
  ])('given %o, tells how it is used', async (values, message) => {
    await expect(loadTest(values)).rejects.toThrow(UsageError);
    await expect(loadTest(values)).rejects.toThrow(message);
  });

  it('says what is wrong with a mix file, a token file and a secret', async () => {
    const mix = await fileWith('{ "parts": [ { "scenario": "chat", "devices": 0, "rate": -1 } ] }');
    const failure = await loadTest({ mix }).catch((error: unknown) => error);
    expect(failure).toBeInstanceOf(ConfigError);
    expect((failure as ConfigError).problems).toHaveLength(2);
    const tokens = await fileWith('\nnot.a.token\n');
    await expect(loadTest({ tokens })).rejects.toThrow(/file: line 2 holds no token with sub and device_id$/);
    const token = await tokenFor({ userId: 'carol', deviceId: 1 });
    await expect(loadTest({ tokens: await fileWith(`${token}\n${token}`) })).rejects.toThrow(
      /line 2 holds a second token/,
    );
    await expect(loadTest({ 'secret-file': await fileWith('short') })).rejects.toThrow(
      /holds no secret of 32 bytes/,
    );
  });

  it('makes no secret of its own where no gateway has one', async () => {
    await expect(loadTest({}, {})).rejects.toThrow(/there is no .*token-secret: start the gateway/);
    await expect(loadTest({}, { JWT_JWKS_URL: 'https://idp.example.org/jwks' })).rejects.toThrow(
      /can not sign/,
    );
  });
});
