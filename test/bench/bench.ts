/**
 * `npm run bench`: the gateway beside what the same machine can do without it. Contestants take turns in random order,
 * round after round, and every ratio is of one round, so that what disturbs the machine disturbs both sides.
 */
import { execFileSync } from 'node:child_process';
import { mkdirSync, writeFileSync } from 'node:fs';
import { cpus } from 'node:os';
import { basename, dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import {
  type Company,
  type Contestant,
  companyOf,
  type Kind,
  otherCompanyOf,
  type Run,
  type Scale,
} from './contest.ts';
import { bareCompany } from './contestants/bare.ts';
import { enrolmentsKind } from './contestants/enrolments.ts';
import {
  deepCompany,
  farBundlesKind,
  gatewayCompany,
  gatewayKind,
  inspectedCompany,
  manyCompany,
  pqCompany,
  userBundlesKind,
} from './contestants/gateway-claims.ts';
import { handshakesCompany } from './contestants/handshakes.ts';
import { backlogKind, farMessagesKind, messagesKind, userMessagesKind } from './contestants/messages.ts';
import { nodesCompany } from './contestants/nodes.ts';
import { pgbenchDeleteCompany, pgbenchMessagesCompany, pgbenchUpdateCompany } from './contestants/pgbench.ts';
import { refillsKind } from './contestants/refills.ts';
import { returnsKind } from './contestants/returns.ts';
import { statementCompany, usualCompany, usualMessagesCompany } from './contestants/usual-way.ts';
import { machineBusyMs } from './cpu.ts';
import type { Results } from './figures.ts';
import { measureIdle } from './idle.ts';
import { describeSetting } from './machine.ts';
import { toSvg } from './plot.ts';
import { OTHERS_SHARE_MAX, toMarkdown } from './report.ts';
import { openStage, type Stage } from './stage.ts';
import { measureStart } from './start.ts';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const OUTPUT_DIR = join(ROOT, 'test-output', 'bench');

const companies: readonly Company[] = [
  gatewayCompany,
  pgbenchUpdateCompany,
  pgbenchDeleteCompany,
  usualCompany,
  bareCompany,
  statementCompany,
  deepCompany,
  manyCompany,
  pqCompany,
  companyOf(userBundlesKind),
  companyOf(farBundlesKind),
  inspectedCompany,
  nodesCompany,
  companyOf(messagesKind),
  companyOf(userMessagesKind),
  companyOf(farMessagesKind),
  companyOf(backlogKind),
  pgbenchMessagesCompany,
  usualMessagesCompany,
  handshakesCompany,
  companyOf(returnsKind),
  companyOf(refillsKind),
  companyOf(enrolmentsKind),
];
/** What another build of the gateway is measured by. */
const comparable: readonly Kind[] = [
  gatewayKind,
  userBundlesKind,
  farBundlesKind,
  messagesKind,
  userMessagesKind,
  farMessagesKind,
  backlogKind,
  returnsKind,
  refillsKind,
  enrolmentsKind,
];
const NAMES = companies.flatMap(({ names }) => names);
/** Measured once, after the rounds. */
const SINGLE = ['idle', 'start'];

const HELP = `Usage: npm run bench -- [options]

  --rounds <n>      how often every contestant takes its turn (default 3)
  --seconds <n>     measured time of each turn, after a second of warm-up (default 3)
  --only <names>    some of these, separated by commas:
                    ${wrapped([...NAMES, ...SINGLE], 20)}
  --against <dir>   another build's dist folder, measured too, as gateway-other-1 and so on; may be repeated.
                    It takes part in what --only names of
                    ${wrapped(
                      comparable.map(({ name }) => name),
                      20,
                    )}
  --profile <name>  profile one contestant's server instead, into test-output/bench
  --patience <n>    how often a turn is taken again that other processes disturbed (default 1)
  --sockets <n>     sockets of each contestant (default 200)
  --devices <n>     devices that are claimed from (default 2000)
  --pool <n>        one-time prekeys of each (default: what the time needs, at least 100)
  --idle <n>        idle sockets (default 10000)
  --no-build        measure dist/ as it is
  --quick           one round of 1 s, on less: shows that it works, and nothing else
  --help`;

interface Options {
  rounds: number;
  seconds: number;
  only: string[];
  against: string[];
  profile: string | undefined;
  scale: Scale;
  idleSockets: number;
  build: boolean;
  patience: number;
}

const WARM_UP_MS = 1_000;
/** No contestant with a pool is expected to claim more in a second: the pools are filled for it. */
const CLAIMS_A_SECOND_MAX = 34_000;
/** Before the first round, so that none starts with cold code. At full speed: at a few hundred requests a second a server would be compiled only while it is measured. */
const FIRST_TURN = { warmUpMs: 1_500, measureMs: 2_500, isUnpaced: true };

async function main(): Promise<void> {
  const options = readOptions();
  if (options.build) execFileSync('npm', ['run', '--silent', 'build'], { cwd: ROOT, stdio: 'inherit' });
  const stage = await openStage();
  try {
    if (options.profile !== undefined) await profile(stage, options, options.profile);
    else await compete(stage, options);
  } finally {
    await stage.stop();
  }
}

async function compete(stage: Stage, options: Options): Promise<void> {
  const contestants: Contestant[] = [];
  const others = options.against.flatMap((distDir, index) => {
    const build = { label: `other-${index + 1}`, distDir, note: `out of ${basename(dirname(distDir))}` };
    return comparable.map((kind) => otherCompanyOf(kind, build));
  });
  const asked = options.only.flatMap((name) => [
    name,
    ...options.against.map((_, index) => `${name}-other-${index + 1}`),
  ]);
  for (const { names, make } of [...companies, ...others]) {
    if (!names.some((name) => asked.includes(name))) continue;
    print(`preparing ${names.join(', ')}`);
    const company = await make(stage, options.scale);
    contestants.push(...company.filter(({ name }) => asked.includes(name)));
  }
  for (const contestant of contestants) {
    print(`warming up ${contestant.name}`);
    await contestant.reset();
    await contestant.run(FIRST_TURN);
  }

  const rounds: Record<string, Run>[] = [];
  for (let number = 1; number <= options.rounds && contestants.length > 0; number++) {
    await stage.checkpoint();
    const round: Record<string, Run> = {};
    for (const contestant of shuffled(contestants)) {
      const run = await quietTurn(stage, contestant, options);
      round[contestant.name] = run;
      print(
        `round ${number} of ${options.rounds}  ${contestant.name.padEnd(20)} ${run.perSecond.toFixed(0).padStart(7)} ${contestant.operation}s/s  others ${(run.othersShare * 100).toFixed(0)} %`,
      );
    }
    rounds.push(round);
  }

  const idle: Results['idle'] = {};
  if (options.only.includes('idle')) {
    for (const kind of ['gateway', 'bare'] as const) {
      print(`opening ${options.idleSockets} idle sockets: ${kind}`);
      idle[kind] = await measureIdle(stage, kind, options.idleSockets);
    }
  }
  if (options.only.includes('start')) print('starting embedded gateways');
  const start = options.only.includes('start') ? await measureStart() : null;

  const { pools, deepPools, manyPools, backlog } = options.scale;
  const results: Results = {
    setting: await describeSetting(stage.postgres.binDir),
    options: {
      rounds: options.rounds,
      seconds: options.seconds,
      pools,
      deepPools,
      manyPools,
      backlog,
      cores: cpus().length,
    },
    entrants: contestants.map(({ name, what, operation, isGateway }) => ({
      name,
      what,
      operation,
      isGateway,
    })),
    rounds,
    idle,
    start,
  };
  const markdown = toMarkdown(results);
  mkdirSync(OUTPUT_DIR, { recursive: true });
  writeFileSync(join(OUTPUT_DIR, 'bench.json'), `${JSON.stringify(results, null, 2)}\n`);
  writeFileSync(join(OUTPUT_DIR, 'bench.md'), markdown);
  writeFileSync(join(OUTPUT_DIR, 'bench.svg'), toSvg(results));
  print(`\n${markdown}\nwritten to test-output/bench: bench.json, bench.md, bench.svg`);
}

/** One turn; taken again, a few times, where other processes had too much of the machine. */
async function quietTurn(stage: Stage, contestant: Contestant, options: Options): Promise<Run> {
  let quietest: Run | null = null;
  for (let attempt = 0; attempt <= options.patience; attempt++) {
    await contestant.reset();
    const before = { atMs: performance.now(), busyMs: machineBusyMs(), ownMs: stage.ownCpuMs() };
    const run = await contestant.run({ warmUpMs: WARM_UP_MS, measureMs: options.seconds * 1000 });
    const elapsedMs = performance.now() - before.atMs;
    const othersMs = machineBusyMs() - before.busyMs - (stage.ownCpuMs() - before.ownMs);
    const othersShare = Math.max(0, othersMs / (elapsedMs * cpus().length));
    if (quietest === null || othersShare < quietest.othersShare) quietest = { ...run, othersShare };
    if (othersShare <= OTHERS_SHARE_MAX) break;
  }
  return quietest!;
}

async function profile(stage: Stage, options: Options, name: string): Promise<void> {
  const company = companies.find(({ names }) => names.includes(name));
  if (company === undefined) throw new Error(`there is no contestant ${name}`);
  const contestants = await company.make(stage, options.scale);
  const contestant = contestants.find((each) => each.name === name)!;
  if (contestant.profile === undefined) throw new Error(`${name} has no server of its own`);
  await contestant.reset();
  await contestant.run(FIRST_TURN);
  mkdirSync(OUTPUT_DIR, { recursive: true });
  const file = join(OUTPUT_DIR, `${name}.cpuprofile`);
  await contestant.profile({ warmUpMs: WARM_UP_MS, measureMs: options.seconds * 1000 }, file);
  print(`written to test-output/bench: ${name}.cpuprofile`);
}

function readOptions(): Options {
  const { values } = parseArgs({
    options: {
      rounds: { type: 'string' },
      seconds: { type: 'string' },
      only: { type: 'string' },
      against: { type: 'string', multiple: true, default: [] },
      profile: { type: 'string' },
      patience: { type: 'string' },
      sockets: { type: 'string', default: '200' },
      devices: { type: 'string', default: '2000' },
      pool: { type: 'string' },
      idle: { type: 'string' },
      'no-build': { type: 'boolean', default: false },
      quick: { type: 'boolean', default: false },
      help: { type: 'boolean', default: false },
    },
  });
  if (values.help) {
    print(HELP);
    process.exit(0);
  }
  const isQuick = values.quick;
  const seconds = wholeNumber('seconds', values.seconds ?? (isQuick ? '1' : '3'));
  const devices = wholeNumber('devices', values.devices);
  const claimsMax = Math.ceil((seconds + WARM_UP_MS / 1000) * CLAIMS_A_SECOND_MAX);
  const known = [...NAMES, ...SINGLE];
  const only = values.only?.split(',') ?? known;
  const unknown = only.filter((name) => !known.includes(name));
  if (unknown.length > 0) throw new Error(`there is no contestant ${unknown.join(', ')}; see --help`);
  return {
    rounds: wholeNumber('rounds', values.rounds ?? (isQuick ? '1' : '3')),
    seconds,
    only,
    against: values.against.map((dir) => resolve(dir)),
    profile: values.profile,
    scale: {
      sockets: wholeNumber('sockets', values.sockets),
      claimsMax,
      pools: {
        devices,
        perDevice:
          values.pool === undefined
            ? Math.max(100, Math.ceil(claimsMax / devices))
            : wholeNumber('pool', values.pool),
      },
      deepPools: { devices: isQuick ? 20 : 100, perDevice: 10_000 },
      // None of the pools gets low: telling that is not what is measured here.
      manyPools: { devices: isQuick ? 20_000 : 200_000, perDevice: 12 },
      backlog: isQuick ? 2_000 : 10_000,
    },
    idleSockets: wholeNumber('idle', values.idle ?? (isQuick ? '1000' : '10000')),
    build: !values['no-build'],
    patience:
      (values.patience ?? (isQuick ? '0' : '1')) === '0'
        ? 0
        : wholeNumber('patience', values.patience ?? '1'),
  };
}

function wholeNumber(name: string, text: string): number {
  if (!/^[1-9]\d{0,6}$/.test(text)) throw new Error(`--${name} must be a whole number above 0`);
  return Number(text);
}

function shuffled<Item>(items: readonly Item[]): Item[] {
  return items
    .map((item) => ({ item, place: Math.random() }))
    .sort((a, b) => a.place - b.place)
    .map(({ item }) => item);
}

/** Names in lines of a readable length. */
function wrapped(names: readonly string[], indent: number): string {
  const lines: string[] = [''];
  for (const name of names) {
    if (`${lines.at(-1)}${name}, `.length > 90) lines.push('');
    lines[lines.length - 1] += `${name}, `;
  }
  return lines.join(`\n${' '.repeat(indent)}`).replace(/, $/, '');
}

function print(text: string): void {
  process.stdout.write(`${text}\n`);
}

try {
  await main();
} catch (error) {
  process.stderr.write(`bench: ${error instanceof Error ? error.message : String(error)}\n`);
  if (error instanceof Error && process.env.DEBUG) process.stderr.write(`${error.stack}\n`);
  process.exitCode = 1;
}
