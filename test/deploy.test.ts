import { spawn } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { describe, expect, it } from 'vitest';
import { parse } from 'yaml';
import { environment } from '../src/config/environment.ts';
import { parseConfig } from '../src/config.ts';
import { httpRoutes } from '../src/protocol/http-routes.ts';
import { FRAME_BYTES_MAX } from '../src/protocol/limits.ts';

interface Instruction {
  name: string;
  text: string;
}

/** Instructions with their continued lines joined, comments left out, split into stages. */
function stagesOf(dockerfile: string): Instruction[][] {
  const lines = dockerfile
    .split('\n')
    .filter((line) => !line.trimStart().startsWith('#'))
    .join('\n')
    .replace(/\\\n\s*/g, ' ')
    .split('\n')
    .filter((line) => line.trim() !== '');
  const stages: Instruction[][] = [];
  for (const line of lines) {
    const [, name = '', text = ''] = /^(\w+)\s+(.*)$/.exec(line) ?? [];
    if (name === 'FROM') stages.push([]);
    stages.at(-1)?.push({ name, text });
  }
  return stages;
}

function textsOf(stage: readonly Instruction[], name: string): string[] {
  return stage.filter((instruction) => instruction.name === name).map((instruction) => instruction.text);
}

const stages = stagesOf(readFileSync('Dockerfile', 'utf8'));
const image = stages.at(-1)!;

describe('Dockerfile', () => {
  it('builds in one stage and runs in another, on a Node that the package allows', () => {
    expect(stages).toHaveLength(2);
    const oldest = Number(/>=(\d+)/.exec(JSON.parse(readFileSync('package.json', 'utf8')).engines.node)?.[1]);
    for (const stage of stages) {
      const [, major] = /^node:(\d+)-\S+/.exec(textsOf(stage, 'FROM')[0]!) ?? [];
      expect(Number(major)).toBeGreaterThanOrEqual(oldest);
    }
  });

  it('takes the locked dependencies, without their scripts, and leaves the development ones behind', () => {
    const runs = textsOf(stages[0]!, 'RUN').join('\n');
    expect(runs).toContain('npm ci --ignore-scripts');
    expect(runs).toMatch(/npm prune .*--omit=dev/);
  });

  it('runs as somebody who is not root', () => {
    const users = textsOf(image, 'USER');
    expect(users).toHaveLength(1);
    expect(['root', '0', '0:0']).not.toContain(users[0]);
    const names = image.map((instruction) => instruction.name);
    expect(names.slice(names.indexOf('USER'))).not.toContain('RUN');
  });

  it('holds no secret, and asks for none while it is built', () => {
    expect(stages.flatMap((stage) => textsOf(stage, 'ARG'))).toEqual([]);
    const variables = stages.flatMap((stage) => textsOf(stage, 'ENV')).join('\n');
    expect(variables).not.toMatch(/SECRET|TOKEN|PASSWORD|KEY|URL/);
  });

  it('copies only what is there and what .dockerignore lets through', () => {
    const ignore = readFileSync('.dockerignore', 'utf8').split('\n');
    expect(ignore).toContain('*');
    const copied = stages
      .flatMap((stage) => textsOf(stage, 'COPY'))
      .filter((text) => !text.startsWith('--from='));
    const sources = copied.flatMap((text) => text.split(/\s+/).slice(0, -1));
    expect(sources).toContain('drizzle');
    for (const source of sources) {
      expect(existsSync(source), source).toBe(true);
      expect(ignore).toContain(`!${source}`);
    }
  });

  it('starts the gateway as the first process, so that it gets the signals', () => {
    expect(JSON.parse(textsOf(image, 'ENTRYPOINT')[0]!)).toEqual(['node', 'dist/main.js']);
    expect(JSON.parse(textsOf(image, 'CMD')[0]!)).toEqual(['serve']);
  });

  it.each([
    ['is healthy while /livez says so', 200, 0],
    ['is not healthy where /livez denies it', 503, 1],
    ['is not healthy where whoever is there hangs up', null, 1],
  ])('%s', async (_, status, expected) => {
    const [, json] = /CMD (\[.*\])$/.exec(textsOf(image, 'HEALTHCHECK')[0]!) ?? [];
    const [command, ...args] = JSON.parse(json!) as [string, ...string[]];
    expect(command).toBe('node');
    const asked: (string | undefined)[] = [];
    const admin = createServer((request, response) => {
      asked.push(request.url);
      response.writeHead(status ?? 500).end();
    });
    await new Promise<void>((resolve) => admin.listen(0, '127.0.0.1', resolve));
    const { port } = admin.address() as AddressInfo;
    if (status === null) admin.on('connection', (socket) => socket.destroy());
    const code = await new Promise((resolve) => {
      spawn(process.execPath, args, { env: { ADMIN_PORT: String(port) }, stdio: 'ignore' }).on(
        'exit',
        resolve,
      );
    });
    expect(code).toBe(expected);
    expect(asked).toEqual(status === null ? [] : ['/livez']);
    await new Promise((resolve) => admin.close(resolve));
  });
});

interface Service {
  image?: string;
  environment?: Record<string, string>;
  depends_on?: Record<string, { condition: string }>;
  healthcheck?: { test: string[] };
  ports?: string[];
  stop_signal?: string;
  stop_grace_period?: string;
}

describe('compose.yaml', () => {
  const text = readFileSync('compose.yaml', 'utf8');
  const { services, networks } = parse(text, { merge: true }) as {
    services: Record<string, Service>;
    networks: { default: { ipam: { config: { subnet: string }[] } } };
  };
  const gateways = ['gateway-1', 'gateway-2'];

  it('starts PostgreSQL, Redis, two gateways and a proxy, in versions that the gateway supports', () => {
    expect(Object.keys(services).sort()).toEqual([...gateways, 'postgres', 'proxy', 'redis']);
    expect(Number(/^postgres:(\d+)/.exec(services.postgres!.image!)?.[1])).toBeGreaterThanOrEqual(14);
    expect(Number(/^redis:(\d+)/.exec(services.redis!.image!)?.[1])).toBeGreaterThanOrEqual(7);
  });

  it.each(gateways)('starts %s once both engines answer, and gives it time to end', (name) => {
    const gateway = services[name]!;
    expect(Object.keys(gateway.depends_on ?? {}).sort()).toEqual(['postgres', 'redis']);
    for (const [engine, { condition }] of Object.entries(gateway.depends_on ?? {})) {
      expect(condition).toBe('service_healthy');
      expect(services[engine]?.healthcheck?.test[0]).toBe('CMD');
    }
    expect(gateway).toMatchObject({ stop_signal: 'SIGTERM', stop_grace_period: '30s' });
  });

  it.each(gateways)(
    'sets variables of %s that it knows, to values that it accepts without a warning',
    (name) => {
      const env: Record<string, string> = {};
      for (const [variable, value] of Object.entries(services[name]!.environment ?? {})) {
        expect(Object.keys(environment.shape)).toContain(variable);
        env[variable] = value
          .replace(/\$\{\w+:\?[^}]*\}/g, 's'.repeat(32))
          .replace(/\$\{\w+:-([^}]*)\}/g, (_, byDefault: string) => byDefault);
      }
      expect(JSON.stringify(env)).not.toContain('${');
      const config = parseConfig(env);
      expect(config.store.kind).toBe('url');
      expect(config.redisUrl).not.toBeNull();
      expect(config.warnings).toEqual([]);
      expect(config.trustedProxies).toEqual(networks.default.ipam.config.map(({ subnet }) => subnet));
    },
  );

  it('demands its secrets, and has none of its own', () => {
    for (const name of ['JWT_SECRET', 'POSTGRES_PASSWORD']) {
      expect(text).toContain(`\${${name}:?`);
      expect(text).not.toContain(`\${${name}:-`);
      expect(text).not.toContain(`\${${name}}`);
    }
  });

  it('publishes the proxy alone, to this machine alone', () => {
    expect(services.proxy?.ports).toEqual(['127.0.0.1:3000:3000']);
    for (const name of [...gateways, 'postgres', 'redis']) expect(services[name]?.ports).toBeUndefined();
  });

  it('has a proxy that knows both gateways, lets WebSockets through, and says who calls', () => {
    const proxy = readFileSync('deploy/nginx.conf', 'utf8');
    const named = [...proxy.matchAll(/^\s*server (\S+):3000 /gm)].map(([, name]) => name);
    expect(named).toEqual(gateways);
    expect(Object.keys(services.proxy!.depends_on ?? {})).toEqual(gateways);
    expect(proxy).toContain('proxy_set_header Upgrade $http_upgrade;');
    expect(proxy).toContain('proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;');
    // As much as the gateway itself takes, and quiet for longer than its pings are apart.
    expect(proxy).toContain(`client_max_body_size ${FRAME_BYTES_MAX / 1024 ** 2}m;`);
    expect(Number(/proxy_read_timeout (\d+)s/.exec(proxy)?.[1])).toBeGreaterThan(45);
  });

  it('has a proxy that asks no second gateway for a claim whose answer was lost', () => {
    const [, pattern = '', settings] =
      /location ~ (\S+) \{([^}]*)\}/.exec(readFileSync('deploy/nginx.conf', 'utf8')) ?? [];
    expect(settings).toContain('proxy_next_upstream off;');
    // Of all routes it is the one that claims.
    const paths = Object.entries(httpRoutes).map(([name, { path }]) => [
      name,
      path.replace(':userId', 'alice'),
    ]);
    expect(paths.flatMap(([name, path]) => (new RegExp(pattern).test(path!) ? [name] : []))).toEqual([
      'requestBundle',
    ]);
  });
});
