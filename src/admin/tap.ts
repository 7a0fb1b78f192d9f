/**
 * What this node sees, as events for those who look. With nobody looking nothing hangs on the observer; with viewers, an
 * event is made once, and its payload redacted only where some viewer has room for it.
 */
import type { Clock } from '../lib/clock.ts';
import { createRecent } from '../lib/recent.ts';
import { addressKey, type DeviceAddress } from '../protocol/ids.ts';
import type { StreamEvent } from '../protocol/inspector/events.ts';
import { matchesFilter, type StreamFilter } from '../protocol/inspector/filter.ts';
import type { GateName } from '../protocol/inspector/values.ts';
import type { Observer, Reports } from '../requests/observe.ts';
import { isoTime, type LiveSockets } from './live-sockets.ts';
import type { Outbox } from './outbox.ts';
import type { Redactor } from './redactor.ts';

export interface Tap {
  /** Puts what matches into the outbox until it is taken away. */
  watch(filter: StreamFilter, outbox: Watcher): () => void;
  /** Steps in this message's life that were seen while anybody watched, oldest first. */
  lifeOf(messageId: string): StreamEvent[];
}

/** Whoever takes events: it never makes the tap wait. */
export type Watcher = Pick<Outbox, 'offer' | 'hasRoom'>;

type MessageEvent = Extract<StreamEvent, { kind: 'message' }>;

/** Steps of messages' lives that are remembered for a timeline. */
const LIVES_MAX = 4_000;
/** Pushed envelopes whose message is remembered until their acknowledgement. */
const ENVELOPES_MAX = 20_000;

export function createTap(parts: {
  observer: Observer;
  node: string;
  sockets: LiveSockets;
  redactor: Redactor;
  clock: Clock;
}): Tap {
  const { observer, node, sockets, redactor, clock } = parts;
  const watches = new Set<{ filter: StreamFilter; outbox: Watcher }>();
  const envelopes = createRecent<{ messageId: string; peer: string }>(ENVELOPES_MAX);
  const lives: MessageEvent[] = [];
  let nextLife = 0;
  let number = 0;
  let lastMs = Number.NaN;
  let lastTime = '';
  let detach: (() => void) | null = null;

  // Events are written out field by field: spread from a common part, each took a hundred times as long.

  /** Many events share a millisecond, and so the text of it. */
  function timeNow(): string {
    const nowMs = clock.nowMs();
    if (nowMs !== lastMs) {
      lastMs = nowMs;
      lastTime = isoTime(nowMs);
    }
    return lastTime;
  }

  function gateOf(fence: number | null | undefined): GateName | null {
    return fence === null || fence === undefined ? null : sockets.gate(fence);
  }

  /** @returns whether somebody takes it, and so whether its payload is worth redacting */
  function emit(event: StreamEvent): boolean {
    let isTaken = false;
    for (const { filter, outbox } of watches) {
      if (matchesFilter(filter, event) && outbox.offer(event)) isTaken = true;
    }
    return isTaken;
  }

  function emitLife(event: MessageEvent): void {
    if (lives.length < LIVES_MAX) lives.push(event);
    else lives[nextLife] = event;
    nextLife = (nextLife + 1) % LIVES_MAX;
    emit(event);
  }

  const reports: Partial<Reports> = {
    requestEnded({ device, fence, door, name, code, durationMs, bytes, input, reply }) {
      const event: StreamEvent = {
        time: timeNow(),
        node,
        number: ++number,
        device: addressKey(device),
        socket: fence ?? null,
        gate: gateOf(fence),
        kind: 'request',
        event: name,
        direction: 'in',
        door,
        bytes: bytes ?? null,
        latencyMs: durationMs,
        code,
        input: null,
        answer: null,
      };
      if (emit(event) && name !== 'unknown') {
        if (input !== undefined) event.input = redactor.input(name, input);
        if (reply !== undefined) event.answer = redactor.reply(name, reply);
      }
      if (name === 'requestBundle' && reply?.ok === true) {
        emitClaims(
          device,
          input as { claimId: string },
          reply.data as unknown as Parameters<typeof emitClaims>[2],
        );
      }
    },

    pushSent(device, fence, name, payload) {
      const event: StreamEvent = {
        time: timeNow(),
        node,
        number: ++number,
        device: addressKey(device),
        socket: fence,
        gate: gateOf(fence),
        kind: 'push',
        event: name,
        direction: 'out',
        bytes: bytesOf(payload),
        latencyMs: null,
        acknowledged: null,
        input: null,
        answer: null,
      };
      if (name !== 'messages') {
        if (emit(event)) event.input = redactor.payload(name, payload);
        return null;
      }
      // Redacted before it is known whether a viewer has room when the acknowledgement comes: until then nobody may
      // hold the payload itself.
      const isWanted = [...watches].some(
        ({ filter, outbox }) => outbox.hasRoom() && matchesBeforeAnswer(filter, event),
      );
      if (isWanted) event.input = redactor.payload(name, payload);
      const sentAtMs = lastMs;
      return (acknowledgement) => {
        event.time = timeNow();
        event.latencyMs = clock.nowMs() - sentAtMs;
        event.acknowledged = acknowledgement !== null;
        if (emit(event) && acknowledgement !== null) {
          event.answer = redactor.acknowledgement(name, acknowledgement);
        }
      };
    },

    gateMoved({ device, fence }, from, to, reason) {
      emit({
        time: timeNow(),
        node,
        number: ++number,
        device: addressKey(device),
        socket: fence,
        gate: gateOf(fence),
        kind: 'gate',
        event: 'gate',
        direction: 'server',
        from: from.name,
        to: to.name,
        keyVersion: to.name === 'connected' ? null : to.keyVersion,
        reason,
      });
    },

    stored(message) {
      emitSent('stored', message);
    },

    poked(message) {
      emitSent('poked', message);
    },

    pushed({ device, fence }, pushedEnvelopes) {
      for (const { id, messageId, body } of pushedEnvelopes) {
        // A bounce is told as such, by whoever brought it back.
        if (body.kind === 'bounce') continue;
        const peer = addressKey(body.sender);
        envelopes.set(id, { messageId, peer });
        emitLife({
          time: timeNow(),
          node,
          number: ++number,
          device: addressKey(device),
          socket: fence,
          gate: gateOf(fence),
          kind: 'message',
          event: 'message',
          direction: 'server',
          messageId,
          envelopeId: id,
          peer,
          stage: 'pushed',
          reason: null,
        });
      }
    },

    settled({ device, fence }, { processed, failed = [] }) {
      for (const id of processed) {
        const known = envelopes.get(id);
        if (known === undefined) continue;
        envelopes.delete(id);
        emitLife({
          time: timeNow(),
          node,
          number: ++number,
          device: addressKey(device),
          socket: fence,
          gate: gateOf(fence),
          kind: 'message',
          event: 'message',
          direction: 'server',
          messageId: known.messageId,
          envelopeId: id,
          peer: known.peer,
          stage: 'acknowledged',
          reason: null,
        });
      }
      for (const { id, reason } of failed) {
        const known = envelopes.get(id);
        if (known === undefined) continue;
        emitLife({
          time: timeNow(),
          node,
          number: ++number,
          device: addressKey(device),
          socket: fence,
          gate: gateOf(fence),
          kind: 'message',
          event: 'message',
          direction: 'server',
          messageId: known.messageId,
          envelopeId: id,
          peer: known.peer,
          stage: 'putOff',
          reason,
        });
      }
    },

    bounced(messages) {
      for (const { recipient, sender, messageId, reason } of messages) {
        emitLife({
          time: timeNow(),
          node,
          number: ++number,
          device: addressKey(recipient),
          socket: null,
          gate: null,
          kind: 'message',
          event: 'message',
          direction: 'server',
          messageId,
          envelopeId: null,
          peer: addressKey(sender),
          stage: 'bounced',
          reason,
        });
      }
    },

    handshakeRefused({ code, errorId }) {
      emit({
        time: timeNow(),
        node,
        number: ++number,
        device: null,
        socket: null,
        gate: null,
        kind: 'handshakeRefused',
        event: 'handshakeRefused',
        direction: 'in',
        code,
        // An id that nobody logged says nothing.
        errorId: code === 'INTERNAL' ? (errorId ?? null) : null,
      });
    },

    socketOpened({ device, fence }) {
      emit({
        time: timeNow(),
        node,
        number: ++number,
        device: addressKey(device),
        socket: fence,
        gate: gateOf(fence),
        kind: 'socketOpened',
        event: 'socketOpened',
        direction: 'in',
      });
    },

    socketClosed({ device, fence, reason, gate }) {
      emit({
        time: timeNow(),
        node,
        number: ++number,
        device: addressKey(device),
        socket: fence,
        gate,
        kind: 'socketClosed',
        event: 'socketClosed',
        direction: 'server',
        reason,
      });
    },
  };

  function emitSent(
    stage: 'stored' | 'poked',
    { sender, messageId, recipientUserId, deviceIds }: Parameters<Reports['stored']>[0],
  ): void {
    for (const deviceId of deviceIds) {
      emitLife({
        time: timeNow(),
        node,
        number: ++number,
        device: addressKey({ userId: recipientUserId, deviceId }),
        socket: null,
        gate: null,
        kind: 'message',
        event: 'message',
        direction: 'server',
        messageId,
        envelopeId: null,
        peer: addressKey(sender),
        stage,
        reason: null,
      });
    }
  }

  function emitClaims(
    claimer: DeviceAddress,
    { claimId }: { claimId: string },
    { userId, devices }: ClaimedDevices,
  ): void {
    for (const { deviceId, oneTimePreKey, oneTimePreKeyAbsent, pqPreKey } of devices) {
      emit({
        time: timeNow(),
        node,
        number: ++number,
        device: addressKey({ userId, deviceId }),
        socket: null,
        gate: null,
        kind: 'claim',
        event: 'claim',
        direction: 'server',
        peer: addressKey(claimer),
        claimId,
        keyId: oneTimePreKey?.keyId ?? null,
        absent: oneTimePreKeyAbsent ?? null,
        pqKeyId: pqPreKey?.keyId ?? null,
        pqFallback: pqPreKey?.lastResort ?? false,
      });
    }
  }

  return {
    watch(filter, outbox) {
      const watch = { filter, outbox };
      watches.add(watch);
      detach ??= observer.attach(reports);
      return () => {
        watches.delete(watch);
        if (watches.size > 0) return;
        detach?.();
        detach = null;
        // Nobody will ask for what was seen: the memory is free for the gateway again.
        envelopes.clear();
        lives.length = 0;
        nextLife = 0;
      };
    },

    lifeOf: (messageId) =>
      [...lives.slice(nextLife), ...lives.slice(0, nextLife)].filter(
        (event) => event.messageId === messageId,
      ),
  };
}

interface ClaimedDevices {
  userId: string;
  devices: {
    deviceId: number;
    oneTimePreKey: { keyId: number } | null;
    oneTimePreKeyAbsent?: 'noneLeft' | 'limited' | undefined;
    pqPreKey: { keyId: number; lastResort: boolean } | null;
  }[];
}

/** Whether the answer may still make it match: of how long it took, and how it ended, nothing is known yet. */
function matchesBeforeAnswer(filter: StreamFilter, event: StreamEvent): boolean {
  return matchesFilter({ ...filter, slowerThanMs: undefined }, event);
}

/** What a payload weighs, without writing it: its strings are all that can be large. */
function bytesOf(value: unknown): number {
  if (typeof value === 'string') return value.length + 2;
  if (typeof value !== 'object' || value === null) return 5;
  let bytes = 2;
  for (const name in value) bytes += name.length + 4 + bytesOf((value as Record<string, unknown>)[name]);
  return bytes;
}
