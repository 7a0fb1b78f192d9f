/** The inspector's server: who may look, what they are answered, and the page itself. */
import { existsSync } from 'node:fs';
import type { IncomingMessage, ServerResponse } from 'node:http';
import { fileURLToPath } from 'node:url';
import cookie from '@fastify/cookie';
import files from '@fastify/static';
import fastify, { type FastifyReply, type FastifyRequest } from 'fastify';
import { type Clock, hasPassed } from '../lib/clock.ts';
import type { Log } from '../lib/log.ts';
import type { InspectionStore, LowDevice } from '../ports/inspection.ts';
import type { KeyStore } from '../ports/key-store.ts';
import type { Relay } from '../ports/relay.ts';
import { GatewayError } from '../protocol/errors.ts';
import { addressKey, deviceAddress } from '../protocol/ids.ts';
import { type AdminError, adminRoutes } from '../protocol/inspector/admin-api.ts';
import { filterFromQuery } from '../protocol/inspector/filter.ts';
import type { OverviewSample } from '../protocol/inspector/overview.ts';
import type { Observer } from '../requests/observe.ts';
import { type Access, createAccess, type Session } from './access.ts';
import { createFacts } from './facts.ts';
import { createLiveSockets, isoTime } from './live-sockets.ts';
import { createNodes, type Nodes } from './nodes.ts';
import { countNode, merged } from './overview.ts';
import { createRedactor } from './redactor.ts';
import { createTap } from './tap.ts';
import { streamEvents, streamOverview } from './viewer.ts';

export interface InspectorParts {
  observer: Observer;
  relay: Relay;
  keys: Pick<KeyStore, 'read' | 'sharedSecret'>;
  store: InspectionStore;
  /** What is exchanged for a session. */
  token: string;
  /** Whether sockets may be disconnected. */
  writable: boolean;
  version: string;
  lowThreshold: number;
  clock: Clock;
  log: Log;
}

export interface Inspector {
  /** Answers one request of the admin listener. */
  handle(request: IncomingMessage, response: ServerResponse): void;
  close(): Promise<void>;
}

type ErrorCode = AdminError['error']['code'];

const STATUS: Readonly<Record<ErrorCode, number>> = {
  UNAUTHENTICATED: 401,
  FORBIDDEN: 403,
  BAD_REQUEST: 400,
  NOT_FOUND: 404,
  RATE_LIMITED: 429,
  UNAVAILABLE: 503,
  INTERNAL: 500,
};

const BODY_BYTES_MAX = 8 * 1024;
/** A device in an address, with every character percent-encoded. */
const PARAMETER_LENGTH_MAX = 3 * 140;
/** Streams that are open at once; each costs the gateway a little. */
const STREAMS_MAX = 32;
const LOW_DEVICES_MAX = 20;
/** The store is asked for low devices no more often, however many overviews are open. */
const LOW_DEVICES_PERIOD_MS = 15_000;
/** The same from `src` and from `dist`. */
const PAGE_FOLDER = fileURLToPath(new URL('../../dist/admin/web/', import.meta.url));

const HEADERS = {
  'content-security-policy':
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
  'cross-origin-opener-policy': 'same-origin',
  'cross-origin-resource-policy': 'same-origin',
  'referrer-policy': 'no-referrer',
  'x-content-type-options': 'nosniff',
} as const;

/** A refusal that the viewer is to see. */
class Refusal extends Error {
  readonly code: ErrorCode;
  readonly retryAfterMs: number | undefined;

  constructor(code: ErrorCode, message: string, retryAfterMs?: number) {
    super(message);
    this.code = code;
    this.retryAfterMs = retryAfterMs;
  }
}

export async function createInspector(parts: InspectorParts): Promise<Inspector> {
  const { observer, relay, clock, log, writable } = parts;
  const node = relay.nodeId;
  const sockets = createLiveSockets({ observer, node, clock });
  const redactor = createRedactor(await parts.keys.sharedSecret('inspector digests'));
  const tap = createTap({ observer, node, sockets, redactor, clock });
  const startCounts = () => countNode({ observer, node, sockets, clock });
  const nodes = await createNodes({ relay, tap, sockets, startCounts, clock, log });
  const facts = createFacts({ ...parts, nodes });
  const access = createAccess({ token: parts.token, clock, log });
  let droppedTotal = 0;
  const watchOverview = createOverview(parts, nodes, () => droppedTotal);

  const app = fastify({
    logger: false,
    bodyLimit: BODY_BYTES_MAX,
    exposeHeadRoutes: false,
    return503OnClosing: false,
    routerOptions: { maxParamLength: PARAMETER_LENGTH_MAX },
  });
  await app.register(cookie);
  app.removeContentTypeParser('text/plain');

  app.addHook('onRequest', async (request, reply) => {
    reply.headers(HEADERS);
    if (request.url.startsWith('/api/')) reply.header('cache-control', 'no-store');
    // SameSite keeps the cookie from other sites; this keeps them from what needs none, and from their own subdomains.
    if (request.method !== 'GET' && !isSameOrigin(request)) {
      throw new Refusal('FORBIDDEN', 'this comes from another origin');
    }
  });

  app.setErrorHandler((error, request, reply) => {
    if (error instanceof Refusal) return refuse(reply, error);
    if (error instanceof GatewayError) {
      const code = error.code === 'UNAVAILABLE' ? 'UNAVAILABLE' : 'BAD_REQUEST';
      return refuse(reply, new Refusal(code, error.message, error.retryAfterMs));
    }
    const status = (error as { statusCode?: number }).statusCode ?? 500;
    if (status < 500) return refuse(reply, new Refusal('BAD_REQUEST', 'the request can not be read'));
    log.error({ path: request.routeOptions.url, error: error as Error }, 'admin: a request failed');
    return refuse(reply, new Refusal('INTERNAL', 'a fault of the server; its log tells more'));
  });

  // ── Access

  app.post(adminRoutes.login.path, async (request, reply) => {
    const { token } = parsed(adminRoutes.login.body, request.body);
    const outcome = access.login(token, request.ip);
    if (outcome.kind !== 'session') throw refusalOf(outcome);
    reply.setCookie(cookieName(request), outcome.id, {
      httpOnly: true,
      sameSite: 'strict',
      path: '/',
      secure: request.headers['x-forwarded-proto'] === 'https',
    });
    return { writable };
  });

  app.post(adminRoutes.logout.path, async (request, reply) => {
    const name = cookieName(request);
    const id = request.cookies[name];
    if (id !== undefined && access.session(id) !== null) {
      access.logout(id);
      log.info({ address: request.ip }, 'admin: logged out');
    }
    reply.clearCookie(name, { path: '/' });
    return {};
  });

  /** Who asks: a session, or whoever shows the token itself, as `keygate tail` does. */
  function admitted(request: FastifyRequest): Session | null {
    const session = access.session(request.cookies[cookieName(request)]);
    if (session !== null) return session;
    const bearer = /^Bearer (\S+)$/i.exec(request.headers.authorization ?? '')?.[1];
    if (bearer === undefined) throw new Refusal('UNAUTHENTICATED', 'log in first');
    const outcome = access.check(bearer, request.ip);
    if (outcome.kind !== 'right') throw refusalOf(outcome);
    return null;
  }

  app.get(adminRoutes.session.path, async (request) => {
    const session = admitted(request);
    // The token itself does not expire; a moment far away says so.
    const expiresAt = isoTime(session?.expiresAtMs ?? clock.nowMs() + 24 * 3_600_000);
    return { writable, node, version: parts.version, expiresAt };
  });

  // ── Streams

  let openStreams = 0;

  /** Hands the response over to `show`, until it, or the session that opened it, ends. */
  function stream(
    request: FastifyRequest,
    reply: FastifyReply,
    show: (response: ServerResponse) => void,
  ): void {
    const session = admitted(request);
    if (openStreams >= STREAMS_MAX) {
      throw new Refusal('UNAVAILABLE', 'too many streams are open on this node', 5_000);
    }
    openStreams += 1;
    reply.hijack();
    const response = reply.raw;
    for (const [name, value] of Object.entries(HEADERS)) response.setHeader(name, value);
    const forget = session?.onEnd(() => response.destroy());
    response.once('close', () => {
      openStreams -= 1;
      forget?.();
    });
    response.on('error', () => {});
    show(response);
  }

  app.get(adminRoutes.stream.path, async (request, reply) => {
    admitted(request);
    const read = filterFromQuery(new URLSearchParams(queryOf(request)));
    if (!read.ok) throw new Refusal('BAD_REQUEST', read.message);
    const onDropped = (count: number): void => {
      droppedTotal += count;
    };
    stream(request, reply, (response) =>
      streamEvents(response, { nodes, filter: read.filter, clock, onDropped }),
    );
  });

  app.get(adminRoutes.overview.path, async (request, reply) => {
    stream(request, reply, (response) => streamOverview(response, { watch: watchOverview, clock }));
  });

  // ── Facts

  app.get(adminRoutes.sockets.path, async (request) => {
    admitted(request);
    return await facts.sockets(parsed(adminRoutes.sockets.query, request.query));
  });

  app.get(adminRoutes.device.path, async (request) => {
    admitted(request);
    const { messageId } = parsed(adminRoutes.device.query, request.query);
    const [, userId, deviceId] = /^(.+)\.(\d{1,3})$/.exec(parameter(request, 'device')) ?? [];
    const device = deviceAddress.safeParse({ userId, deviceId: Number(deviceId) });
    if (!device.success) throw new Refusal('BAD_REQUEST', 'a device is written as alice.1');
    return await facts.device(device.data, messageId ?? null);
  });

  app.get(adminRoutes.message.path, async (request) => {
    admitted(request);
    const { recipient } = parsed(adminRoutes.message.query, request.query);
    const asked = parsed(adminRoutes.device.query, { messageId: parameter(request, 'messageId') });
    return await facts.message(asked.messageId!, recipient ?? null);
  });

  app.post(adminRoutes.disconnect.path, async (request) => {
    admitted(request);
    const target = parsed(adminRoutes.disconnect.body, request.body);
    if (!writable) throw new Refusal('FORBIDDEN', 'this inspector only reads; ADMIN_WRITE allows more');
    const answer = await nodes.askOne(target.node, { about: 'disconnect', socket: target.socket });
    log.info(
      { address: request.ip, node: target.node, socket: target.socket, disconnected: answer },
      'admin: a socket was disconnected',
    );
    if (answer === null) throw new Refusal('UNAVAILABLE', 'that node did not answer');
    return { disconnected: answer };
  });

  // ── The page

  if (existsSync(PAGE_FOLDER)) {
    await app.register(files, {
      root: PAGE_FOLDER,
      wildcard: false,
      setHeaders(response, path) {
        // Vite writes a hash of the content into the names of its assets.
        const isNamedByHash = path.includes('/assets/');
        response.header('cache-control', isNamedByHash ? 'public, max-age=31536000, immutable' : 'no-store');
      },
    });
  }
  app.setNotFoundHandler((request, reply) => {
    const isPage = request.method === 'GET' && !request.url.startsWith('/api/');
    if (isPage && existsSync(PAGE_FOLDER)) return reply.sendFile('index.html');
    const message = isPage ? 'the page is not built: npm run build' : 'there is nothing at this address';
    return refuse(reply, new Refusal('NOT_FOUND', message));
  });
  await app.ready();

  return {
    handle: (request, response) => app.routing(request, response),

    async close() {
      await nodes.stop();
      await app.close();
    },
  };
}

/** @returns how to watch the seconds of all nodes; the store is asked for low devices now and then while anybody does */
function createOverview(
  { store, lowThreshold, clock }: InspectorParts,
  nodes: Nodes,
  droppedTotal: () => number,
): (listener: (sample: OverviewSample) => void) => () => void {
  let lowDevices: LowDevice[] | null = [];
  let askedAtMs = Number.NEGATIVE_INFINITY;

  async function refresh(): Promise<void> {
    if (!hasPassed(clock, askedAtMs, LOW_DEVICES_PERIOD_MS)) return;
    askedAtMs = clock.nowMs();
    lowDevices = await store.lowDevices(lowThreshold, LOW_DEVICES_MAX);
  }

  return (listener) =>
    nodes.count((samples) => {
      void refresh();
      const low = lowDevices?.map(({ device, ...counts }) => ({ device: addressKey(device), ...counts }));
      listener(
        merged(samples, {
          atMs: clock.nowMs(),
          nodes: nodes.states(),
          lowDevices: low ?? null,
          droppedTotal: droppedTotal(),
        }),
      );
    });
}

function refuse(reply: FastifyReply, { code, message, retryAfterMs }: Refusal): FastifyReply {
  const error = { code, message, ...(retryAfterMs === undefined ? {} : { retryAfterMs }) };
  if (retryAfterMs !== undefined) reply.header('retry-after', Math.ceil(retryAfterMs / 1_000));
  return reply.code(STATUS[code]).header('cache-control', 'no-store').send({ error });
}

function refusalOf(outcome: Exclude<ReturnType<Access['check']>, { kind: 'right' }>): Refusal {
  return outcome.kind === 'wrong'
    ? new Refusal('UNAUTHENTICATED', 'this is not the admin token')
    : new Refusal('RATE_LIMITED', 'too many wrong tokens were shown', Math.ceil(outcome.retryAfterMs));
}

interface Checked<Value> {
  safeParse(value: unknown): { success: true; data: Value } | { success: false };
}

/** @throws Refusal BAD_REQUEST */
function parsed<Value>(schema: Checked<Value>, value: unknown): Value {
  const result = schema.safeParse(value);
  if (!result.success) throw new Refusal('BAD_REQUEST', 'the request is malformed');
  return result.data;
}

function parameter(request: FastifyRequest, name: string): string {
  return (request.params as Record<string, string>)[name] ?? '';
}

function queryOf(request: FastifyRequest): string {
  const mark = request.url.indexOf('?');
  return mark === -1 ? '' : request.url.slice(mark + 1);
}

/** Cookies know no ports: two nodes on one machine would log each other's viewers out. */
function cookieName(request: FastifyRequest): string {
  return `keygate_admin_${request.socket.localPort}`;
}

/** Browsers name the page that a request comes from; what names none is no browser's. */
function isSameOrigin({ headers }: FastifyRequest): boolean {
  const { origin, host } = headers;
  if (origin === undefined) return true;
  return URL.canParse(origin) && new URL(origin).host === host;
}
