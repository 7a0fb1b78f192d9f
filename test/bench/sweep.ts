/**
 * How long the retention sweep holds a lock at ten million rows:
 * `npx tsx test/bench/sweep.ts [rows in millions] [--wait]`. The sweeps are those of a gateway, each for a while; every
 * transaction and statement of theirs is timed from the client, which is no less than its locks last. With `--wait` it
 * begins to measure when a line comes in, so that the machine can be made quiet when the rows are there.
 */
import { once } from 'node:events';
import postgres from 'postgres';
import { createInProcessBus } from '../../src/backends/in-process/bus.ts';
import { createInProcessLocks } from '../../src/backends/in-process/locks.ts';
import { type Database, openDatabase } from '../../src/backends/postgres/database.ts';
import { createKeyStore } from '../../src/backends/postgres/key-store.ts';
import { createMessageStore } from '../../src/backends/postgres/message-store.ts';
import { migrateDatabase } from '../../src/backends/postgres/migrations.ts';
import { createBounces } from '../../src/delivery/bounce.ts';
import { noReports } from '../../src/delivery/reports.ts';
import { sweepMessages } from '../../src/delivery/retention.ts';
import { createIdleSweep } from '../../src/keys/idle.ts';
import { sweepKeys } from '../../src/keys/retention.ts';
import { steadyClock, systemClock } from '../../src/lib/clock.ts';
import { silentLog } from '../../src/lib/log.ts';
import { startPostgres } from '../support/engines.ts';

const DAY_MS = 24 * 3_600_000;
const RETENTION_MS = 30 * DAY_MS;
const IDLE_MS = 100 * DAY_MS;
const SWEPT_MS = 60_000;
const LOCK_MAX_MS = 50;
const millions = Number(process.argv[2] ?? 10);
const CLAIMS = millions * 500_000;
const POOLED = millions * 100_000;
const MESSAGES = millions * 200_000;
const RECEIPTS = millions * 200_000;
const DEVICES = Math.max(100, millions * 10_000);
/** Idle ones that hold as much as a device can. */
const FULL_DEVICES = 10;
const FULL = { pooled: 1_000, claims: 1_000, messages: 10_000 };

class TimeIsUpError extends Error {}

const engine = await startPostgres({
  durable: true,
  prefer: 'system',
  settings: { shared_buffers: '1GB', max_wal_size: '8GB' },
});
try {
  const address = { kind: 'url', url: engine.url } as const;
  await migrateDatabase(address);
  await seed();
  if (process.argv.includes('--wait')) {
    print('ready: waits for a line');
    await once(process.stdin, 'data');
    process.stdin.pause();
  }
  const database = openDatabase({ address, clock: systemClock, log: silentLog });
  await measure(database);
  await database.close();
} finally {
  await engine.stop();
}

async function measure(database: Database): Promise<void> {
  const timesMs = new Map<string, number[]>();
  let untilMs = 0;
  async function timed<Result>(name: string, work: () => Promise<Result>): Promise<Result> {
    const startMs = steadyClock.nowMs();
    if (startMs > untilMs) throw new TimeIsUpError();
    const result = await work();
    const times = timesMs.get(name) ?? [];
    times.push(steadyClock.nowMs() - startMs);
    timesMs.set(name, times);
    return result;
  }
  const watched: Database = {
    ...database,
    transaction: (action) => timed('a transaction, flushed', () => database.transaction(action)),
    upkeep: (action) => timed('a transaction', () => database.upkeep(action)),
    run: (action) => timed('a read, without locks', () => database.run(action)),
    hot: (statement, values) => timed('a statement, flushed', () => database.hot(statement, values)),
  };
  const clock = systemClock;
  const store = createKeyStore(watched);
  const messages = createMessageStore(watched);
  const bus = createInProcessBus({ log: silentLog });
  const bounces = createBounces({
    messages,
    bus,
    clock,
    messageLifetimeMs: RETENTION_MS,
    reports: noReports,
  });
  let rows = 0;
  const onBatch = (count: number): void => {
    rows += count;
  };

  await report('claims', () => sweepKeys({ store, clock, claimedPreKeyRetentionMs: RETENTION_MS, onBatch }));
  const idle = createIdleSweep({
    store,
    locks: createInProcessLocks({ clock }),
    clock,
    retentionMs: IDLE_MS,
    async onWiped(device) {
      onBatch(1);
      await bounces.bounceStale(device);
    },
  });
  await report('idle devices', async () => {
    while (!(await idle.run()).isAtEnd);
  });
  await report('messages and message ids', () => sweepMessages({ messages, bounces, clock, onBatch }));

  async function report(what: string, sweep: () => Promise<unknown>): Promise<void> {
    timesMs.clear();
    rows = 0;
    const startMs = steadyClock.nowMs();
    untilMs = startMs + SWEPT_MS;
    await sweep().catch((error: unknown) => {
      if (!(error instanceof TimeIsUpError)) throw error;
    });
    const seconds = (steadyClock.nowMs() - startMs) / 1000;
    print(`${what}: ${rows} in ${seconds.toFixed(1)} s, ${Math.round(rows / seconds)} a second`);
    for (const [name, times] of timesMs) {
      const sorted = times.sort((a, b) => a - b);
      const at = (share: number) => sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))]!;
      const shown = [at(0.5), at(0.99), at(0.999), at(1)].map((ms) => ms.toFixed(1)).join(' / ');
      const over = sorted.filter((ms) => ms > LOCK_MAX_MS).length;
      print(
        `  ${name}: ${sorted.length}, half / 99 % / 99.9 % / longest ${shown} ms; ${over} over ${LOCK_MAX_MS} ms`,
      );
    }
  }
}

/** A fifth of each kind is due. */
async function seed(): Promise<void> {
  const sql = postgres(engine.url, { max: 1, onnotice: () => {} });
  await sql`SET synchronous_commit = off`;
  await seedDevices('user', DEVICES, 125);
  await sql`
    INSERT INTO one_time_prekeys (user_id, device_id, kind, key_id, public_key)
    SELECT 'user-' || n % ${DEVICES}, 1, 0, ${CLAIMS}::int8 + n, decode('05' || md5(n::text) || md5(n::text), 'hex')
    FROM generate_series(1, ${POOLED}) n`;
  await sql`
    INSERT INTO prekey_claims (user_id, device_id, claimer_user_id, claimer_device_id, claim_id, identity_version,
                               registration_id, signed_prekey_id, ec_key_id, ec_public_key, claimed_at)
    SELECT 'user-' || n % ${DEVICES}, 1, 'claimer-' || n % 9973, 1, gen_random_uuid(), 1, 7, 1, n,
           decode('05' || md5(n::text) || md5(n::text), 'hex'), now() - random() * interval '37.5 days'
    FROM generate_series(1, ${CLAIMS}) n`;
  await sql`
    INSERT INTO messages (user_id, device_id, sequence, id, kind, peer_user_id, peer_device_id, message_id, type, content,
                          identity_version, stored_at, expires_at)
    SELECT 'user-' || n % ${DEVICES}, 1, n, gen_random_uuid(), 0, 'user-' || (n + 1) % ${DEVICES}, 1, gen_random_uuid(), 1,
           decode(repeat(md5(n::text), 8), 'hex'), 1, now() - interval '20 days', now() + (random() - 0.2) * interval '30 days'
    FROM generate_series(1, ${MESSAGES}) n`;
  await sql`
    INSERT INTO message_receipts (user_id, device_id, kind, peer_user_id, peer_device_id, message_id, sequence, stored_at,
                                  waiting_at, finished_at)
    SELECT 'user-' || n % ${DEVICES}, 1, 0, 'user-' || (n + 1) % ${DEVICES}, 1, gen_random_uuid(), n,
           now() - interval '3 days', now() - random() * interval '30 hours',
           CASE WHEN n % 2 = 0 THEN now() - random() * interval '30 hours' END
    FROM generate_series(1, ${RECEIPTS}) n`;
  await seedFullDevices();
  await sql`SELECT setval('message_sequence', ${MESSAGES + FULL.messages})`;
  await sql`VACUUM ANALYZE`;
  await sql`CHECKPOINT`;
  const [{ rows }] = (await sql`
    SELECT sum(n_live_tup)::float8 AS rows FROM pg_stat_user_tables`) as unknown as [{ rows: number }];
  print(`${Math.round(rows)} rows`);
  await sql.end();

  /** Used last at a moment within `days`. */
  async function seedDevices(name: string, count: number, days: number): Promise<void> {
    await sql`
      INSERT INTO devices (user_id, device_id, registration_id, identity_key, identity_canonical, signed_prekey_id,
                           key_version, identity_version, ec_claimed, updated_at, served_at)
      SELECT ${name} || '-' || n, 1, 7, decode('05' || md5(n::text) || md5(n::text), 'hex'),
             decode(md5(n::text) || md5(n::text), 'hex'), 1, 1, 1, 60, now() - interval '200 days',
             now() - random() * make_interval(days => ${days})
      FROM generate_series(0, ${count - 1}) n`;
    await sql`
      INSERT INTO signed_prekeys (user_id, device_id, kind, key_id, public_key, signature)
      SELECT ${name} || '-' || n, 1, 0, 1, decode('05' || md5(n::text) || md5(n::text), 'hex'),
             decode(repeat(md5(n::text), 4), 'hex')
      FROM generate_series(0, ${count - 1}) n`;
  }

  async function seedFullDevices(): Promise<void> {
    // By their names they are the first that the sweep comes to.
    await seedDevices('full', FULL_DEVICES, 0);
    await sql`UPDATE devices SET served_at = updated_at WHERE user_id LIKE 'full-%'`;
    await sql`
      INSERT INTO one_time_prekeys (user_id, device_id, kind, key_id, public_key)
      SELECT 'full-' || d, 1, 0, n, decode('05' || md5(n::text) || md5(n::text), 'hex')
      FROM generate_series(0, ${FULL_DEVICES - 1}) d, generate_series(1, ${FULL.pooled}) n`;
    await sql`
      INSERT INTO prekey_claims (user_id, device_id, claimer_user_id, claimer_device_id, claim_id, identity_version,
                                 registration_id, signed_prekey_id, ec_key_id, ec_public_key, claimed_at)
      SELECT 'full-' || d, 1, 'claimer-' || n, 1, gen_random_uuid(), 1, 7, 1, ${FULL.pooled}::int8 + 2 * n,
             decode('05' || md5(n::text) || md5(n::text), 'hex'), now() - random() * interval '20 days'
      FROM generate_series(0, ${FULL_DEVICES - 1}) d, generate_series(1, ${FULL.claims}) n`;
    await sql`
      INSERT INTO messages (user_id, device_id, sequence, id, kind, peer_user_id, peer_device_id, message_id, type,
                            content, identity_version, stored_at, expires_at)
      SELECT 'full-' || d, 1, ${MESSAGES}::int8 + n, gen_random_uuid(), 0, 'user-' || n % 100, 1, gen_random_uuid(), 1,
             decode(repeat(md5(n::text), 8), 'hex'), 1, now(), now() + interval '30 days'
      FROM generate_series(0, ${FULL_DEVICES - 1}) d, generate_series(1, ${FULL.messages}) n`;
  }
}

function print(line: string): void {
  process.stdout.write(`${line}\n`);
}
