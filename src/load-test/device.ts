/**
 * One device as the load test plays it: a bare socket, so that what the kit would hide (a message that comes twice,
 * a refusal) is seen and counted.
 */
import type { Clock, Timer } from '../lib/clock.ts';
import type { ErrorCode, ErrorObject } from '../protocol/errors.ts';
import type { PushPayload, Reply, RequestData, RequestInput, RequestName } from '../protocol/events.ts';
import type { DeviceAddress } from '../protocol/ids.ts';
import { VALIDATION_LIFETIME_MS } from '../protocol/limits.ts';
import { type BareSocket, createSocket } from '../sdk/socket.ts';
import { createLoadKeys, type LoadKeys } from './device-keys.ts';

/** A code of the wire, or what happened on the way. */
export type FailureCode = ErrorCode | 'DISCONNECTED' | 'NOT_ANSWERED' | 'CONNECT_FAILED' | 'WRONG_ANSWER';

/** Of Socket.IO: with the gateway's own error object, or with what `ws` said. */
type ConnectError = Error & { data?: ErrorObject; description?: { message?: string } };

/** What an operation ends with where it does not succeed. */
export class Failure extends Error {
  readonly code: FailureCode;
  readonly retryAfterMs: number | null;

  constructor(code: FailureCode, { message = code, retryAfterMs }: Partial<ErrorObject> = {}) {
    super(message);
    this.code = code;
    this.retryAfterMs = retryAfterMs ?? null;
  }

  /** Whether the gateway may have carried the request out all the same. */
  get isUncertain(): boolean {
    return this.code === 'DISCONNECTED' || this.code === 'NOT_ANSWERED';
  }
}

export interface DeviceListener {
  /** @param processed acknowledges the whole page */
  onMessages(envelopes: PushPayload<'messages'>['envelopes'], processed: () => void): void;
  onPreKeysLow(): void;
  /** The connection ended, and neither `cut` nor `close` was called. */
  onDisconnect(): void;
}

const ANSWER_WAIT_MAX_MS = 30_000;
/** A long queue on a busy gateway. */
const DRAIN_WAIT_MAX_MS = 10 * 60_000;
/** Kept clear of its end: the gateway must still take it when it arrives. */
const VALIDATION_USE_MS = VALIDATION_LIFETIME_MS * 0.9;

export class LoadDevice {
  readonly address: DeviceAddress;
  readonly keys: LoadKeys;
  listener: DeviceListener = { onMessages() {}, onPreKeysLow() {}, onDisconnect() {} };
  readonly #clock: Clock;
  readonly #token: string;
  readonly #socket: BareSocket;
  /** Gives up what an answer is waited for. */
  readonly #unanswered = new Set<(failure: Failure) => void>();
  #validation: { text: string; untilMs: number } | null = null;
  #onQueueEmpty = (): void => {};
  #isEnding = false;

  constructor(options: {
    url: string;
    address: DeviceAddress;
    token: string;
    clock: Clock;
    hasPq?: boolean;
  }) {
    this.address = options.address;
    this.keys = createLoadKeys({ hasPq: options.hasPq ?? false });
    this.#clock = options.clock;
    this.#token = options.token;
    this.#socket = createSocket(options.url);
    this.#socket.on('disconnect', () => {
      this.#giveUp();
      if (!this.#isEnding) this.listener.onDisconnect();
    });
    this.#socket.on('messages', ({ envelopes }, acknowledge) => {
      this.listener.onMessages(envelopes, () => acknowledge({ processed: envelopes.map(({ id }) => id) }));
    });
    this.#socket.on('queueEmpty', () => this.#onQueueEmpty());
    this.#socket.on('preKeysLow', () => this.listener.onPreKeysLow());
  }

  get isConnected(): boolean {
    return this.#socket.connected;
  }

  /** For an answer of the gateway, or for a connection to it. */
  get isWaiting(): boolean {
    return this.#unanswered.size > 0 || !this.isConnected;
  }

  /** @throws Failure */
  connect(): Promise<void> {
    this.#isEnding = false;
    this.#socket.auth = { token: this.#token };
    return this.#answered<void>((resolve, reject) => {
      const onConnect = (): void => settle(() => resolve(undefined));
      const onError = (error: ConnectError): void => settle(() => reject(refusalOf(error)));
      const settle = (action: () => void): void => {
        this.#socket.off('connect', onConnect);
        this.#socket.off('connect_error', onError);
        action();
      };
      this.#socket.on('connect', onConnect);
      this.#socket.on('connect_error', onError);
      this.#socket.connect();
      return () => settle(() => this.#socket.disconnect());
    });
  }

  /** Asks once. @throws Failure */
  ask<Name extends RequestName>(name: Name, input: RequestInput<Name>): Promise<RequestData<Name>> {
    if (!this.isConnected) return Promise.reject(new Failure('DISCONNECTED'));
    return this.#answered((resolve, reject) => {
      const onReply = (reply: Reply<Name>): void => {
        if (reply.ok) resolve(reply.data);
        else reject(new Failure(reply.error.code, reply.error));
      };
      (this.#socket.emit as (name: string, input: unknown, onReply: unknown) => void)(name, input, onReply);
      return undefined;
    });
  }

  /**
   * Opens the gate, with a validation of an earlier connection where that is still good.
   *
   * @returns resolves when everything that waited has been handed over: `queueEmpty` came
   * @throws Failure
   */
  async openGate(): Promise<void> {
    if (this.#validation === null || this.#validation.untilMs < this.#clock.nowMs()) await this.#validate();
    const empty = this.#queueEmpty();
    // Where the connection ends, the request says so.
    empty.catch(() => {});
    try {
      await this.ask('clientReady', { validation: this.#validation!.text });
    } catch (error) {
      this.#validation = null;
      // Nobody waits for the end of the queue.
      this.#onQueueEmpty();
      throw error;
    }
    await empty;
  }

  async #validate(): Promise<void> {
    const untilMs = this.#clock.nowMs() + VALIDATION_USE_MS;
    const verdict = await this.ask('validateKeys', this.keys.validation());
    if (verdict.validation === undefined) {
      throw new Failure('WRONG_ANSWER', { message: `keys not valid: ${verdict.missingKeys.join(', ')}` });
    }
    this.#validation = { text: verdict.validation, untilMs };
  }

  #queueEmpty(): Promise<void> {
    return this.#answered<void>((resolve) => {
      this.#onQueueEmpty = () => resolve(undefined);
      return undefined;
    }, DRAIN_WAIT_MAX_MS);
  }

  /** Leaves what arrives unread, so that the gateway's writes pile up. */
  pauseReading(): void {
    this.#webSocket()?.pause();
  }

  resumeReading(): void {
    this.#webSocket()?.resume();
  }

  /** Ends the connection as a network that goes away does: without a word. */
  cut(): void {
    this.#isEnding = true;
    this.#webSocket()?.terminate();
    this.close();
  }

  close(): void {
    this.#isEnding = true;
    this.#socket.disconnect();
    // Who was still connecting hears of no end.
    this.#giveUp();
  }

  #giveUp(): void {
    const failure = new Failure('DISCONNECTED');
    for (const giveUp of this.#unanswered) giveUp(failure);
  }

  /** @param start begins the work; what it returns gives the work up */
  #answered<Result>(
    start: (
      resolve: (result: Result) => void,
      reject: (failure: Failure) => void,
    ) => (() => void) | undefined,
    waitMaxMs = ANSWER_WAIT_MAX_MS,
  ): Promise<Result> {
    return new Promise((resolve, reject) => {
      let timer: Timer;
      const settled = (): void => {
        timer.cancel();
        this.#unanswered.delete(giveUp);
      };
      const fail = (failure: Failure): void => {
        settled();
        reject(failure);
      };
      const giveUp = (failure: Failure): void => {
        fail(failure);
        stop?.();
      };
      this.#unanswered.add(giveUp);
      timer = this.#clock.after(waitMaxMs, () => giveUp(new Failure('NOT_ANSWERED')));
      const stop = start((result) => {
        settled();
        resolve(result);
      }, fail);
    });
  }

  /** Below Socket.IO: in Node, its client's transport is a WebSocket of the package `ws`. */
  #webSocket(): { pause(): void; resume(): void; terminate(): void } | undefined {
    return (this.#socket.io.engine?.transport as { ws?: never } | undefined)?.ws;
  }
}

/** Before there is a WebSocket, a refusal is an HTTP status, which `ws` tells in a sentence. */
function refusalOf(error: ConnectError): Failure {
  if (error.data !== undefined) return new Failure(error.data.code, error.data);
  const message = error.description?.message ?? error.message;
  switch (/^Unexpected server response: (\d+)$/.exec(message)?.[1]) {
    case '429':
      return new Failure('RATE_LIMITED', { message });
    case '503':
      return new Failure('UNAVAILABLE', { message });
    default:
      return new Failure('CONNECT_FAILED', { message });
  }
}
