/**
 * All faults, mixed, for as long as is asked, at the leases, sweeps and bounds of production:
 * `npm run soak -- --minutes 10 --seed 1`. Ends with 1 where a rule was broken or something did not recover.
 */
import { execFileSync } from 'node:child_process';
import { parseArgs } from 'node:util';
import { buildKeygate } from '../support/program.ts';
import * as faults from './faults.ts';
import { seeded } from './random.ts';
import { type Fault, run } from './run.ts';
import { startStage } from './stage.ts';

const ofNodesAndEngines: Record<string, Fault> = {
  'gateway killed': faults.gatewayKilled,
  'gateway frozen beyond its lease': faults.gatewayFrozen,
  'gateway drained': faults.gatewayDrained,
  'Redis killed, back empty': faults.redisKilled,
  'Redis restarted': faults.redisRestarted,
  'Redis silent': faults.redisSilent,
  'PostgreSQL killed': faults.postgresKilled,
  'PostgreSQL connections cut': faults.postgresConnectionsCut,
  'PostgreSQL slow': faults.postgresSlow,
  'PostgreSQL silent': faults.postgresSilent,
};
const ofClientsAndLinks: Record<string, Fault> = {
  '2,000 reconnections at once': faults.reconnectsAtOnce(2_000),
  'link cut at each step': faults.linkCutAtEachStep,
  'link cut after bytes': faults.linkCutAfterBytes,
  'link slow and narrow': faults.linkSlowAndNarrow,
  'link silent': faults.linkSilent,
  'clients read nothing': faults.clientsReadNothing,
  'client frozen': faults.clientFrozen,
};
const all = { ...ofNodesAndEngines, ...ofClientsAndLinks };

/** How often a fault comes with another: one of the nodes or engines, and one of the clients or links. */
const TWO_AT_ONCE = 0.4;
const BROKEN_MIN_MS = 2_000;
const BROKEN_SPREAD_MS = 20_000;
const WAIT_MAX_MS = 240_000;

const { values } = parseArgs({
  options: { minutes: { type: 'string', default: '10' }, seed: { type: 'string', default: '1' } },
});
const minutes = Number(values.minutes);
const seed = Number(values.seed);
if (!(minutes > 0) || !Number.isInteger(seed)) {
  process.stderr.write('Usage: npm run soak -- --minutes <number> --seed <whole number>\n');
  process.exit(2);
}
// The nodes run the sources, but for their threads.
buildKeygate();
const commit = execFileSync('git', ['rev-parse', '--short=12', 'HEAD'], { encoding: 'utf8' }).trim();
process.stdout.write(`soak: ${minutes} minutes, seed ${seed}, commit ${commit}\n`);

const random = seeded(seed);
const operations = new Map<string, number>();
const faultCounts = new Map<string, number>();
const broken: string[] = [];
const startedMs = performance.now();
const elapsedS = (): number => Math.round((performance.now() - startedMs) / 1_000);
/** Every fault once in an order of the seed's choice, then in another. */
let deck: string[] = [];

const stage = await startStage({ gateways: 3, timing: {} });
for (let round = 1; elapsedS() < minutes * 60 && broken.length === 0; round++) {
  const names = draw();
  const roundSeed = seed * 100_000 + round;
  const began = elapsedS();
  try {
    const { violations, counts } = await run({
      ...{ stage, seed: roundSeed, phones: 8, actions: 150, waitMaxMs: WAIT_MAX_MS },
      brokenMs: (chance) => BROKEN_MIN_MS + chance.below(BROKEN_SPREAD_MS),
      fault: async (scene) => {
        await Promise.all(names.map((name) => all[name]!(scene)));
      },
    });
    broken.push(
      ...violations.map(({ rule, detail }) => `round ${round}, ${names.join(' + ')}: ${rule}: ${detail}`),
    );
    for (const [name, count] of Object.entries(counts)) add(operations, name, count);
    for (const name of names) add(faultCounts, name, 1);
    process.stdout.write(
      `${elapsedS()} s: ${names.join(' + ')}: ${counts.actions} actions in ${elapsedS() - began} s, ${violations.length} violations\n`,
    );
  } catch (error) {
    broken.push(`round ${round}, ${names.join(' + ')}: ${(error as Error).message}`);
  }
}
await stage.stop();

const table = (counts: Map<string, number>): string =>
  [...counts]
    .sort(([a], [b]) => a.localeCompare(b))
    .map(([name, count]) => `  ${count} × ${name}`)
    .join('\n');
process.stdout.write(
  `\n${elapsedS()} s, seed ${seed}, commit ${commit}\noperations and answers\n${table(operations)}\nfaults\n${table(faultCounts)}\n` +
    `violations: ${broken.length}\n${broken.map((line) => `  ${line}\n`).join('')}`,
);
process.exit(broken.length === 0 ? 0 : 1);

function draw(): string[] {
  if (deck.length === 0) deck = shuffled(Object.keys(all));
  const first = deck.pop()!;
  const others = first in ofClientsAndLinks ? ofNodesAndEngines : ofClientsAndLinks;
  const second = random.happens(TWO_AT_ONCE) ? deck.find((name) => name in others) : undefined;
  if (second === undefined) return [first];
  deck.splice(deck.indexOf(second), 1);
  return [first, second];
}

function shuffled<T>(items: T[]): T[] {
  const rest = [...items];
  return items.map(() => rest.splice(random.below(rest.length), 1)[0]!);
}

function add(to: Map<string, number>, name: string, count: number): void {
  to.set(name, (to.get(name) ?? 0) + count);
}
