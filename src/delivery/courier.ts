/**
 * The courier of one process: it knows every served socket, looks where a poke points, and looks again by itself where
 * a poke may have been lost.
 */
import { type Clock, every, hasPassed, type Timer } from '../lib/clock.ts';
import type { Log } from '../lib/log.ts';
import type { Bus, BusListener } from '../ports/bus.ts';
import type { MessageStore, QueuedEnvelope, StoredMessage } from '../ports/message-store.ts';
import { GatewayError } from '../protocol/errors.ts';
import { addressKey, type DeviceAddress } from '../protocol/ids.ts';
import type { Bounces } from './bounce.ts';
import { createDeletedLately } from './deleted-lately.ts';
import type { DeliveryReports } from './reports.ts';
import { isRevoked, type TokenAge } from './revocation.ts';
import { createSession, type ServedSocket, type Session, type SessionShared } from './session.ts';

export interface CourierParts {
  messages: MessageStore;
  bus: Bus;
  bounces: Bounces;
  clock: Clock;
  log: Log;
  lowThreshold: number;
  reports: DeliveryReports;
  /** A lost poke delays a message, and a crash a bounce, by at most this long. */
  sweepPeriodMs?: number;
}

/** @returns whether the message goes out without being read back; where it doesn't, the device is to be looked at */
export type HandOver = (envelope: QueuedEnvelope, stored: StoredMessage) => boolean;

export interface Courier extends BusListener {
  /**
   * Takes a connected socket in: numbers its connection, displaces older ones of the device on every node, and
   * resolves when pokes for it can arrive. Nothing is handed out before the session's `ready`.
   *
   * @param token by default one that does not say when it was issued
   * @throws GatewayError FORBIDDEN where the token was revoked, UNAVAILABLE when the store can't be reached
   */
  attach(device: DeviceAddress, socket: ServedSocket, token?: TokenAge): Promise<Session>;
  /** To be asked for before a message is stored for `device`; null where nothing can be handed over now. */
  handOverTo(device: DeviceAddress): HandOver | null;
  /** Starts the slow sweep that finds what a lost poke left. */
  start(): void;
  stop(): void;
}

const SWEEP_PERIOD_MS = 15_000;
/** Revocations of so long before the last sweep are looked at again: whoever revokes may have another clock. */
const REVOKED_LATELY_MS = 5 * 60_000;
const REVOKED_MAX = 1_000;
/** Sockets that stay open for long are noted as served, or their devices would be taken for idle. */
const NOTE_SERVED_PERIOD_MS = 3_600_000;
/** Devices asked about in one statement of the sweep. */
const SWEEP_DEVICES_MAX = 500;

export function createCourier(parts: CourierParts): Courier {
  const { messages, bus, bounces, clock, log, sweepPeriodMs = SWEEP_PERIOD_MS } = parts;
  const sessions = new Map<string, Session>();
  let sweeping: Timer[] = [];
  let servedNotedMs = clock.nowMs();
  /** A node that stood still, or had no store, was told of nothing that was revoked meanwhile. */
  let revokedLookedAtMs = clock.nowMs();

  function forget(session: Session): void {
    // A late end of an older connection must not remove the newer one.
    const key = addressKey(session.device);
    if (sessions.get(key) === session) sessions.delete(key);
    bus.release({ device: session.device, fence: session.fence });
  }

  const shared: SessionShared = { ...parts, deleted: createDeletedLately(), forget };

  async function lookAround(): Promise<void> {
    const nowMs = clock.nowMs();
    const revokedSinceMs = Math.min(revokedLookedAtMs, nowMs) - REVOKED_LATELY_MS;
    for (const device of await messages.revokedSince(revokedSinceMs, REVOKED_MAX)) {
      sessions.get(addressKey(device))?.look();
    }
    revokedLookedAtMs = nowMs;
    const open: Session[] = [];
    for (const session of sessions.values()) {
      // Of the others no version is compared: what a lost poke had to say of them, the next request finds.
      if (session.gate().name === 'open') open.push(session);
      else session.doubtKeys();
    }
    const notesServed = hasPassed(clock, servedNotedMs, NOTE_SERVED_PERIOD_MS);
    if (notesServed) servedNotedMs = clock.nowMs();
    for (let start = 0; start < open.length; start += SWEEP_DEVICES_MAX) {
      const readers = open.slice(start, start + SWEEP_DEVICES_MAX).map((session) => session.reader());
      for (const device of await messages.inNeedOfALook(readers, clock.nowMs())) {
        sessions.get(addressKey(device))?.look();
      }
      if (notesServed) await messages.noteServed(readers, clock.nowMs());
    }
  }

  return {
    async attach(device, socket, token = { issuedAtMs: null }) {
      const { fence, lowNoticeVersion, revokedAtMs } = await messages.connect(device);
      if (isRevoked(token, revokedAtMs)) throw new GatewayError('FORBIDDEN', 'the device was revoked');
      const session = createSession(shared, { device, token, fence, lowNoticeVersion, socket });
      if (!socket.isOpen()) {
        // One that ended while it was numbered must not displace one that came after it.
        session.detach();
        return session;
      }
      const key = addressKey(device);
      const older = sessions.get(key);
      if (older !== undefined && older.fence > fence) {
        session.displace();
        return session;
      }
      sessions.set(key, session);
      older?.displace();
      if (!(await bus.acquire({ device, fence }))) session.displace();
      return session;
    },

    handOverTo(device) {
      const session = sessions.get(addressKey(device));
      const readCount = session?.readCount() ?? null;
      if (session === undefined || readCount === null) return null;
      return (envelope, stored) => session.handOver(envelope, stored, readCount);
    },

    onPoke(device) {
      sessions.get(addressKey(device))?.look();
    },

    onDisplaced(lease) {
      const session = sessions.get(addressKey(lease.device));
      if (session?.fence === lease.fence) session.displace();
    },

    onGap() {
      for (const session of sessions.values()) session.look();
    },

    start() {
      // What an interrupted bounce left anywhere goes home. It may be much: nobody's look waits for it.
      sweeping = [lookAround, () => bounces.settle(null)].map((step) =>
        every(clock, sweepPeriodMs, async () => {
          await step().catch((error: Error) => log.warn({ error }, 'the delivery sweep failed'));
        }),
      );
    },

    stop() {
      for (const timer of sweeping) timer.cancel();
    },
  };
}
