/** The socket: connecting and coming back, tokens, and requests that outlive a connection. */
import type { Socket } from 'socket.io-client';
import type { ErrorObject } from '../protocol/errors.ts';
import type {
  PushName,
  PushPayload,
  Reply,
  RequestData,
  RequestInput,
  RequestName,
} from '../protocol/events.ts';
import { FRAME_BYTES_MAX } from '../protocol/limits.ts';
import { KeygateError, KitError } from './errors.ts';
import { createSocket } from './socket.ts';
import type { KitClock } from './time.ts';

export type LinkState = 'offline' | 'connecting' | 'online' | 'displaced' | 'closed';

/** Why a token is asked for: a connection, one that runs out, or one that the gateway refused. */
export type TokenReason = 'connect' | 'expiring' | 'refused';

/** Why there is no connection. No text of the kit's own holds a token. */
export interface Trouble {
  /** The contract's where the gateway refused; `NO_TOKEN` where the application gave none, else `UNREACHABLE`. */
  code: string;
  message: string;
}

export interface LinkOptions {
  url: string;
  getToken(reason: TokenReason): Promise<string>;
  clock: KitClock;
  /** Requests of the application that may wait for an answer. */
  outboxMax: number;
  onState(state: LinkState): void;
  /** The application's requests that wait became more or fewer. */
  onOutbox(): void;
}

export interface CallOptions {
  /** The kit's own: a full outbox of the application does not keep it out. */
  own?: boolean;
  /** Asked over one connection only: rejects with KitError UNANSWERED where that breaks. */
  once?: boolean;
}

export interface Link {
  state(): LinkState;
  /** Numbers the connections; 0 before the first. */
  connection(): number;
  /** Why the last attempt to connect failed; null before one has, and once one succeeds. */
  trouble(): Trouble | null;
  outboxLength(): number;
  /**
   * Asks, and asks again with the same input over however many connections it takes. `sendMessages` to one user are
   * asked one after the other, in the order of the calls.
   *
   * @throws KeygateError for a refusal that does not pass by itself; KitError OUTBOX_FULL, DISPLACED, CLOSED, UNANSWERED;
   *   TypeError for what is no JSON
   */
  call<Name extends RequestName>(
    name: Name,
    input: RequestInput<Name>,
    options?: CallOptions,
  ): Promise<RequestData<Name>>;
  /** @throws KitError DISPLACED, CLOSED */
  whenOnline(): Promise<void>;
  /** Waits for the attempt that is under way. @returns whether there is a connection */
  whenTried(): Promise<boolean>;
  /** @returns what `work` gives, or null where the connection ends first */
  whileOnline<Result>(work: Promise<Result>): Promise<Result | null>;
  /**
   * An acknowledgement that comes after the push's connection has ended goes nowhere.
   *
   * @returns takes the listener away
   */
  on<Name extends PushName>(name: Name, listener: PushListener<Name>): () => void;
  open(): void;
  close(): void;
}

export type PushListener<Name extends PushName> = (
  payload: PushPayload<Name>,
  acknowledge: (answer: unknown) => void,
) => void;

const BACKOFF_MIN_MS = 500;
const BACKOFF_MAX_MS = 20_000;
/** A gateway that takes no connection within this time, or leaves a request unanswered, is not there. */
const ANSWER_WAIT_MAX_MS = 20_000;
/** Refusals that pass by themselves are asked again so often. */
const RETRIES_MAX = 8;
const RETRY_DEFAULT_MS = 1_000;
/** More than what a frame holds besides the input: the request's name, its number and some brackets. */
const FRAME_REST_BYTES = 256;

interface Waiting {
  name: RequestName;
  input: unknown;
  own: boolean;
  once: boolean;
  /** Requests of one lane are asked one after the other. */
  lane: string | null;
  retries: number;
  /** It was refused for the time being, and waits for its next try over this connection. */
  isPutOff: boolean;
  /** The connection that it was last asked over and has no answer by. */
  askedOver: number | null;
  cancelTimer(): void;
  resolve(data: unknown): void;
  reject(error: Error): void;
}

export function createLink(options: LinkOptions): Link {
  const { clock } = options;
  const waiting = new Set<Waiting>();
  const lanes = new Map<string, Waiting[]>();
  const watchers = new Set<(state: LinkState) => void>();
  let state: LinkState = 'offline';
  let connection = 0;
  /** Numbers attempts, so that what comes late of a given-up one is told apart. */
  let attempt = 0;
  let failures = 0;
  let notBeforeMs = 0;
  /** The gateway's last, which outlives attempts that did not reach it; null once it took a connection. */
  let refusal: ErrorObject | null = null;
  let trouble: Trouble | null = null;
  let cancelTimer = () => {};

  // Events are sent and heard by names that vary: each call checks its own.
  const socket = createSocket(options.url) as Socket;

  socket.on('connect', () => {
    cancelTimer();
    connection += 1;
    refusal = null;
    trouble = null;
    // It was about the time until now, which a clock that is set back must not lengthen.
    notBeforeMs = 0;
    become('online');
    for (const request of waiting) ask(request);
  });

  socket.on('connect_error', (error: Error & { data?: ErrorObject }) => {
    refusal = error.data ?? refusal;
    if (error.data?.retryAfterMs !== undefined) notBeforeMs = clock.nowMs() + error.data.retryAfterMs;
    fail(error.data ?? unreachableGateway(transportReason(error)));
  });

  socket.on('disconnect', () => {
    // First of all: what is settled below must not ask the next one over a connection that is gone.
    if (state === 'online') comeBack();
    for (const request of waiting) {
      request.cancelTimer();
      if (request.once && request.askedOver !== null) {
        settle(request, () =>
          request.reject(
            new KitError('UNANSWERED', `${request.name}: the connection broke before the answer`),
          ),
        );
      }
      request.askedOver = null;
      request.isPutOff = false;
    }
  });

  socket.on('displaced', () => end('displaced'));
  socket.on('serverDraining', ({ retryAfterMs }: PushPayload<'serverDraining'>) => {
    notBeforeMs = clock.nowMs() + retryAfterMs;
  });
  socket.on('tokenExpiring', () => {
    askForToken('expiring')
      .then((token) => link.call('refreshToken', { token }, { own: true, once: true }))
      // The connection ends with its token, and the next one asks for another.
      .catch(() => {});
  });

  function become(next: LinkState): void {
    if (state === next) return;
    state = next;
    for (const watcher of watchers) watcher(next);
    options.onState(next);
  }

  /** Rejects also where the application's function throws at once. */
  async function askForToken(reason: TokenReason): Promise<string> {
    return await options.getToken(reason);
  }

  function connect(): void {
    become('connecting');
    attempt += 1;
    const mine = attempt;
    let hasToken = false;
    cancelTimer();
    cancelTimer = clock.after(ANSWER_WAIT_MAX_MS, () => {
      const silence = `no answer within ${ANSWER_WAIT_MAX_MS / 1_000} s`;
      fail(hasToken ? unreachableGateway(silence) : withoutToken(silence));
    });
    askForToken(refusal === null || refusal.retryable ? 'connect' : 'refused').then(
      (token) => {
        if (mine !== attempt || state !== 'connecting') return;
        hasToken = true;
        socket.auth = { token };
        socket.connect();
      },
      (error: unknown) => {
        if (mine === attempt) fail(withoutToken((error instanceof Error && error.message) || String(error)));
      },
    );
  }

  function fail(why: Trouble): void {
    if (state !== 'connecting') return;
    // Parts of an error object that are the contract's alone stay behind.
    trouble = { code: why.code, message: why.message };
    attempt += 1;
    socket.disconnect();
    comeBack();
  }

  /** Jittered, so that a thousand clients of one server don't come back as one. */
  function comeBack(): void {
    const latestMs = Math.min(BACKOFF_MAX_MS, 2 * BACKOFF_MIN_MS * 2 ** failures);
    const earliestMs = Math.max(BACKOFF_MIN_MS, latestMs / 2);
    failures += 1;
    const backoffMs = earliestMs + clock.random() * (latestMs - earliestMs);
    const askedMs = notBeforeMs - clock.nowMs();
    const delayMs = askedMs > backoffMs ? askedMs + clock.random() * BACKOFF_MIN_MS : backoffMs;
    cancelTimer();
    cancelTimer = clock.after(delayMs, connect);
    become('offline');
  }

  function end(as: 'displaced' | 'closed'): void {
    if (state === 'closed') return;
    attempt += 1;
    cancelTimer();
    become(as);
    socket.disconnect();
    for (const request of waiting) settle(request, () => request.reject(endedError()));
  }

  function endedError(): KitError {
    return state === 'displaced'
      ? new KitError('DISPLACED', 'a newer connection of this device took over')
      : new KitError('CLOSED', 'the client is closed');
  }

  function hasEnded(): boolean {
    return state === 'displaced' || state === 'closed';
  }

  function ask(request: Waiting): void {
    if (state !== 'online' || request.askedOver !== null || request.isPutOff || !waiting.has(request)) return;
    if (request.lane !== null && lanes.get(request.lane)?.[0] !== request) return;
    const askedOver = connection;
    request.askedOver = askedOver;
    request.cancelTimer();
    request.cancelTimer = clock.after(ANSWER_WAIT_MAX_MS, () => dropConnection(askedOver));
    socket.emit(request.name, request.input, (reply: Reply<RequestName>) => {
      if (request.askedOver !== askedOver || !waiting.has(request)) return;
      request.cancelTimer();
      // It serves: the next outage is a new one.
      failures = 0;
      if (reply.ok) settle(request, () => request.resolve(reply.data));
      else refused(request, reply.error);
    });
  }

  function refused(request: Waiting, error: ErrorObject): void {
    // It was answered, and nothing was done: asking again is safe for every request.
    request.askedOver = null;
    if (error.code === 'TOKEN_EXPIRED' && request.name !== 'refreshToken') {
      // Another connection brings another token, and asks again.
      dropConnection(connection);
      return;
    }
    const passes = error.code === 'UNAVAILABLE' || error.code === 'RATE_LIMITED';
    if (!passes || request.retries >= RETRIES_MAX) {
      settle(request, () => request.reject(new KeygateError(error)));
      return;
    }
    request.retries += 1;
    request.isPutOff = true;
    const waitMs = error.retryAfterMs ?? RETRY_DEFAULT_MS;
    request.cancelTimer = clock.after(waitMs * (1 + clock.random() / 2), () => {
      request.isPutOff = false;
      ask(request);
    });
  }

  /** Said on this side alone: a dead connection would never say so itself. */
  function dropConnection(which: number): void {
    if (state === 'online' && connection === which) socket.disconnect();
  }

  function settle(request: Waiting, deliver: () => void): void {
    request.cancelTimer();
    waiting.delete(request);
    if (request.lane !== null) {
      const lane = lanes.get(request.lane)!;
      lane.splice(lane.indexOf(request), 1);
      if (lane.length === 0) lanes.delete(request.lane);
      else ask(lane[0]!);
    }
    deliver();
    if (!request.own) options.onOutbox();
  }

  function outboxLength(): number {
    let length = 0;
    for (const request of waiting) if (!request.own) length += 1;
    return length;
  }

  /** Calls `action` once, when the state, now or later, is one that `until` takes. @returns gives up */
  function onceState(until: (state: LinkState) => boolean, action: (state: LinkState) => void): () => void {
    const watcher = (now: LinkState): void => {
      if (!until(now)) return;
      watchers.delete(watcher);
      action(now);
    };
    watchers.add(watcher);
    watcher(state);
    return () => watchers.delete(watcher);
  }

  const link: Link = {
    state: () => state,
    connection: () => connection,
    trouble: () => trouble,
    outboxLength,

    call(name, input, { own = false, once = false } = {}) {
      if (hasEnded()) return Promise.reject(endedError());
      if (!own && outboxLength() >= options.outboxMax) {
        return Promise.reject(
          new KitError('OUTBOX_FULL', `${options.outboxMax} requests wait for an answer already`),
        );
      }
      try {
        refuseUnsendable(name, input);
      } catch (error) {
        return Promise.reject(error);
      }
      return new Promise((resolve, reject) => {
        const request: Waiting = {
          name,
          input,
          own,
          once,
          lane: name === 'sendMessages' ? (input as RequestInput<'sendMessages'>).userId : null,
          retries: 0,
          isPutOff: false,
          askedOver: null,
          cancelTimer: () => {},
          resolve: resolve as (data: unknown) => void,
          reject,
        };
        waiting.add(request);
        if (request.lane !== null) lanes.set(request.lane, [...(lanes.get(request.lane) ?? []), request]);
        ask(request);
        if (!own) options.onOutbox();
      });
    },

    async whenOnline() {
      await new Promise((resolve) => onceState((now) => now === 'online' || hasEnded(), resolve));
      if (hasEnded()) throw endedError();
    },

    async whenTried() {
      const tried = await new Promise<LinkState>((resolve) =>
        onceState((now) => now !== 'connecting', resolve),
      );
      return tried === 'online';
    },

    async whileOnline(work) {
      let giveUp = (): void => {};
      const broken = new Promise<null>((resolve) => {
        giveUp = onceState(
          (now) => now !== 'online',
          () => resolve(null),
        );
      });
      return await Promise.race([work, broken]).finally(giveUp);
    },

    on(name, listener) {
      const guarded = (payload: never, acknowledge?: (answer: unknown) => void): void => {
        const cameOver = connection;
        listener(payload, (answer) => {
          if (state === 'online' && connection === cameOver) acknowledge?.(answer);
        });
      };
      const event: string = name;
      socket.on(event, guarded as () => void);
      return () => socket.off(event, guarded as () => void);
    },

    open: connect,
    close: () => end('closed'),
  };
  return link;
}

function unreachableGateway(reason: string): Trouble {
  return { code: 'UNREACHABLE', message: `the gateway can’t be reached: ${reason}` };
}

/** What a login answers may stand in its error's text: a parser quotes what it could not read. */
function withoutToken(reason: string): Trouble {
  const safe = reason.replace(/\beyJ[\w-]*(?:\.[\w-]*)*|\bBearer\s+\S+/g, '(a token)');
  return { code: 'NO_TOKEN', message: `getToken: ${safe}` };
}

/**
 * Engine.IO says no more than "websocket error". Node's socket knows why, though of a name with several addresses it
 * gives a code only; a browser tells nobody.
 */
function transportReason(
  error: Error & { description?: { message?: string; error?: { code?: string } } },
): string {
  const { message, error: cause } = error.description ?? {};
  return (message || cause?.code || error.message).trim();
}

/**
 * The gateway ends a connection whose frame is too large, and what is no JSON can't be sent at all: either would be
 * asked again over every connection, before all that waits behind it.
 */
function refuseUnsendable(name: RequestName, input: unknown): void {
  const bytes = new TextEncoder().encode(JSON.stringify(input)).length;
  if (bytes <= FRAME_BYTES_MAX - FRAME_REST_BYTES) return;
  throw new KeygateError({
    code: 'PAYLOAD_TOO_LARGE',
    message: `${name}: ${bytes} bytes are more than a frame may hold`,
    retryable: false,
  });
}
