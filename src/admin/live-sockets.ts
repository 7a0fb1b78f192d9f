/** The sockets that this node serves and what their gates did: kept whether or not anybody looks. */
import type { Clock } from '../lib/clock.ts';
import { addressKey, type DeviceAddress } from '../protocol/ids.ts';
import {
  GATE_HISTORY_MAX,
  type GateStepSeen,
  SOCKETS_MAX,
  type SocketFacts,
} from '../protocol/inspector/facts.ts';
import { isOfDevice } from '../protocol/inspector/filter.ts';
import type { GateName } from '../protocol/inspector/values.ts';
import type { LiveSocket, Observer } from '../requests/observe.ts';

export interface LiveSockets {
  /** Of an open socket; null where there is none of this number. */
  gate(fence: number): GateName | null;
  gateCounts(): Record<GateName, number>;
  /** Sorted by device. */
  list(query: SocketQuery): { sockets: SocketFacts[]; total: number };
  /** @returns false where there is none of this number */
  close(fence: number, reason: string): boolean;
}

export interface SocketQuery {
  /** A device or a user. */
  device?: string | undefined;
  gate?: GateName | undefined;
}

interface Known {
  device: DeviceAddress;
  fence: number;
  live: LiveSocket;
  openedAtMs: number;
  gate: GateName;
  keyVersion: number | null;
  history: GateStepSeen[];
}

export function createLiveSockets(parts: { observer: Observer; node: string; clock: Clock }): LiveSockets {
  const { observer, node, clock } = parts;
  const open = new Map<number, Known>();

  observer.attach({
    socketOpened({ device, fence, live }) {
      const openedAtMs = clock.nowMs();
      open.set(fence, { device, fence, live, openedAtMs, gate: 'connected', keyVersion: null, history: [] });
    },
    socketClosed({ fence }) {
      open.delete(fence);
    },
    gateMoved({ fence }, _, to, reason) {
      const known = open.get(fence);
      if (known === undefined) return;
      const keyVersion = to.name === 'connected' ? null : to.keyVersion;
      known.gate = to.name;
      known.keyVersion = keyVersion;
      known.history.push({ time: isoTime(clock.nowMs()), to: to.name, keyVersion, reason });
      if (known.history.length > GATE_HISTORY_MAX) known.history.shift();
    },
  });

  function factsOf(known: Known): SocketFacts {
    const facts = known.live.facts();
    return {
      node,
      socket: known.fence,
      device: addressKey(known.device),
      openedAt: isoTime(known.openedAtMs),
      gate: known.gate,
      keyVersion: known.keyVersion,
      gateHistory: known.history,
      windowCount: facts.windowCount,
      windowBytes: facts.windowBytes,
      windowFull: facts.windowFull,
      oldestPushAt: facts.oldestPushAtMs === null ? null : isoTime(facts.oldestPushAtMs),
      roundTripMs: facts.roundTripMs,
      bufferedBytes: facts.bufferedBytes,
      tokenExpiresAt: isoTime(facts.tokenExpiresAtMs),
      paused: facts.tokenExpiresAtMs <= clock.nowMs(),
    };
  }

  return {
    gate: (fence) => open.get(fence)?.gate ?? null,

    gateCounts() {
      const counts = { connected: 0, validated: 0, open: 0 };
      for (const { gate } of open.values()) counts[gate] += 1;
      return counts;
    },

    list({ device, gate }) {
      const found: { key: string; known: Known }[] = [];
      for (const known of open.values()) {
        if (gate !== undefined && known.gate !== gate) continue;
        const key = addressKey(known.device);
        if (device === undefined || isOfDevice(device, key)) found.push({ key, known });
      }
      found.sort((a, b) => (a.key < b.key ? -1 : 1));
      return {
        sockets: found.slice(0, SOCKETS_MAX).map(({ known }) => factsOf(known)),
        total: found.length,
      };
    },

    close(fence, reason) {
      const known = open.get(fence);
      known?.live.close(reason);
      return known !== undefined;
    },
  };
}

export function isoTime(ms: number): string {
  return new Date(ms).toISOString();
}
