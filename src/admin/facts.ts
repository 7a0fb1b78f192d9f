/** The answers of the admin API, put together from the store and from what all nodes see. */

import type { Clock } from '../lib/clock.ts';
import type { InspectionStore, WaitingEnvelope } from '../ports/inspection.ts';
import type { KeyStore } from '../ports/key-store.ts';
import { addressKey, addressOfKey, type DeviceAddress } from '../protocol/ids.ts';
import type { AdminAnswer } from '../protocol/inspector/admin-api.ts';
import type { StreamEvent } from '../protocol/inspector/events.ts';
import { SOCKETS_MAX } from '../protocol/inspector/facts.ts';
import { diagnose, type MessageFacts, type PutOff } from './diagnose.ts';
import { isoTime, type SocketQuery } from './live-sockets.ts';
import type { Nodes } from './nodes.ts';

export interface Facts {
  sockets(query: SocketQuery): Promise<AdminAnswer<'sockets'>>;
  /** @throws GatewayError UNAVAILABLE when the store can't be reached */
  device(device: DeviceAddress, messageId: string | null): Promise<AdminAnswer<'device'>>;
  /** @param recipient a user id, or a device of one; null asks for those that the events name. @throws as `device` */
  message(messageId: string, recipient: string | null): Promise<AdminAnswer<'message'>>;
}

const CLAIMS_MAX = 50;
const PENDING_MAX = 50;
/** A request addresses no more, and one is the sender. */
const TRACED_DEVICES_MAX = 128;

export function createFacts(parts: {
  nodes: Nodes;
  keys: Pick<KeyStore, 'read'>;
  store: InspectionStore;
  lowThreshold: number;
  clock: Clock;
}): Facts {
  const { nodes, keys, store, lowThreshold, clock } = parts;

  async function messageFacts(
    device: DeviceAddress,
    messageId: string,
    waiting: readonly WaitingEnvelope[],
  ): Promise<MessageFacts> {
    const [trace] = await store.trace(messageId, device);
    if (trace === undefined) return { messageId, state: 'neverStored', reason: null, putOff: null };
    return {
      messageId,
      state: trace.state,
      reason: trace.reason,
      putOff: putOffOf(waiting.filter((envelope) => envelope.messageId === messageId)),
    };
  }

  return {
    async sockets(query) {
      const { answers, nodes: states } = await nodes.askAll({ about: 'sockets', query });
      const sockets = answers
        .flatMap((answer) => answer.sockets)
        .sort((a, b) => (a.device < b.device ? -1 : 1))
        .slice(0, SOCKETS_MAX);
      const counts = await store.waitingCounts(sockets.map(({ device }) => addressOfKey(device)));
      return {
        nodes: states,
        sockets: sockets.map((socket) => ({
          ...socket,
          pendingCount: counts === null ? null : (counts.get(socket.device) ?? 0),
        })),
        total: answers.reduce((sum, { total }) => sum + total, 0),
      };
    },

    async device(device, messageId) {
      const key = addressKey(device);
      const [row, claims, waiting, seen] = await Promise.all([
        keys.read(device),
        store.claimsOf(device, CLAIMS_MAX),
        store.waitingOf(device, PENDING_MAX),
        nodes.askAll({ about: 'sockets', query: { device: key } }),
      ]);
      const sockets = seen.answers
        .flatMap((answer) => answer.sockets)
        .filter((socket) => socket.device === key)
        .sort((a, b) => b.socket - a.socket);
      const state =
        row === null
          ? 'neverUploaded'
          : row.identity !== null
            ? 'uploaded'
            : row.keyVersion > 0
              ? 'reset'
              : 'neverUploaded';
      const nowMs = clock.nowMs();
      return {
        device: key,
        time: isoTime(nowMs),
        state,
        keyVersion: row?.keyVersion ?? 0,
        countVersion: row?.countVersion ?? 0,
        keySet:
          row === null || row.identity === null
            ? null
            : {
                registrationId: row.registrationId ?? 0,
                signedPreKeyId: row.signedPreKeys.ec?.keyId ?? null,
                signedPreKeyExpiresAt: timeOrNull(row.signedPreKeyExpiresAtMs),
                pqLastResortPreKeyId: row.signedPreKeys.pq?.keyId ?? null,
                availableCount: row.availableCounts.ec,
                pqAvailableCount: row.availableCounts.pq,
                claimedCount: row.claimedCounts.ec,
                pqClaimedCount: row.claimedCounts.pq,
                lowThreshold,
                updatedAt: timeOrNull(row.updatedAtMs),
              },
        sockets,
        nodes: seen.nodes,
        claims: claims.map((claim) => ({
          claimer: addressKey(claim.claimer),
          claimId: claim.claimId,
          claimedAt: isoTime(claim.claimedAtMs),
          signedPreKeyId: claim.signedPreKeyId,
          keyId: claim.keyId,
          pqKeyId: claim.pqKeyId,
          pqFallback: claim.pqKeyId === null && claim.pqLastResortPreKeyId !== null,
        })),
        pending: {
          count: waiting.count,
          first: waiting.first.map(({ peer, storedAtMs, expiresAtMs, dueAtMs, ...envelope }) => ({
            ...envelope,
            peer: addressKey(peer),
            storedAt: isoTime(storedAtMs),
            expiresAt: isoTime(expiresAtMs),
            dueAt: timeOrNull(dueAtMs),
          })),
        },
        diagnoses: diagnose({
          device: key,
          nowMs,
          node: nodes.node,
          nodes: seen.nodes,
          state,
          keyVersion: row?.keyVersion ?? 0,
          sockets,
          pendingCount: waiting.count,
          putOff: putOffOf(waiting.first),
          message: messageId === null ? null : await messageFacts(device, messageId, waiting.first),
        }),
      };
    },

    async message(messageId, recipient) {
      const { answers } = await nodes.askAll({ about: 'life', messageId });
      const events: StreamEvent[] = answers
        .flat()
        .sort((a, b) => (a.time < b.time ? -1 : a.time > b.time ? 1 : a.number - b.number));
      const named = recipient === null ? devicesIn(events) : [recipient];
      const traces = (
        await Promise.all(named.flatMap(recipientsOf).map((one) => store.trace(messageId, one)))
      ).flat();
      return {
        messageId,
        recipients: traces.map((trace) => ({
          device: addressKey(trace.recipient),
          sender: addressKey(trace.sender),
          storedAt: isoTime(trace.storedAtMs),
          state: trace.state,
          reason: trace.reason,
        })),
        events,
      };
    },
  };
}

/** The first that waits for its time. */
function putOffOf(waiting: readonly WaitingEnvelope[]): PutOff | null {
  const found = waiting.find(({ dueAtMs, bounceReason }) => dueAtMs !== null && bounceReason === null);
  if (found === undefined || found.dueAtMs === null) return null;
  const { messageId, dueAtMs, undecryptableCount, temporaryCount } = found;
  return { messageId, dueAtMs, undecryptableCount, temporaryCount };
}

/** Those of whom a message's events tell: its sender and each device that it went to. */
function devicesIn(events: readonly StreamEvent[]): string[] {
  const devices = new Set(events.flatMap(({ device }) => (device === null ? [] : [device])));
  return [...devices].slice(0, TRACED_DEVICES_MAX);
}

/** A user id may hold dots: `alice.1` is a device of alice, and may be a user. */
function recipientsOf(named: string): { userId: string; deviceId: number | null }[] {
  const user = { userId: named, deviceId: null };
  const device = /^(.+)\.(\d{1,3})$/.exec(named);
  return device === null ? [user] : [{ userId: device[1]!, deviceId: Number(device[2]) }, user];
}

function timeOrNull(ms: number | null): string | null {
  return ms === null ? null : isoTime(ms);
}
