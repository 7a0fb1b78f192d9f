/**
 * Measures whether the time of an answer tells who is here, where PRIVATE_DIRECTORY is true: requesters ask in turn for
 * users that nobody knows and for users who have been here and have no keys, by both requests that name a user. Two halves
 * of the unknown ones, compared with each other, show the noise.
 */
import { randomUUID } from 'node:crypto';
import { createDatabase, startPostgres } from '../support/engines.ts';
import type { Client } from '../support/gateway.ts';
import { startGatewayProcess } from '../support/gateway-process.ts';
import { KeyMaker } from '../support/key-maker.ts';
import { buildKeygate } from '../support/program.ts';

const REQUESTERS = 2;
const ROUNDS = 300;
const EMPTY_USERS = 20;
type Kind = 'unknown' | 'unknown too' | 'without keys';
const KINDS: readonly Kind[] = ['unknown', 'unknown too', 'without keys'];

buildKeygate();
const engine = await startPostgres();
process.env.TEST_DATABASE_URL = engine.url;

/** Mann and Whitney's: how many standard deviations the ranks of one sample lie from where chance would put them. */
function rankTest(one: readonly number[], other: readonly number[]): { z: number } {
  const sorted = [
    ...one.map((ms) => ({ ms, isOne: true })),
    ...other.map((ms) => ({ ms, isOne: false })),
  ].sort((a, b) => a.ms - b.ms);
  let rankSum = 0;
  for (let start = 0; start < sorted.length; ) {
    let end = start;
    while (end < sorted.length && sorted[end]!.ms === sorted[start]!.ms) end += 1;
    const rank = (start + 1 + end) / 2;
    rankSum += rank * sorted.slice(start, end).filter(({ isOne }) => isOne).length;
    start = end;
  }
  const [n, m] = [one.length, other.length];
  const u = rankSum - (n * (n + 1)) / 2;
  return { z: (u - (n * m) / 2) / Math.sqrt((n * m * (n + m + 1)) / 12) };
}

function percentile(samples: readonly number[], share: number): number {
  const sorted = [...samples].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))]!;
}

async function measure(env: Record<string, string>): Promise<void> {
  const database = await createDatabase();
  const gateway = await startGatewayProcess({ databaseUrl: database.url }, env);
  for (let index = 0; index < EMPTY_USERS; index++) {
    const client = await gateway.connect({ userId: `empty-${index}`, deviceId: 1 });
    await client.call('uploadKeys', new KeyMaker().keySet());
    await client.call('resetKeys');
    client.close();
  }
  const userOf = (kind: Kind, round: number): string =>
    kind === 'without keys' ? `empty-${round % EMPTY_USERS}` : `nobody-${randomUUID()}`;

  const samples = new Map<string, number[]>();
  const ask = async (client: Client, kind: Kind, round: number): Promise<void> => {
    for (const request of ['requestBundle', 'listDevices'] as const) {
      const userId = userOf(kind, round);
      const startedMs = performance.now();
      const reply =
        request === 'requestBundle'
          ? await client.ask(request, { claimId: randomUUID(), userId })
          : await client.ask(request, { userId });
      const tookMs = performance.now() - startedMs;
      if (reply.ok || reply.error.code !== 'USER_NOT_FOUND') throw new Error(JSON.stringify(reply));
      const key = `${request}/${kind}`;
      samples.set(key, [...(samples.get(key) ?? []), tookMs]);
    }
  };
  await Promise.all(
    Array.from({ length: REQUESTERS }, async (_, requester) => {
      const client = await gateway.connect({ userId: `requester-${requester}`, deviceId: 1 });
      for (let round = 0; round < ROUNDS / REQUESTERS; round++) {
        // The order changes, so that what came just before is of no account.
        for (let step = 0; step < KINDS.length; step++)
          await ask(client, KINDS[(round + step) % KINDS.length]!, round);
      }
    }),
  );
  for (const request of ['requestBundle', 'listDevices']) {
    const [unknown, again, empty] = KINDS.map((kind) => samples.get(`${request}/${kind}`)!);
    const show = (ms: readonly number[]): string =>
      `${percentile(ms, 0.5).toFixed(2)} ms (10 %: ${percentile(ms, 0.1).toFixed(2)}, 90 %: ${percentile(ms, 0.9).toFixed(2)})`;
    process.stdout.write(
      `${request}: median unknown ${show(unknown!)}, unknown too ${show(again!)}, without keys ${show(empty!)}\n` +
        `  rank test: unknown and unknown too z = ${rankTest(unknown!, again!).z.toFixed(2)}, ` +
        `unknown and without keys z = ${rankTest([...unknown!, ...again!], empty!).z.toFixed(2)} (noise: within ±2.6)\n`,
    );
  }
  await gateway.stop();
  await database.drop();
}

for (const isPrivate of ['true', 'false']) {
  process.stdout.write(`PRIVATE_DIRECTORY=${isPrivate}, ${ROUNDS} of each kind, ${REQUESTERS} requesters\n`);
  await measure({ PRIVATE_DIRECTORY: isPrivate });
}
await engine.stop();
process.exit(0);
