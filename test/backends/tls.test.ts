/** TLS to the engines, asked for in their URLs: what is sent is hidden, and who answers has to prove who he is. */
import { execFile } from 'node:child_process';
import { promisify } from 'node:util';
import { sql } from 'drizzle-orm';
import { Redis } from 'ioredis';
import postgres from 'postgres';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openDatabase } from '../../src/backends/postgres/database.ts';
import { connectRedis } from '../../src/backends/redis/connect.ts';
import { examineRedis } from '../../src/backends/redis/examine.ts';
import { systemClock } from '../../src/lib/clock.ts';
import { silentLog } from '../../src/lib/log.ts';
import { type Engine, type PostgresEngine, startPostgres, startRedis } from '../support/engines.ts';
import { someone } from '../support/flow.ts';
import { enrol, testEnvironment } from '../support/gateway.ts';
import { startGatewayProcess } from '../support/gateway-process.ts';
import { freePort } from '../support/ports.ts';
import { KEYGATE } from '../support/program.ts';
import { type Certificate, selfMadeCertificate } from '../support/tls.ts';

let certificate: Certificate;
let database: PostgresEngine;
let redis: Engine;
let redisTlsUrl: string;

beforeAll(async () => {
  certificate = await selfMadeCertificate();
  const { certFile, keyFile } = certificate;
  [database, redis] = await Promise.all([
    startPostgres({ settings: { ssl: 'on', ssl_cert_file: certFile, ssl_key_file: keyFile } }),
    startRedis(),
  ]);
  const port = await freePort();
  const admin = new Redis(redis.url);
  await admin.config('SET', 'tls-cert-file', certFile, 'tls-key-file', keyFile, 'tls-auth-clients', 'no');
  await admin.config('SET', 'tls-port', String(port));
  admin.disconnect();
  redisTlsUrl = `rediss://localhost:${port}`;
});
afterAll(async () => {
  await Promise.all([database?.stop(), redis?.stop()]);
  await certificate?.remove();
});

const databaseUrl = (sslmode: string): string =>
  `postgres://postgres@localhost:${database.port}/test?sslmode=${sslmode}`;

/** What `keygate doctor` finds of each engine. */
async function doctor(urls: { databaseUrl: string; redisUrl: string }, env: Record<string, string> = {}) {
  const { stdout } = await promisify(execFile)(process.execPath, [KEYGATE, 'doctor', '--json'], {
    env: { PATH: process.env.PATH, ...testEnvironment(urls), ...env },
  }).catch((error: { stdout: string }) => error);
  const { findings } = JSON.parse(stdout) as { findings: { what: string; good: boolean; found: string }[] };
  const of = (what: string) => findings.filter((finding) => finding.what === what);
  return {
    isReached: (what: string) => of(what).some((finding) => finding.good),
    said: (what: string) => of(what).map((finding) => finding.found),
  };
}

describe('TLS to the engines', () => {
  it('carries everything where their URLs ask for it and the certificate is known', async () => {
    const gateway = await startGatewayProcess(
      { databaseUrl: databaseUrl('verify-full'), redisUrl: redisTlsUrl },
      { NODE_EXTRA_CA_CERTS: certificate.certFile },
    );
    const sql = postgres(`postgres://postgres@127.0.0.1:${database.port}/test`, { max: 1 });
    try {
      await enrol(gateway, someone(), { oneTimePreKeys: 1, pqOneTimePreKeys: 0 });
      // PostgreSQL 18 lists a connection before it knows what it will be.
      const connections = await sql<{ ssl: boolean }[]>`
        SELECT s.ssl FROM pg_stat_ssl s JOIN pg_stat_activity a USING (pid)
        WHERE a.client_addr IS NOT NULL AND a.pid <> pg_backend_pid() AND a.state <> 'starting'`;
      expect(connections.length).toBeGreaterThan(0);
      expect(connections.filter(({ ssl }) => !ssl)).toEqual([]);
      expect((await fetch(`${gateway.adminUrl}/readyz`)).status).toBe(200);
      expect(await gateway.output()).not.toContain('broken');
    } finally {
      await sql.end();
      await gateway.stop();
    }
  });

  it('is refused where nobody vouches for the certificate, and the doctor says so, without the password', async () => {
    const found = await doctor({
      databaseUrl: databaseUrl('verify-full').replace('postgres@', 'postgres:hunter2@'),
      redisUrl: redisTlsUrl,
    });
    expect(found.isReached('postgres')).toBe(false);
    expect(found.said('postgres')).toEqual([expect.stringMatching(/^self-signed certificate/)]);
    expect(found.isReached('redis')).toBe(false);
    expect(found.said('redis')).toEqual([
      expect.stringMatching(/^no connection to Redis: self-signed certificate/),
    ]);
  });

  it('is what the doctor thinks of where only one side of a link to Redis speaks it', async () => {
    const fault = async (url: string): Promise<string> => {
      const link = connectRedis({ url, name: 'test', log: silentLog });
      return await examineRedis(link)
        .then(() => 'none', String)
        .finally(() => link.disconnect());
    };
    const toTls = redisTlsUrl.replace('rediss:', 'redis:');
    const toPlain = redis.url.replace('redis:', 'rediss:');
    const faults = [toTls, `${toTls}?cluster=true`, toPlain, `${toPlain}?cluster=true`].map(fault);
    const wanted = (hint: string) =>
      expect.stringMatching(`^Error: no connection to Redis: .+; if its port speaks ${hint}$`);
    const [tls, plain] = [
      wanted('TLS, REDIS_URL must begin with rediss://'),
      wanted('no TLS, REDIS_URL must begin with redis://'),
    ];
    expect(await Promise.all(faults)).toEqual([tls, tls, plain, plain]);
  });

  it('is refused where the certificate is another host’s', async () => {
    const other = (url: string) => url.replace('localhost', '127.0.0.1');
    const found = await doctor(
      { databaseUrl: other(databaseUrl('verify-full')), redisUrl: other(redisTlsUrl) },
      { NODE_EXTRA_CA_CERTS: certificate.certFile },
    );
    expect(found.isReached('postgres')).toBe(false);
    expect(found.said('postgres')).toEqual([
      expect.stringContaining("IP: 127.0.0.1 is not in the cert's list"),
    ]);
    expect(found.isReached('redis')).toBe(false);
    expect(found.said('redis')).toEqual([expect.stringContaining('127.0.0.1')]);
  });

  it('makes the store unavailable while nobody vouches for its certificate, as one that has run out meanwhile', async () => {
    const address = { kind: 'url', url: databaseUrl('verify-full') } as const;
    const database = openDatabase({ address, clock: systemClock, log: silentLog });
    await expect(database.run((db) => db.execute(sql`SELECT 1`))).rejects.toMatchObject({
      code: 'UNAVAILABLE',
      cause: { cause: { code: 'DEPTH_ZERO_SELF_SIGNED_CERT' } },
    });
    await database.close();
  });

  it('is compared with the address where the URL names the host by it', async () => {
    const ofAddress = await selfMadeCertificate('IP:127.0.0.1');
    const { certFile, keyFile } = ofAddress;
    const engine = await startPostgres({
      settings: { ssl: 'on', ssl_cert_file: certFile, ssl_key_file: keyFile },
    });
    const at = async (host: string, sslmode: string) => {
      const url = `postgres://postgres@${host}:${engine.port}/test?sslmode=${sslmode}`;
      const found = await doctor(
        { databaseUrl: url, redisUrl: redisTlsUrl },
        { NODE_EXTRA_CA_CERTS: certFile },
      );
      return found.said('postgres');
    };
    try {
      // What only PostgreSQL itself could tell.
      const reached = expect.stringMatching(/^\d+ migrations are missing: run keygate migrate$/);
      expect(await at('127.0.0.1', 'verify-full')).toContainEqual(reached);
      expect(await at('localhost', 'verify-full')).toEqual([expect.stringContaining('localhost')]);
      expect(await at('localhost', 'require')).toContainEqual(reached);
    } finally {
      await engine.stop();
      await ofAddress.remove();
    }
  });

  it('looks at no certificate where sslmode=require says so, as PostgreSQL’s own clients do', async () => {
    const found = await doctor({ databaseUrl: databaseUrl('require'), redisUrl: redisTlsUrl });
    expect(found.isReached('postgres')).toBe(true);
  });
});
