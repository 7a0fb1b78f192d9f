/** The second listener: is the process alive, and may it be sent traffic? */
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';

export interface Admin {
  url: string;
  close(): Promise<void>;
}

/** A part that readiness depends on. `required` parts make the node unready, the others degraded. */
export interface Probe {
  name: string;
  required: boolean;
  /** @returns null where all is well, otherwise why not */
  check(): Promise<string | null>;
}

/**
 * Serves `/livez` and `/readyz`.
 *
 * @throws Error where the address can't be listened on
 */
export async function startAdmin(options: {
  host: string;
  port: number;
  probes: readonly Probe[];
}): Promise<Admin> {
  const server = createServer((request, response) => {
    const path = request.url?.split('?')[0];
    const answer = (status: number, body: object): void => {
      response.writeHead(status, { 'content-type': 'application/json', 'cache-control': 'no-store' });
      response.end(`${JSON.stringify(body)}\n`);
    };
    if (request.method !== 'GET') return answer(405, { error: 'only GET' });
    if (path === '/livez') return answer(200, { status: 'alive' });
    if (path !== '/readyz') return answer(404, { error: 'not found' });
    void readiness(options.probes).then(({ ready, body }) => answer(ready ? 200 : 503, body));
  });
  server.requestTimeout = 5_000;
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject);
    server.listen(options.port, options.host, resolve);
  });
  const { port } = server.address() as AddressInfo;
  const host = options.host.includes(':') ? `[${options.host}]` : options.host;
  return {
    url: `http://${host}:${port}`,
    close: () =>
      new Promise((resolve) => {
        server.close(() => resolve());
        server.closeAllConnections();
      }),
  };
}

async function readiness(probes: readonly Probe[]): Promise<{ ready: boolean; body: object }> {
  const results = await Promise.all(
    probes.map(async ({ name, required, check }) => ({
      name,
      required,
      trouble: await check().catch((error: Error) => error.message),
    })),
  );
  const ready = results.every(({ required, trouble }) => !required || trouble === null);
  const troubled = results.some(({ trouble }) => trouble !== null);
  return {
    ready,
    body: {
      status: ready ? (troubled ? 'degraded' : 'ready') : 'unready',
      parts: Object.fromEntries(results.map(({ name, trouble }) => [name, trouble ?? 'ok'])),
    },
  };
}
