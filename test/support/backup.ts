/** A PostgreSQL of its own that is backed up and restored, by its own tools where they are there. */
import { execFile } from 'node:child_process';
import { access, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import postgres from 'postgres';
import { startPostgres } from './engines.ts';

const run = promisify(execFile);

/**
 * What is restored takes table after table from whoever works on them. In a deadlock PostgreSQL ends the session that
 * looks for one first: let that be a gateway's.
 */
const RESTORES_FIRST = { ...process.env, PGOPTIONS: '-c deadlock_timeout=1min' };

export interface BackedUpPostgres {
  url: string;
  backUp(): Promise<void>;
  /** Puts everything back to where it stood at the last `backUp`; who is connected stays, or is cut and comes back. */
  restore(): Promise<void>;
  stop(): Promise<void>;
}

/** With Debian's PostgreSQL by pg_dump and pg_restore; the npm packages hold neither, and databases are copied then. */
export async function startBackedUpPostgres(): Promise<BackedUpPostgres> {
  const engine = await startPostgres({ prefer: 'system' });
  const folder = await mkdtemp(join(tmpdir(), 'keygate-backup-'));
  const hasTools = await access(join(engine.binDir, 'pg_dump')).then(
    () => true,
    () => false,
  );
  const file = join(folder, 'backup');
  const database = new URL(engine.url).pathname.slice(1);

  async function copy(from: string, to: string): Promise<void> {
    const url = new URL(engine.url);
    url.pathname = '/template1';
    const sql = postgres(url.href, { max: 1, onnotice: () => {} });
    try {
      await sql`SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = ${from}`;
      await sql.unsafe(`DROP DATABASE IF EXISTS ${to} WITH (FORCE)`);
      await sql.unsafe(`CREATE DATABASE ${to} TEMPLATE ${from}`);
    } finally {
      await sql.end();
    }
  }

  return {
    url: engine.url,
    async backUp() {
      if (hasTools) {
        await run(join(engine.binDir, 'pg_dump'), ['--format=custom', `--file=${file}`, engine.url]);
      } else await copy(database, 'backup');
    },
    async restore() {
      if (hasTools) {
        const how = ['--clean', '--if-exists', '--single-transaction', `--dbname=${engine.url}`];
        await run(join(engine.binDir, 'pg_restore'), [...how, file], { env: RESTORES_FIRST });
      } else await copy('backup', database);
    },
    async stop() {
      await engine.stop();
      await rm(folder, { recursive: true, force: true });
    },
  };
}
