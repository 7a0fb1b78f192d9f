/**
 * The gate of one socket: may messages pass? A pure machine; whoever holds it carries the effects out.
 *
 *   connected ──validated(v)──▶ validated(v) ──opened(v)──▶ open(v)
 *                                   ▲                         │ keysChanged(w > v)
 *                                   └──────── closed ◀────────┘
 */

import { unreachable } from '../lib/unreachable.ts';
import type { GateClosedReason } from '../protocol/events.ts';

export type GateState =
  /** Nothing is proven. */
  | { name: 'connected' }
  /** Client and server agreed on `keyVersion`; whether it is still current, the opening proves. */
  | { name: 'validated'; keyVersion: number }
  | {
      name: 'open';
      keyVersion: number;
      /** Rotations that this socket has under way: until they end, a newer version may be its own doing. */
      ownRotations: number;
      /** Versions that own rotations made while one before them has not ended: they may end in any order. */
      ahead: readonly number[];
      /** The newest change seen while an own rotation was under way. */
      seen: KeyChangeSeen | null;
    };

export interface KeyChangeSeen {
  keyVersion: number;
  reason: GateClosedReason;
}

type OpenState = Extract<GateState, { name: 'open' }>;

export type GateEvent =
  /** A validation found client and server in step at this version. */
  | { name: 'validated'; keyVersion: number }
  /** The store proved `keyVersion` current and named this connection the served one. */
  | { name: 'opened'; keyVersion: number }
  /** The store holds this version now; an older one than before counts only as `serverRestored`, which voids all proofs. */
  | { name: 'keysChanged'; keyVersion: number; reason: GateClosedReason }
  | { name: 'rotationStarted' }
  /** `keyVersion` is null where the rotation changed nothing or failed. */
  | { name: 'rotationEnded'; keyVersion: number | null };

export type GateEffect =
  /** Start handing out what waits. */
  | { name: 'deliver' }
  /** Stop, and tell the client. */
  | { name: 'close'; reason: GateClosedReason; keyVersion: number };

export interface GateStep {
  state: GateState;
  effects: GateEffect[];
}

export const CONNECTED: GateState = { name: 'connected' };

/** The next state and what is to be done. An event of an older key set changes nothing. */
export function step(state: GateState, event: GateEvent): GateStep {
  switch (state.name) {
    case 'connected':
    case 'validated':
      return stepClosed(state, event);
    case 'open':
      return stepOpen(state, event);
    default:
      return unreachable(state);
  }
}

function stepClosed(state: Exclude<GateState, OpenState>, event: GateEvent): GateStep {
  switch (event.name) {
    case 'validated':
      // Older verdicts are ignored: the client may upload while validation runs.
      if (state.name === 'validated' && event.keyVersion < state.keyVersion) return stay(state);
      return stay({ name: 'validated', keyVersion: event.keyVersion });
    case 'opened':
      if (state.name === 'connected' || event.keyVersion !== state.keyVersion) return stay(state);
      return {
        state: { name: 'open', keyVersion: event.keyVersion, ownRotations: 0, ahead: [], seen: null },
        effects: [{ name: 'deliver' }],
      };
    case 'keysChanged':
      return event.reason === 'serverRestored' ? stay(CONNECTED) : stay(state);
    case 'rotationStarted':
    case 'rotationEnded':
      // A validation stays what it was; the opening compares it with the store's version.
      return stay(state);
    default:
      return unreachable(event);
  }
}

function stepOpen(state: OpenState, event: GateEvent): GateStep {
  switch (event.name) {
    case 'validated':
      // Whether the keys have changed, and why, only the store says.
      return stay(state);
    case 'opened':
      if (event.keyVersion !== state.keyVersion) return stay(state);
      return { state, effects: [{ name: 'deliver' }] };
    case 'keysChanged':
      if (event.reason === 'serverRestored') return closed(CONNECTED, event);
      if (event.keyVersion <= state.keyVersion) return stay(state);
      if (state.ownRotations > 0) {
        if (state.seen !== null && state.seen.keyVersion >= event.keyVersion) return stay(state);
        return stay({ ...state, seen: { keyVersion: event.keyVersion, reason: event.reason } });
      }
      return closed({ name: 'validated', keyVersion: state.keyVersion }, event);
    case 'rotationStarted':
      return stay({ ...state, ownRotations: state.ownRotations + 1 });
    case 'rotationEnded': {
      const ownRotations = Math.max(0, state.ownRotations - 1);
      const ended = event.keyVersion === null ? state.ahead : [...state.ahead, event.keyVersion];
      let { keyVersion } = state;
      while (ended.includes(keyVersion + 1)) keyVersion += 1;
      // One that is not the very next version came after somebody else's change, or ended before its forerunner.
      const ahead = ended.filter((version) => version > keyVersion);
      const open: OpenState = { name: 'open', keyVersion, ownRotations, ahead, seen: state.seen };
      if (ownRotations > 0) return stay(open);
      const seen = newest(state.seen, ahead);
      if (seen !== null && seen.keyVersion > keyVersion)
        return closed({ name: 'validated', keyVersion }, seen);
      return { state: { ...open, seen: null }, effects: [{ name: 'deliver' }] };
    }
    default:
      return unreachable(event);
  }
}

function newest(seen: KeyChangeSeen | null, ahead: readonly number[]): KeyChangeSeen | null {
  const keyVersion = Math.max(...ahead);
  // What was seen says more than the version alone.
  return ahead.length === 0 || (seen !== null && seen.keyVersion >= keyVersion)
    ? seen
    : { keyVersion, reason: 'keysRotated' };
}

function closed(state: GateState, { reason, keyVersion }: KeyChangeSeen): GateStep {
  return { state, effects: [{ name: 'close', reason, keyVersion }] };
}

function stay(state: GateState): GateStep {
  return { state, effects: [] };
}
