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
import type { Contestant, MakeContestant, Run, Scale } from './contest.ts';
import { echo } from './contestants/echo.ts';
import { gatewayClaims } from './contestants/gateway-claims.ts';
import { messages } from './contestants/messages.ts';
import { pgbench } from './contestants/pgbench.ts';
import { usualWay } from './contestants/usual-way.ts';
import { machineBusyMs } from './cpu.ts';
import { type IdleResult, measureIdle } from './idle.ts';
import { describeSetting } from './machine.ts';
import { toSvg } from './plot.ts';
import { OTHERS_SHARE_MAX, type Results, toMarkdown } from './report.ts';
import { DIST_DIR, openStage, type Stage } from './stage.ts';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const OUTPUT_DIR = join(ROOT, 'test-output', 'bench');

const CLAIMS = 'the gateway: claims through sockets';

const makers: Record<string, MakeContestant> = {
  gateway: (stage, scale) =>
    gatewayClaims(stage, scale, { name: 'gateway', what: CLAIMS, distDir: DIST_DIR }),
  'pgbench-update': (stage, scale) => pgbench(stage, scale, 'update'),
  'pgbench-delete': (stage, scale) => pgbench(stage, scale, 'delete'),
  'usual-way': usualWay,
  echo,
  messages,
};

const HELP = `Usage: npm run bench -- [options]

  --rounds <n>      how often every contestant takes its turn (default 5)
  --seconds <n>     measured time of each turn, after a second of warm-up (default 5)
  --only <names>    some of: ${Object.keys(makers).join(', ')}, idle; separated by commas
  --against <dir>   another gateway's dist folder, measured beside this one as other-1; may be repeated
  --profile <name>  profile one contestant's server instead, into test-output/bench
  --patience <n>    how often a turn is taken again that other processes disturbed (default 3)
  --sockets <n>     sockets of each contestant (default 200)
  --devices <n>     devices that are claimed from (default 2000)
  --pool <n>        one-time prekeys of each (default: what the time needs, at least 100)
  --idle <n>        idle sockets (default 5000)
  --no-build        measure dist/ as it is
  --quick           one round of 2 s and 1000 idle sockets: shows that it works, and nothing else
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
/** Before the first round, so that none starts with cold code. */
const FIRST_WARM_UP_MS = 2_000;

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
  for (const [name, make] of Object.entries(makers)) {
    if (options.only.includes(name)) contestants.push(await make(stage, options.scale));
  }
  for (const [index, distDir] of options.against.entries()) {
    const other = {
      name: `other-${index + 1}`,
      what: `${CLAIMS}, out of ${basename(dirname(distDir))}`,
      distDir,
    };
    contestants.push(await gatewayClaims(stage, options.scale, other));
  }
  for (const contestant of contestants) {
    await contestant.reset();
    await contestant.run({ warmUpMs: FIRST_WARM_UP_MS, measureMs: 1_000 });
  }

  const rounds: Record<string, Run>[] = [];
  for (let number = 1; number <= options.rounds && contestants.length > 0; number++) {
    await stage.checkpoint();
    const round: Record<string, Run> = {};
    for (const contestant of shuffled(contestants)) {
      const run = await quietTurn(stage, contestant, options);
      round[contestant.name] = run;
      print(
        `round ${number} of ${options.rounds}  ${contestant.name.padEnd(15)} ${run.perSecond.toFixed(0).padStart(7)} ${contestant.operation}s/s  others ${(run.othersShare * 100).toFixed(0)} %`,
      );
    }
    rounds.push(round);
  }

  const idle: Record<string, IdleResult> = {};
  if (options.only.includes('idle')) {
    for (const kind of ['gateway', 'echo'] as const) {
      print(`opening ${options.idleSockets} idle sockets: ${kind}`);
      idle[kind] = await measureIdle(stage, kind, options.idleSockets);
    }
  }

  const results: Results = {
    setting: await describeSetting(stage.postgres.binDir),
    options: { rounds: options.rounds, seconds: options.seconds },
    entrants: contestants.map(({ name, what, operation }) => ({ name, what, operation })),
    rounds,
    idle,
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
  const make = makers[name];
  if (make === undefined) throw new Error(`there is no contestant ${name}`);
  const contestant = await make(stage, options.scale);
  if (contestant.profile === undefined) throw new Error(`${name} has no server of its own`);
  await contestant.reset();
  await contestant.run({ warmUpMs: FIRST_WARM_UP_MS, measureMs: 1_000 });
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
  const seconds = wholeNumber('seconds', values.seconds ?? (values.quick ? '2' : '5'));
  const targetDevices = wholeNumber('devices', values.devices);
  const needed = Math.ceil(((seconds + WARM_UP_MS / 1000) * CLAIMS_A_SECOND_MAX) / targetDevices);
  const known = [...Object.keys(makers), 'idle'];
  const only = values.only?.split(',') ?? known;
  const unknown = only.filter((name) => !known.includes(name));
  if (unknown.length > 0) throw new Error(`there is no contestant ${unknown.join(', ')}; see --help`);
  return {
    rounds: wholeNumber('rounds', values.rounds ?? (values.quick ? '1' : '5')),
    seconds,
    only,
    against: values.against.map((dir) => resolve(dir)),
    profile: values.profile,
    scale: {
      targetDevices,
      preKeysPerDevice: values.pool === undefined ? Math.max(100, needed) : wholeNumber('pool', values.pool),
      sockets: wholeNumber('sockets', values.sockets),
    },
    idleSockets: wholeNumber('idle', values.idle ?? (values.quick ? '1000' : '5000')),
    build: !values['no-build'],
    patience:
      values.patience === '0' ? 0 : wholeNumber('patience', values.patience ?? (values.quick ? '1' : '3')),
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
