/** A real PgBouncer in front of one database: it swaps the sessions of PostgreSQL between those who connect to it. */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import postgres from 'postgres';
import { engineUserFor, letPass } from '../../src/backends/postgres/engine-user.ts';
import { findPgBouncer } from './debian-binary.ts';
import { type Engine, inTemporaryFolder, startEngine } from './engines.ts';

/**
 * In transaction mode, with two sessions for everybody, each for at most three seconds. Its URL is that of the same
 * database and role through it, and says nothing of `prepare`.
 *
 * @param databaseUrl of the role that it connects as
 * @param settings of PgBouncer, beside these
 * @throws MissingEngineError with one line that says what to install
 */
export async function startPooler(
  databaseUrl: string,
  settings: Record<string, string> = {},
): Promise<Engine> {
  const binary = await findPgBouncer();
  const { hostname, port: databasePort, username, password, pathname } = new URL(databaseUrl);
  const secret = password === '' ? '' : ` password=${decodeURIComponent(password)}`;
  const target = `host=${hostname} port=${databasePort || '5432'} user=${decodeURIComponent(username)}${secret}`;
  const urlFor = (port: number): string => `postgres://${username}@127.0.0.1:${port}${pathname}`;
  return inTemporaryFolder(async (dir) => {
    // Like PostgreSQL, it does not run as root.
    const user = await engineUserFor(join(dir, 'none'));
    if (user !== null) await letPass(user, dir);
    const configFile = join(dir, 'pgbouncer.ini');
    return startEngine(dir, {
      name: 'PgBouncer',
      binary,
      user,
      argsFor(port) {
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
        const said = Object.entries(lines).map(([name, value]) => `${name} = ${value}\n`);
        writeFileSync(configFile, `[databases]\n* = ${target}\n[pgbouncer]\n${said.join('')}`, {
          mode: 0o644,
        });
        return [configFile];
      },
      answers: (port) => answers(urlFor(port)),
      urlFor,
    });
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
