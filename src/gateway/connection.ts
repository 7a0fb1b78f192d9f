/** One socket's life: its requests, its session with the gate, its token's time, and its end. */
import type { DefaultEventsMap, Socket } from 'socket.io';
import type { Courier } from '../delivery/courier.ts';
import type { ServedSocket, Session } from '../delivery/session.ts';
import type { Clock, Timer } from '../lib/clock.ts';
import { envelopesJson, type IncomingEnvelope } from '../protocol/envelope.ts';
import { GatewayError } from '../protocol/errors.ts';
import {
  inputIsOptional,
  type MessagesAcknowledgement,
  type PushName,
  type PushPayload,
  pushes,
  type Reply,
  type RequestData,
  type RequestName,
  requests,
} from '../protocol/events.ts';
import type { DeviceAddress } from '../protocol/ids.ts';
import { bundlesJson } from '../protocol/keys.ts';
import { ACKNOWLEDGEMENT_TIMEOUT_MS, WINDOW_ENVELOPES_MAX } from '../protocol/limits.ts';
import type { ClientToServerEvents, ServerToClientEvents } from '../protocol/socket-types.ts';
import type { Caller } from '../requests/authenticate.ts';
import { badRequest, type Dispatch, draining } from '../requests/dispatch.ts';
import type { Connection, RequestContext } from '../requests/handlers.ts';
import type { LiveSocket, LiveSocketFacts, Observer } from '../requests/observe.ts';
import { Frames } from './frames.ts';
import { frameBytesOf } from './parser.ts';
import { webSocketOf } from './strangers.ts';

export interface SocketData {
  /** Once its token was found good. */
  connection?: DeviceConnection;
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
 * @throws GatewayError FORBIDDEN where the token was revoked, UNAVAILABLE when the store can't be reached
 */
export async function acceptConnection(
  parts: ConnectionParts,
  socket: GatewaySocket,
  caller: Caller,
): Promise<void> {
  // It may have ended while its token was checked, and then nobody tells of its end any more.
  if (socket.conn.readyState !== 'open') return;
  const connection = new DeviceConnection(parts, socket, caller);
  socket.data.connection = connection;
  await connection.begin(caller);
}

/** A class, because every open socket has one: methods of its own would be much of what it holds while it idles. */
class DeviceConnection implements ServedSocket, LiveSocket, Connection {
  readonly #parts: ConnectionParts;
  readonly #socket: GatewaySocket;
  readonly #device: DeviceAddress;
  readonly #frames: Frames;
  readonly #token: TokenWatch;
  /** Gives up the pushes that wait for an answer; a list, which holds less than a set while it is empty. */
  readonly #unanswered: (() => void)[] = [];
  #session: Session | null = null;
  #ended = false;
  readonly #waiting: WaitingRequest[] = [];
  #underWay = 0;
  #requestBytes = 0;
  /** Hears when nothing is under way any more, or can be answered. */
  #onIdle: (() => void) | null = null;

  constructor(parts: ConnectionParts, socket: GatewaySocket, caller: Caller) {
    this.#parts = parts;
    this.#socket = socket;
    this.#device = caller.device;
    // The connection may end while the store is asked: then nobody else would tell the session.
    socket.conn.on('close', (reason) => this.#end(reason));
    // One that has left and keeps its transport is of no more use.
    socket.on('disconnect', (reason) => this.close(reason));
    this.#frames = new Frames(socket, {
      clock: parts.clock,
      unreadBytesMax: UNREAD_BYTES_MAX,
      onTooSlow: () => {
        this.#end('it reads too slowly');
        // A polite end would wait until everything was read.
        webSocketOf(socket.conn).terminate();
      },
    });
    this.#token = new TokenWatch(caller, parts.clock, {
      onExpiring: (expiresAt) => this.push('tokenExpiring', { expiresAt }),
      onExpired: () => this.#session?.pause(),
      onGraceOver: () => this.close('its token ran out'),
    });
  }

  async begin(caller: Caller): Promise<void> {
    const { courier, observer } = this.#parts;
    const session = await courier.attach(this.#device, this, caller);
    this.#session = session;
    if (this.#ended) {
      session.detach();
      return;
    }
    forgetHandshake(this.#socket);
    observer.socketOpened({ device: this.#device, fence: session.fence, live: this });
    const context: RequestContext = {
      ...{ door: 'socket', device: this.#device, connection: this, isAwaited: () => !this.#ended },
      tokenAge: () => session.tokenAge(),
    };
    this.#frames.serve(({ id, event, args, bytes }) => {
      const answer = (reply: Reply<RequestName>): void => this.#frames.reply(id, replyJson(event, reply));
      this.#receive({ event, args, bytes, answer }, context);
    });
    // What brings attachments comes by Socket.IO. Nothing is passed on: no event has another listener.
    this.#socket.use((packet) => {
      const [event, ...args] = packet as [string, ...unknown[]];
      const answer = args.pop();
      // Nobody could learn what became of a request without an acknowledgement: it is not carried out.
      if (typeof answer !== 'function') return;
      this.#receive(
        { event, args, bytes: frameBytesOf(packet), answer: answer as Incoming['answer'] },
        context,
      );
    });
  }

  // ── As the session has it

  isOpen(): boolean {
    return !this.#ended;
  }

  push<Name extends Exclude<PushName, 'messages'>>(name: Name, payload: PushPayload<Name>): void {
    this.#parts.observer.pushSent(this.#device, this.#session?.fence ?? null, name, payload);
    this.#frames.push(name, JSON.stringify(payload));
  }

  /** Resolves null where nothing usable came in time. */
  pushMessages(envelopes: IncomingEnvelope[]): Promise<MessagesAcknowledgement | null> {
    if (this.#ended) return Promise.resolve(null);
    const { observer } = this.#parts;
    const told = observer.pushSent(this.#device, this.#session?.fence ?? null, 'messages', { envelopes });
    // Elsewhere, so that what waits for the client does not keep its messages in memory.
    const { acknowledgement, hear, pushedAs } = this.#awaitAcknowledgement(told);
    pushedAs(this.#frames.pushForAnswer('messages', `{"envelopes":${envelopesJson(envelopes)}}`, hear));
    return acknowledgement;
  }

  /** @param told hears what came of it, or null where it is nothing */
  #awaitAcknowledgement(told: ReturnType<Observer['pushSent']>): {
    acknowledgement: Promise<MessagesAcknowledgement | null>;
    hear(raw: unknown): void;
    pushedAs(id: number): void;
  } {
    let hear = (_raw: unknown): void => {};
    let pushId: number | null = null;
    const acknowledgement = new Promise<MessagesAcknowledgement | null>((resolve) => {
      const settle = (answer: MessagesAcknowledgement | null): void => {
        timer.cancel();
        const at = this.#unanswered.indexOf(giveUp);
        if (at >= 0) this.#unanswered.splice(at, 1);
        told?.(answer);
        resolve(answer);
      };
      const giveUp = (): void => {
        // What comes later is no answer any more.
        if (pushId !== null) this.#frames.giveUpAnswer(pushId);
        settle(null);
      };
      const timer = this.#parts.clock.after(ACKNOWLEDGEMENT_TIMEOUT_MS, giveUp);
      this.#unanswered.push(giveUp);
      hear = (raw) => settle(acknowledgementIn(raw));
    });
    const pushedAs = (id: number): void => {
      pushId = id;
    };
    return { acknowledgement, hear, pushedAs };
  }

  close(reason: string): void {
    this.#end(reason);
    this.#frames.flush();
    // The transport is closed, not the Socket.IO session: the client comes back by itself.
    this.#socket.conn.close();
  }

  /** Closes it once the requests that it has taken are answered, or `waitMaxMs` later. It must be taking no more. */
  async closeWhenAnswered(reason: string, waitMaxMs: number): Promise<void> {
    if (this.#underWay > 0 && !this.#ended) {
      await new Promise<void>((resolve) => {
        const late = this.#parts.clock.after(waitMaxMs, resolve);
        this.#onIdle = () => {
          late.cancel();
          resolve();
        };
      });
    }
    this.close(reason);
  }

  displace(): void {
    this.#end('displaced');
    // Socket.IO ignores this for a socket that is still being taken in: its door does it then.
    this.#socket.data.isDisplaced = true;
    this.#socket.disconnect(true);
  }

  #end(reason: string): void {
    if (this.#ended) return;
    this.#ended = true;
    this.#onIdle?.();
    this.#token.stop();
    // Each takes itself out.
    for (const giveUp of [...this.#unanswered]) giveUp();
    if (this.#session === null) return;
    const { fence } = this.#session;
    const gate = this.#session.gate().name;
    this.#session.detach();
    this.#parts.observer.socketClosed({ device: this.#device, fence, reason, gate });
  }

  // ── As the inspector sees it

  facts(): LiveSocketFacts {
    const { count, bytes, isFull, oldestPushAtMs } = this.session.window();
    return {
      windowCount: count,
      windowBytes: bytes,
      windowFull: isFull,
      oldestPushAtMs,
      ...this.#frames.facts(),
      tokenExpiresAtMs: this.#token.expiresAtMs,
    };
  }

  // ── As requests have it

  /** There from when requests are taken. */
  get session(): Session {
    return this.#session!;
  }

  extend(newer: Caller): void {
    // It may have ended while its token was looked at: nothing would stop its timer any more.
    if (this.#ended) return;
    this.#token.extend(newer);
    this.session.resume(newer);
  }

  #receive({ event, args, bytes, answer }: Incoming, context: RequestContext): void {
    const name = Object.hasOwn(requests, event) ? (event as RequestName) : 'unknown';
    const refusal = this.#refusalOf({ name, argumentCount: args.length, bytes });
    if (refusal !== null) {
      const [device, { fence }] = [this.#device, this.session];
      const { observer } = this.#parts;
      observer.requestEnded({ door: 'socket', device, fence, name, code: refusal.code, durationMs: 0 });
      if (!this.#ended) answer({ ok: false, error: refusal.toObject() });
      return;
    }
    const known = name as RequestName;
    const input = args.length === 0 && inputIsOptional(known) ? {} : args[0];
    this.#requestBytes += bytes;
    this.#waiting.push({ name: known, input, bytes, answer });
    this.#carryOut(context);
  }

  /** Why a request is not even looked at. */
  #refusalOf(asked: {
    name: RequestName | 'unknown';
    argumentCount: number;
    bytes: number;
  }): GatewayError | null {
    if (asked.name === 'unknown') return badRequest([{ path: [], message: 'unknown event' }]);
    if (asked.argumentCount > 1) {
      return badRequest([{ path: [], message: 'takes one argument and an acknowledgement' }]);
    }
    if (this.#token.isExpired() && asked.name !== 'refreshToken') return new GatewayError('TOKEN_EXPIRED');
    if (this.#parts.isDraining()) {
      return draining();
    }
    const isFull = this.#waiting.length >= REQUESTS_WAITING_MAX;
    if (isFull || this.#requestBytes + asked.bytes > REQUEST_BYTES_MAX) {
      return new GatewayError('RATE_LIMITED', 'too many requests are under way on this socket', {
        retryAfterMs: TOO_MANY_RETRY_MS,
      });
    }
    return null;
  }

  #carryOut(context: RequestContext): void {
    const { dispatch } = this.#parts;
    while (this.#underWay < REQUESTS_UNDER_WAY_MAX && !this.#ended) {
      const request = this.#waiting.shift();
      if (request === undefined) return;
      this.#underWay += 1;
      void dispatch(request.name, request.input, context, request.bytes).then((reply) => {
        this.#underWay -= 1;
        this.#requestBytes -= request.bytes;
        if (!this.#ended) request.answer(reply);
        this.#carryOut(context);
        if (this.#underWay === 0) this.#onIdle?.();
      });
    }
  }
}

/** @returns null for what is no acknowledgement */
function acknowledgementIn(raw: unknown): MessagesAcknowledgement | null {
  if (typeof raw !== 'object' || raw === null) return null;
  const { processed, failed } = raw as Record<string, unknown>;
  // A list that no window could fill is not looked at: a frame holds half a million items, and each has its issues.
  if (isTooLong(processed) || isTooLong(failed)) return null;
  const parsed = pushes.messages.acknowledgement.safeParse(raw);
  return parsed.success ? parsed.data : null;
}

function isTooLong(list: unknown): boolean {
  return Array.isArray(list) && list.length > WINDOW_ENVELOPES_MAX;
}

function replyJson(event: string, reply: Reply<RequestName>): string {
  if (!reply.ok || event !== ('requestBundle' satisfies RequestName)) return JSON.stringify(reply);
  return `{"ok":true,"data":${bundlesJson(reply.data as RequestData<'requestBundle'>)}}`;
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

/** A request as it came in, whichever way. */
interface Incoming {
  event: string;
  /** Without the acknowledgement. */
  args: readonly unknown[];
  /** Of the frame that brought it. */
  bytes: number;
  answer(reply: Reply<RequestName>): void;
}

interface WaitingRequest extends Pick<Incoming, 'bytes' | 'answer'> {
  name: RequestName;
  input: unknown;
}

/** One timer at a time: a socket that idles for hours holds no more than it needs. */
class TokenWatch {
  readonly #clock: Clock;
  readonly #listener: { onExpiring(expiresAt: string): void; onExpired(): void; onGraceOver(): void };
  #expiresAtMs: number;
  #timer: Timer | null = null;

  constructor(
    first: Caller,
    clock: Clock,
    listener: { onExpiring(expiresAt: string): void; onExpired(): void; onGraceOver(): void },
  ) {
    this.#clock = clock;
    this.#listener = listener;
    this.#expiresAtMs = first.expiresAtMs;
    this.#watch();
  }

  get expiresAtMs(): number {
    return this.#expiresAtMs;
  }

  isExpired(): boolean {
    return this.#clock.nowMs() >= this.#expiresAtMs;
  }

  extend(caller: Caller): void {
    this.#expiresAtMs = caller.expiresAtMs;
    this.#watch();
  }

  stop(): void {
    this.#timer?.cancel();
    this.#timer = null;
  }

  #watch(): void {
    this.stop();
    const clock = this.#clock;
    const listener = this.#listener;
    const leftMs = this.#expiresAtMs - clock.nowMs();
    this.#timer = clock.after(Math.max(leftMs - TOKEN_NOTICE_MS, leftMs * 0.9), () => {
      this.#timer = clock.after(this.#expiresAtMs - clock.nowMs(), () => {
        this.#timer = clock.after(TOKEN_GRACE_MS, () => listener.onGraceOver());
        listener.onExpired();
      });
      listener.onExpiring(new Date(this.#expiresAtMs).toISOString());
    });
  }
}
