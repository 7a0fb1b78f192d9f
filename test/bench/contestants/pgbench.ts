/** pgbench, without sockets or gateway, 8 clients, prepared: what the engine itself can do, one operation after the other. */
import { spawn } from 'node:child_process';
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as wait } from 'node:timers/promises';
import { byteaArray, textArray } from '../../../src/backends/postgres/array-literal.ts';
import type { Company, Contestant, Scale } from '../contest.ts';
import { cpuMs } from '../cpu.ts';
import type { Latency } from '../load/measurement.ts';
import { oneTimePublicKeys, userIds } from '../seed.ts';
import type { Stage } from '../stage.ts';
import { CONTENT_BYTES } from './messages.ts';

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

export const pgbenchUpdateCompany: Company = {
  names: ['pgbench-update'],
  make: async (stage, scale) => [await claims(stage, scale, 'update')],
};

export const pgbenchDeleteCompany: Company = {
  names: ['pgbench-delete'],
  make: async (stage, scale) => [await claims(stage, scale, 'delete')],
};

async function claims(stage: Stage, scale: Scale, variant: keyof typeof variants): Promise<Contestant> {
  const { what, create, table, claim, claimed } = variants[variant];
  const { devices, perDevice } = scale.pools;
  const { sql, url } = await stage.createDatabase(`pgbench_${variant}`);
  await sql.unsafe(create);
  const users = userIds('target', devices);
  return {
    name: `pgbench-${variant}`,
    what,
    operation: 'claim',
    isGateway: false,
    async reset() {
      const publicKeys = oneTimePublicKeys(stage.pool);
      await sql`TRUNCATE ${sql(table)}`;
      await sql`
        INSERT INTO ${sql(table)} (user_id, device_id, key_id, public_key)
        SELECT u.user_id, 1, n, k.public_key
        FROM unnest(${textArray(users)}::text[]) WITH ORDINALITY AS u (user_id, nth)
        CROSS JOIN generate_series(1, ${perDevice}::int8) AS n
        JOIN unnest(${byteaArray(publicKeys)}::bytea[]) WITH ORDINALITY AS k (public_key, nth)
          ON k.nth = 1 + (u.nth * 7 + n) % ${publicKeys.length}
        ORDER BY u.nth, n`;
      await sql`VACUUM (ANALYZE) ${sql(table)}`;
    },
    async run({ measureMs }) {
      const script = `\\set user random(0, ${devices - 1})\n${claim}\n`;
      const { operations, ...run } = await pgbench(stage, { url, script, measureMs });
      const seeded = String(devices * perDevice);
      const [books] = await sql.unsafe<{ count: number }[]>(claimed.replace(':seeded', seeded));
      const missed = operations - books!.count;
      const remarks =
        missed === 0 ? [] : [`${missed} of ${operations} found their device's pool empty or locked`];
      return { ...run, loadShare: null, loopShare: null, remarks };
    },
  };
}

const QUEUE_DEVICES = 200;

export const pgbenchMessagesCompany: Company = {
  names: ['pgbench-messages'],
  async make(stage) {
    const { sql, url } = await stage.createDatabase('pgbench_messages');
    // The gateway's queue, with its indexes and without what it remembers besides.
    await sql.unsafe(`
      CREATE SEQUENCE queue_sequence;
      CREATE TABLE queue (
        user_id text, device_id int2, sequence int8 DEFAULT nextval('queue_sequence'), id uuid NOT NULL,
        kind int2 NOT NULL, peer_user_id text NOT NULL, peer_device_id int2 NOT NULL, message_id uuid NOT NULL,
        type int2, content bytea, bounce_reason text, pending bool NOT NULL DEFAULT true,
        identity_version int8 NOT NULL, undecryptable_count int2 NOT NULL DEFAULT 0,
        temporary_count int2 NOT NULL DEFAULT 0, due_at timestamptz, stored_at timestamptz NOT NULL,
        expires_at timestamptz NOT NULL, PRIMARY KEY (user_id, device_id, sequence));
      CREATE INDEX queue_put_off ON queue (user_id, device_id, due_at) WHERE due_at IS NOT NULL;
      CREATE INDEX queue_bounced ON queue (user_id, device_id) WHERE NOT pending;
      CREATE INDEX queue_expiry ON queue (expires_at)`);
    const script = [
      `\\set user random(0, ${QUEUE_DEVICES - 1})`,
      'INSERT INTO queue (user_id, device_id, id, kind, peer_user_id, peer_device_id, message_id, type, content,',
      '  identity_version, stored_at, expires_at)',
      "VALUES ('member-' || :user, 1, gen_random_uuid(), 0, 'sender-1000', 1, gen_random_uuid(), 2,",
      `  '\\x${Buffer.alloc(CONTENT_BYTES, 7).toString('hex')}', 1, now(), now() + interval '30 days')`,
      'RETURNING sequence \\gset',
      "DELETE FROM queue WHERE user_id = 'member-' || :user AND device_id = 1 AND sequence = :sequence;",
      '',
    ].join('\n');
    return [
      {
        name: 'pgbench-messages',
        what: 'pgbench: one insert and one delete of such a message, in two transactions, 8 clients, prepared',
        operation: 'message',
        isGateway: false,
        async reset() {
          await sql`TRUNCATE queue`;
          await sql`VACUUM (ANALYZE) queue`;
        },
        async run({ measureMs }) {
          const { operations: _, ...run } = await pgbench(stage, { url, script, measureMs });
          const [books] = await sql<{ left: number }[]>`SELECT count(*)::int4 AS left FROM queue`;
          const remarks = books!.left === 0 ? [] : [`${books!.left} messages were left`];
          return { ...run, loadShare: null, loopShare: null, remarks };
        },
      },
    ];
  },
};

interface PgbenchRun {
  /** Runs of the script. */
  operations: number;
  perSecond: number;
  latencyMs: Latency;
  cpuPerOperationUs: { postgres: number };
}

async function pgbench(
  stage: Stage,
  { url, script, measureMs }: { url: string; script: string; measureMs: number },
): Promise<PgbenchRun> {
  const dir = await mkdtemp(join(tmpdir(), 'keygate-bench-'));
  try {
    const file = join(dir, 'script.sql');
    await writeFile(file, script);
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
    return {
      operations,
      perSecond: figure(output, /tps = ([\d.]+)/),
      latencyMs: latencyOf(await loggedMs(dir)),
      cpuPerOperationUs: { postgres: (cpu * 1000) / operations },
    };
  } finally {
    await rm(dir, { recursive: true, force: true });
  }
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

function latencyOf(times: number[]): Latency {
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
