import { spawn } from 'node:child_process';
import { generateKeyPairSync } from 'node:crypto';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { mkdtemp, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { embeddedSecret, embeddedSecretFile } from '../src/embedded-secret.ts';
import { systemClock } from '../src/lib/clock.ts';
import { createAuthenticator } from '../src/requests/authenticate.ts';
import { eventually } from './support/eventually.ts';
import { connectClient } from './support/gateway.ts';
import { START_MAX_MS } from './support/gateway-process.ts';
import { freePort } from './support/ports.ts';
import { KEYGATE } from './support/program.ts';

const JWT_SECRET = 's'.repeat(32);
const PUBLIC_KEY = generateKeyPairSync('ed25519')
  .publicKey.export({ type: 'spki', format: 'pem' })
  .toString();

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'keygate-main-'));
});
afterEach(() => rm(folder, { recursive: true, force: true }));

/** The command line in an environment that holds nothing but what is given. */
function start(args: string[], env: NodeJS.ProcessEnv = {}) {
  const child = spawn(process.execPath, [KEYGATE, ...args], {
    env: { PATH: process.env.PATH, HOME: process.env.HOME, DATA_DIR: folder, ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  const output = { stdout: '', stderr: '' };
  for (const name of ['stdout', 'stderr'] as const) {
    child[name].setEncoding('utf8').on('data', (chunk: string) => {
      output[name] += chunk;
    });
  }
  const end = new Promise<{ code: number | null; stdout: string; stderr: string }>((resolve) => {
    child.on('close', (code) => resolve({ code, ...output }));
  });
  return { child, end };
}

function keygate(args: string[], env?: NodeJS.ProcessEnv) {
  return start(args, env).end;
}

describe('keygate', () => {
  it('tells its commands and its version', async () => {
    const help = await keygate(['--help']);
    expect(help).toMatchObject({ code: 0, stderr: '' });
    for (const name of ['serve', 'token', 'migrate', 'check-config', 'load-test'])
      expect(help.stdout).toContain(name);
    const version = JSON.parse(readFileSync('package.json', 'utf8')).version;
    expect(await keygate(['--version'])).toEqual({ code: 0, stdout: `${version}\n`, stderr: '' });
  });

  it.each(['serve', 'token', 'migrate', 'check-config', 'load-test'])(
    'tells how %s is used',
    async (name) => {
      const { code, stdout } = await keygate([name, '--help'], { PORT: 'bad' });
      expect(code).toBe(0);
      expect(stdout).toContain(`Usage: keygate ${name}`);
    },
  );

  it.each([
    ['no command', []],
    ['an unknown command', ['frobnicate']],
    ['a name that every object has', ['constructor']],
    ['an unknown option', ['token', '--users', 'alice']],
    ['an argument too many', ['migrate', 'now']],
    ['no user', ['token', '--device', '1']],
    ['no device', ['token', '--user', 'alice']],
    ['a device out of range', ['token', '--user', 'alice', '--device', '128']],
    ['a device that is no number', ['token', '--user', 'alice', '--device', '0x1']],
    ['a reserved user', ['token', '--user', 'stats', '--device', '1']],
    ['a time without a unit', ['token', '--user', 'alice', '--device', '1', '--ttl', '60']],
  ])('ends with 2 and says where help is, given %s', async (_, args) => {
    const { code, stdout, stderr } = await keygate(args);
    expect(code).toBe(2);
    expect(stdout).toBe('');
    expect(stderr.trim().split('\n')).toHaveLength(2);
    expect(stderr).toContain('--help');
  });
});

describe('keygate check-config', () => {
  it('prints every problem, one a line, and ends with 1', async () => {
    const { code, stdout, stderr } = await keygate(['check-config'], {
      PORT: 'x',
      REDIS_URL: 'redis://:hunter2@cache',
      JWT_SECRTE: 'hunter2',
    });
    expect(code).toBe(1);
    expect(stdout).toBe('');
    expect(stderr.trim().split('\n')).toEqual([
      'keygate: PORT must be a whole number from 0 to 65535; it is "x"',
      'keygate: REDIS_URL is set without DATABASE_URL: a shared bus over a private store would lie',
      'keygate: JWT_SECRTE is unknown; did you mean JWT_SECRET?',
    ]);
  });

  it('tells programs the same as one JSON object, with the same exit codes', async () => {
    const bad = await keygate(['check-config', '--json'], { PORT: 'x', JWT_SECRTE: 'hunter2' });
    expect({ ...bad, stdout: JSON.parse(bad.stdout) }).toEqual({
      code: 1,
      stderr: '',
      stdout: {
        good: false,
        problems: [
          'PORT must be a whole number from 0 to 65535; it is "x"',
          'JWT_SECRTE is unknown; did you mean JWT_SECRET?',
        ],
      },
    });
    const good = await keygate(['check-config', '--json'], {
      DATABASE_URL: 'postgres://keygate:hunter2@db/keygate',
      JWT_SECRET,
    });
    expect(good).toMatchObject({ code: 0, stderr: '' });
    expect(JSON.parse(good.stdout)).toMatchObject({
      good: true,
      problems: [],
      store: 'PostgreSQL at DATABASE_URL',
      gateway: 'every address, port 3000',
      warnings: [expect.stringMatching(/^REDIS_URL is not set/)],
    });
    expect(good.stdout).not.toContain('hunter2');
    expect(good.stdout).not.toContain(JWT_SECRET);
  });

  it('says what a good environment amounts to, without its secrets, and touches nothing', async () => {
    const embedded = await keygate(['check-config']);
    expect(embedded).toMatchObject({ code: 0, stderr: '' });
    expect(embedded.stdout).toContain(folder);
    await expect(stat(embeddedSecretFile(folder))).rejects.toThrow('ENOENT');

    const production = await keygate(['check-config'], {
      DATABASE_URL: 'postgres://keygate:hunter2@db/keygate',
      JWT_SECRET,
    });
    expect(production).toMatchObject({ code: 0, stderr: '' });
    expect(production.stdout).toContain('warning  REDIS_URL is not set');
    expect(production.stdout).not.toContain('hunter2');
    expect(production.stdout).not.toContain(JWT_SECRET);
  });
});

describe('keygate token', () => {
  const ALICE = ['token', '--user', 'alice', '--device', '1'];

  it('signs with the secret file of the data folder, which it makes where it is not there', async () => {
    const { code, stdout, stderr } = await keygate([...ALICE, '--ttl', '90s']);
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
    const door = await createAuthenticator({
      keys: { kind: 'secret', secret: await embeddedSecret(folder) },
      issuer: null,
      audience: null,
      clock: systemClock,
    });
    const caller = await door.authenticate(stdout.trim());
    expect(caller.device).toEqual({ userId: 'alice', deviceId: 1 });
    expect(caller.expiresAtMs - (caller.issuedAtMs ?? 0)).toBeLessThanOrEqual(91_000);
    expect(caller.expiresAtMs - (caller.issuedAtMs ?? 0)).toBeGreaterThanOrEqual(90_000);
  });

  it('signs with JWT_SECRET, for the issuer and the audience that the gateway demands', async () => {
    const { stdout } = await keygate(ALICE, { JWT_SECRET, JWT_ISSUER: 'idp', JWT_AUDIENCE: 'chat' });
    const door = await createAuthenticator({
      keys: { kind: 'secret', secret: new TextEncoder().encode(JWT_SECRET) },
      issuer: 'idp',
      audience: 'chat',
      clock: systemClock,
    });
    expect((await door.authenticate(stdout.trim())).device.userId).toBe('alice');
    await expect(stat(embeddedSecretFile(folder))).rejects.toThrow('ENOENT');
  });

  it('says that it can not sign where there is only a public key', async () => {
    for (const env of [{ JWT_PUBLIC_KEY: PUBLIC_KEY }, { JWT_JWKS_URL: 'https://idp.example.org/jwks' }]) {
      const { code, stdout, stderr } = await keygate(ALICE, env);
      expect({ code, stdout }).toEqual({ code: 1, stdout: '' });
      expect(stderr).toMatch(/^keygate: can not sign: .+\n$/);
    }
  });
});

describe('keygate serve', () => {
  it('refuses a bad environment before it starts anything', async () => {
    const { code, stderr } = await keygate(['serve'], { PORT: 'x', QUEUE_MAX: 'x' });
    expect(code).toBe(1);
    expect(stderr.trim().split('\n')).toHaveLength(2);
  });

  /** What it has printed when it serves. */
  function printed(child: ReturnType<typeof start>['child']): Promise<string> {
    return new Promise((resolve) => {
      let text = '';
      child.stdout.on('data', (chunk: string) => {
        text += chunk;
        if (/a token .*\n/.test(text)) resolve(text);
      });
      child.on('close', () => resolve(text));
    });
  }

  it.each(['SIGTERM', 'SIGINT', 'SIGHUP'] as const)(
    'prints where it listens, and ends with 0 on %s',
    async (signal) => {
      const { child, end } = start(['serve'], { PORT: '0', ADMIN_PORT: '0' });
      const text = await printed(child);
      expect(text).toMatch(/gateway {2}http:\/\/127\.0\.0\.1:\d+\n/);
      expect(text).toMatch(/inspect {2}http:\/\/127\.0\.0\.1:\d+\/\n/);
      // For another shell, which knows of no DATA_DIR.
      expect(text).toMatch(/a token {2}DATA_DIR='(.*)' \S.* token --user alice --device 1\n/);
      expect(text).toContain(`DATA_DIR='${folder}' `);
      child.kill(signal);
      expect((await end).code).toBe(0);
    },
  );

  it('serves, and ends with 0, where nothing that it says can be written', async () => {
    const port = String(await freePort());
    const child = spawn('sh', ['-c', 'exec "$@" >/dev/full 2>&1', 'sh', process.execPath, KEYGATE, 'serve'], {
      env: { PATH: process.env.PATH, DATA_DIR: folder, PORT: '0', ADMIN_PORT: port },
      stdio: 'ignore',
    });
    const ended = once(child, 'exit');
    try {
      await eventually(async () => (await fetch(`http://127.0.0.1:${port}/readyz`)).status === 200, {
        waitMaxMs: START_MAX_MS,
      });
      child.kill('SIGTERM');
      expect(await ended).toEqual([0, null]);
    } finally {
      child.kill('SIGKILL');
    }
  });

  it('is not led astray by what the environment has for other clients of PostgreSQL', async () => {
    const astray = { PGTARGETSESSIONATTRS: 'any', PGSSLNEGOTIATION: 'direct' };
    expect(await keygate(['migrate'], astray)).toMatchObject({ code: 0, stderr: '' });
  });

  it('lets no library print what clients bring, whatever DEBUG says', async () => {
    const { child, end } = start(['serve'], { PORT: '0', ADMIN_PORT: '0', DEBUG: '*' });
    const [, url] = /gateway {2}(\S+)/.exec(await printed(child)) ?? [];
    const token = (await keygate(['token', '--user', 'alice', '--device', '1'])).stdout.trim();
    const client = await connectClient(url!, token);
    await client.call('keyStatus');
    client.close();
    child.kill('SIGTERM');
    const { code, stderr } = await end;
    expect({ code, isTold: stderr.includes(token) }).toEqual({ code: 0, isTold: false });
    expect(stderr).toContain('DEBUG is not heeded');
  });
});
