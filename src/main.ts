#!/usr/bin/env node
/** The command line. Answers go to stdout, faults and the log to stderr; 0 is success, 1 failure, 2 wrong usage. */
import { basename, relative } from 'node:path';
import { parseArgs } from 'node:util';
import { setFlagsFromString } from 'node:v8';
import {
  answer,
  BadNewsError,
  type Command,
  DEVICE_OPTIONS,
  deviceOf,
  faultOf,
  JSON_OPTION,
  type Options,
  print,
  type Values,
} from './command.ts';
import { type Config, ConfigError, parseConfig, parseStoreConfig } from './config.ts';
import { embeddedSecret, embeddedSecretFile } from './embedded-secret.ts';
import { stayAwake, systemClock } from './lib/clock.ts';
import { unreachable } from './lib/unreachable.ts';
import { LOAD_TEST_HELP, LOAD_TEST_OPTIONS, runLoadTest } from './load-test-command.ts';
import { createLogger } from './logger.ts';
import { operatorCommands } from './operate.ts';
import { packageVersion } from './package-version.ts';
import { signToken } from './requests/authenticate.ts';
import { runTail, TAIL_HELP, TAIL_OPTIONS } from './tail-command.ts';
import { endOnUncaught } from './uncaught.ts';
import { UsageError } from './usage-error.ts';

const commands: Record<string, Command> = {
  serve: {
    summary: 'run the gateway until SIGTERM or SIGINT',
    help: 'Usage: keygate serve\n\nRuns the gateway. It is configured by environment variables; see the README.\nSIGTERM, SIGINT or SIGHUP drains and ends it; a second one ends it at once.',
    options: {},
    run: serve,
  },
  token: {
    summary: 'print a token for a device',
    help: 'Usage: keygate token --user <user id> --device <1-127> [--ttl <time>]\n\n  --user    the user id, as in alice\n  --device  the device id, a number from 1 to 127\n  --ttl     how long the token is good: 90s, 15m, 1h, 7d (default 1h)\n\nSigns with JWT_SECRET or, where no key is configured, with the secret file in DATA_DIR.',
    options: { ...DEVICE_OPTIONS, ttl: { type: 'string' } },
    run: printToken,
  },
  migrate: {
    summary: 'bring the database schema up to date',
    help: 'Usage: keygate migrate\n\nApplies the migrations of this version to the database. serve does so too when it starts.',
    options: {},
    run: migrate,
  },
  'check-config': {
    summary: 'check the environment and show what it means',
    help: 'Usage: keygate check-config [--json]\n\nPrints every problem of the configuration, one a line, or what the configuration amounts to.\nConnects to nothing.\n\n  --json  print either as JSON',
    options: JSON_OPTION,
    run: checkConfig,
  },
  tail: {
    summary: 'show what happens, as it happens',
    help: TAIL_HELP,
    options: TAIL_OPTIONS,
    run: tail,
  },
  'load-test': {
    summary: 'put a gateway under load, and report what it did',
    help: LOAD_TEST_HELP,
    options: LOAD_TEST_OPTIONS,
    run: loadTest,
  },
  ...operatorCommands,
};

const HELP: Options = { help: { type: 'boolean', short: 'h' } };

/** Meant for other clients; PostgreSQL's driver would let them win over what DATABASE_URL says, or stop at their values. */
const OF_OTHER_CLIENTS = ['PGTARGETSESSIONATTRS', 'PGSSLNEGOTIATION'];

async function main(args: readonly string[]): Promise<number> {
  for (const variable of OF_OTHER_CLIENTS) delete process.env[variable];
  const [name, ...rest] = args;
  const command = name !== undefined && Object.hasOwn(commands, name) ? commands[name] : undefined;
  try {
    if (command !== undefined) {
      const values = parsed(rest, { ...command.options, ...HELP });
      if (values.help === true) print(command.help);
      else {
        // serve has a log for it.
        if (name !== 'serve') endOnUncaught((error) => complain(faultOf(error)));
        await command.run(values, process.env);
      }
      return 0;
    }
    if (name !== undefined && !name.startsWith('-')) throw new UsageError(`unknown command ${shown(name)}`);
    const values = parsed(args, { ...HELP, version: { type: 'boolean', short: 'v' } });
    if (values.version === true) print(packageVersion());
    else if (values.help === true) print(overview());
    else throw new UsageError('no command given');
    return 0;
  } catch (error) {
    if (error instanceof BadNewsError) return 1;
    for (const line of error instanceof ConfigError ? error.problems : [faultOf(error)]) complain(line);
    if (!(error instanceof UsageError)) return 1;
    complain(`see ${commandLine()} ${command === undefined ? '' : `${name} `}--help`);
    return 2;
  }
}

async function serve(): Promise<void> {
  const config = parseConfig(process.env);
  const log = createLogger(config.logLevel);
  endOnUncaught((error) => log.error({ error }, 'uncaught exception'));
  for (const warning of config.warnings) log.warn({}, warning);
  // What is printed is told once, and nobody may be there to read it.
  process.stdout.on('error', () => {});
  if (process.env.DEBUG) {
    delete process.env.DEBUG;
    log.warn({}, 'DEBUG is not heeded: what libraries print with it holds tokens and passwords');
  }
  // Listened for before the start, so that a signal during it is not lost.
  const signal = nextSignal();
  // Loaded only here: the other commands answer without waiting for the whole gateway.
  const { createGateway } = await import('./compose.ts');
  keepYoungWhatIsShortLived();
  const gateway = await createGateway(config, { log });
  print(
    [
      `Keygate ${packageVersion()}`,
      `  gateway  ${gateway.url}`,
      `  health   ${gateway.adminUrl}/readyz`,
      ...(config.admin.token === null ? [] : [`  inspect  ${gateway.adminUrl}/`]),
      `  a token  ${tokenHint(config)}`,
    ].join('\n'),
  );
  log.info({ signal: await signal }, 'stopping');
  await gateway.stop();
}

/**
 * What a burst of results is made of lives through a collection or two, and V8 concludes from it that its like lives long:
 * it makes such objects where little is collected, and there they keep, dead, what they refer to. Under messages, 37 MB a
 * second came to lie there, where 11 do without.
 */
function keepYoungWhatIsShortLived(): void {
  setFlagsFromString('--no-allocation-site-pretenuring');
}

/** The first one; from then on, the next ends the process at once. */
function nextSignal(): Promise<NodeJS.Signals> {
  const signals = ['SIGTERM', 'SIGINT', 'SIGHUP'] as const;
  return new Promise((resolve) => {
    const endAtOnce = (signal: NodeJS.Signals): void => {
      process.off(signal, endAtOnce);
      process.kill(process.pid, signal);
      // Nothing ends the first process of a container by default.
      process.exit(1);
    };
    const heed = (signal: NodeJS.Signals): void => {
      for (const name of signals) process.off(name, heed).on(name, endAtOnce);
      resolve(signal);
    };
    for (const name of signals) process.on(name, heed);
  });
}

/** As another shell has to say it, whose environment knows nothing of this one's. */
function tokenHint(config: Config): string {
  const { keys } = config.tokens;
  const tokenCommand = `${commandLine()} token --user alice --device 1`;
  switch (keys.kind) {
    case 'secret':
      return `JWT_SECRET=… ${settings('JWT_ISSUER', 'JWT_AUDIENCE')}${tokenCommand}`;
    case 'secretFile':
      return `${settings('DATA_DIR', 'JWT_ISSUER', 'JWT_AUDIENCE')}${tokenCommand}`;
    case 'publicKey':
      return 'from whoever holds the private half of JWT_PUBLIC_KEY';
    case 'jwks':
      return 'from the issuer whose keys are at JWT_JWKS_URL';
    default:
      return unreachable(keys);
  }
}

/** Those variables that are set, as a shell takes them in front of a command. */
function settings(...names: string[]): string {
  return names
    .filter((name) => (process.env[name] ?? '') !== '')
    .map((name) => `${name}='${process.env[name]!.replaceAll("'", "'\\''")}' `)
    .join('');
}

async function printToken(values: Values): Promise<void> {
  const device = deviceOf(values);
  const ttlMs = timeOf(typeof values.ttl === 'string' ? values.ttl : '1h');
  const config = parseConfig(process.env);
  const token = await signToken({
    secret: await signingSecret(config),
    device,
    ttlMs,
    issuer: config.tokens.issuer,
    audience: config.tokens.audience,
    clock: systemClock,
  });
  print(token);
}

async function signingSecret(config: Config): Promise<Uint8Array> {
  const { keys } = config.tokens;
  switch (keys.kind) {
    case 'secret':
      return keys.secret;
    case 'secretFile':
      return embeddedSecret(keys.dataDir);
    case 'publicKey':
      throw new Error('can not sign: JWT_PUBLIC_KEY only verifies; the tokens come from its private half');
    case 'jwks':
      throw new Error('can not sign: JWT_JWKS_URL only verifies; the tokens come from its issuer');
    default:
      return unreachable(keys);
  }
}

async function tail(values: Values): Promise<void> {
  const ending = new AbortController();
  const end = (): void => ending.abort();
  void nextSignal().then(end);
  // Whoever reads, `head` say, may have seen enough.
  process.stdout.on('error', end);
  const isTerminal = process.stdout.isTTY === true;
  const awake = stayAwake();
  await runTail(values, parseConfig(process.env), {
    isTerminal,
    colours: isTerminal && !process.env.NO_COLOR,
    line: print,
    notice: complain,
    signal: ending.signal,
  }).finally(() => awake.cancel());
}

async function loadTest(values: Values): Promise<void> {
  const interrupted = new AbortController();
  await runLoadTest(values, {
    config: parseConfig(process.env),
    interrupted: interrupted.signal,
    // Listened for only when there is something to report.
    onBegin: () => void nextSignal().then(() => interrupted.abort()),
    print,
    progress: process.stderr,
  });
}

const UNIT_MS: Readonly<Record<string, number>> = { s: 1000, m: 60_000, h: 3_600_000, d: 86_400_000 };
const TTL_MAX_MS = 3650 * 86_400_000;

function timeOf(text: string): number {
  const [, count, unit] = /^(\d{1,9})([smhd])$/.exec(text) ?? [];
  const timeMs = Number(count) * (UNIT_MS[unit ?? ''] ?? Number.NaN);
  if (!(timeMs > 0 && timeMs <= TTL_MAX_MS)) {
    throw new UsageError('--ttl must be a time such as 90s, 15m, 1h or 7d, of at most ten years');
  }
  return timeMs;
}

async function migrate(): Promise<void> {
  const config = parseStoreConfig(process.env);
  const { migrateDatabase } = await import('./compose/store.ts');
  await migrateDatabase(config);
  print('the database schema is up to date');
}

async function checkConfig(values: Values): Promise<void> {
  const config = checkedConfig(values);
  const { store, redisUrl, listen, admin, origins, warnings } = config;
  const amounts = {
    store:
      store.kind === 'embedded' ? `a private PostgreSQL in ${store.dataDir}` : 'PostgreSQL at DATABASE_URL',
    bus: redisUrl === null ? 'in this process, one node' : 'Redis at REDIS_URL',
    tokens: verifiedBy(config),
    gateway: `${listen.host ?? 'every address'}, port ${listen.port}`,
    admin: `${admin.host}, port ${admin.port}`,
    origins:
      [...(origins.loopback ? ['pages of this machine'] : []), ...origins.listed].join(', ') ||
      'no browser page',
  };
  answer(values, { good: true, problems: [], ...amounts, warnings }, [
    'the configuration is good',
    ...Object.entries(amounts).map(([name, what]) => `  ${name.padEnd(7)}  ${what}`),
    ...warnings.map((warning) => `  warning  ${warning}`),
  ]);
}

/** @throws ConfigError, or BadNewsError where its problems were printed as JSON */
function checkedConfig(values: Values): Config {
  try {
    return parseConfig(process.env);
  } catch (error) {
    if (values.json !== true || !(error instanceof ConfigError)) throw error;
    print(JSON.stringify({ good: false, problems: error.problems }));
    throw new BadNewsError();
  }
}

function verifiedBy(config: Config): string {
  const { keys } = config.tokens;
  switch (keys.kind) {
    case 'secret':
      return 'HS256 by JWT_SECRET';
    case 'secretFile':
      return `HS256 by the secret in ${embeddedSecretFile(keys.dataDir)}`;
    case 'publicKey':
      return `${keys.algorithms.join(' or ')} by JWT_PUBLIC_KEY`;
    case 'jwks':
      return `${keys.algorithms.join(', ')} by the keys at JWT_JWKS_URL`;
    default:
      return unreachable(keys);
  }
}

function parsed(args: readonly string[], options: Options): Values {
  try {
    return parseArgs({ args: [...args], options, strict: true, allowPositionals: false }).values;
  } catch (error) {
    // The first sentence names the argument; the rest explains parseArgs.
    throw new UsageError(
      error instanceof Error ? (error.message.split(/[.\n]( |$)/)[0] ?? '') : String(error),
    );
  }
}

function overview(): string {
  const width = Math.max(...Object.keys(commands).map((name) => name.length));
  const list = Object.entries(commands).map(([name, { summary }]) => `  ${name.padEnd(width)}  ${summary}`);
  return [
    'Usage: keygate <command> [options]',
    '',
    ...list,
    '',
    '`keygate <command> --help` tells more; `keygate --version` tells the version.',
  ].join('\n');
}

/** How this very program was called, so that what it proposes works as it stands. */
function commandLine(): string {
  const script = process.argv[1] ?? 'keygate';
  if (basename(script) === 'keygate') return 'npx keygate';
  return `${script.endsWith('.ts') ? 'npx tsx' : 'node'} ${relative(process.cwd(), script)}`;
}

function shown(text: string): string {
  return JSON.stringify(text.slice(0, 60));
}

function complain(text: string): void {
  process.stderr.write(`keygate: ${text}\n`);
}

// The timers that bound a wait hold no process open: without this one, a command whose connection is gone, and whose fetch
// does not tell, would end before its bound and say nothing.
setInterval(() => {}, 60_000);
process.exit(await main(process.argv.slice(2)));
