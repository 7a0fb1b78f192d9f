/** The second listener: is the process alive, may it be sent traffic, and what else an operator may read there. */
import { createServer, type RequestListener } from 'node:http';
import type { AddressInfo } from 'node:net';
import { listenFault } from '../lib/listen-fault.ts';
import { reasonOf } from '../lib/reason.ts';

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

/** Something to read at one path; it needs no token, so it tells nothing of any device. */
export interface AdminPage {
  path: string;
  headers: Readonly<Record<string, string>>;
  body(): string | Promise<string>;
}

/**
 * Serves `/livez`, `/readyz` and the pages; every other address is the inspector's, where there is one.
 *
 * @throws Error with one sentence for the operator where the address can't be listened on
 */
export async function startAdmin(options: {
  host: string;
  port: number;
  probes: readonly Probe[];
  pages: readonly AdminPage[];
  inspector: RequestListener | null;
}): Promise<Admin> {
  const pages = new Map(options.pages.map((page) => [page.path, page]));
  const server = createServer({ connectionsCheckingInterval: CHECK_MS }, (request, response) => {
    const path = request.url?.split('?')[0];
    const answer = (status: number, body: object): void => {
      response.writeHead(status, { 'content-type': 'application/json', 'cache-control': 'no-store' });
      response.end(`${JSON.stringify(body)}\n`);
    };
    const isOurs = path === '/livez' || path === '/readyz' || pages.has(path ?? '');
    if (!isOurs && options.inspector !== null) return options.inspector(request, response);
    if (request.method !== 'GET') return answer(405, { error: 'only GET' });
    if (path === '/livez') return answer(200, { status: 'alive' });
    if (path === '/readyz') {
      void readiness(options.probes).then(({ ready, body }) => answer(ready ? 200 : 503, body));
      return;
    }
    const page = pages.get(path ?? '');
    if (page === undefined) return answer(404, { error: 'not found' });
    void Promise.resolve(page.body()).then(
      (body) => {
        response.writeHead(200, { ...PAGE_HEADERS, ...page.headers });
        response.end(body);
      },
      () => answer(500, { error: 'could not be told' }),
    );
  });
  server.requestTimeout = 5_000;
  server.maxConnections = CONNECTIONS_MAX;
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject);
    server.listen(options.port, options.host, resolve);
  }).catch((error: unknown) => {
    throw listenFault(error, { ...options, hostName: 'ADMIN_HOST', portName: 'ADMIN_PORT' });
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

/** Of whoever scrapes, probes and watches. */
const CONNECTIONS_MAX = 128;
/** How late a connection that says nothing is noticed: a health probe waits for no more than a few seconds. */
const CHECK_MS = 1_000;

const PAGE_HEADERS = {
  'cache-control': 'no-store',
  'x-content-type-options': 'nosniff',
  'referrer-policy': 'no-referrer',
};

async function readiness(probes: readonly Probe[]): Promise<{ ready: boolean; body: object }> {
  const results = await Promise.all(
    probes.map(async ({ name, required, check }) => ({
      name,
      required,
      trouble: await check().catch(reasonOf),
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
