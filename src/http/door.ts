/** The HTTP door: the same requests as by socket, under the names and shapes of `protocol/http-routes.ts`. */
import { randomUUID } from 'node:crypto';
import { METHODS, type Server, STATUS_CODES } from 'node:http';
import type { Socket } from 'node:net';
import fastify, { type FastifyReply, type FastifyRequest } from 'fastify';
import type { Clock } from '../lib/clock.ts';
import { nestsDeeper } from '../lib/json-depth.ts';
import { ERRORS, type ErrorObject, GatewayError, type Issue } from '../protocol/errors.ts';
import type { RequestName } from '../protocol/events.ts';
import { httpRoutes } from '../protocol/http-routes.ts';
import type { DeviceBundle } from '../protocol/keys.ts';
import {
  DEVICE_ID_MAX,
  FRAME_BYTES_MAX,
  ISSUES_MAX,
  JSON_DEPTH_MAX,
  USER_ID_LENGTH_MAX,
} from '../protocol/limits.ts';
import type { Authenticator, Caller } from '../requests/authenticate.ts';
import { badRequest, type Dispatch, draining } from '../requests/dispatch.ts';
import type { RequestContext } from '../requests/handlers.ts';
import type { Limits } from '../requests/limits.ts';
import type { Observer } from '../requests/observe.ts';
import { type AllowedOrigins, isOriginAllowed } from '../requests/origins.ts';

export interface HttpDoorParts {
  dispatch: Dispatch;
  authenticator: Authenticator;
  /** @throws GatewayError FORBIDDEN for a revoked token */
  refuseRevoked(caller: Caller): Promise<void>;
  limits: Pick<Limits, 'chargeArrival'>;
  origins: AllowedOrigins;
  clock: Clock;
  observer: Observer;
  isDraining(): boolean;
}

export interface HttpDoor {
  /** Socket.IO hangs on it too, and takes what begins with its own path. */
  server: Server;
  /**
   * @param host null for every address of the machine
   * @param port 0 for any free one
   * @returns the URL of where it listens
   * @throws Error where the address can't be had
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

const HEADERS = {
  // A stored answer would hand one prekey to two peers, or tell of keys that are gone.
  'cache-control': 'no-store',
  'content-security-policy': "default-src 'none'; frame-ancestors 'none'",
  'referrer-policy': 'no-referrer',
  vary: 'Origin',
  'x-content-type-options': 'nosniff',
} as const;

type RouteName = keyof typeof httpRoutes & RequestName;

/** What was learnt of a request before its body is read. */
interface Admission {
  caller: Caller;
  name: RouteName;
  startedMs: number;
}

/** @returns the door, not yet listening */
export async function createHttpDoor(parts: HttpDoorParts): Promise<HttpDoor> {
  const { authenticator, clock, observer, origins } = parts;
  let closing = false;

  const app = fastify({
    logger: false,
    bodyLimit: FRAME_BYTES_MAX,
    http: { headersTimeout: HEADERS_TIMEOUT_MS, connectionsCheckingInterval: TIMEOUT_CHECK_MS },
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
    // The table of codes knows no addresses: HTTP's own status says it.
    return refuse(reply, malformed('there is nothing at this address'), 404);
  });

  app.setErrorHandler((error, request, reply) => {
    const admission = request.getDecorator<Admission | null>('admission');
    const errorId = randomUUID();
    const refusal = refusalOf(error, errorId);
    const { code } = refusal;
    if (admission === null) {
      observer.handshakeRefused({ code, errorId, error });
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
      request.setDecorator<Admission>('admission', { caller, name, startedMs });
      // Also what turns out to be unreadable, or revoked, has cost something.
      await parts.limits.chargeArrival(caller.device, name);
      await parts.refuseRevoked(caller);
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
        const { caller } = request.getDecorator<Admission>('admission');
        const answer = await answers[name](request, caller);
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
      if (host !== null) return await app.listen({ host, port });
      try {
        return await app.listen({ host: '::', port });
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== 'EAFNOSUPPORT') throw error;
        return await app.listen({ host: '0.0.0.0', port });
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

type Answer = { ok: true; data: Record<string, unknown> } | { ok: false; error: ErrorObject };

/** One entry per route: what the HTTP client wrote becomes a request of the registry, and its reply an answer. */
function createAnswers(
  dispatch: Dispatch,
): Record<RouteName, (request: FastifyRequest, caller: Caller) => Promise<Answer>> {
  const contextOf = (caller: Caller): RequestContext => ({
    ...{ door: 'http', device: caller.device, connection: null, isArrivalCharged: true },
    tokenAge: () => caller,
  });

  return {
    async uploadKeys(request, caller) {
      refuseOthers(request.query, []);
      const { shape } = httpRoutes.uploadKeys.body;
      const { keyBundle } = fieldsOf(request.body, Object.keys(shape), []);
      const { identityPubKey: identityKey, ...rest } = fieldsOf(
        keyBundle,
        Object.keys(shape.keyBundle.shape),
        ['keyBundle'],
      );
      const reply = await dispatch('uploadKeys', { ...rest, identityKey }, contextOf(caller));
      return asWritten(reply, ([field, ...deeper]) =>
        field === undefined
          ? ['keyBundle']
          : ['keyBundle', field === 'identityKey' ? 'identityPubKey' : field, ...deeper],
      );
    },

    async requestBundle(request, caller) {
      const { deviceId: wanted } = refuseOthers(request.query, ['deviceId']);
      const { userId } = request.params as { userId: string };
      const claimId = request.headers['idempotency-key'] ?? randomUUID();
      let deviceId = wanted === undefined ? null : deviceIdOf(wanted);
      if (deviceId === null) {
        const listed = await dispatch(
          'listDevices',
          { userId },
          { ...contextOf(caller), isArrivalCharged: false },
        );
        if (!listed.ok) return listed;
        deviceId = Math.min(...listed.data.devices.map((listedDevice) => listedDevice.deviceId));
      }
      const reply = await dispatch('requestBundle', { claimId, userId, deviceId }, contextOf(caller));
      if (reply.ok) return { ok: true, data: { keyBundle: keyBundleOf(reply.data.devices[0]!) } };
      return asWritten(reply, ([field, ...deeper]) =>
        field === 'claimId' ? ['Idempotency-Key'] : field === undefined ? [] : [field, ...deeper],
      );
    },

    async checkPreKeys(request, caller) {
      refuseOthers(request.query, []);
      return await dispatch('checkPreKeys', {}, contextOf(caller));
    },

    async addPreKeys(request, caller) {
      refuseOthers(request.query, []);
      const { preKeys } = fieldsOf(request.body, Object.keys(httpRoutes.addPreKeys.body.shape), []);
      if (preKeys === undefined) throw badRequest([{ path: ['preKeys'], message: 'must be a list' }]);
      const reply = await dispatch('addPreKeys', { oneTimePreKeys: preKeys }, contextOf(caller));
      return asWritten(reply, ([field, ...deeper]) => (field === undefined ? [] : ['preKeys', ...deeper]));
    },

    async keyStats(request, caller) {
      refuseOthers(request.query, []);
      return await dispatch('keyStats', {}, contextOf(caller));
    },

    async keyStatus(request, caller) {
      refuseOthers(request.query, []);
      return await dispatch('keyStatus', {}, contextOf(caller));
    },

    async validateKeys(request, caller) {
      refuseOthers(request.query, []);
      return await dispatch('validateKeys', request.body, contextOf(caller));
    },
  };
}

function keyBundleOf(bundle: DeviceBundle) {
  const { identityKey, oneTimePreKey, oneTimePreKeyAbsent: _, ...rest } = bundle;
  return {
    ...rest,
    identityPubKey: identityKey,
    oneTimePreKeys: oneTimePreKey === null ? [] : [oneTimePreKey],
  };
}

/** @throws GatewayError BAD_REQUEST */
function deviceIdOf(text: unknown): number {
  if (typeof text === 'string' && /^[1-9]\d{0,2}$/.test(text) && Number(text) <= DEVICE_ID_MAX) {
    return Number(text);
  }
  throw badRequest([{ path: ['deviceId'], message: `must be a whole number from 1 to ${DEVICE_ID_MAX}` }]);
}

/** @throws GatewayError BAD_REQUEST for a query parameter that the route doesn't have */
function refuseOthers(query: unknown, names: readonly string[]): Record<string, unknown> {
  return fieldsOf(query, names, []);
}

/** @throws GatewayError BAD_REQUEST unless `value` is an object of no other fields than `names` */
function fieldsOf(value: unknown, names: readonly string[], path: Issue['path']): Record<string, unknown> {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw badRequest([{ path, message: 'must be an object' }]);
  }
  const others = Object.keys(value).filter((name) => !names.includes(name));
  if (others.length === 0) return value as Record<string, unknown>;
  throw badRequest(
    others.slice(0, ISSUES_MAX).map((name) => ({
      path: [...path, name.slice(0, NAME_LENGTH_MAX)],
      message: 'is not a field of this request',
    })),
  );
}

/** What a client sent comes back in no greater length than a name has. */
const NAME_LENGTH_MAX = 120;

/** Faults are named as the HTTP client wrote its fields, not as the registry calls them. */
function asWritten(reply: Answer, written: (path: Issue['path']) => Issue['path']): Answer {
  if (reply.ok || reply.error.details === undefined || !('issues' in reply.error.details)) return reply;
  const issues = reply.error.details.issues.map(({ path, message }) => ({ path: written(path), message }));
  const message = reply.error.code === 'BAD_REQUEST' ? badRequest(issues).message : reply.error.message;
  return { ok: false, error: { ...reply.error, message, details: { issues } } };
}

/** @returns undefined where there is none, which the authenticator refuses */
function bearerToken(authorization: string | undefined): string | undefined {
  return /^Bearer +(\S+)$/i.exec(authorization ?? '')?.[1];
}

function malformed(message: string): GatewayError {
  return new GatewayError('BAD_REQUEST', message, { details: { issues: [{ path: [], message }] } });
}

/** What the client may know of something thrown: Fastify's refusals of a body, and nothing of a fault of ours. */
function refusalOf(error: unknown, errorId: string): GatewayError {
  if (error instanceof GatewayError) return error;
  const { code, statusCode = 500 } = error as { code?: string; statusCode?: number };
  if (code === 'FST_ERR_CTP_BODY_TOO_LARGE') return new GatewayError('PAYLOAD_TOO_LARGE');
  if (code === 'FST_ERR_CTP_INVALID_MEDIA_TYPE') return malformed('the body must be application/json');
  if (statusCode >= 400 && statusCode < 500) return malformed('the body can not be read as JSON');
  return new GatewayError('INTERNAL', undefined, { details: { errorId } });
}

function refuse(
  reply: FastifyReply,
  refusal: GatewayError | ErrorObject,
  httpStatus: number = ERRORS[refusal.code].httpStatus,
): FastifyReply {
  const error = refusal instanceof GatewayError ? refusal.toObject() : refusal;
  if (httpStatus === 401) reply.header('www-authenticate', 'Bearer');
  if (error.retryAfterMs !== undefined) reply.header('retry-after', Math.ceil(error.retryAfterMs / 1000));
  return reply.code(httpStatus).send({ success: false, error });
}

function refuseMethod(reply: FastifyReply, methods: readonly string[]): FastifyReply {
  reply.header('allow', methods.join(', '));
  return refuse(reply, malformed('this method is not allowed here'), 405);
}

/** Fastify demands a handler also where a hook has answered. */
async function answeredBefore(): Promise<never> {
  throw new Error('a request was handled that its hook should have answered');
}

/** Answers what is no HTTP, has too many header lines, or comes too slowly; no hook ever sees it. */
function refuseUnreadable(error: Error & { code?: string }, socket: Socket): void {
  if (error.code === 'ECONNRESET' || !socket.writable) {
    socket.destroy();
    return;
  }
  const status =
    error.code === 'HPE_HEADER_OVERFLOW' ? 431 : error.code === 'ERR_HTTP_REQUEST_TIMEOUT' ? 408 : 400;
  const refusal =
    status === 431 ? new GatewayError('PAYLOAD_TOO_LARGE') : malformed('the request can not be read');
  const body = JSON.stringify({ success: false, error: refusal.toObject() });
  const head = [
    `HTTP/1.1 ${status} ${STATUS_CODES[status]}`,
    'content-type: application/json; charset=utf-8',
    `content-length: ${Buffer.byteLength(body)}`,
    'connection: close',
    ...Object.entries(HEADERS).map(([name, value]) => `${name}: ${value}`),
  ];
  socket.end(`${head.join('\r\n')}\r\n\r\n${body}`, () => socket.destroy());
}
