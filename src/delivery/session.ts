/**
 * One socket's share of delivery: its gate, the window of what was pushed and not yet acknowledged, and the one loop
 * that reads, proves and pushes.
 */
import type { Clock, Timer } from '../lib/clock.ts';
import type { Log } from '../lib/log.ts';
import type {
  DeviceProof,
  MessageStore,
  QueuedEnvelope,
  Reader,
  StoredMessage,
} from '../ports/message-store.ts';
import type { IncomingEnvelope } from '../protocol/envelope.ts';
import { GatewayError } from '../protocol/errors.ts';
import type {
  FailedReason,
  GateClosedReason,
  MessagesAcknowledgement,
  PushName,
  PushPayload,
} from '../protocol/events.ts';
import { addressKey, type DeviceAddress } from '../protocol/ids.ts';
import {
  CONTENT_BYTES_MAX,
  PAGE_BYTES_MAX,
  PAGE_ENVELOPES_MAX,
  WINDOW_BYTES_MAX,
  WINDOW_ENVELOPES_MAX,
} from '../protocol/limits.ts';
import type { Bounces } from './bounce.ts';
import { CONNECTED, type GateEffect, type GateEvent, type GateState, step } from './gate.ts';
import type { DeliveryReports } from './reports.ts';
import { isRevoked, type TokenAge } from './revocation.ts';

/** What a session needs of its socket. */
export interface ServedSocket {
  /** False from when its end was seen. */
  isOpen(): boolean;
  push<Name extends Exclude<PushName, 'messages'>>(name: Name, payload: PushPayload<Name>): void;
  /** @returns the client's acknowledgement; null where none came in time, or the socket ended */
  pushMessages(envelopes: IncomingEnvelope[]): Promise<MessagesAcknowledgement | null>;
  /** Ends the connection; the client may come back at once. */
  close(reason: string): void;
  /** Ends the connection for a newer one of the same device; the client does not come back by itself. */
  displace(): void;
}

export interface Session {
  readonly device: DeviceAddress;
  readonly fence: number;
  gate(): GateState;
  /** What was pushed and not yet acknowledged. */
  window(): { count: number; bytes: number; isFull: boolean; oldestPushAtMs: number | null };
  /** What the sweep asks the store about. */
  reader(): Reader & { keyVersion: number; lowNoticeVersion: number; inFlight: number };
  /** A validation found client and server in step at `keyVersion`. */
  validated(keyVersion: number): void;
  /**
   * Opens the gate with this socket's validation, or with the one brought along.
   *
   * @throws GatewayError KEYS_NOT_UPLOADED, KEYS_NOT_VALIDATED, KEYS_OUT_OF_SYNC, UNAVAILABLE
   */
  ready(broughtKeyVersion: number | null): Promise<{ pendingCount: number; keyVersion: number }>;
  /**
   * Runs a change of this socket's own: a mere rotation carries an open gate along instead of closing it, and whether
   * the device still has keys is asked anew.
   */
  change<Outcome extends { rotation: boolean; data: { keyVersion: number } }>(
    change: () => Promise<Outcome>,
  ): Promise<Outcome>;
  /** Whether the device has a key set, as far as this session has heard. */
  hasKeys(): Promise<boolean>;
  /** Something of the device may have changed. */
  look(): void;
  /**
   * How many reads there have been: what is handed over must not have been in one of them. Null while the session reads.
   */
  readCount(): number | null;
  /**
   * Takes a message over that was just stored, without its being read back.
   *
   * @param readCount what `readCount` said before it was stored
   * @returns false where it is not proven that it may go out now, before all else: then `look` is due
   */
  handOver(envelope: QueuedEnvelope, stored: StoredMessage, readCount: number): boolean;
  /** While paused nothing is handed out; the gate stays as it is. */
  pause(): void;
  /** Goes on under a newer token. */
  resume(token: TokenAge): void;
  displace(): void;
  detach(): void;
}

export interface SessionParts {
  device: DeviceAddress;
  token: TokenAge;
  fence: number;
  lowNoticeVersion: number;
  socket: ServedSocket;
  messages: MessageStore;
  bounces: Bounces;
  clock: Clock;
  log: Log;
  lowThreshold: number;
  reports: DeliveryReports;
  forget(session: Session): void;
}

/** After a failure of the store, look again this much later. */
const RETRY_MS = 1_000;

/** What lasts from one `clientReady` to the next, or to the gate's closing. */
interface Opening {
  identityVersion: number;
  /** The highest sequence that waited at `clientReady`. */
  boundary: number;
  deliveredCount: number;
  emptyAnnounced: boolean;
}

/** How things stood when a statement began: it may have seen nothing that came later. */
interface Start {
  state: GateState;
  ownChanges: number;
}

/** Envelopes that were pushed together, until what became of them is stored. */
interface PushedPage {
  /** By envelope id. */
  sequences: Map<string, number>;
  bytes: number;
  pushedAtMs: number;
  /** The gate was closed after it was pushed: the client may have dropped it, and it may be offered again. */
  isVoid: boolean;
  /** Its acknowledgement has come and is being stored. */
  isSettling: boolean;
}

export function createSession(parts: SessionParts): Session {
  const { device, fence, socket, messages, bounces, clock, log, lowThreshold, reports } = parts;
  const me: Reader = { device, fence };
  let state: GateState = CONNECTED;
  let opening: Opening | null = null;
  /** The window: a client that says that it is ready, or closes its gate, has read no more by that. */
  const window = new Set<PushedPage>();
  /** How often the gate was closed. */
  let closings = 0;
  /** A validation of a newer key set than the one that the gate is open on. */
  let validatedAhead: number | null = null;
  let noticeVersion = parts.lowNoticeVersion;
  /** `clientReady` is followed by a notice where a pool is low, also if it was so before. */
  let lowNoticeOwed = false;
  let knownToHaveKeys = false;
  /** Changes of this socket's own that have ended: what was asked before the last of them says nothing of now. */
  let ownChanges = 0;
  let { token } = parts;
  let paused = false;
  let ended = false;
  let looking = false;
  let lookAgain = false;
  let readCount = 0;
  /** Whether something may wait that is not in the window, as far as the reads have shown. */
  let mayWait = true;
  /** What was handed over in this turn, and goes out at its end. */
  let handed: { page: PushedPage; envelopes: QueuedEnvelope[] } | null = null;
  let timer: Timer | null = null;
  let timerDueMs = Number.POSITIVE_INFINITY;

  function apply(event: GateEvent): void {
    const before = state;
    const next = step(state, event);
    state = next.state;
    if (state.name !== before.name || keyVersionOf(state) !== keyVersionOf(before)) {
      const closing = next.effects.find((effect) => effect.name === 'close');
      reports.gateMoved(me, before, state, closing?.reason ?? null);
    }
    for (const effect of next.effects) carryOut(effect);
  }

  function carryOut(effect: GateEffect): void {
    switch (effect.name) {
      case 'deliver':
        session.look();
        break;
      case 'close':
        // What is in flight stays pending: a late acknowledgement still counts, another opening offers it again.
        opening = null;
        closings += 1;
        for (const page of window) page.isVoid = true;
        socket.push('gateClosed', { reason: effect.reason, keyVersion: effect.keyVersion });
        break;
    }
  }

  /** Looks once, and once more for everything that asked meanwhile. */
  async function lookUntilQuiet(): Promise<void> {
    looking = true;
    while (lookAgain && !ended) {
      lookAgain = false;
      try {
        if (state.name === 'open' && !paused) await drain();
        else {
          const start = now();
          learn(await messages.prove(device), start);
        }
      } catch (error) {
        log.warn({ device: addressKey(device), error: error as Error }, 'looking at a device failed');
        lookAt(clock.nowMs() + RETRY_MS);
      }
    }
    looking = false;
  }

  function now(): Start {
    return { state, ownChanges };
  }

  function knowKeys(hasKeys: boolean, start: Start): void {
    if (start.ownChanges === ownChanges) knownToHaveKeys = hasKeys;
  }

  /** Takes in what a statement proved. @returns whether the gate is open at the proven version */
  function learn(proof: DeviceProof | null, start: Start): boolean {
    if (ended) return false;
    if (proof === null) {
      if (start.state.name !== 'connected') findRestored(0);
      return false;
    }
    if (leftAsRevoked(proof)) return false;
    knowKeys(proof.hasKeys, start);
    // An open gate was served under its number: a backup was restored that had not heard of it.
    if (proof.fence < fence && start.state.name === 'open') {
      findRestored(proof.keyVersion);
      return false;
    }
    if (proof.fence > fence) {
      session.displace();
      return false;
    }
    if (lowNoticeOwed || proof.lowNoticeVersion > noticeVersion) {
      lowNoticeOwed = false;
      noticeVersion = Math.max(noticeVersion, proof.lowNoticeVersion);
      if (isLow(proof)) pushPreKeysLow(proof);
    }
    follow(proof, start);
    return state.name === 'open' && state.keyVersion === proof.keyVersion;
  }

  /** Whether this socket's token was revoked: then it is told so, and ends. */
  function leftAsRevoked({ revokedAtMs, keyVersion }: DeviceProof): boolean {
    if (!isRevoked(token, revokedAtMs)) return false;
    socket.push('gateClosed', { reason: 'deviceRevoked', keyVersion });
    session.detach();
    socket.close('its device was revoked');
    return true;
  }

  /** Voids all that was proven: of the keys that the client compared with, the store may know nothing any more. */
  function findRestored(keyVersion: number): void {
    validatedAhead = null;
    if (keyVersion === 0) knownToHaveKeys = false;
    apply({ name: 'keysChanged', keyVersion, reason: 'serverRestored' });
  }

  /** Tells the gate which version a statement proved that began at `start`. */
  function follow(proof: DeviceProof, start: Start): void {
    const keyVersion = keyVersionOf(state);
    if (keyVersion === null || proof.keyVersion === keyVersion) return;
    // A version that went back while no change of ours was under way: an older backup was restored.
    if (proof.keyVersion < keyVersion && keyVersion === keyVersionOf(start.state)) {
      findRestored(proof.keyVersion);
    } else {
      apply({ name: 'keysChanged', keyVersion: proof.keyVersion, reason: reasonOf(proof) });
    }
  }

  function reasonOf(proof: DeviceProof): GateClosedReason {
    if (!proof.hasKeys) return 'keysReset';
    return proof.identityVersion === opening?.identityVersion ? 'keysRotated' : 'identityReplaced';
  }

  function isLow(proof: DeviceProof): boolean {
    const { ec, pq } = proof.availableCounts;
    return proof.hasKeys && (ec < lowThreshold || (proof.offersPq && pq < lowThreshold));
  }

  function pushPreKeysLow(proof: DeviceProof): void {
    socket.push('preKeysLow', {
      availableCount: proof.availableCounts.ec,
      pqAvailableCount: proof.availableCounts.pq,
      threshold: lowThreshold,
      countVersion: proof.countVersion,
    });
  }

  /** What the window still takes; null where an acknowledgement must come first. A page holds its first envelope whatever its size. */
  function roomInWindow(): { envelopes: number; bytes: number } | null {
    let envelopes = WINDOW_ENVELOPES_MAX;
    let bytes = WINDOW_BYTES_MAX;
    for (const page of window) {
      envelopes -= page.sequences.size;
      bytes -= page.bytes;
    }
    return envelopes <= 0 || bytes < CONTENT_BYTES_MAX ? null : { envelopes, bytes };
  }

  /** Reads and pushes pages until the queue or the window ends. */
  async function drain(): Promise<void> {
    while (state.name === 'open' && opening !== null && !paused && !ended) {
      const current = opening;
      const closingsAtStart = closings;
      const room = roomInWindow();
      mayWait = true;
      // An acknowledgement makes room and looks again.
      if (room === null) return;
      const start = now();
      readCount += 1;
      const page = await messages.read(me, {
        inFlight: inFlight(),
        envelopesMax: Math.min(PAGE_ENVELOPES_MAX, room.envelopes),
        bytesMax: Math.min(PAGE_BYTES_MAX, room.bytes),
        nowMs: clock.nowMs(),
      });
      if (!learn(page?.proof ?? null, start) || page === null) return;
      // The gate was closed and opened again while the page was read: what it left out may not be in flight now.
      if (closings !== closingsAtStart) continue;
      // Before what is pushed of it: under steady traffic no page may ever be empty.
      announceEmpty(current, page.oldestSequence);
      if (page.nextDueAtMs !== null) lookAt(page.nextDueAtMs);
      if (page.unreadable.length > 0) {
        await messages.bounce(device, page.unreadable);
        await bounces.settle(device);
      }
      if (closings !== closingsAtStart || paused || ended) continue;
      if (page.envelopes.length > 0) pushPage(page.envelopes);
      if (!page.more && page.unreadable.length === 0) {
        mayWait = false;
        return;
      }
    }
  }

  /** @param current what the gate was open for when the read began that found `oldestSequence` */
  function announceEmpty(current: Opening, oldestSequence: number | null): void {
    if (opening !== current || current.emptyAnnounced) return;
    if (oldestSequence !== null && oldestSequence <= current.boundary) return;
    // The store has deleted what an acknowledgement under way has not been counted for: its end looks again.
    for (const page of window) {
      if (page.isVoid && !page.isSettling) continue;
      for (const sequence of page.sequences.values()) if (sequence <= current.boundary) return;
    }
    current.emptyAnnounced = true;
    socket.push('queueEmpty', { deliveredCount: current.deliveredCount });
  }

  /** What is not to be read again. */
  function inFlight(): number[] {
    return [...window].flatMap((page) => (page.isVoid ? [] : [...page.sequences.values()]));
  }

  function isInFlight(sequence: number): boolean {
    for (const page of window) {
      if (page.isVoid) continue;
      for (const pushed of page.sequences.values()) if (pushed === sequence) return true;
    }
    return false;
  }

  function emptyPage(): PushedPage {
    const page = {
      sequences: new Map<string, number>(),
      bytes: 0,
      pushedAtMs: clock.nowMs(),
      isVoid: false,
      isSettling: false,
    };
    window.add(page);
    return page;
  }

  function addTo(page: PushedPage, envelope: QueuedEnvelope): void {
    page.sequences.set(envelope.id, envelope.sequence);
    page.bytes += contentBytesOf(envelope);
  }

  function pushPage(envelopes: QueuedEnvelope[]): void {
    const page = emptyPage();
    for (const envelope of envelopes) addTo(page, envelope);
    push(page, envelopes);
  }

  /** At the end of the turn, so that what was stored together goes out together. */
  function pushHanded(): void {
    if (handed === null) return;
    const { page, envelopes } = handed;
    handed = null;
    if (page.isVoid || paused || ended) {
      // It waits in the queue like everything else.
      window.delete(page);
      session.look();
    } else push(page, envelopes);
  }

  function push(page: PushedPage, envelopes: QueuedEnvelope[]): void {
    reports.pushed(me, envelopes);
    void socket.pushMessages(envelopes.map(toWire)).then(async (acknowledgement) => {
      if (acknowledgement === null) {
        window.delete(page);
        // The client may have been told that the gate is closed and have dropped the page: that is no silence.
        if (page.isVoid) session.look();
        else if (!ended) socket.close('a push was not acknowledged in time');
        return;
      }
      page.isSettling = true;
      let isAllGone = false;
      try {
        isAllGone = await settlePage(page, acknowledgement);
        reports.settled(me, acknowledgement);
      } catch (error) {
        log.warn({ device: addressKey(device), error: error as Error }, 'an acknowledgement was not stored');
        lookAt(clock.nowMs() + RETRY_MS);
      } finally {
        window.delete(page);
        // Where the last read found nothing beyond the window, there is nothing to look for.
        if (!isAllGone || page.isVoid || mayWait || opening?.emptyAnnounced !== true) session.look();
      }
    });
  }

  /** @returns whether every envelope of the page was processed, and was this session's to delete */
  async function settlePage(page: PushedPage, acknowledgement: MessagesAcknowledgement): Promise<boolean> {
    const left = new Map(page.sequences);
    const processed: number[] = [];
    for (const id of acknowledgement.processed) {
      const sequence = left.get(id);
      if (sequence === undefined) continue;
      processed.push(sequence);
      left.delete(id);
    }
    const failures: { sequence: number; reason: FailedReason }[] = [];
    for (const { id, reason } of acknowledgement.failed ?? []) {
      const sequence = left.get(id);
      if (sequence === undefined) continue;
      failures.push({ sequence, reason });
      left.delete(id);
    }
    // What the client left out it has not processed: it is offered again.
    for (const sequence of left.values()) failures.push({ sequence, reason: 'temporary' });

    let isAllGone = failures.length === 0;
    if (processed.length > 0) {
      const count = await messages.acknowledge(me, processed);
      isAllGone &&= count === processed.length;
      // What was pushed before a second `clientReady` and processed after it counts for the second.
      if (opening !== null) opening.deliveredCount += count;
    }
    if (failures.length > 0) {
      const { nextDueAtMs, bounced } = await messages.putOff(me, failures, clock.nowMs());
      if (nextDueAtMs !== null) lookAt(nextDueAtMs);
      if (bounced) await bounces.settle(device);
    }
    return isAllGone;
  }

  /** Looks at `dueMs`, or before. */
  function lookAt(dueMs: number): void {
    if (ended || dueMs >= timerDueMs) return;
    timer?.cancel();
    timerDueMs = dueMs;
    timer = clock.after(Math.max(0, dueMs - clock.nowMs()), () => {
      timerDueMs = Number.POSITIVE_INFINITY;
      session.look();
    });
  }

  const session: Session = {
    device,
    fence,
    gate: () => state,

    window() {
      let count = 0;
      let bytes = 0;
      let oldestPushAtMs: number | null = null;
      for (const page of window) {
        oldestPushAtMs ??= page.pushedAtMs;
        count += page.sequences.size;
        bytes += page.bytes;
      }
      return {
        count,
        bytes,
        isFull: count >= WINDOW_ENVELOPES_MAX || bytes > WINDOW_BYTES_MAX - CONTENT_BYTES_MAX,
        oldestPushAtMs,
      };
    },

    reader: () => ({
      ...me,
      keyVersion: state.name === 'open' ? state.keyVersion : 0,
      lowNoticeVersion: noticeVersion,
      inFlight: inFlight().length,
    }),

    validated(keyVersion) {
      apply({ name: 'validated', keyVersion });
      if (state.name !== 'open' || keyVersion <= state.keyVersion) return;
      // The notice of a change was lost, or is on its way: the look closes the gate and tells why.
      validatedAhead = keyVersion;
      session.look();
    },

    async ready(broughtKeyVersion) {
      const start = now();
      const validatedVersion = keyVersionOf(start.state);
      const keyVersion =
        broughtKeyVersion ??
        (validatedVersion === null ? null : Math.max(validatedVersion, validatedAhead ?? 0));
      if (keyVersion === null) {
        if (!(await session.hasKeys())) throw new GatewayError('KEYS_NOT_UPLOADED');
        throw new GatewayError('KEYS_NOT_VALIDATED');
      }
      const result = await messages.serve(me, keyVersion, clock.nowMs());
      if (result === null) learn(null, start);
      if (result !== null && leftAsRevoked(result.proof)) throw new GatewayError('FORBIDDEN');
      if (result === null || !result.proof.hasKeys) throw new GatewayError('KEYS_NOT_UPLOADED');
      follow(result.proof, start);
      if (!result.served) {
        learn(result.proof, start);
        if (result.proof.fence > fence) {
          throw new GatewayError('UNAVAILABLE', 'a newer connection of this device took over');
        }
        throw new GatewayError('KEYS_OUT_OF_SYNC', undefined, {
          details: { keyVersion: result.proof.keyVersion },
        });
      }
      knowKeys(true, start);
      lowNoticeOwed = true;
      apply({ name: 'validated', keyVersion });
      opening = {
        identityVersion: result.proof.identityVersion,
        boundary: result.newestSequence,
        deliveredCount: 0,
        emptyAnnounced: false,
      };
      apply({ name: 'opened', keyVersion });
      const { name, keyVersion: newest } = session.gate() as Exclude<GateState, { name: 'connected' }>;
      if (name !== 'open') {
        // A newer key set was validated while the store answered for this one.
        opening = null;
        throw new GatewayError('KEYS_OUT_OF_SYNC', undefined, { details: { keyVersion: newest } });
      }
      validatedAhead = null;
      // An own rotation may have carried the gate on meanwhile: then this opening is the one to deliver for.
      session.look();
      return { pendingCount: result.pendingCount, keyVersion };
    },

    async change(change) {
      apply({ name: 'rotationStarted' });
      let keyVersion: number | null = null;
      try {
        const outcome = await change();
        if (outcome.rotation) keyVersion = outcome.data.keyVersion;
        return outcome;
      } finally {
        knownToHaveKeys = false;
        ownChanges += 1;
        apply({ name: 'rotationEnded', keyVersion });
        // Where it was more than a rotation, the store's version tells.
        session.look();
      }
    },

    async hasKeys() {
      if (knownToHaveKeys) return true;
      const start = now();
      const hasKeys = (await messages.prove(device))?.hasKeys ?? false;
      knowKeys(hasKeys, start);
      return hasKeys;
    },

    readCount: () => (looking ? null : readCount),

    handOver(envelope, stored, readCountBefore) {
      // Whoever drains may be about to read it himself, or has read it.
      if (ended || paused || looking || readCount !== readCountBefore) return false;
      if (state.name !== 'open' || opening?.emptyAnnounced !== true || mayWait) return false;
      const isCurrent =
        stored.fence === fence &&
        stored.keyVersion === state.keyVersion &&
        stored.identityVersion === opening.identityVersion;
      if (!isCurrent || stored.waiting === null || !stored.waiting.every(isInFlight)) return false;
      if (roomInWindow() === null) return false;
      const bytes = contentBytesOf(envelope);
      const isFull =
        handed !== null &&
        (handed.envelopes.length === PAGE_ENVELOPES_MAX || handed.page.bytes + bytes > PAGE_BYTES_MAX);
      if (isFull || handed?.page.isVoid) pushHanded();
      if (handed === null) {
        handed = { page: emptyPage(), envelopes: [] };
        setImmediate(pushHanded);
      }
      addTo(handed.page, envelope);
      handed.envelopes.push(envelope);
      return true;
    },

    look() {
      lookAgain = true;
      if (!looking && !ended) void lookUntilQuiet();
    },

    pause() {
      paused = true;
    },

    resume(newer) {
      token = newer;
      paused = false;
      session.look();
    },

    displace() {
      if (ended) return;
      socket.push('displaced', {});
      session.detach();
      socket.displace();
    },

    detach() {
      if (ended) return;
      ended = true;
      opening = null;
      timer?.cancel();
      parts.forget(session);
    },
  };
  return session;
}

function keyVersionOf(state: GateState): number | null {
  return state.name === 'connected' ? null : state.keyVersion;
}

function contentBytesOf({ body }: QueuedEnvelope): number {
  return body.kind === 'message' ? body.content.length : 0;
}

function toWire(envelope: QueuedEnvelope): IncomingEnvelope {
  const { id, messageId, body } = envelope;
  const storedAt = new Date(envelope.storedAtMs).toISOString();
  if (body.kind === 'bounce') {
    return {
      id,
      kind: 'bounce',
      messageId,
      recipient: body.recipient,
      reason: body.reason,
      storedAt,
    };
  }
  const content = Buffer.from(body.content.buffer, body.content.byteOffset, body.content.byteLength);
  return {
    id,
    kind: 'message',
    messageId,
    sender: body.sender,
    type: body.type,
    content: content.toString('base64'),
    storedAt,
  };
}
