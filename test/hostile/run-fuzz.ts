/** `npm run fuzz`: the fuzzer for as long as it takes, on a gateway and an engine of its own. */
import { parseArgs } from 'node:util';
import { createDatabase, startPostgres } from '../support/engines.ts';
import { tokenFor } from '../support/gateway.ts';
import { startGatewayProcess } from '../support/gateway-process.ts';
import { KeyMaker } from '../support/key-maker.ts';
import { buildKeygate } from '../support/program.ts';
import { createChance, fuzz } from './fuzz.ts';
import { complaintsOf, createProbe, PEAK_BYTES_MAX } from './probe.ts';

const { values } = parseArgs({
  options: { cases: { type: 'string', default: '1000000' }, seed: { type: 'string' } },
});
const cases = Number(values.cases);
const seed = Number(values.seed ?? createChance(Date.now()).below(2 ** 31));
if (!Number.isSafeInteger(cases) || cases < 1 || !Number.isSafeInteger(seed) || seed < 0) {
  process.stderr.write('usage: npm run fuzz -- [--cases <number>] [--seed <number>]\n');
  process.exit(2);
}

const PROGRESS_PERIOD_CASES = 20_000;

buildKeygate();
const engine = await startPostgres();
process.env.TEST_DATABASE_URL = engine.url;
const database = await createDatabase();
const probe = await createProbe();
const gateway = await startGatewayProcess({ databaseUrl: database.url }, probe.env);
const bystander = await gateway.connect({ userId: 'bystander', deviceId: 1 });
await bystander.call('uploadKeys', new KeyMaker().keySet());

process.stdout.write(`fuzzing: ${cases} cases, seed ${seed}\n`);
const startedMs = performance.now();
const seconds = (): string => ((performance.now() - startedMs) / 1000).toFixed(0);
let told = 0;
const { findings, ...counts } = await fuzz({
  url: gateway.url,
  cases,
  seed,
  tokenOf: (device) => tokenFor({ userId: device, deviceId: 1 }),
  complaints: () => complaintsOf(gateway),
  onProgress: (progress) => {
    if (progress.done - told < PROGRESS_PERIOD_CASES) return;
    told = progress.done;
    process.stdout.write(`${progress.done} of ${cases} in ${seconds()} s, ${progress.findings} findings\n`);
  },
});
const { peakBytes, heldBytes, isPolluted } = await probe.figures(gateway);
const serves = (await bystander.call('keyStatus')).keyVersion > 0;
const mib = (bytes: number): string => `${Math.round(bytes / 2 ** 20)} MiB`;
process.stdout.write(
  `${counts.requests + counts.frames + counts.http} cases in ${seconds()} s, seed ${seed}: ${JSON.stringify(counts)}\n` +
    `memory at most ${mib(peakBytes)}, held at the end ${mib(heldBytes)}; ${findings.length} findings\n`,
);
for (const { seed: batchSeed, what, cases: tried } of findings) {
  process.stdout.write(`\n${what}, in the batch of seed ${batchSeed}:\n`);
  for (const one of tried) process.stdout.write(`  ${JSON.stringify(one.slice(0, 2_000))}\n`);
}
await gateway.stop();
await database.drop();
await probe.remove();
await engine.stop();
const isSound = findings.length === 0 && !isPolluted && serves && peakBytes < PEAK_BYTES_MAX;
process.exit(isSound ? 0 : 1);
