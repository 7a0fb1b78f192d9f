/** A real PgBouncer in front of one database: it swaps the sessions of PostgreSQL between those who connect to it. */
import { closeSync, openSync } from 'node:fs';
import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import postgres from 'postgres';
import { engineUserFor, letPass } from '../../src/backends/postgres/engine-user.ts';
import { startGuarded } from '../../src/backends/postgres/guarded-process.ts';
import { findPgBouncer } from './debian-binary.ts';
import { inTemporaryFolder, startOnFreePort } from './engines.ts';
import { eventually } from './eventually.ts';

export interface Pooler {
  /** The same database and role, through it; nothing is said of `prepare`. */
  url: string;
  stop(): Promise<void>;
}

/**
 * In transaction mode, with two sessions for everybody, each for at most three seconds.
 *
 * @param databaseUrl of the role that it connects as
 * @param settings of PgBouncer, beside these
 * @throws MissingEngineError with one line that says what to install
 */
export async function startPooler(
  databaseUrl: string,
  settings: Record<string, string> = {},
): Promise<Pooler> {
  const binary = await findPgBouncer();
  const { hostname, port: databasePort, username, password, pathname } = new URL(databaseUrl);
  return inTemporaryFolder(async (dir) => {
    // Like PostgreSQL, it does not run as root.
    const user = await engineUserFor(join(dir, 'none'));
    if (user !== null) await letPass(user, dir);
    const [configFile, logFile] = [join(dir, 'pgbouncer.ini'), join(dir, 'pgbouncer.log')];
    const engine = await startOnFreePort(dir, async (port) => {
      const secret = password === '' ? '' : ` password=${decodeURIComponent(password)}`;
      const lines = {
        listen_addr: '127.0.0.1',
        listen_port: String(port),
        unix_socket_dir: '',
        auth_type: 'any',
        pool_mode: 'transaction',
        default_pool_size: '2',
        server_lifetime: '3',
        server_login_retry: '1',
        ...settings,
      };
      await writeFile(
        configFile,
        [
          '[databases]',
          `* = host=${hostname} port=${databasePort || '5432'} user=${decodeURIComponent(username)}${secret}`,
          '[pgbouncer]',
          ...Object.entries(lines).map(([name, value]) => `${name} = ${value}`),
          '',
        ].join('\n'),
        { mode: 0o644 },
      );
      const outputFd = openSync(logFile, 'a', 0o600);
      const server = await startGuarded({
        command: binary.command,
        args: [configFile],
        cwd: dir,
        env: binary.env,
        user,
        outputFd,
        stopSteps: [
          { signal: 'SIGTERM', waitMs: 3_000 },
          { signal: 'SIGKILL', waitMs: 1_000 },
        ],
        removeWhenOrphaned: [dir],
      }).finally(() => closeSync(outputFd));
      const isReady = await Promise.race([
        server.exited.then(() => false),
        eventually(() => answers(`postgres://${username}@127.0.0.1:${port}${pathname}`), {
          that: 'PgBouncer answering',
        }),
      ]);
      if (!isReady) throw new Error(`PgBouncer did not start: ${await readFile(logFile, 'utf8')}`);
      return server;
    });
    return {
      url: `postgres://${username}@127.0.0.1:${engine.port}${pathname}`,
      stop: () => engine.stop(),
    };
  });
}

async function answers(url: string): Promise<boolean> {
  const sql = postgres(url, { max: 1, prepare: false, fetch_types: false, connect_timeout: 2 });
  return await sql`SELECT 1`
    .then(
      () => true,
      () => false,
    )
    .finally(() => sql.end({ timeout: 0 }));
}
