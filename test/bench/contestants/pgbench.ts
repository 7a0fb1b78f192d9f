/** pgbench, without sockets or gateway: one claim a transaction, 8 clients, prepared. What the engine itself can do. */
import { spawn } from 'node:child_process';
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as wait } from 'node:timers/promises';
import { byteaArray, textArray } from '../../../src/backends/postgres/array-literal.ts';
import type { Contestant, Scale } from '../contest.ts';
import { cpuMs } from '../cpu.ts';
import { oneTimePublicKeys, userIds } from '../seed.ts';
import type { Stage } from '../stage.ts';

const CLIENTS = 8;
/** Of so many transactions one is logged, for the percentiles. */
const LOGGED_SHARE = 0.1;
const REAP_MS = 300;

const oldestUnclaimed = (table: string, condition: string) => `(
  SELECT sequence FROM ${table}
  WHERE user_id = 'target-' || :user AND device_id = 1 ${condition}
  ORDER BY user_id, device_id, sequence LIMIT 1 FOR UPDATE SKIP LOCKED)`;

const variants = {
  update: {
    what: 'pgbench, one claim a transaction: UPDATE of a flag, 8 clients, prepared',
    create: `
      CREATE TABLE flagged (sequence int8 GENERATED ALWAYS AS IDENTITY PRIMARY KEY, user_id text NOT NULL,
        device_id int2 NOT NULL, key_id int8 NOT NULL, public_key bytea NOT NULL, claimed bool NOT NULL DEFAULT false);
      CREATE INDEX flagged_unclaimed ON flagged (user_id, device_id, sequence) WHERE NOT claimed`,
    table: 'flagged',
    claim: `UPDATE flagged SET claimed = true WHERE sequence = ${oldestUnclaimed('flagged', 'AND NOT claimed')}
      RETURNING key_id, public_key;`,
    claimed: 'SELECT count(*)::int4 AS count FROM flagged WHERE claimed',
  },
  delete: {
    what: 'pgbench, one claim a transaction: DELETE from a slim pool, 8 clients, prepared',
    create: `
      CREATE TABLE slim (sequence int8 GENERATED ALWAYS AS IDENTITY, user_id text NOT NULL, device_id int2 NOT NULL,
        key_id int8 NOT NULL, public_key bytea NOT NULL, PRIMARY KEY (user_id, device_id, sequence))`,
    table: 'slim',
    claim: `DELETE FROM slim WHERE user_id = 'target-' || :user AND device_id = 1
      AND sequence = ${oldestUnclaimed('slim', '')}
      RETURNING key_id, public_key;`,
    claimed: 'SELECT :seeded - count(*)::int4 AS count FROM slim',
  },
} as const;

export async function pgbench(
  stage: Stage,
  scale: Scale,
  variant: keyof typeof variants,
): Promise<Contestant> {
  const { what, create, table, claim, claimed } = variants[variant];
  const { sql, url } = await stage.createDatabase(`pgbench_${variant}`);
  await sql.unsafe(create);
  const users = userIds('target', scale.targetDevices);
  return {
    name: `pgbench-${variant}`,
    what,
    operation: 'claim',
    async reset() {
      const publicKeys = oneTimePublicKeys(stage.pool);
      await sql`TRUNCATE ${sql(table)}`;
      await sql`
        INSERT INTO ${sql(table)} (user_id, device_id, key_id, public_key)
        SELECT u.user_id, 1, n, k.public_key
        FROM unnest(${textArray(users)}::text[]) WITH ORDINALITY AS u (user_id, nth)
        CROSS JOIN generate_series(1, ${scale.preKeysPerDevice}::int8) AS n
        JOIN unnest(${byteaArray(publicKeys)}::bytea[]) WITH ORDINALITY AS k (public_key, nth)
          ON k.nth = 1 + (u.nth * 7 + n) % ${publicKeys.length}
        ORDER BY u.nth, n`;
      await sql`VACUUM (ANALYZE) ${sql(table)}`;
    },
    async run({ measureMs }) {
      const dir = await mkdtemp(join(tmpdir(), 'keygate-bench-'));
      try {
        const file = join(dir, 'claim.sql');
        await writeFile(file, `\\set user random(0, ${scale.targetDevices - 1})\n${claim}\n`);
        const engine = { pid: stage.postgres.pid, withChildren: true };
        const before = cpuMs(engine);
        const output = await runProgram(join(stage.postgres.binDir, 'pgbench'), [
          ...['--no-vacuum', '--protocol=prepared', `--client=${CLIENTS}`, '--jobs=2', `--file=${file}`],
          ...[`--time=${Math.max(1, Math.round(measureMs / 1000))}`, '--log'],
          ...[`--log-prefix=${join(dir, 'log')}`, `--sampling-rate=${LOGGED_SHARE}`, url],
        ]);
        // A backend counts once the postmaster has noticed its end.
        await wait(REAP_MS);
        const cpu = cpuMs(engine) - before;
        const operations = figure(output, /transactions actually processed: (\d+)/);
        const seeded = scale.targetDevices * scale.preKeysPerDevice;
        const [books] = await sql.unsafe<{ count: number }[]>(claimed.replace(':seeded', String(seeded)));
        return {
          perSecond: figure(output, /tps = ([\d.]+)/),
          latencyMs: latencyOf(await loggedMs(dir)),
          cpuPerOperationUs: { postgres: (cpu * 1000) / operations },
          loadShare: null,
          loopShare: null,
          remarks:
            books!.count === operations
              ? []
              : [`${operations - books!.count} of ${operations} found their device's pool empty or locked`],
        };
      } finally {
        await rm(dir, { recursive: true, force: true });
      }
    },
  };
}

async function loggedMs(dir: string): Promise<number[]> {
  const files = (await readdir(dir)).filter((name) => name.startsWith('log'));
  const texts = await Promise.all(files.map((name) => readFile(join(dir, name), 'utf8')));
  // Third on each line: microseconds.
  return texts.flatMap((text) =>
    text
      .split('\n')
      .filter(Boolean)
      .map((line) => Number(line.split(' ')[2]) / 1000),
  );
}

function latencyOf(times: number[]) {
  const sorted = times.sort((a, b) => a - b);
  const at = (share: number) => sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))] ?? 0;
  return { p50: at(0.5), p90: at(0.9), p99: at(0.99), p999: at(0.999) };
}

function figure(text: string, pattern: RegExp): number {
  const match = pattern.exec(text);
  if (match === null) throw new Error(`pgbench said:\n${text}`);
  return Number(match[1]);
}

function runProgram(command: string, args: string[]): Promise<string> {
  return new Promise((resolve, reject) => {
    const child = spawn(command, args, { stdio: ['ignore', 'pipe', 'pipe'] });
    let output = '';
    for (const stream of [child.stdout, child.stderr]) {
      stream.setEncoding('utf8').on('data', (chunk: string) => {
        output += chunk;
      });
    }
    child.once('error', reject);
    child.once('close', (code) => (code === 0 ? resolve(output) : reject(new Error(output))));
  });
}
