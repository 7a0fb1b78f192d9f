/** The Socket.IO door: who may connect, and how the whole of it drains. */
import { randomUUID } from 'node:crypto';
import type { Server as HttpServer, IncomingMessage } from 'node:http';
import type { Socket as TcpSocket } from 'node:net';
import { type DefaultEventsMap, Server } from 'socket.io';
import type { Courier } from '../delivery/courier.ts';
import type { Clock } from '../lib/clock.ts';
import type { Log } from '../lib/log.ts';
import { GatewayError } from '../protocol/errors.ts';
import { FRAME_BYTES_MAX } from '../protocol/limits.ts';
import type { ClientToServerEvents, ServerToClientEvents } from '../protocol/socket-types.ts';
import type { Authenticator } from '../requests/authenticate.ts';
import type { ClientAddressOf } from '../requests/client-address.ts';
import { badRequest, type Dispatch, draining } from '../requests/dispatch.ts';
import type { Limits } from '../requests/limits.ts';
import type { Observer } from '../requests/observe.ts';
import { boundConnections } from './bound-connections.ts';
import { acceptConnection, type GatewaySocket, type SocketData } from './connection.ts';
import { createFlow } from './flow.ts';
import { boundedParser } from './parser.ts';
import { refuseUpgrade } from './refuse-upgrade.ts';
import { watchStrangers, webSocketOf } from './strangers.ts';

export interface SocketDoorParts {
  server: HttpServer;
  authenticator: Pick<Authenticator, 'authenticate'>;
  courier: Courier;
  dispatch: Dispatch;
  observer: Observer;
  clock: Clock;
  isOriginAllowed(origin: string | undefined): boolean;
  clientAddressOf: ClientAddressOf;
  limits: Limits;
  log: Log;
  /** Open connections of this node; null for no bound. */
  connectionsMax: number | null;
  /** Open connections of one address on this node; 0 for no bound. */
  connectionsPerAddressMax: number;
  /** Frames of one connection in a second, over ten seconds; 0 for no bound. */
  framesPerSecondMax: number;
  isDraining(): boolean;
}

export interface SocketDoor {
  count(): number;
  /**
   * Asks every client to come back later, spread over `spreadMs`, and ends their connections as that time passes, each
   * when the requests that it has under way are answered.
   */
  drain(spreadMs: number): Promise<void>;
  close(): Promise<void>;
}

/** Namespaces that one connection may ask for in vain. */
const NAMESPACES_MAX = 16;
/** How long requests that are under way may hold up the end of their connection: longer than nearly all of them take. */
const DRAIN_ANSWER_MAX_MS = 5_000;
/** How long clients have to answer the closing handshake when the door closes. */
const GOODBYE_WAIT_MAX_MS = 1_000;
/** An address with too many connections open may try again so much later. */
const CROWDED_RETRY_MS = 10_000;

export function createSocketDoor(parts: SocketDoorParts): SocketDoor {
  const { clock, log, observer } = parts;
  if (parts.connectionsMax !== null) {
    boundConnections(parts.server, { max: parts.connectionsMax, clock, log, observer });
  }
  const requestListeners = parts.server.listeners('request') as (() => void)[];
  const io = new Server<ClientToServerEvents, ServerToClientEvents, DefaultEventsMap, SocketData>(
    parts.server,
    {
      // One transport: no sticky sessions, and no long poll that a proxy may buffer.
      transports: ['websocket'],
      serveClient: false,
      maxHttpBufferSize: FRAME_BYTES_MAX,
      parser: boundedParser,
      perMessageDeflate: false,
      // Whoever asks to upgrade at another address is answered below.
      destroyUpgrade: false,
      pingInterval: 25_000,
      pingTimeout: 20_000,
      cleanupEmptyChildNamespaces: true,
      // A refused upgrade is answered here, and the engine hears no more of it.
      allowRequest: (request, allow) => {
        heedErrors(request.socket);
        admitUpgrade(request).then(
          () => {
            // The answer and the engine's first packet leave in one write.
            request.socket.cork();
            allow(null, true);
            process.nextTick(uncork, request.socket);
          },
          (error: unknown) => refuseUpgrade(request.socket, refusalOf(error)),
        );
      },
    },
  );

  // The engine is for upgrades alone. Without one a request is like any other, and the HTTP door's to refuse.
  parts.server.removeAllListeners('request');
  for (const listener of requestListeners) parts.server.on('request', listener);

  function refusalOf(error: unknown): GatewayError {
    const errorId = randomUUID();
    const refusal =
      error instanceof GatewayError
        ? error
        : new GatewayError('INTERNAL', undefined, { details: { errorId } });
    observer.handshakeRefused({ door: 'socket', code: refusal.code, errorId, error });
    return refusal;
  }

  /** Open connections by address. */
  const connectionCounts = new Map<string, number>();

  /**
   * What is judged before the connection becomes a WebSocket. A page of a foreign origin learns no more than that it
   * failed: that is how browsers tell of a refused upgrade, while every later refusal bears an error object.
   */
  async function admitUpgrade({ url = '', headers, socket }: IncomingMessage): Promise<void> {
    // The engine itself would say so behind an answer that has been given.
    if (!/[?&]EIO=4(&|$)/.test(url)) {
      throw badRequest([
        { path: [], message: 'speak protocol 4 of Engine.IO, as clients of Socket.IO 3 and later do' },
      ]);
    }
    // A WebSocket knows no CORS: without this, any page could connect with what it has got hold of.
    if (!parts.isOriginAllowed(headers.origin)) {
      throw new GatewayError('FORBIDDEN', 'this origin is not allowed');
    }
    const address = parts.clientAddressOf({
      remoteAddress: socket.remoteAddress,
      forwardedFor: headers['x-forwarded-for'],
    });
    const { connectionsPerAddressMax } = parts;
    if (connectionsPerAddressMax > 0) {
      if ((connectionCounts.get(address) ?? 0) >= connectionsPerAddressMax) {
        observer.limitHit({ limit: 'connectionsPerAddress', device: null });
        throw new GatewayError('RATE_LIMITED', 'too many connections of this address', {
          retryAfterMs: CROWDED_RETRY_MS,
        });
      }
      connectionCounts.set(address, (connectionCounts.get(address) ?? 0) + 1);
      socket.on('close', () => {
        const left = (connectionCounts.get(address) ?? 1) - 1;
        if (left > 0) connectionCounts.set(address, left);
        else connectionCounts.delete(address);
      });
    }
    await parts.limits.chargeHandshake(address);
  }

  if (parts.framesPerSecondMax > 0) {
    // The engine tells of a frame before Socket.IO takes it apart.
    io.engine.on('connection', (conn: GatewaySocket['conn']) => {
      const flow = createFlow(parts.framesPerSecondMax, clock);
      let isCut = false;
      conn.on('packet', () => {
        if (isCut || flow.takes()) return;
        isCut = true;
        observer.limitHit({ limit: 'framesPerSocket', device: null });
        webSocketOf(conn).terminate();
      });
    });
  }

  // No answer is to be kept, not even that to a handshake.
  io.engine.on('headers', (headers: Record<string, string>) => {
    headers['Cache-Control'] = 'no-store';
  });

  // A connection can't be moved onto another WebSocket: what bounds it watches the one that it came by.
  io.engine.use((request: IncomingMessage, _response: unknown, next: (error?: Error) => void) => {
    next(/[?&]sid=/.test(request.url ?? '') ? new Error('a session stays on its connection') : undefined);
  });

  parts.server.on('upgrade', ({ url, socket }: IncomingMessage) => {
    if (url?.startsWith(`${io.path()}/`)) return;
    heedErrors(socket);
    refuseUpgrade(socket, badRequest([{ path: [], message: `sockets are opened at ${io.path()}/` }]), 404);
  });

  const strangers = watchStrangers(io.engine, clock);
  const webSockets = watchWebSockets(io.engine, clock);

  io.use((socket, next) => {
    admit(socket).then(
      () => next(),
      (error: unknown) => {
        const refusal = refusalOf(error);
        next(Object.assign(new Error(refusal.code), { data: refusal.toObject() }));
      },
    );
  });

  /** How many other namespaces a connection has asked for: each costs as much as many requests. */
  const strayed = new WeakMap<GatewaySocket['conn'], number>();

  // Every other namespace exists for the moment in which it is refused: only so does the client get an error object.
  io.of((_name, _auth, next) => next(null, true)).use((socket, next) => {
    const { conn } = socket;
    const asks = (strayed.get(conn) ?? 0) + 1;
    strayed.set(conn, asks);
    if (asks > NAMESPACES_MAX) webSocketOf(conn).terminate();
    const refusal = badRequest([{ path: [], message: 'there is one namespace, /' }]);
    next(Object.assign(new Error('Invalid namespace'), { data: refusal.toObject() }));
  });

  io.on('connection', (socket) => {
    strangers.admitted(socket.conn);
    if (socket.data.isDisplaced) socket.disconnect(true);
    // The drain has not seen it; an end by Socket.IO would tell its client not to come back.
    else if (parts.isDraining()) socket.conn.close();
  });

  /** Connections that have shown a token, good or not. */
  const asked = new WeakSet<GatewaySocket['conn']>();

  async function admit(socket: GatewaySocket): Promise<void> {
    // Socket.IO itself refuses a second socket of one connection only from when the first is taken in.
    if (asked.has(socket.conn)) {
      socket.conn.close();
      throw badRequest([{ path: [], message: 'a connection takes one token' }]);
    }
    asked.add(socket.conn);
    if (parts.isDraining()) {
      throw draining();
    }
    const caller = await parts.authenticator.authenticate(socket.handshake.auth.token);
    await parts.limits.chargeConnection(caller.device);
    await acceptConnection(parts, socket, caller);
  }

  return {
    count: () => io.sockets.sockets.size,

    async drain(spreadMs) {
      const sockets = [...io.sockets.sockets.values()];
      await Promise.all(
        sockets.map(async (socket, index) => {
          const delayMs = Math.round((spreadMs * index) / sockets.length);
          socket.emit('serverDraining', { retryAfterMs: delayMs });
          await new Promise<void>((resolve) => clock.after(delayMs, resolve));
          await socket.data.connection?.closeWhenAnswered('the node drains', DRAIN_ANSWER_MAX_MS);
        }),
      );
    },

    async close() {
      io.disconnectSockets(true);
      // Closes the engine and its sockets only: the HTTP server has an owner of its own.
      io.engine.close();
      await webSockets.end();
    },
  };
}

/**
 * Until it is a WebSocket nobody else hears of a socket's errors, and a reset while it is judged would end the process. A
 * function of its own, so that the listener, which stays, keeps nothing of the handshake.
 */
function heedErrors(socket: TcpSocket): void {
  socket.on('error', destroy);
}

function uncork(socket: TcpSocket): void {
  socket.uncork();
}

function destroy(this: TcpSocket): void {
  this.destroy();
}

/**
 * The engine forgets a connection as soon as it has asked its client to close it; a client that is silent would keep it,
 * and with it the process, for half a minute.
 */
function watchWebSockets(engine: Server['engine'], clock: Clock): { end(): Promise<void> } {
  const open = new Set<ReturnType<typeof webSocketOf>>();
  let onEmpty = (): void => {};
  let isOver = false;
  engine.on('connection', (conn: GatewaySocket['conn']) => {
    const webSocket = webSocketOf(conn);
    if (isOver) return webSocket.terminate();
    open.add(webSocket);
    webSocket.on('close', () => {
      open.delete(webSocket);
      if (open.size === 0) onEmpty();
    });
  });
  return {
    async end() {
      if (open.size > 0) {
        await new Promise<void>((resolve) => {
          onEmpty = resolve;
          clock.after(GOODBYE_WAIT_MAX_MS, resolve);
        });
      }
      isOver = true;
      for (const webSocket of open) webSocket.terminate();
    },
  };
}
