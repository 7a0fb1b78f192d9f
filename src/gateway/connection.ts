/** One socket's life: its requests, its session with the gate, its token's time, and its end. */
import type { DefaultEventsMap, Socket } from 'socket.io';
import type { Courier } from '../delivery/courier.ts';
import type { ServedSocket, Session } from '../delivery/session.ts';
import type { Clock, Timer } from '../lib/clock.ts';
import type { IncomingEnvelope } from '../protocol/envelope.ts';
import { GatewayError } from '../protocol/errors.ts';
import {
  inputIsOptional,
  type MessagesAcknowledgement,
  pushes,
  type Reply,
  type RequestName,
  requests,
} from '../protocol/events.ts';
import { ACKNOWLEDGEMENT_TIMEOUT_MS } from '../protocol/limits.ts';
import type { ClientToServerEvents, ServerToClientEvents } from '../protocol/socket-types.ts';
import type { Caller } from '../requests/authenticate.ts';
import { badRequest, type Dispatch } from '../requests/dispatch.ts';
import type { RequestContext } from '../requests/handlers.ts';
import type { Observer } from '../requests/observe.ts';
import { frameBytesOf } from './parser.ts';
import { webSocketOf } from './strangers.ts';

export interface SocketData {
  /** A newer connection took over while this one was still being taken in. */
  isDisplaced?: boolean;
}

export type GatewaySocket = Socket<ClientToServerEvents, ServerToClientEvents, DefaultEventsMap, SocketData>;

export interface ConnectionParts {
  courier: Courier;
  dispatch: Dispatch;
  observer: Observer;
  clock: Clock;
  isDraining(): boolean;
}

/** Requests of one socket that are carried out at once: no socket occupies the node by itself. */
const REQUESTS_UNDER_WAY_MAX = 32;
/** Requests of one socket that wait for those before them. */
const REQUESTS_WAITING_MAX = 1_024;
/** Frames of one socket whose requests are not answered yet. */
const REQUEST_BYTES_MAX = 16 * 1024 * 1024;
/** Bytes that wait to be read by one client: beyond it, it reads too slowly to be served. */
const UNREAD_BYTES_MAX = 8 * 1024 * 1024;
/** The client is told so long before its token ends, or at nine tenths of the token's time. */
const TOKEN_NOTICE_MS = 60_000;
/** After its token ran out, a socket may still bring a new one for so long. */
const TOKEN_GRACE_MS = 30_000;
const TOO_MANY_RETRY_MS = 500;

/**
 * Takes a socket in whose token is good: from when it resolves, its requests are answered.
 *
 * @throws GatewayError UNAVAILABLE when the store can't be reached
 */
export async function acceptConnection(
  parts: ConnectionParts,
  socket: GatewaySocket,
  caller: Caller,
): Promise<void> {
  const { courier, dispatch, observer, clock } = parts;
  const { device } = caller;
  // It may have ended while its token was checked, and then nobody tells of its end any more.
  if (socket.conn.readyState !== 'open') return;
  let ended = false;
  let session: Session | null = null;
  const unanswered = new Set<() => void>();

  const served: ServedSocket = {
    isOpen: () => !ended,
    push: (name, payload) => {
      observer.pushSent(device, session?.fence ?? null, name, payload);
      (socket.emit as (event: string, body: unknown) => void)(name, payload);
    },
    pushMessages,
    close,
    displace: () => {
      end('displaced');
      // Socket.IO ignores this for a socket that is still being taken in: its door does it then.
      socket.data.isDisplaced = true;
      socket.disconnect(true);
    },
  };

  /** Resolves null where nothing usable came in time. */
  function pushMessages(envelopes: IncomingEnvelope[]): Promise<MessagesAcknowledgement | null> {
    return new Promise((resolve) => {
      let answered: ReturnType<Observer['pushSent']> = null;
      const settle = (acknowledgement: MessagesAcknowledgement | null): void => {
        timer.cancel();
        answered?.(acknowledgement);
        unanswered.delete(giveUp);
        resolve(acknowledgement);
      };
      const giveUp = (): void => settle(null);
      const timer = clock.after(ACKNOWLEDGEMENT_TIMEOUT_MS, giveUp);
      unanswered.add(giveUp);
      if (ended) return giveUp();
      answered = observer.pushSent(device, session?.fence ?? null, 'messages', { envelopes });
      socket.emit('messages', { envelopes }, (raw: unknown) => {
        const parsed = pushes.messages.acknowledgement.safeParse(raw);
        settle(parsed.success ? parsed.data : null);
      });
    });
  }

  function end(reason: string): void {
    if (ended) return;
    ended = true;
    token.stop();
    for (const giveUp of unanswered) giveUp();
    if (session === null) return;
    session.detach();
    observer.socketClosed({ device, fence: session.fence, reason });
  }

  function close(reason: string): void {
    end(reason);
    // The transport is closed, not the Socket.IO session: the client comes back by itself.
    socket.conn.close();
  }

  // The connection may end while the store is asked: then nobody else would tell the session.
  socket.conn.on('close', end);
  // One that has left and keeps its transport is of no more use.
  socket.on('disconnect', close);

  // A polite end would wait until everything was read.
  const line = watchLine(socket.conn, clock, () => {
    end('it reads too slowly');
    webSocketOf(socket.conn).terminate();
  });

  const token = watchToken(caller, clock, {
    onExpiring: (expiresAt) => served.push('tokenExpiring', { expiresAt }),
    onExpired: () => session?.pause(),
    onGraceOver: () => close('its token ran out'),
  });

  session = await courier.attach(device, served, caller);
  if (ended) {
    session.detach();
    return;
  }
  forgetHandshake(socket);
  const attached = session;
  observer.socketOpened({
    device,
    fence: attached.fence,
    live: {
      facts() {
        const { count, bytes, isFull, oldestPushAtMs } = attached.window();
        return {
          windowCount: count,
          windowBytes: bytes,
          windowFull: isFull,
          oldestPushAtMs,
          ...line.facts(),
          tokenExpiresAtMs: token.expiresAtMs(),
        };
      },
      close,
    },
  });

  const context: RequestContext = {
    door: 'socket',
    device,
    connection: {
      session: attached,
      extend(newer) {
        token.extend(newer);
        attached.resume(newer);
      },
    },
  };
  const waiting: WaitingRequest[] = [];
  let underWay = 0;
  let requestBytes = 0;

  function carryOut(): void {
    while (underWay < REQUESTS_UNDER_WAY_MAX && !ended) {
      const request = waiting.shift();
      if (request === undefined) return;
      underWay += 1;
      void dispatch(request.name, request.input, context, request.bytes).then((reply) => {
        underWay -= 1;
        requestBytes -= request.bytes;
        request.acknowledge(reply);
        carryOut();
      });
    }
  }

  // Nothing is passed on: no event has another listener.
  socket.use((packet) => {
    const [event, ...args] = packet as [string, ...unknown[]];
    const last = args.at(-1);
    // Nobody could learn what became of a request without an acknowledgement: it is not carried out.
    if (typeof last !== 'function') return;
    const acknowledge = (reply: Reply<RequestName>): void => {
      if (ended) return;
      last(reply);
    };
    const isKnown = Object.hasOwn(requests, event);
    const refuse = (error: GatewayError): void => {
      const { fence } = attached;
      const name = isKnown ? (event as RequestName) : 'unknown';
      observer.requestEnded({ door: 'socket', device, fence, name, code: error.code, durationMs: 0 });
      acknowledge({ ok: false, error: error.toObject() });
    };

    if (!isKnown) return refuse(badRequest([{ path: [], message: 'unknown event' }]));
    const name = event as RequestName;
    if (args.length > 2) {
      return refuse(badRequest([{ path: [], message: 'takes one argument and an acknowledgement' }]));
    }
    if (token.isExpired() && name !== 'refreshToken') return refuse(new GatewayError('TOKEN_EXPIRED'));
    if (parts.isDraining()) {
      return refuse(
        new GatewayError('UNAVAILABLE', 'this server is draining', { retryAfterMs: TOO_MANY_RETRY_MS }),
      );
    }
    const bytes = frameBytesOf(packet);
    if (waiting.length >= REQUESTS_WAITING_MAX || requestBytes + bytes > REQUEST_BYTES_MAX) {
      return refuse(
        new GatewayError('RATE_LIMITED', 'too many requests are under way on this socket', {
          retryAfterMs: TOO_MANY_RETRY_MS,
        }),
      );
    }
    const input = args.length === 1 && inputIsOptional(name) ? {} : args.length === 1 ? undefined : args[0];
    requestBytes += bytes;
    waiting.push({ name, input, bytes, acknowledge });
    carryOut();
  });
}

const NOTHING = Object.freeze({});
const NO_HEADERS: readonly string[] = Object.freeze([]);

/**
 * What the connection began with, its token too, is of no more use, and a good part of what an idle socket would hold.
 * The engine keeps the request itself for as long as the connection lives, so it is emptied.
 */
function forgetHandshake({ handshake, conn }: GatewaySocket): void {
  Object.assign(handshake, { headers: NOTHING, query: NOTHING, auth: NOTHING });
  Object.assign(conn.request, { headers: NOTHING, rawHeaders: NO_HEADERS, _query: NOTHING });
  (conn as { request: unknown }).request = null;
}

interface WaitingRequest {
  name: RequestName;
  input: unknown;
  bytes: number;
  acknowledge(reply: Reply<RequestName>): void;
}

interface TokenWatch {
  expiresAtMs(): number;
  isExpired(): boolean;
  extend(caller: Caller): void;
  stop(): void;
}

function watchToken(
  first: Caller,
  clock: Clock,
  listener: { onExpiring(expiresAt: string): void; onExpired(): void; onGraceOver(): void },
): TokenWatch {
  let timer: Timer | null = null;
  let expiresAtMs = first.expiresAtMs;

  function stop(): void {
    timer?.cancel();
    timer = null;
  }

  // One timer at a time: a socket that idles for hours holds no more than it needs.
  function watch(): void {
    stop();
    const leftMs = expiresAtMs - clock.nowMs();
    timer = clock.after(Math.max(leftMs - TOKEN_NOTICE_MS, leftMs * 0.9), () => {
      timer = clock.after(expiresAtMs - clock.nowMs(), () => {
        timer = clock.after(TOKEN_GRACE_MS, () => listener.onGraceOver());
        listener.onExpired();
      });
      listener.onExpiring(new Date(expiresAtMs).toISOString());
    });
  }

  watch();
  return {
    expiresAtMs: () => expiresAtMs,
    isExpired: () => clock.nowMs() >= expiresAtMs,
    extend(caller) {
      expiresAtMs = caller.expiresAtMs;
      watch();
    },
    stop,
  };
}

/**
 * Watches what passes, and calls `onTooSlow` as soon as more is written than the bound and not yet taken by the
 * network. The engine hands its WebSocket one batch at a time and queues the rest itself, both without a bound.
 */
function watchLine(
  conn: GatewaySocket['conn'],
  clock: Clock,
  onTooSlow: () => void,
): { facts(): { bufferedBytes: number; roundTripMs: number | null } } {
  const webSocket = webSocketOf(conn);
  let queuedBytes = 0;
  let pingedAtMs = 0;
  let roundTripMs: number | null = null;
  conn.on('packetCreate', ({ type, data }: { type: string; data?: string | Buffer }) => {
    if (type === 'ping') pingedAtMs = clock.nowMs();
    if (data !== undefined) queuedBytes += Buffer.byteLength(data);
    if (queuedBytes + webSocket.bufferedAmount > UNREAD_BYTES_MAX) onTooSlow();
  });
  conn.on('flush', () => {
    queuedBytes = 0;
  });
  conn.on('heartbeat', () => {
    roundTripMs = clock.nowMs() - pingedAtMs;
  });
  return { facts: () => ({ bufferedBytes: queuedBytes + webSocket.bufferedAmount, roundTripMs }) };
}
