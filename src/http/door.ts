/** The HTTP door: the same requests as by socket, under the names and shapes of `protocol/http-routes.ts`. */
import { randomUUID } from 'node:crypto';
import { lookup } from 'node:dns/promises';
import { METHODS, type Server } from 'node:http';
import fastify, { type FastifyReply, type FastifyRequest } from 'fastify';
import type { Clock } from '../lib/clock.ts';
import { nestsDeeper } from '../lib/json-depth.ts';
import { listenFault } from '../lib/listen-fault.ts';
import { GatewayError } from '../protocol/errors.ts';
import { httpRoutes } from '../protocol/http-routes.ts';
import { FRAME_BYTES_MAX, JSON_DEPTH_MAX, USER_ID_LENGTH_MAX } from '../protocol/limits.ts';
import type { Authenticator, Caller, KeysFound } from '../requests/authenticate.ts';
import { type Dispatch, draining } from '../requests/dispatch.ts';
import type { RequestContext } from '../requests/handlers.ts';
import type { Limits } from '../requests/limits.ts';
import type { Observer } from '../requests/observe.ts';
import { type AllowedOrigins, isOriginAllowed } from '../requests/origins.ts';
import { createAnswers, type RouteName } from './answers.ts';
import { HEADERS, malformed, refusalOf, refuse, refuseMethod, refuseUnreadable } from './refusals.ts';
import { UpgradableRequest } from './upgradable-request.ts';

export interface HttpDoorParts {
  dispatch: Dispatch;
  authenticator: Pick<Authenticator, 'authenticate'>;
  /** @throws GatewayError FORBIDDEN for a revoked token */
  refuseRevoked(caller: Caller): Promise<KeysFound>;
  limits: Pick<Limits, 'chargeArrival'>;
  origins: AllowedOrigins;
  clock: Clock;
  observer: Observer;
  isDraining(): boolean;
}

export interface HttpDoor {
  /** Socket.IO hangs on it too, and takes the upgrades at its own path. */
  server: Server;
  /**
   * @param host null for every address of the machine
   * @param port 0 for any free one
   * @returns the URL of where it listens
   * @throws Error with one sentence for the operator where the address can't be had
   */
  listen(host: string | null, port: number): Promise<string>;
  /** Takes nothing new, lets the requests under way be answered, and after a grace cuts what is left. */
  close(): Promise<void>;
}

/** The header lines of a request must be in by then; the whole of it by the second. */
const HEADERS_TIMEOUT_MS = 10_000;
const REQUEST_TIMEOUT_MS = 30_000;
/** How late either may be noticed. */
const TIMEOUT_CHECK_MS = 5_000;
/** More than the minute for which proxies like to keep idle connections, so that they meet no closed one. */
const KEEP_ALIVE_TIMEOUT_MS = 65_000;
/** A connection on which nothing moves: its client doesn't read the answer. */
const STALLED_TIMEOUT_MS = 60_000;
const CLOSE_GRACE_MS = 5_000;
/** How long a browser may remember the answer to its preflight. */
const PREFLIGHT_AGE_S = 600;
/** In an address, each character of a user id may stand percent-encoded. */
const PARAMETER_LENGTH_MAX = 3 * USER_ID_LENGTH_MAX;

/** Where sockets are opened: a client that tries another transport first asks here. */
const SOCKET_PATH = '/socket.io/';

/** What was learnt of a request before its body is read. */
interface Admission {
  caller: Caller;
  name: RouteName;
  startedMs: number;
  /** Null until the store has told it, and said that the token was not revoked. */
  found: KeysFound | null;
}

/** @returns the door, not yet listening */
export async function createHttpDoor(parts: HttpDoorParts): Promise<HttpDoor> {
  const { authenticator, clock, observer, origins } = parts;
  let closing = false;

  const app = fastify({
    logger: false,
    bodyLimit: FRAME_BYTES_MAX,
    http: {
      headersTimeout: HEADERS_TIMEOUT_MS,
      connectionsCheckingInterval: TIMEOUT_CHECK_MS,
      IncomingMessage: UpgradableRequest,
    },
    requestTimeout: REQUEST_TIMEOUT_MS,
    keepAliveTimeout: KEEP_ALIVE_TIMEOUT_MS,
    connectionTimeout: STALLED_TIMEOUT_MS,
    // A claim must not happen by a look.
    exposeHeadRoutes: false,
    // What comes while the door closes gets an answer of the same form as before.
    return503OnClosing: false,
    routerOptions: { maxParamLength: PARAMETER_LENGTH_MAX },
    // An address that can't be decoded: it reaches no hook.
    frameworkErrors: (_, request, reply) => {
      dress(request as FastifyRequest, reply as FastifyReply);
      refuse(reply as FastifyReply, malformed('the address can not be read'));
    },
    clientErrorHandler: refuseUnreadable,
  });
  app.removeContentTypeParser(['text/plain', 'application/json']);
  const parseJson = app.getDefaultJsonParser('error', 'error');
  app.addContentTypeParser('application/json', { parseAs: 'string' }, (request, body: string, done) => {
    if (nestsDeeper(body, JSON_DEPTH_MAX)) return done(malformed('the body is nested too deep'));
    return parseJson(request, body, done);
  });
  for (const method of METHODS) {
    if (!app.supportedMethods.includes(method)) app.addHttpMethod(method);
  }
  app.decorateRequest('admission', null);

  const isClosing = (): boolean => closing || parts.isDraining();

  /** The headers of every answer. */
  function dress(request: FastifyRequest, reply: FastifyReply): void {
    reply.headers(HEADERS);
    const { origin } = request.headers;
    if (origin !== undefined && isOriginAllowed(origins, origin)) {
      reply.header('access-control-allow-origin', origin);
      reply.header('access-control-expose-headers', 'Retry-After, WWW-Authenticate');
    }
    if (isClosing()) reply.header('connection', 'close');
  }

  app.addHook('onRequest', async (request, reply) => {
    dress(request, reply);
    if (!isOriginAllowed(origins, request.headers.origin)) {
      throw new GatewayError('FORBIDDEN', 'this origin is not allowed');
    }
    if (!request.is404) return;
    if (request.method === 'HEAD') return refuseMethod(reply, []);
    if (request.url.startsWith(SOCKET_PATH)) {
      return refuse(reply, malformed("a socket is opened as a WebSocket: transports: ['websocket']"));
    }
    // The table of codes knows no addresses: HTTP's own status says it.
    return refuse(reply, malformed('there is nothing at this address'), 404);
  });

  app.setErrorHandler((error, request, reply) => {
    const admission = request.getDecorator<Admission | null>('admission');
    const errorId = randomUUID();
    const refusal = refusalOf(error, errorId);
    const { code } = refusal;
    if (admission === null) {
      observer.handshakeRefused({ door: 'http', code, errorId, error });
    } else {
      const { name, startedMs } = admission;
      const { device } = admission.caller;
      if (code === 'INTERNAL') observer.requestFailed({ name, device, errorId, error });
      observer.requestEnded({ door: 'http', device, name, code, durationMs: clock.nowMs() - startedMs });
    }
    return refuse(reply, refusal);
  });

  /** Lets in whoever shows a good token, before a byte of the body is read. */
  function admit(name: RouteName) {
    return async (request: FastifyRequest): Promise<void> => {
      const startedMs = clock.nowMs();
      if (isClosing()) {
        throw draining();
      }
      const caller = await authenticator.authenticate(bearerToken(request.headers.authorization));
      const admission: Admission = { caller, name, startedMs, found: null };
      request.setDecorator<Admission>('admission', admission);
      // Also what turns out to be unreadable, or revoked, has cost something.
      await parts.limits.chargeArrival(caller.device, name);
      admission.found = await parts.refuseRevoked(caller);
    };
  }

  const answers = createAnswers(parts.dispatch);
  for (const name of Object.keys(httpRoutes) as RouteName[]) {
    const { method, path } = httpRoutes[name];
    const methods = [method, 'OPTIONS'];
    app.route({
      method,
      url: path,
      onRequest: admit(name),
      handler: async (request, reply) => {
        const answer = await answers[name](request, contextOf(request));
        return answer.ok ? reply.send({ success: true, ...answer.data }) : refuse(reply, answer.error);
      },
    });
    app.route({
      method: 'OPTIONS',
      url: path,
      onRequest: async (_, reply) =>
        reply
          .code(204)
          .headers({
            allow: methods.join(', '),
            'access-control-allow-methods': method,
            'access-control-allow-headers': 'Authorization, Content-Type, Idempotency-Key',
            'access-control-max-age': PREFLIGHT_AGE_S,
          })
          .send(),
      handler: answeredBefore,
    });
    app.route({
      method: app.supportedMethods.filter((other) => !methods.includes(other)),
      url: path,
      onRequest: async (_, reply) => refuseMethod(reply, methods),
      handler: answeredBefore,
    });
  }
  await app.ready();

  return {
    server: app.server,

    async listen(host, port) {
      try {
        const at = host === 'localhost' ? await oneAddressOf(host) : (host ?? '::');
        return await app.listen({ host: at, port }).catch((error: NodeJS.ErrnoException) => {
          if (host !== null || error.code !== 'EAFNOSUPPORT') throw error;
          return app.listen({ host: '0.0.0.0', port });
        });
      } catch (error) {
        throw listenFault(error, { host, port, hostName: 'HOST', portName: 'PORT' });
      }
    },

    async close() {
      closing = true;
      // A client in the middle of a request that never ends would keep the server open.
      const grace = clock.after(CLOSE_GRACE_MS, () => app.server.closeAllConnections());
      await app.close();
      grace.cancel();
    },
  };
}

/** The framework would listen at each address of this name, at all but one on a server that nothing here can bound. */
async function oneAddressOf(host: string): Promise<string> {
  return (await lookup(host, { verbatim: false })).address;
}

function contextOf(request: FastifyRequest): RequestContext {
  const { caller, found } = request.getDecorator<Admission>('admission');
  return {
    ...{ door: 'http', device: caller.device, connection: null, isArrivalCharged: true, found },
    isAwaited: () => !request.raw.socket.destroyed,
    tokenAge: () => caller,
  };
}

/** @returns undefined where there is none, which the authenticator refuses */
function bearerToken(authorization: string | undefined): string | undefined {
  return /^Bearer +(\S+)$/i.exec(authorization ?? '')?.[1];
}

/** Fastify demands a handler also where a hook has answered. */
async function answeredBefore(): Promise<never> {
  throw new Error('a request was handled that its hook should have answered');
}
