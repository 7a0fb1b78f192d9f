/** `keygate load-test`: from options and tokens to a test, a progress line and the reports. */
import { randomBytes } from 'node:crypto';
import { existsSync } from 'node:fs';
import { mkdir, open, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { isLoopback } from './config/values.ts';
import type { Config } from './config.ts';
import { embeddedSecret, embeddedSecretFile } from './embedded-secret.ts';
import { steadyClock, systemClock } from './lib/clock.ts';
import { unreachable } from './lib/unreachable.ts';
import { type LoadPlan, type PartPlan, SCENARIOS } from './load-test/load-plan.ts';
import type { Credential, LoadTest, Progress } from './load-test/load-test.ts';
import { packageVersion } from './package-version.ts';
import { partFromOptions, partsFromMix } from './read-load-plan.ts';
import { SECRET_BYTES_MIN, signToken } from './requests/authenticate.ts';
import { UsageError } from './usage-error.ts';

export const LOAD_TEST_OPTIONS = {
  url: { type: 'string' },
  scenario: { type: 'string' },
  mix: { type: 'string' },
  devices: { type: 'string' },
  rate: { type: 'string' },
  duration: { type: 'string' },
  'content-bytes': { type: 'string' },
  backlog: { type: 'string' },
  pq: { type: 'boolean' },
  'secret-file': { type: 'string' },
  tokens: { type: 'string' },
  out: { type: 'string' },
  'yes-i-own-this-server': { type: 'boolean' },
} as const;

/** As they were parsed. */
type Options = {
  [Name in keyof typeof LOAD_TEST_OPTIONS]?: (typeof LOAD_TEST_OPTIONS)[Name]['type'] extends 'boolean'
    ? boolean
    : string;
};

const OUT_DEFAULT = 'load-test-report';

const scenarioList = Object.entries(SCENARIOS).map(([name, { summary, deviceCount, ratePerSecond }]) => {
  const rate = ratePerSecond === null ? 'all at once' : `${ratePerSecond}/s`;
  return `  ${name.padEnd(13)} ${summary}\n${' '.repeat(16)}(${deviceCount} devices, ${rate})`;
});

export const LOAD_TEST_HELP = `Usage: keygate load-test [options]

Puts a running gateway under load, in an open loop: operations leave when they are due, whatever the gateway
makes of earlier ones, and latency counts from when they were due. With no options, 100 devices chat for 30 s
with the gateway that "keygate serve" runs in the same folder and environment.

  --scenario <name>      chat where nothing is said:
${scenarioList.map((line) => `    ${line.replaceAll('\n', '\n    ')}`).join('\n')}
  --mix <file>           several scenarios at once, from a JSON file:
                           { "parts": [ { "scenario": "chat", "devices": 500, "rate": 200 },
                                        { "scenario": "storm", "delay": "5s" } ] }
                         a part may have: scenario, name, devices, rate, duration, delay, contentBytes, backlog, pq
  --devices <count>      devices, each of a user of its own
  --rate <number>        operations that are due in a second
  --duration <time>      how long operations are due: 500ms, 30s, 5m, 1h (default 30s)
  --content-bytes <n>    bytes of one ciphertext (default 256; slow-readers 1024)
  --backlog <count>      messages that wait for each device of backlog (default 100)
  --pq                   devices have post-quantum prekeys too (ML-KEM-1024), as Signal's clients do:
                         a last-resort one, and in claims one-time ones

  --url <address>        the gateway (default: this machine, PORT)
  --secret-file <file>   the secret that signs the tokens (default: JWT_SECRET, or the secret file in DATA_DIR)
  --tokens <file>        tokens instead, one a line. The key sets of their devices are REPLACED.
  --yes-i-own-this-server
                         lets --url name another machine

  --out <folder>         where report.html and report.json are written (default ${OUT_DEFAULT})

Ctrl-C ends the test early and reports what was measured. The exit code is 0 where nothing was lost, doubled or
out of order and something succeeded, or nothing was due yet. The users of a test are new ones, called load-…;
their keys stay behind, so use a gateway whose data you can throw away. The gateway's limits are in force:
RATE_LIMITED is counted, and so are bundles without a one-time prekey.`;

export interface LoadTestSurroundings {
  config: Config;
  /** Raised when the user wants it to end. */
  interrupted: AbortSignal;
  /** All that can be wrong with the options is known to be right. */
  onBegin(): void;
  print(text: string): void;
  /** Where the test is watched while it runs. */
  progress: ProgressOutput;
}

export interface ProgressOutput {
  /** A terminal's line is written over. */
  isTTY?: boolean;
  columns?: number;
  write(text: string): unknown;
}

/** @throws UsageError, ConfigError; Error whose message says why the test could not begin or what it found broken */
export async function runLoadTest(
  values: Record<string, unknown>,
  { config, interrupted, onBegin, print, progress }: LoadTestSurroundings,
): Promise<void> {
  const options = values as Options;
  const url = gatewayUrl(options.url, config, options['yes-i-own-this-server'] === true);
  const parts = await planParts(options);
  const plan: LoadPlan = { url, parts };
  const credentials = await makeCredentials(options, plan, config);
  const report = await reportFiles(options.out ?? OUT_DEFAULT);
  onBegin();

  // Loaded only here: the other commands answer without waiting for it.
  const { startLoadTest } = await import('./load-test/load-test.ts');
  const { htmlReport } = await import('./load-test/html-report.ts');
  const { textReport } = await import('./load-test/text-report.ts');
  const { progressLine } = await import('./load-test/progress.ts');
  const test = startLoadTest({
    plan,
    credentials,
    clock: steadyClock,
    random: Math.random,
    interrupted,
    keygateVersion: packageVersion(),
  });
  const endProgress = showProgress(test, progressLine, progress);
  const result = await test.result.finally(endProgress);

  // First of all, since a disk may be full by now.
  print(textReport(result));
  await writeFile(report.json, `${JSON.stringify(result, null, 1)}\n`);
  await writeFile(report.html, htmlReport(result));
  print(`report: ${report.html} and ${report.json}`);
  if (result.faults.length > 0) throw new Error(`the load test failed: ${result.faults.join('; ')}`);
}

/** Where the report goes. A day's test is not to find out at its end that it can't be written. @throws UsageError */
async function reportFiles(folder: string): Promise<{ json: string; html: string }> {
  const report = { json: join(folder, 'report.json'), html: join(folder, 'report.html') };
  try {
    await mkdir(folder, { recursive: true });
    for (const file of Object.values(report)) await (await open(file, 'a')).close();
  } catch (error) {
    throw new UsageError(`--out: ${error instanceof Error ? error.message : error}`);
  }
  return report;
}

function gatewayUrl(given: string | undefined, config: Config, isOwned: boolean): string {
  if (given === undefined) {
    if (config.listen.port === 0) throw new UsageError('--url is missing, and PORT does not tell it');
    return `http://127.0.0.1:${config.listen.port}`;
  }
  const url = URL.canParse(given) ? new URL(given) : null;
  if (url === null || !/^https?:$/.test(url.protocol)) {
    throw new UsageError('--url must be an address that begins with http:// or https://');
  }
  if (url.href !== `${url.origin}/`) throw new UsageError(`--url must be an address alone, as ${url.origin}`);
  if (!isLoopback(url.hostname) && !isOwned) {
    throw new UsageError(
      `${url.hostname} is not this machine; where it is yours to put under load, say --yes-i-own-this-server`,
    );
  }
  return url.origin;
}

async function planParts(options: Options): Promise<PartPlan[]> {
  const { mix } = options;
  if (mix === undefined) return [partFromOptions(options)];
  for (const name of ['scenario', 'devices', 'rate', 'content-bytes', 'backlog', 'pq'] as const) {
    if (options[name] !== undefined)
      throw new UsageError(`--${name} does not go with --mix, whose file tells it`);
  }
  return partsFromMix({ name: mix, text: await readText('--mix', mix), duration: options.duration });
}

/** Beyond the test's own time: preparing and ending. */
const TOKEN_TIME_LEFT_MS = 3_600_000;

async function makeCredentials(options: Options, { parts }: LoadPlan, config: Config): Promise<Credential[]> {
  const deviceCount = parts.reduce((sum, part) => sum + part.deviceCount, 0);
  if (options.tokens !== undefined) {
    if (options['secret-file'] !== undefined) throw new UsageError('--tokens and --secret-file are two ways');
    const { readTokens } = await import('./load-test/token-file.ts');
    const credentials = readTokensOf(options.tokens, await readText('--tokens', options.tokens), readTokens);
    if (credentials.length < deviceCount) {
      throw new UsageError(
        `${options.tokens} holds ${credentials.length} tokens, and the test is to have ${deviceCount} devices; see --devices`,
      );
    }
    return credentials;
  }
  const secret = await signingSecret(options['secret-file'], config);
  const ttlMs =
    Math.max(...parts.map(({ delayMs, durationMs }) => delayMs + durationMs)) + TOKEN_TIME_LEFT_MS;
  // New users for each run: what an earlier one left behind is not in the way.
  const run = randomBytes(4).toString('hex');
  return await Promise.all(
    Array.from({ length: deviceCount }, async (_, index) => {
      const address = { userId: `load-${run}-${index + 1}`, deviceId: 1 };
      const { issuer, audience } = config.tokens;
      const token = await signToken({ secret, device: address, ttlMs, issuer, audience, clock: systemClock });
      return { address, token };
    }),
  );
}

function readTokensOf(name: string, text: string, read: (text: string) => Credential[]): Credential[] {
  try {
    return read(text);
  } catch (error) {
    throw new Error(`${name}: ${error instanceof Error ? error.message : error}`);
  }
}

async function signingSecret(file: string | undefined, config: Config): Promise<Uint8Array> {
  if (file !== undefined) {
    const secret = new TextEncoder().encode((await readText('--secret-file', file)).trim());
    if (secret.byteLength < SECRET_BYTES_MIN) {
      throw new Error(`${file} holds no secret of ${SECRET_BYTES_MIN} bytes`);
    }
    return secret;
  }
  const { keys } = config.tokens;
  switch (keys.kind) {
    case 'secret':
      return keys.secret;
    case 'secretFile':
      // Not made here: a secret that no gateway has is of no use.
      if (!existsSync(embeddedSecretFile(keys.dataDir))) {
        throw new Error(
          `there is no ${embeddedSecretFile(keys.dataDir)}: start the gateway in this folder first, or see --secret-file and --tokens`,
        );
      }
      return embeddedSecret(keys.dataDir);
    case 'publicKey':
    case 'jwks':
      throw new Error('can not sign: the gateway verifies by a public key; bring tokens by --tokens');
    default:
      return unreachable(keys);
  }
}

async function readText(option: string, file: string): Promise<string> {
  try {
    return await readFile(file, 'utf8');
  } catch (error) {
    throw new UsageError(`${option} ${file}: ${(error as NodeJS.ErrnoException).code ?? 'can not be read'}`);
  }
}

const LOOK_PERIOD_MS = 250;
/** Where lines can't be written over. */
const LINE_PERIOD_MS = 5_000;
/** Rates over less time jump. */
const RATE_WINDOW_MS = 2_000;

/** On a terminal one line that is written over, else a line now and then. @returns ends it */
function showProgress(
  test: LoadTest,
  lineOf: (before: Progress | null, now: Progress) => string,
  output: ProgressOutput,
): () => void {
  const history: Progress[] = [];
  let toldPhase = '';
  let toldAtMs = 0;

  const look = (): void => {
    const now = test.progress();
    history.push(now);
    while (history.length > 2 && now.elapsedMs - history[1]!.elapsedMs > RATE_WINDOW_MS) history.shift();
    const line = lineOf(history.length > 1 ? history[0]! : null, now);
    const nowMs = steadyClock.nowMs();
    if (output.isTTY) {
      output.write(`\r\x1b[2K${line.slice(0, (output.columns ?? 80) - 1)}`);
    } else if (now.phase !== toldPhase || nowMs - toldAtMs >= LINE_PERIOD_MS) {
      toldPhase = now.phase;
      toldAtMs = nowMs;
      output.write(`${line}\n`);
    }
  };
  look();
  // It also keeps the process alive while nothing but timers of the test is waited for.
  const timer = setInterval(look, LOOK_PERIOD_MS);
  return () => {
    clearInterval(timer);
    if (output.isTTY) output.write('\r\x1b[2K');
  };
}
