/** The chat client's kit: it connects, keeps keys in step, and hands every message over once, in order. */
import type { PushName, PushPayload, RequestData, RequestInput, RequestName } from '../protocol/events.ts';
import { VALIDATION_LIFETIME_MS } from '../protocol/limits.ts';
import type { KeyVerdict } from './check-keys.ts';
import { createLink, type Link, type LinkState, type TokenReason } from './connection.ts';
import type { DeviceKeys } from './device-keys.ts';
import { createDrain } from './drain.ts';
import { isOutOfStep, KeygateError, KitError } from './errors.ts';
import { type BounceEnvelope, createInbox, type MessageEnvelope } from './inbox.ts';
import { createKeyCheck } from './key-check.ts';
import { createKeySync, type KeySync, type PoolCounts } from './key-sync.ts';
import { type Metrics, newMetrics } from './metrics.ts';
import { type KitStorage, memoryStorage, openNotebook } from './storage.ts';
import { type KitClock, systemKitClock } from './time.ts';

export type ClientState =
  /** Waiting before the next attempt to connect. */
  | 'offline'
  /** Connecting, or connected and not started. */
  | 'connecting'
  | 'checkingKeys'
  | 'syncingKeys'
  /** The gate is open: messages come. */
  | 'ready'
  /** The application asks its user, then calls `setUp`. */
  | 'needsSetup'
  /** A newer connection of this device took over. The kit does not come back by itself. */
  | 'displaced'
  | 'closed';

export interface ClientSnapshot {
  state: ClientState;
  /** One-time prekeys that are being made; null where none are. */
  keyProgress: { made: number; wanted: number } | null;
  /** What waited at `clientReady` and how much was handed over since; null once the queue was empty. */
  drainProgress: { handled: number; pending: number } | null;
  /** Requests of the application that wait for an answer. */
  outboxLength: number;
  /**
   * What keeps it from being ready. Without a connection, why the last attempt failed: a code of the contract where the
   * gateway refused, `NO_TOKEN` where `getToken` failed, `UNREACHABLE` where nothing answered as a gateway does. With
   * one, what went wrong on the way to `ready`; `LOCAL` where keys or storage threw. Null where nothing is known to
   * have failed. No text of the kit's own holds a token.
   */
  trouble: { code: string; message: string } | null;
}

export interface ConnectOptions {
  /** Of the gateway's client port: `https://keys.example.org`; `http`, `ws` and `wss` do as well. */
  url: string;
  /** Asked at connecting, when a token runs out, and after a refused handshake. Its error's text is shown as trouble. */
  getToken(reason: TokenReason): Promise<string>;
  keys: DeviceKeys;
  /**
   * Decrypts, keeps and shows one message; it is acknowledged when this resolves. Throw `UndecryptableError` where no
   * retry can help and `DuplicateMessageError` where it was decrypted before; anything else is offered again.
   * Called for one envelope after the other, and also while the application encrypts: a session's decrypt and encrypt
   * must not run at the same time, or messages are lost (see `DeviceKeys`).
   */
  onMessage(envelope: MessageEnvelope): Promise<void>;
  /** A message of this device can't be delivered: send it again under a new id, or tell the user. */
  onBounce?(envelope: BounceEnvelope): Promise<void>;
  /** Where the kit remembers; without one it forgets with the process. */
  storage?: KitStorage;
  /** Requests of the application that may wait for an answer. Default 256. */
  outboxMax?: number;
  /** One-time prekeys of each kind that the gateway is kept filled to. Default 100. */
  poolLevel?: number;
  /**
   * How long a private half stays after its id was first heard of as handed out, or its signed prekey was replaced.
   * Default 60 days: the 30 of the contract and 30 of a message's life; longer where the gateway keeps messages longer.
   */
  usedLifetimeMs?: number;
  clock?: KitClock;
}

export interface KeygateClient {
  readonly state: ClientState;
  snapshot(): ClientSnapshot;
  /** Calls `listener` after every change. @returns takes it away */
  subscribe(listener: (snapshot: ClientSnapshot) => void): () => void;
  metrics(): Metrics;
  /**
   * Any request of the contract. It waits for a connection, for ever if need be, and is asked again over the next where
   * one breaks or gives no answer for 20 s: the same `claimId` or `messageId` makes that safe. A change of keys without
   * `ifKeyVersion` would not be safe to repeat, and is asked once. `sendMessages` to one user go out in the order of
   * the calls. Where the gateway takes no connection of this device, it waits as for a network: `snapshot` tells why.
   *
   * Over an open connection a refusal as UNAVAILABLE or RATE_LIMITED is asked again 8 times, each after the gateway's
   * `retryAfterMs` (or 1 s) and up to half as much again, and then thrown: UNAVAILABLE because the store is away so
   * after 8 to 12 s. Whoever repeats a call that was thrown names the same `messageId` or `claimId` as before: it may
   * have been carried out, and under another id a message may arrive twice and another one-time prekey is spent.
   *
   * @throws KeygateError for a refusal; KitError OUTBOX_FULL, UNANSWERED, DISPLACED, CLOSED; TypeError for what is no JSON
   */
  call<Name extends RequestName>(name: Name, input: RequestInput<Name>): Promise<RequestData<Name>>;
  /** Listens to pushes; `messages` go to `onMessage`. @returns takes the listener away */
  on<Name extends Exclude<PushName, 'messages'>>(
    name: Name,
    listener: (payload: PushPayload<Name>) => void,
  ): () => void;
  /**
   * One pass, one verdict. A systemic fault leads to exactly one reset, here and on the gateway, and `needsSetup`;
   * without a network nothing is deleted.
   */
  checkKeys(): Promise<KeyVerdict>;
  /**
   * Registers listeners (all or none), checks and syncs keys, and only then says `clientReady`. From then on the kit
   * does so by itself after every reconnection and whenever the gate closes. Waits for a network where there is none,
   * and for a token that the gateway takes: `snapshot` tells what is amiss.
   *
   * @returns the state that it ends in: `ready`, or `needsSetup`
   * @throws what a listener's registration threw: none is left then, and it may be called again; what keys or storage
   *   threw; KeygateError for a refusal that does not pass; KitError DISPLACED, CLOSED, NO_AGREEMENT
   */
  start(): Promise<ClientState>;
  /**
   * Makes a new key set under a new identity, puts it in place of whatever the gateway holds, and starts. A key set
   * that is whole is kept: where this throws, it may be called again, and goes on with the keys that it made.
   */
  setUp(): Promise<ClientState>;
  /** The user wants to begin afresh: one reset, here and on the gateway, and `needsSetup`. */
  reset(reason: string): Promise<void>;
  close(): void;
}

const DAY_MS = 86_400_000;
/** Rounds of validating and mending, and of paths that end out of step, before the path is given up. */
const ROUNDS_MAX = 5;
const PAUSE_MIN_MS = 1_000;
const PAUSE_MAX_MS = 20_000;

type End = 'ready' | 'needsSetup';
type Phase = 'checkingKeys' | 'syncingKeys' | End;

/**
 * Opens a client; connecting begins at once, everything else with `start`.
 *
 * @throws TypeError for a `url` that is none of a gateway, or a `getToken` that is no function
 */
export async function connect(options: ConnectOptions): Promise<KeygateClient> {
  refuseUnusable(options);
  const { keys, clock = systemKitClock } = options;
  const notebook = await openNotebook(options.storage ?? memoryStorage());
  const { memory } = notebook;
  const metrics = newMetrics();
  const subscribers = new Set<(snapshot: ClientSnapshot) => void>();
  let phase: Phase | null = null;
  let keyProgress: ClientSnapshot['keyProgress'] = null;
  let pathFailure: Error | null = null;
  let removeListeners: (() => void) | null = null;
  /** The way from a connection to an open gate, while it is being gone. */
  let path: Promise<End> | null = null;
  let verdict: Promise<KeyVerdict> | null = null;
  let settingUp: Promise<ClientState> | null = null;
  /** The last validation: a reconnecting client whose keys have not changed goes straight to `clientReady`. */
  let kept: { validation: string; madeMs: number } | null = null;
  /** The gate that stands open, and what was counted when it opened. */
  let opened: { connection: number; keyVersion: number } | null = null;
  /** The newest version that a gate closed for since `clientReady` was asked last. */
  let closedFor = 0;
  let endPause = () => {};

  const link: Link = createLink({
    url: options.url,
    getToken: (reason) => options.getToken(reason),
    clock,
    outboxMax: options.outboxMax ?? 256,
    onState: follow,
    onOutbox: tell,
  });

  const drain = createDrain({ clock, onProgress: tell, onEnd: () => fillUp(null) });

  const inbox = createInbox({
    metrics,
    notebook,
    onMessage: (envelope) => options.onMessage(envelope),
    onBounce: async (envelope) => options.onBounce?.(envelope),
    onHandled: () => drain.handled(),
  });

  const sync: KeySync = createKeySync({
    link,
    keys,
    clock,
    metrics,
    notebook,
    poolLevel: options.poolLevel ?? 100,
    usedLifetimeMs: options.usedLifetimeMs ?? 60 * DAY_MS,
    onProgress(progress) {
      keyProgress = progress;
      tell();
    },
  });

  const keyCheck = createKeyCheck({
    link,
    keys,
    clock,
    metrics,
    notebook,
    sync,
    isSetUpAskedFor: () => settingUp !== null,
    onNeedsSetup: () => enter('needsSetup'),
    onReset: distrust,
  });

  function state(): ClientState {
    const at = link.state();
    if (at === 'displaced' || at === 'closed') return at;
    if (phase === 'needsSetup') return phase;
    return at === 'online' ? (phase ?? 'connecting') : at;
  }

  function snapshot(): ClientSnapshot {
    const trouble = link.trouble() ?? pathFailure;
    return {
      state: state(),
      keyProgress,
      drainProgress: drain.progress(),
      outboxLength: link.outboxLength(),
      trouble: trouble && {
        code: 'code' in trouble ? String(trouble.code) : 'LOCAL',
        message: trouble.message,
      },
    };
  }

  function tell(): void {
    const now = snapshot();
    // In a turn of its own: what a screen throws changes nothing here.
    for (const subscriber of subscribers) queueMicrotask(() => subscriber(now));
  }

  function enter(next: Phase | null): void {
    if (phase === next) return;
    phase = next;
    if (next !== 'ready') drain.abandon();
    tell();
  }

  function follow(next: LinkState): void {
    if (next === 'online') {
      metrics.reconnects = link.connection() - 1;
      if (removeListeners !== null && phase !== 'needsSetup') walkByItself();
    } else if (phase === 'ready') {
      phase = null;
      drain.abandon();
    }
    tell();
  }

  let lastTurn: Promise<unknown> = Promise.resolve();
  /** Whatever changes keys happens one after the other. */
  function turn<Result>(work: () => Promise<Result>): Promise<Result> {
    const mine = lastTurn.then(work);
    lastTurn = mine.catch(() => {});
    return mine;
  }

  /** All or none: where one registration throws, those before it are taken back. */
  function register(): () => void {
    const removers: (() => void)[] = [];
    const removeAll = (): void => {
      for (const remove of removers.splice(0)) remove();
    };
    try {
      removers.push(link.on('messages', (page, acknowledge) => void inbox.take(page).then(acknowledge)));
      removers.push(link.on('queueEmpty', drain.emptied));
      removers.push(
        link.on('preKeysLow', (counts) => {
          // Otherwise the end of the drain is waited for, and asks for itself.
          if (phase === 'ready' && drain.progress() === null) fillUp(counts);
        }),
      );
      removers.push(link.on('gateClosed', gateClosed));
      return removeAll;
    } catch (error) {
      removeAll();
      throw error;
    }
  }

  function gateClosed({ reason, keyVersion }: PushPayload<'gateClosed'>): void {
    closedFor = Math.max(closedFor, reason === 'serverRestored' ? Number.POSITIVE_INFINITY : keyVersion);
    // Said of an older opening, and overtaken by the one that stands.
    if (opened !== null && keyVersion <= opened.keyVersion && reason !== 'serverRestored') return;
    distrust();
    if (phase === 'needsSetup') return;
    enter('checkingKeys');
    walkByItself();
  }

  /** @param notice the gateway's counts; null asks for them */
  function fillUp(notice: PoolCounts | null): void {
    turn(async () => {
      let counts = notice;
      // A notice that comes late says nothing of now: the gateway is asked instead, and nothing is uploaded twice.
      if (counts === null || counts.countVersion < memory.lastCountVersion) {
        counts = await link.call('checkPreKeys', {}, { own: true });
      }
      if (counts.countVersion < memory.lastCountVersion) {
        // The gateway was restored from a backup.
        distrust();
        enter('checkingKeys');
        walkByItself();
        return;
      }
      await sync.replenish(counts);
      await sync.forgetUsed();
    }).catch(() => {
      // The next notice or the next drain tries again.
      keyProgress = null;
      tell();
    });
  }

  /** Another validation is due, whatever the last one said. The caller sees to it. */
  function distrust(): void {
    kept = null;
    opened = null;
  }

  /** A path that nobody waits for. */
  function walkByItself(): void {
    walk().catch(() => {
      // Shown as trouble; the next connection, or `start`, tries again.
    });
  }

  /** Goes the path, over as many connections as that takes. Who asks meanwhile joins. */
  function walk(): Promise<End> {
    path ??= walkUntilThrough();
    return path;
  }

  async function walkUntilThrough(): Promise<End> {
    let disagreements = 0;
    let pauseMs = PAUSE_MIN_MS;
    try {
      for (;;) {
        await link.whenOnline();
        try {
          const end = isOpen() ? 'ready' : await turn(goThrough);
          pathFailure = null;
          // The gate may have closed again, or the connection gone, before this was reached.
          if (end === 'needsSetup' || isOpen()) return end;
        } catch (error) {
          if (isOutOfStep(error)) {
            kept = null;
            disagreements += 1;
            if (disagreements >= ROUNDS_MAX) throw noAgreement();
          } else if (mayPass(error)) {
            pathFailure = error as Error;
            tell();
            await pause(pauseMs * (1 + clock.random() / 2));
            pauseMs = Math.min(2 * pauseMs, PAUSE_MAX_MS);
          } else if (!(error instanceof KitError && error.code === 'UNANSWERED')) throw error;
        }
      }
    } catch (error) {
      pathFailure = error instanceof Error ? error : new Error(String(error));
      throw error;
    } finally {
      path = null;
      tell();
    }
  }

  function isOpen(): boolean {
    return phase === 'ready' && opened?.connection === link.connection() && link.state() === 'online';
  }

  function pause(ms: number): Promise<void> {
    return new Promise((resolve) => {
      const cancel = clock.after(ms, resolve);
      endPause = () => {
        cancel();
        resolve();
      };
    });
  }

  /** Check, validate, mend, and only then `clientReady`. */
  async function goThrough(): Promise<End> {
    if (await openedWithKept()) return 'ready';
    enter('checkingKeys');
    const { offline, needsSetup } = await keyCheck.check();
    if (offline) throw new KitError('UNANSWERED', 'the connection broke while keys were checked');
    if (needsSetup) return 'needsSetup';
    enter('syncingKeys');
    for (let round = 0; round < ROUNDS_MAX; round++) {
      const found = await sync.validate();
      if (found.missingKeys.includes('identity')) {
        // The gateway has none, or another registration id with it; another identity was seen by the check.
        await sync.uploadKeySet();
        continue;
      }
      if (await sync.mend(found)) continue;
      if (found.validation === undefined) continue;
      kept = { validation: found.validation, madeMs: clock.nowMs() };
      await open(found.validation);
      if (found.rotationDue) await rotateWhileOpen();
      return 'ready';
    }
    throw noAgreement();
  }

  async function openedWithKept(): Promise<boolean> {
    if (kept === null || clock.nowMs() - kept.madeMs >= VALIDATION_LIFETIME_MS) return false;
    try {
      await open(kept.validation);
      return true;
    } catch (error) {
      kept = null;
      if (isOutOfStep(error)) return false;
      throw error;
    }
  }

  async function open(validation: string): Promise<void> {
    const beginDrain = drain.expect();
    closedFor = 0;
    const ready = await link.call('clientReady', { validation }, { own: true });
    // It may have closed again by the time that the answer is taken in.
    if (closedFor > ready.keyVersion) throw outOfStep('the gate closed as it opened');
    opened = { connection: link.connection(), keyVersion: ready.keyVersion };
    memory.lastKeyVersion = Math.max(memory.lastKeyVersion, ready.keyVersion);
    beginDrain(ready.pendingCount);
    enter('ready');
  }

  /** Through the open gate, which is carried along. What fails here is tried again with the next validation. */
  async function rotateWhileOpen(): Promise<void> {
    kept = null;
    await sync.rotate().catch(() => {});
  }

  const client: KeygateClient = {
    get state() {
      return state();
    },
    snapshot,
    subscribe(listener) {
      subscribers.add(listener);
      return () => subscribers.delete(listener);
    },
    metrics: () => structuredClone(metrics),

    call: (name, input) => link.call(name, input, { once: changesKeys(name) && !('ifKeyVersion' in input) }),

    // A fault of a listener must not reach the kit's own, which are told of the same push.
    on: (name, listener) => link.on(name, (payload) => queueMicrotask(() => listener(payload))),

    checkKeys() {
      verdict ??= check().finally(() => {
        verdict = null;
      });
      return verdict;

      async function check(): Promise<KeyVerdict> {
        const isOnline = await link.whenTried();
        const found = isOnline ? await link.whileOnline(keyCheck.underWay() ?? turn(keyCheck.check)) : null;
        return found ?? (await keyCheck.checkLocally());
      }
    },

    async start() {
      removeListeners ??= register();
      return await walk();
    },

    setUp() {
      settingUp ??= (async () => {
        removeListeners ??= register();
        await link.whenOnline();
        await turn(async () => {
          enter('syncingKeys');
          try {
            const fault = await keyCheck.lastingFault();
            if (fault === null) return;
            if (!fault.fresh) await keyCheck.reset(fault.reason);
            await sync.createKeySet();
          } catch (error) {
            enter('needsSetup');
            throw error;
          }
        });
        return await walk();
      })().finally(() => {
        settingUp = null;
      });
      return settingUp;
    },

    async reset(reason) {
      await turn(async () => {
        await keyCheck.reset(reason);
        enter('needsSetup');
      });
    },

    close() {
      removeListeners?.();
      drain.abandon();
      endPause();
      link.close();
    },
  };
  link.open();
  return client;
}

/** What no attempt to connect could get over. The values stay out of the text: either may have been a token. */
function refuseUnusable({ url, getToken }: ConnectOptions): void {
  if (typeof url !== 'string' || !isGatewayUrl(url)) {
    throw new TypeError('connect: url must be an http, https, ws or wss URL, as https://keys.example.org');
  }
  if (typeof getToken !== 'function') {
    throw new TypeError('connect: getToken must be a function that resolves to a token');
  }
}

function isGatewayUrl(url: string): boolean {
  try {
    return /^(https?|wss?):\/\//.test(url) && new URL(url).hostname !== '';
  } catch {
    return false;
  }
}

function changesKeys(name: RequestName): boolean {
  return name === 'uploadKeys' || name === 'rotateSignedPreKey' || name === 'resetKeys';
}

function outOfStep(message: string): KeygateError {
  return new KeygateError({ code: 'KEYS_OUT_OF_SYNC', message, retryable: false });
}

/** A fault of the gateway may be mended by the next minute; a refusal of what was asked stays. */
function mayPass(error: unknown): boolean {
  return error instanceof KeygateError && (error.retryable || error.code === 'INTERNAL');
}

function noAgreement(): KitError {
  return new KitError('NO_AGREEMENT', 'client and gateway did not come to agree on the keys');
}
