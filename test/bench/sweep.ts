/**
 * How long the retention sweep holds a lock at ten million rows: `npx tsx test/bench/sweep.ts [rows in millions]`.
 * Every transaction and statement of the sweep is timed from the client, which is no less than its locks last.
 */
import postgres from 'postgres';
import { migrateDatabase, openDatabase } from '../../src/backends/postgres/database.ts';
import { createKeyStore } from '../../src/backends/postgres/key-store.ts';
import { createMessageStore } from '../../src/backends/postgres/message-store.ts';
import { steadyClock, systemClock } from '../../src/lib/clock.ts';
import { silentLog } from '../../src/lib/log.ts';
import { startPostgres } from '../support/engines.ts';

const DAY_MS = 24 * 3_600_000;
/** Rows of one batch, as the sweep of a gateway takes them. */
const BATCH_ROWS = 500;
const SWEPT_MS = 45_000;
const millions = Number(process.argv[2] ?? 10);
const CLAIMS = millions * 600_000;
const MESSAGES = millions * 200_000;
const RECEIPTS = millions * 200_000;
const DEVICES = Math.max(100, millions * 10_000);

const engine = await startPostgres({
  durable: true,
  prefer: 'system',
  settings: { shared_buffers: '1GB', max_wal_size: '8GB' },
});
try {
  const address = { kind: 'url', url: engine.url } as const;
  await migrateDatabase(address);
  await seed();
  const database = openDatabase({ address, clock: systemClock, log: silentLog });
  const timesMs: Record<string, number[]> = { transaction: [], run: [], hot: [] };
  const timed = <Result>(name: string, work: () => Promise<Result>): Promise<Result> => {
    const startMs = steadyClock.nowMs();
    return work().finally(() => timesMs[name]!.push(steadyClock.nowMs() - startMs));
  };
  const watched: typeof database = {
    ...database,
    transaction: (action) => timed('transaction', () => database.transaction(action)),
    run: (action) => timed('run', () => database.run(action)),
    hot: (statement, values) => timed('hot', () => database.hot(statement, values)),
  };
  const nowMs = systemClock.nowMs();
  await report('claims', async () =>
    createKeyStore(watched).sweep({
      claimedBeforeMs: nowMs - 30 * DAY_MS,
      replacedBeforeMs: nowMs - 30 * DAY_MS,
      limit: BATCH_ROWS,
    }),
  );
  const messages = createMessageStore(watched);
  await report('messages', async () => {
    const touched = await messages.sweep({ nowMs, forgetBeforeMs: nowMs - DAY_MS, limit: BATCH_ROWS });
    const until = { nowMs, expiresAtMs: nowMs + 30 * DAY_MS, limit: BATCH_ROWS };
    while ((await messages.settleBounces(null, until)).more);
    return touched;
  });
  await database.close();

  async function report(what: string, sweep: () => Promise<number>): Promise<void> {
    for (const name of Object.keys(timesMs)) timesMs[name] = [];
    const startMs = steadyClock.nowMs();
    let rows = 0;
    while (steadyClock.nowMs() - startMs < SWEPT_MS) {
      const removed = await sweep();
      rows += removed;
      if (removed === 0) break;
    }
    const seconds = (steadyClock.nowMs() - startMs) / 1000;
    print(`${what}: ${rows} rows in ${seconds.toFixed(1)} s, ${Math.round(rows / seconds)} a second`);
    for (const [name, times] of Object.entries(timesMs)) {
      if (times.length === 0) continue;
      const sorted = [...times].sort((a, b) => a - b);
      const at = (share: number) => sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))]!;
      const over = sorted.filter((ms) => ms > 50).length;
      const shown = [at(0.5), at(0.99), sorted.at(-1)!].map((ms) => ms.toFixed(1)).join(' / ');
      print(`  ${name}: ${times.length}, half / 99 % / longest ${shown} ms; ${over} over 50 ms`);
    }
  }
} finally {
  await engine.stop();
}

/** A fifth of each kind is due. */
async function seed(): Promise<void> {
  const sql = postgres(engine.url, { max: 1, onnotice: () => {} });
  await sql`SET synchronous_commit = off`;
  await sql`
    INSERT INTO devices (user_id, device_id, registration_id, identity_key, identity_canonical, signed_prekey_id,
                         key_version, identity_version, ec_claimed)
    SELECT 'user-' || n, 1, 7, decode(md5(n::text) || md5(n::text), 'hex'), decode(md5(n::text) || md5(n::text), 'hex'),
           1, 1, 1, 60
    FROM generate_series(0, ${DEVICES - 1}) n`;
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
  await sql`SELECT setval('message_sequence', ${MESSAGES})`;
  await sql`VACUUM ANALYZE`;
  const [{ rows }] = (await sql`
    SELECT sum(n_live_tup)::float8 AS rows FROM pg_stat_user_tables`) as unknown as [{ rows: number }];
  print(`${Math.round(rows)} rows`);
  await sql.end();
}

function print(line: string): void {
  process.stdout.write(`${line}\n`);
}
