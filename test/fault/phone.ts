/**
 * A device as an application has it: it connects again whenever its connection is gone, proves its keys, opens its gate,
 * asks again under the same id what was not answered, and writes all of it into the history. Its keys are real public
 * keys; what it sends means nothing.
 */
import { io, type Socket } from 'socket.io-client';
import type {
  MessagesAcknowledgement,
  PushPayload,
  Reply,
  RequestData,
  RequestInput,
  RequestName,
} from '../../src/protocol/events.ts';
import { addressKey, type DeviceAddress } from '../../src/protocol/ids.ts';
import { KeyMaker } from '../support/key-maker.ts';
import type { OneTimePreKey, SignedKey } from '../support/libsignal-device.ts';
import type { Answer, Asked, Envelope, Recorder } from './history.ts';
import type { Random } from './random.ts';

/** Of a peer, as much as a sender has to know. */
export interface Peer {
  address: DeviceAddress;
}

export interface PhoneOptions {
  address: DeviceAddress;
  url: string;
  token: string;
  random: Random;
  record: Recorder;
  /** Numbers requests and connections over all phones of a history. */
  count(): number;
  /** Told of every answer that was a success. */
  onAnswer?: (request: number, answered: { device: DeviceAddress; asked: Asked }) => void;
  oneTimePreKeys: number;
  /** How a page is answered; by default most of it is processed, and some of it put off once. */
  onMessages?: (page: PushPayload<'messages'>) => MessagesAcknowledgement | null;
}

export interface Phone extends Peer {
  /** Resolves when the gate is open. */
  start(): Promise<void>;
  /** Resolves when there is a connection, and its gate is open. */
  whenOpen(): Promise<void>;
  isOpen(): boolean;
  /** The number of the newest connection; 0 before the first. */
  connection(): number;
  send(to: Peer, messageId: string): Promise<void>;
  claim(of: Peer, claimId: string): Promise<void>;
  refill(count: number): Promise<void>;
  rotate(): Promise<void>;
  replaceIdentity(): Promise<void>;
  /** The same keys with a new signed prekey, by HTTP, as another program of this device would do. */
  rotateByHttp(gatewayUrl: string): Promise<void>;
  reconnect(): void;
  /** Leaves the connection open and listens to it still, but works on over a new one. */
  abandon(): void;
  /** Asks whether the connection lives, and makes a new one where it doesn't. */
  probe(): Promise<void>;
  /** How often this phone was refused, by code, or got no answer (`broken`), connections that it asked for included. */
  troubles: ReadonlyMap<string, number>;
  /** Reads nothing from the network until it is told to. */
  pauseReading(): void;
  resumeReading(): void;
  /** How long after each connection its gate was open, oldest first. */
  openedAfterMs: readonly number[];
  /** For whoever wonders why it is stuck. */
  state(): string;
  stop(): void;
}

/** A gateway that says nothing for so long is taken for dead. */
const ANSWER_WAIT_MAX_MS = 2_500;
const CONNECT_WAIT_MAX_MS = 6_000;
const RETRY_MS = 60;
const REGISTRATION_ID = 77;

interface Line {
  socket: Socket;
  /** 0 until it is connected. */
  connection: number;
  /** When; null from when its gate was open. */
  connectedAtMs: number | null;
}

export function createPhone(options: PhoneOptions): Phone {
  const { address, random, record, count } = options;
  const device = addressKey(address);
  const stopped = new AbortController();
  const troubles = new Map<string, number>();
  const putOff = new Set<string>();
  const openedAfterMs: number[] = [];
  /** Answers of requests that are under way, to be given up with their connection. */
  const waiting = new Map<Line, Set<() => void>>();
  const openWaiters = new Set<() => void>();
  let line: Line | null = null;
  let gateIsOpen = false;
  let keys = new KeyMaker();
  let lastKeyId = 0;
  let signedPreKey: SignedKey = keys.signed(1);
  let heldPreKeys: OneTimePreKey[] = [];
  /** An upload that is not known to be stored. */
  let owed: { preKeys: OneTimePreKey[]; replacesIdentity: boolean } | null = null;
  let seen = { keyVersion: 0, countVersion: 0 };
  let exclusive: Promise<void> = Promise.resolve();

  function makePreKeys(length: number): OneTimePreKey[] {
    return Array.from({ length }, () => keys.oneTime(++lastKeyId));
  }

  function noteTrouble(what: string): void {
    troubles.set(what, (troubles.get(what) ?? 0) + 1);
  }

  // ——— the connection

  function connect(): void {
    const socket: Socket = io(options.url, {
      transports: ['websocket'],
      auth: { token: options.token },
      forceNew: true,
      reconnectionDelay: 20,
      reconnectionDelayMax: 400,
      timeout: 2_000,
    });
    const mine: Line = { socket, connection: 0, connectedAtMs: null };
    line = mine;
    waiting.set(mine, new Set());
    // A gateway that falls silent between its greeting and its answer to the token is not noticed by Socket.IO's client.
    const watch = (): void => {
      setTimeout(() => {
        if (line !== mine || stopped.signal.aborted || socket.connected) return;
        noteTrouble('broken');
        socket.io.reconnection(false);
        socket.disconnect();
        renew();
      }, CONNECT_WAIT_MAX_MS);
    };
    watch();
    const again = (delayMs: number): void => {
      setTimeout(() => {
        if (line === mine && !stopped.signal.aborted) socket.connect();
      }, delayMs);
    };
    socket.on('connect', () => {
      mine.connection = count();
      mine.connectedAtMs = performance.now();
      if (line === mine) startOpening(mine);
    });
    socket.on('connect_error', (error: Error & { data?: { code?: string; retryAfterMs?: number } }) => {
      noteTrouble(error.data?.code ?? 'broken');
      // What the gateway refuses, Socket.IO does not try again by itself.
      if (!socket.active) again(error.data?.retryAfterMs ?? RETRY_MS);
    });
    socket.on('disconnect', () => {
      if (line === mine) gateIsOpen = false;
      watch();
      for (const giveUp of [...waiting.get(mine)!]) giveUp();
      if (!socket.active) again(RETRY_MS);
    });
    socket.on('gateClosed', () => {
      record({ event: 'gateClosed', device, connection: mine.connection });
      if (line !== mine) return;
      gateIsOpen = false;
      startOpening(mine);
    });
    socket.on('queueEmpty', ({ deliveredCount }: PushPayload<'queueEmpty'>) => {
      record({ event: 'queueEmpty', device, connection: mine.connection, deliveredCount });
    });
    socket.on('messages', (page: PushPayload<'messages'>, acknowledge: (value: unknown) => void) => {
      const { connection } = mine;
      record({ event: 'delivered', device, connection, envelopes: page.envelopes.map(toEnvelope) });
      const answer = (options.onMessages ?? verdict)(page);
      if (answer === null) return;
      const failed = (answer.failed ?? []).map((failure) => failure.id);
      record({ event: 'acknowledged', device, connection, processed: answer.processed, failed });
      acknowledge(answer);
    });
  }

  function verdict(page: PushPayload<'messages'>): MessagesAcknowledgement {
    const processed: string[] = [];
    const failed: NonNullable<MessagesAcknowledgement['failed']> = [];
    for (const { id } of page.envelopes) {
      if (!putOff.has(id) && random.happens(0.02)) {
        putOff.add(id);
        failed.push({ id, reason: 'temporary' });
      } else processed.push(id);
    }
    return { processed, failed };
  }

  function renew(): void {
    const old = line;
    connect();
    gateIsOpen = false;
    if (old !== null) for (const giveUp of [...waiting.get(old)!]) giveUp();
  }

  // ——— requests

  /** @returns null where no answer will come */
  function ask<Name extends RequestName>(
    name: Name,
    input: RequestInput<Name>,
    asked: Asked | null,
  ): Promise<Reply<Name> | null> {
    const mine = line;
    if (mine === null || !mine.socket.connected) return pause(RETRY_MS).then(() => null);
    const request = count();
    if (asked !== null) record({ event: 'asked', request, device, connection: mine.connection, asked });
    return new Promise((resolve) => {
      const settle = (reply: Reply<Name> | null): void => {
        clearTimeout(timer);
        if (!waiting.get(mine)!.delete(giveUp)) return;
        if (reply === null) noteTrouble('broken');
        else if (!reply.ok) noteTrouble(reply.error.code);
        if (asked !== null) {
          if (reply === null) record({ event: 'broken', request });
          else record({ event: 'answered', request, answer: toAnswer(asked, reply) });
          if (reply?.ok === true) options.onAnswer?.(request, { device: address, asked });
        }
        resolve(reply);
      };
      const giveUp = (): void => settle(null);
      const timer = setTimeout(() => {
        giveUp();
        if (line !== mine) return;
        mine.socket.disconnect();
        renew();
      }, ANSWER_WAIT_MAX_MS);
      waiting.get(mine)!.add(giveUp);
      mine.socket.emit(name, input, (reply: Reply<Name>) => settle(reply));
    });
  }

  /** Asks until it is answered with success, over however many connections. @throws where the phone is stopped */
  async function insist<Name extends RequestName>(
    name: Name,
    input: RequestInput<Name>,
    asked: Asked,
  ): Promise<RequestData<Name>> {
    for (;;) {
      const reply = await ask(name, input, asked);
      if (stopped.signal.aborted) throw new Error(`${device} was stopped before ${name} was done`);
      if (reply?.ok === true) return reply.data;
      if (reply !== null) await pause(waitOf(reply.error));
    }
  }

  function waitOf(error: { retryAfterMs?: number | undefined }): number {
    return Math.min(error.retryAfterMs ?? RETRY_MS, 300);
  }

  function pause(ms: number): Promise<void> {
    return new Promise((resolve) => setTimeout(resolve, ms));
  }

  // ——— keys and gate: one change at a time

  function alone<T>(work: () => Promise<T>): Promise<T> {
    const result = exclusive.then(work);
    exclusive = result.then(
      () => {},
      () => {},
    );
    return result;
  }

  async function upload(): Promise<void> {
    if (owed === null) return;
    const { preKeys, replacesIdentity } = owed;
    const answer = await insist(
      'uploadKeys',
      {
        registrationId: REGISTRATION_ID,
        identityKey: keys.identityKey(),
        signedPreKey,
        oneTimePreKeys: preKeys,
        ...(replacesIdentity ? { replaceIdentity: true } : {}),
      },
      { name: 'upload', preKeys: preKeys.map((key) => key.publicKey), replacesIdentity },
    );
    note(answer);
    owed = null;
  }

  function note(versions: { keyVersion?: number; countVersion?: number }): void {
    seen = {
      keyVersion: Math.max(seen.keyVersion, versions.keyVersion ?? 0),
      countVersion: Math.max(seen.countVersion, versions.countVersion ?? 0),
    };
  }

  function startOpening(mine: Line): void {
    const { connection } = mine;
    const isOver = (): boolean =>
      stopped.signal.aborted || line !== mine || mine.connection !== connection || !mine.socket.connected;
    void alone(async () => {
      while (!isOver() && !gateIsOpen) {
        await upload();
        const validated = await ask(
          'validateKeys',
          {
            localIdentityKey: keys.identityKey(),
            localSignedPreKeyId: signedPreKey.keyId,
            localSignedPreKeyPublicKey: signedPreKey.publicKey,
            localPreKeyIds: heldPreKeys.map((key) => key.keyId),
            lastKeyVersion: seen.keyVersion,
            lastCountVersion: seen.countVersion,
          },
          null,
        );
        if (validated?.ok !== true) {
          if (validated !== null) await pause(waitOf(validated.error));
          continue;
        }
        const { validation, missingKeys } = validated.data;
        if (validation === undefined) {
          record({ event: 'missed', device, what: missingKeys.join(', ') });
          // It goes on as an application would; what it found stays in the history.
          owed = { preKeys: [], replacesIdentity: true };
          continue;
        }
        note(validated.data);
        const ready = await ask('clientReady', { validation }, { name: 'ready' });
        if (ready?.ok === true && !isOver()) {
          gateIsOpen = true;
          if (mine.connectedAtMs !== null) openedAfterMs.push(performance.now() - mine.connectedAtMs);
          mine.connectedAtMs = null;
          for (const tell of openWaiters) tell();
          openWaiters.clear();
        } else if (ready !== null && !ready.ok) await pause(waitOf(ready.error));
      }
    }).catch((error: unknown) => {
      if (!stopped.signal.aborted) throw error;
    });
  }

  const phone: Phone = {
    address,
    troubles,
    openedAfterMs,
    connection: () => line?.connection ?? 0,
    isOpen: () => gateIsOpen,

    async start() {
      heldPreKeys = makePreKeys(options.oneTimePreKeys);
      owed = { preKeys: heldPreKeys, replacesIdentity: false };
      connect();
      await phone.whenOpen();
    },

    whenOpen() {
      if (gateIsOpen) return Promise.resolve();
      return new Promise((resolve) => openWaiters.add(resolve));
    },

    async send(to, messageId) {
      await insist(
        'sendMessages',
        {
          messageId,
          userId: to.address.userId,
          envelopes: [
            {
              deviceId: to.address.deviceId,
              registrationId: REGISTRATION_ID,
              type: 1,
              content: Buffer.from(messageId).toString('base64'),
            },
          ],
        },
        { name: 'send', messageId, recipient: addressKey(to.address), text: messageId },
      );
    },

    async claim(of, claimId) {
      const { userId, deviceId } = of.address;
      await insist(
        'requestBundle',
        { claimId, userId, deviceId },
        { name: 'claim', claimId, target: addressKey(of.address) },
      );
    },

    refill: (length) =>
      alone(async () => {
        const preKeys = makePreKeys(length);
        heldPreKeys.push(...preKeys);
        const asked: Asked = {
          name: 'upload',
          preKeys: preKeys.map((key) => key.publicKey),
          replacesIdentity: false,
        };
        note(await insist('addPreKeys', { oneTimePreKeys: preKeys }, asked));
      }),

    rotate: () =>
      alone(async () => {
        signedPreKey = keys.signed(signedPreKey.keyId + 1);
        note(await insist('rotateSignedPreKey', { signedPreKey }, { name: 'rotate' }));
      }),

    replaceIdentity: () =>
      alone(async () => {
        keys = new KeyMaker();
        signedPreKey = keys.signed(signedPreKey.keyId + 1);
        heldPreKeys = makePreKeys(options.oneTimePreKeys);
        owed = { preKeys: heldPreKeys, replacesIdentity: true };
        await upload();
      }),

    rotateByHttp: (gatewayUrl) =>
      alone(async () => {
        signedPreKey = keys.signed(signedPreKey.keyId + 1);
        // Where the answer is lost, the socket uploads the same again.
        owed = { preKeys: [], replacesIdentity: false };
        const request = count();
        const asked: Asked = { name: 'upload', preKeys: [], replacesIdentity: false };
        record({ event: 'asked', request, device, connection: null, asked });
        const answer = await fetch(`${gatewayUrl}/api/keys/upload`, {
          method: 'POST',
          headers: { authorization: `Bearer ${options.token}`, 'content-type': 'application/json' },
          body: JSON.stringify({
            keyBundle: { registrationId: REGISTRATION_ID, identityPubKey: keys.identityKey(), signedPreKey },
          }),
          signal: AbortSignal.timeout(ANSWER_WAIT_MAX_MS),
        })
          .then(
            (response) =>
              response.json() as Promise<{ success: boolean; keyVersion: number; error?: { code: string } }>,
          )
          .catch(() => null);
        if (answer === null) {
          noteTrouble('broken');
          record({ event: 'broken', request });
        } else if (answer.success) {
          note(answer);
          record({
            event: 'answered',
            request,
            answer: { ok: true, name: 'upload', keyVersion: answer.keyVersion },
          });
          owed = null;
          return;
        } else {
          noteTrouble(answer.error!.code);
          record({ event: 'answered', request, answer: { ok: false, code: answer.error!.code } });
        }
        await upload();
      }),

    reconnect() {
      line?.socket.io.engine?.close();
    },

    abandon() {
      line?.socket.io.reconnection(false);
      renew();
    },

    async probe() {
      await ask('keyStatus', {}, null);
    },

    pauseReading: () => networkOf(line)?.pause(),
    resumeReading: () => networkOf(line)?.resume(),

    state() {
      const link = line?.socket.connected ? `connected (${line.connection})` : 'not connected';
      const engine = line?.socket.io.engine?.readyState ?? 'none';
      const asked = line === null ? [] : [...waiting.get(line)!.keys()];
      return `${device}: ${link}, engine ${engine}, gate ${gateIsOpen ? 'open' : 'closed'}, ${asked.length} asked, ${JSON.stringify(Object.fromEntries(troubles))}`;
    },

    stop() {
      stopped.abort();
      for (const { socket } of waiting.keys()) {
        socket.io.reconnection(false);
        socket.disconnect();
      }
    },
  };
  return phone;
}

/** The socket under the WebSocket of a connection. */
function networkOf(line: Line | null): { pause(): void; resume(): void } | undefined {
  const transport = line?.socket.io.engine?.transport as unknown as
    | { ws?: { _socket?: { pause(): void; resume(): void } } }
    | undefined;
  return transport?.ws?._socket;
}

function toEnvelope(envelope: PushPayload<'messages'>['envelopes'][number]): Envelope {
  const { id, messageId } = envelope;
  if (envelope.kind === 'bounce') {
    return { kind: 'bounce', id, messageId, recipient: addressKey(envelope.recipient) };
  }
  const text = Buffer.from(envelope.content, 'base64').toString();
  return { kind: 'message', id, messageId, sender: addressKey(envelope.sender), text };
}

function toAnswer(asked: Asked, reply: Reply<RequestName>): Answer {
  if (!reply.ok) return { ok: false, code: reply.error.code };
  switch (asked.name) {
    case 'upload':
    case 'rotate': {
      const { keyVersion } = reply.data as { keyVersion: number };
      return { ok: true, name: asked.name, keyVersion };
    }
    case 'ready': {
      const { keyVersion, pendingCount } = reply.data as RequestData<'clientReady'>;
      return { ok: true, name: 'ready', keyVersion, pendingCount };
    }
    case 'claim': {
      const [bundle] = (reply.data as RequestData<'requestBundle'>).devices;
      return {
        ...{ ok: true, name: 'claim' },
        preKey: bundle?.oneTimePreKey?.publicKey ?? null,
        absent: bundle?.oneTimePreKeyAbsent ?? null,
      };
    }
    case 'send':
      return { ok: true, name: 'send' };
  }
}
