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
import type { GateClosedReason, MessagesAcknowledgement, PushName, PushPayload } from '../protocol/events.ts';
import { addressKey, type DeviceAddress } from '../protocol/ids.ts';
import { PAGE_BYTES_MAX, PAGE_ENVELOPES_MAX } from '../protocol/limits.ts';
import type { Bounces } from './bounce.ts';
import type { DeletedLately } from './deleted-lately.ts';
import { CONNECTED, type GateEffect, type GateEvent, type GateState, step } from './gate.ts';
import type { DeliveryReports } from './reports.ts';
import { isRevoked, type TokenAge } from './revocation.ts';
import {
  addTo,
  contentBytesOf,
  ofPage,
  type PageOutcome,
  type PushedPage,
  PushWindow,
  sortedOut,
  type WindowFacts,
} from './window.ts';

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
  window(): WindowFacts;
  /** What the sweep asks the store about. */
  reader(): Reader & { keyVersion: number; lowNoticeVersion: number; inFlight: number };
  /** A validation found client and server in step at `keyVersion`. */
  validated(keyVersion: number): void;
  /** What the socket stands validated at, by that or by what came after; null before the first, and once the server was restored. */
  validatedVersion(): number | null;
  /** A validation found that the server was restored from an older backup, and lifted its version to `keyVersion`. */
  foundRestored(keyVersion: number): void;
  /**
   * Opens the gate with this socket's validation, or with the one brought along.
   *
   * @throws GatewayError KEYS_NOT_UPLOADED, KEYS_NOT_VALIDATED, KEYS_OUT_OF_SYNC, FORBIDDEN where the token was revoked,
   *   UNAVAILABLE
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
  /** What is known of that may be old: the next to ask asks the store. */
  doubtKeys(): void;
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
  /** Of the token that it goes on under. */
  tokenAge(): TokenAge;
  /** Goes on under a newer token. */
  resume(token: TokenAge): void;
  displace(): void;
  detach(): void;
}

/** What all sessions of a node work with. */
export interface SessionShared {
  messages: MessageStore;
  bounces: Pick<Bounces, 'settle'>;
  clock: Clock;
  log: Log;
  lowThreshold: number;
  reports: DeliveryReports;
  /** Messages that were just deleted: a statement that began before may still have seen them wait. */
  deleted: DeletedLately;
  forget(session: Session): void;
}

/** What one session begins with. */
export interface SessionStart {
  device: DeviceAddress;
  token: TokenAge;
  fence: number;
  lowNoticeVersion: number;
  socket: ServedSocket;
}

/** After a failure of the store, look again this much later, and after each further one twice as much. */
const RETRY_MIN_MS = 1_000;
const RETRY_MAX_MS = 4_000;
/** Sockets whose look failed at once look again at so many different times. */
const RETRY_SPREAD = 64;

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

export function createSession(shared: SessionShared, start: SessionStart): Session {
  return new DeviceSession(shared, start);
}

/** A class, because every open socket has one: methods of its own would be half of what it holds while it idles. */
class DeviceSession implements Session {
  readonly device: DeviceAddress;
  readonly fence: number;
  readonly #shared: SessionShared;
  readonly #me: Reader;
  readonly #socket: ServedSocket;
  #state: GateState = CONNECTED;
  #opening: Opening | null = null;
  /** The window: a client that says that it is ready, or closes its gate, has read no more by that. */
  readonly #window = new PushWindow();
  /** How often the gate was closed. */
  #closings = 0;
  /** A validation of a newer key set than the one that the gate is open on. */
  #validatedAhead: number | null = null;
  #noticeVersion: number;
  /** `clientReady` is followed by a notice where a pool is low, also if it was so before. */
  #lowNoticeOwed = false;
  #knownToHaveKeys = false;
  /** Changes of this socket's own that have ended: what was asked before the last of them says nothing of now. */
  #ownChanges = 0;
  #token: TokenAge;
  #paused = false;
  #ended = false;
  #looking = false;
  #lookAgain = false;
  #readCount = 0;
  #failuresInARow = 0;
  /** Whether something may wait that is not in the window, as far as the reads have shown. */
  #mayWait = true;
  /** What was handed over in this turn, and goes out at its end. */
  #handed: { page: PushedPage; envelopes: QueuedEnvelope[] } | null = null;
  #timer: Timer | null = null;
  #timerDueMs = Number.POSITIVE_INFINITY;
  constructor(shared: SessionShared, start: SessionStart) {
    this.device = start.device;
    this.fence = start.fence;
    this.#shared = shared;
    this.#me = { device: start.device, fence: start.fence };
    this.#socket = start.socket;
    this.#noticeVersion = start.lowNoticeVersion;
    this.#token = start.token;
  }

  /** @returns whether it looks at the device, for the gate is open and may deliver */
  #apply(event: GateEvent): boolean {
    const before = this.#state;
    const next = step(this.#state, event);
    this.#state = next.state;
    if (this.#state.name !== before.name || keyVersionOf(this.#state) !== keyVersionOf(before)) {
      const closing = next.effects.find((effect) => effect.name === 'close');
      this.#shared.reports.gateMoved(this.#me, before, this.#state, closing?.reason ?? null);
    }
    for (const effect of next.effects) this.#carryOut(effect);
    return next.effects.some((effect) => effect.name === 'deliver');
  }

  #carryOut(effect: GateEffect): void {
    switch (effect.name) {
      case 'deliver':
        this.look();
        break;
      case 'close':
        // What is in flight stays pending: a late acknowledgement still counts, another opening offers it again.
        this.#opening = null;
        this.#closings += 1;
        this.#window.voidAll();
        this.#socket.push('gateClosed', { reason: effect.reason, keyVersion: effect.keyVersion });
        break;
    }
  }

  /** Looks once, and once more for everything that asked meanwhile. */
  async #lookUntilQuiet(): Promise<void> {
    this.#looking = true;
    while (this.#lookAgain && !this.#ended) {
      this.#lookAgain = false;
      try {
        if (this.#state.name === 'open' && !this.#paused) await this.#drain();
        else {
          const start = this.#now();
          this.#learn(await this.#shared.messages.prove(this.device), start);
        }
      } catch (error) {
        this.#lookLater(error, 'looking at a device failed');
        continue;
      }
      this.#failuresInARow = 0;
    }
    this.#looking = false;
  }

  #lookLater(error: unknown, what: string): void {
    // That it is away the store says itself, once for all who need it.
    if (!(error instanceof GatewayError && error.code === 'UNAVAILABLE')) {
      this.#shared.log.warn({ device: addressKey(this.device), error: error as Error }, what);
    }
    const delayMs = Math.min(RETRY_MAX_MS, RETRY_MIN_MS * 2 ** this.#failuresInARow);
    this.#failuresInARow += 1;
    const spread = 0.5 + (this.fence % RETRY_SPREAD) / RETRY_SPREAD;
    this.#lookAt(this.#shared.clock.nowMs() + delayMs * spread);
  }

  #now(): Start {
    return { state: this.#state, ownChanges: this.#ownChanges };
  }

  #knowKeys(hasKeys: boolean, start: Start): void {
    if (start.ownChanges === this.#ownChanges) this.#knownToHaveKeys = hasKeys;
  }

  /** Takes in what a statement proved. @returns whether the gate is open at the proven version */
  #learn(proof: DeviceProof | null, start: Start): boolean {
    if (this.#ended) return false;
    if (proof === null) {
      if (start.state.name !== 'connected') this.#findRestored(0);
      return false;
    }
    if (this.#leftAsRevoked(proof)) return false;
    this.#knowKeys(proof.hasKeys, start);
    // An open gate was served under its number: a backup was restored that had not heard of it.
    if (proof.fence < this.fence && start.state.name === 'open') {
      this.#findRestored(proof.keyVersion);
      return false;
    }
    if (proof.fence > this.fence) {
      this.displace();
      return false;
    }
    if (this.#lowNoticeOwed || proof.lowNoticeVersion > this.#noticeVersion) {
      this.#lowNoticeOwed = false;
      this.#noticeVersion = Math.max(this.#noticeVersion, proof.lowNoticeVersion);
      if (this.#isLow(proof)) this.#pushPreKeysLow(proof);
    }
    this.#follow(proof, start);
    return this.#state.name === 'open' && this.#state.keyVersion === proof.keyVersion;
  }

  /** Whether this socket's token was revoked: then it is told so, and ends. */
  #leftAsRevoked({ revokedAtMs, keyVersion }: DeviceProof): boolean {
    if (!isRevoked(this.#token, revokedAtMs)) return false;
    this.#socket.push('gateClosed', { reason: 'deviceRevoked', keyVersion });
    this.detach();
    this.#socket.close('its device was revoked');
    return true;
  }

  /** Voids all that was proven: of the keys that the client compared with, the store may know nothing any more. */
  #findRestored(keyVersion: number): void {
    this.#validatedAhead = null;
    if (keyVersion === 0) this.#knownToHaveKeys = false;
    this.#apply({ name: 'keysChanged', keyVersion, reason: 'serverRestored' });
  }

  /** Tells the gate which version a statement proved that began at `start`. */
  #follow(proof: DeviceProof, start: Start): void {
    const keyVersion = keyVersionOf(this.#state);
    if (keyVersion === null || proof.keyVersion === keyVersion) return;
    // A version that went back while no change of ours was under way: an older backup was restored.
    if (proof.keyVersion < keyVersion && keyVersion === keyVersionOf(start.state)) {
      this.#findRestored(proof.keyVersion);
    } else {
      this.#apply({ name: 'keysChanged', keyVersion: proof.keyVersion, reason: this.#reasonOf(proof) });
    }
  }

  #reasonOf(proof: DeviceProof): GateClosedReason {
    if (!proof.hasKeys) return 'keysReset';
    return proof.identityVersion === this.#opening?.identityVersion ? 'keysRotated' : 'identityReplaced';
  }

  #isLow(proof: DeviceProof): boolean {
    const { ec, pq } = proof.availableCounts;
    return (
      proof.hasKeys && (ec < this.#shared.lowThreshold || (proof.offersPq && pq < this.#shared.lowThreshold))
    );
  }

  #pushPreKeysLow(proof: DeviceProof): void {
    this.#socket.push('preKeysLow', {
      availableCount: proof.availableCounts.ec,
      pqAvailableCount: proof.availableCounts.pq,
      threshold: this.#shared.lowThreshold,
      countVersion: proof.countVersion,
    });
  }

  /** Reads and pushes pages until the queue or the window ends. */
  async #drain(): Promise<void> {
    let hasProof = false;
    while (this.#state.name === 'open' && this.#opening !== null && !this.#paused && !this.#ended) {
      const current = this.#opening;
      const closingsAtStart = this.#closings;
      const room = this.#window.room();
      this.#mayWait = true;
      const start = this.#now();
      if (room === null) {
        // An acknowledgement makes room and looks again. A client that withholds it hears of its keys all the same.
        if (!hasProof) this.#learn(await this.#shared.messages.prove(this.device), start);
        return;
      }
      this.#readCount += 1;
      const page = await this.#shared.messages.read(this.#me, {
        inFlight: this.#window.inFlight(),
        envelopesMax: Math.min(PAGE_ENVELOPES_MAX, room.envelopes),
        bytesMax: Math.min(PAGE_BYTES_MAX, room.bytes),
        nowMs: this.#shared.clock.nowMs(),
      });
      if (!this.#learn(page?.proof ?? null, start) || page === null) return;
      hasProof = true;
      // The gate was closed and opened again while the page was read: what it left out may not be in flight now.
      if (this.#closings !== closingsAtStart) continue;
      // Before what is pushed of it: under steady traffic no page may ever be empty.
      this.#announceEmpty(current, page.oldestSequence);
      if (page.nextDueAtMs !== null) this.#lookAt(page.nextDueAtMs);
      if (this.#paused || this.#ended) continue;
      if (page.envelopes.length > 0) this.#pushPage(page.envelopes);
      if (page.unreadable.length > 0) {
        await this.#shared.messages.bounce(this.device, page.unreadable);
        await this.#shared.bounces.settle(this.device);
      } else if (!page.more) {
        this.#mayWait = false;
        return;
      }
    }
  }

  /** @param current what the gate was open for when the read began that found `oldestSequence` */
  #announceEmpty(current: Opening, oldestSequence: number | null): void {
    if (this.#opening !== current || current.emptyAnnounced) return;
    if (oldestSequence !== null && oldestSequence <= current.boundary) return;
    // The store has deleted what an acknowledgement under way has not been counted for: its end looks again.
    if (this.#window.holdsUpTo(current.boundary)) return;
    current.emptyAnnounced = true;
    this.#socket.push('queueEmpty', { deliveredCount: current.deliveredCount });
  }

  /** At the end of the turn, so that the next page is asked for before this one is written out. */
  #pushPage(envelopes: QueuedEnvelope[]): void {
    const wire = envelopes.map(toWire);
    const page = this.#window.open(this.#shared.clock.nowMs());
    for (const envelope of envelopes) addTo(page, envelope);
    process.nextTick(() => this.#push(page, envelopes, wire));
  }

  /** At the end of the turn, so that what was stored together goes out together. */
  #pushHanded(): void {
    if (this.#handed === null) return;
    const { page, envelopes } = this.#handed;
    this.#handed = null;
    this.#push(page, envelopes, envelopes.map(toWire));
  }

  #push(page: PushedPage, envelopes: QueuedEnvelope[], wire: IncomingEnvelope[]): void {
    if (page.isVoid || this.#paused || this.#ended) {
      // It waits in the queue like everything else.
      this.#window.close(page);
      this.look();
      return;
    }
    this.#shared.reports.pushed(this.#me, envelopes);
    void this.#socket.pushMessages(wire).then(async (acknowledgement) => {
      if (acknowledgement === null) {
        this.#window.close(page);
        // The client may have been told that the gate is closed and have dropped the page: that is no silence.
        if (page.isVoid) this.look();
        else if (!this.#ended) this.#socket.close('a push was not acknowledged in time');
        return;
      }
      page.isSettling = true;
      // It makes room: the next page need not wait until this one is deleted.
      if (this.#mayWait) this.look();
      let isAllGone = false;
      const outcome = sortedOut(page, acknowledgement);
      try {
        isAllGone = await this.#settlePage(outcome);
        this.#shared.reports.settled(this.#me, ofPage(page, acknowledgement, outcome));
      } catch (error) {
        // Offered again at once, it would go to and fro for as long as the store deletes nothing.
        this.#lookLater(error, 'an acknowledgement was not stored');
        this.#window.close(page);
        return;
      }
      this.#window.close(page);
      // Where the last read found nothing beyond the window, there is nothing to look for.
      if (!isAllGone || page.isVoid || this.#mayWait || this.#opening?.emptyAnnounced !== true) this.look();
    });
  }

  /** @returns whether every envelope of the page was processed, and was this session's to delete */
  async #settlePage({ processed, failures }: PageOutcome): Promise<boolean> {
    let isAllGone = failures.length === 0;
    if (processed.length > 0) {
      const count = await this.#shared.messages.acknowledge(this.#me, processed);
      if (count === processed.length) this.#shared.deleted.add(processed);
      else isAllGone = false;
      // What was pushed before a second `clientReady` and processed after it counts for the second.
      if (this.#opening !== null) this.#opening.deliveredCount += count;
    }
    if (failures.length > 0) {
      const { nextDueAtMs, bounced } = await this.#shared.messages.putOff(
        this.#me,
        failures,
        this.#shared.clock.nowMs(),
      );
      if (nextDueAtMs !== null) this.#lookAt(nextDueAtMs);
      if (bounced) await this.#shared.bounces.settle(this.device);
    }
    return isAllGone;
  }

  /** Looks at `dueMs`, or before. */
  #lookAt(dueMs: number): void {
    if (this.#ended || dueMs >= this.#timerDueMs) return;
    this.#timer?.cancel();
    this.#timerDueMs = dueMs;
    this.#timer = this.#shared.clock.after(Math.max(0, dueMs - this.#shared.clock.nowMs()), () => {
      this.#timerDueMs = Number.POSITIVE_INFINITY;
      this.look();
    });
  }

  gate(): GateState {
    return this.#state;
  }

  window(): ReturnType<Session['window']> {
    return this.#window.facts();
  }

  reader(): ReturnType<Session['reader']> {
    return {
      ...this.#me,
      keyVersion: this.#state.name === 'open' ? this.#state.keyVersion : 0,
      lowNoticeVersion: this.#noticeVersion,
      inFlight: this.#window.inFlight().length,
    };
  }

  validatedVersion(): number | null {
    const keyVersion = keyVersionOf(this.#state);
    return keyVersion === null ? null : Math.max(keyVersion, this.#validatedAhead ?? 0);
  }

  validated(keyVersion: number): void {
    this.#apply({ name: 'validated', keyVersion });
    if (this.#state.name !== 'open' || keyVersion <= this.#state.keyVersion) return;
    // The notice of a change was lost, or is on its way: the look closes the gate and tells why.
    this.#validatedAhead = keyVersion;
    this.look();
  }

  foundRestored(keyVersion: number): void {
    if (keyVersion !== keyVersionOf(this.#state)) this.#findRestored(keyVersion);
  }

  async ready(broughtKeyVersion: number | null): ReturnType<Session['ready']> {
    const start = this.#now();
    const keyVersion = broughtKeyVersion ?? this.validatedVersion();
    if (keyVersion === null) {
      if (!(await this.hasKeys())) throw new GatewayError('KEYS_NOT_UPLOADED');
      throw new GatewayError('KEYS_NOT_VALIDATED');
    }
    const result = await this.#shared.messages.serve(this.#me, keyVersion, this.#shared.clock.nowMs());
    if (result === null) this.#learn(null, start);
    if (result !== null && this.#leftAsRevoked(result.proof)) throw new GatewayError('FORBIDDEN');
    if (result === null || !result.proof.hasKeys) throw new GatewayError('KEYS_NOT_UPLOADED');
    this.#follow(result.proof, start);
    if (!result.served) {
      this.#learn(result.proof, start);
      if (result.proof.fence > this.fence) {
        throw new GatewayError('UNAVAILABLE', 'a newer connection of this device took over');
      }
      throw new GatewayError('KEYS_OUT_OF_SYNC', undefined, {
        details: { keyVersion: result.proof.keyVersion },
      });
    }
    this.#knowKeys(true, start);
    this.#lowNoticeOwed = true;
    this.#apply({ name: 'validated', keyVersion });
    this.#opening = {
      identityVersion: result.proof.identityVersion,
      boundary: result.newestSequence,
      deliveredCount: 0,
      emptyAnnounced: false,
    };
    const looks = this.#apply({ name: 'opened', keyVersion });
    const { name, keyVersion: newest } = this.gate() as Exclude<GateState, { name: 'connected' }>;
    if (name !== 'open') {
      // A newer key set was validated while the store answered for this one.
      this.#opening = null;
      throw new GatewayError('KEYS_OUT_OF_SYNC', undefined, { details: { keyVersion: newest } });
    }
    this.#validatedAhead = null;
    // An own rotation may have carried the gate on meanwhile: then this opening is the one to deliver for.
    if (!looks) this.look();
    return { pendingCount: result.pendingCount, keyVersion };
  }

  async change<Outcome extends { rotation: boolean; data: { keyVersion: number } }>(
    change: () => Promise<Outcome>,
  ): Promise<Outcome> {
    this.#apply({ name: 'rotationStarted' });
    let keyVersion: number | null = null;
    try {
      const outcome = await change();
      if (outcome.rotation) keyVersion = outcome.data.keyVersion;
      return outcome;
    } finally {
      this.#knownToHaveKeys = false;
      this.#ownChanges += 1;
      const looks = this.#apply({ name: 'rotationEnded', keyVersion });
      // Where it was more than a rotation, the store's version tells.
      if (!looks) this.look();
    }
  }

  async hasKeys(): Promise<boolean> {
    if (this.#knownToHaveKeys) return true;
    const start = this.#now();
    const hasKeys = (await this.#shared.messages.prove(this.device))?.hasKeys ?? false;
    this.#knowKeys(hasKeys, start);
    return hasKeys;
  }

  doubtKeys(): void {
    this.#knownToHaveKeys = false;
  }

  readCount(): number | null {
    return this.#looking ? null : this.#readCount;
  }

  handOver(envelope: QueuedEnvelope, stored: StoredMessage, readCountBefore: number): boolean {
    // Whoever drains may be about to read it himself, or has read it.
    if (this.#ended || this.#paused || this.#looking || this.#readCount !== readCountBefore) return false;
    if (this.#state.name !== 'open' || this.#opening?.emptyAnnounced !== true || this.#mayWait) return false;
    const isCurrent =
      stored.fence === this.fence &&
      stored.keyVersion === this.#state.keyVersion &&
      stored.identityVersion === this.#opening.identityVersion;
    if (
      !isCurrent ||
      stored.waiting === null ||
      !stored.waiting.every((sequence) => this.#window.has(sequence) || this.#shared.deleted.has(sequence))
    )
      return false;
    if (this.#window.room() === null) return false;
    const bytes = contentBytesOf(envelope);
    const isFull =
      this.#handed !== null &&
      (this.#handed.envelopes.length === PAGE_ENVELOPES_MAX ||
        this.#handed.page.bytes + bytes > PAGE_BYTES_MAX);
    if (isFull) this.#pushHanded();
    if (this.#handed === null) {
      this.#handed = { page: this.#window.open(this.#shared.clock.nowMs()), envelopes: [] };
      process.nextTick(() => this.#pushHanded());
    }
    addTo(this.#handed.page, envelope);
    this.#handed.envelopes.push(envelope);
    return true;
  }

  look(): void {
    this.#lookAgain = true;
    if (!this.#looking && !this.#ended) void this.#lookUntilQuiet();
  }

  pause(): void {
    this.#paused = true;
  }

  tokenAge(): TokenAge {
    return this.#token;
  }

  resume(newer: TokenAge): void {
    this.#token = newer;
    this.#paused = false;
    this.look();
  }

  displace(): void {
    if (this.#ended) return;
    this.#socket.push('displaced', {});
    this.detach();
    this.#socket.displace();
  }

  detach(): void {
    if (this.#ended) return;
    this.#ended = true;
    this.#opening = null;
    this.#timer?.cancel();
    this.#shared.forget(this);
  }
}

function keyVersionOf(state: GateState): number | null {
  return state.name === 'connected' ? null : state.keyVersion;
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
  return {
    id,
    kind: 'message',
    messageId,
    sender: body.sender,
    type: body.type,
    content: body.content,
    storedAt,
  };
}
