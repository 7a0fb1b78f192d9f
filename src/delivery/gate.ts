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
  /** The store holds this version now. */
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
        state: { name: 'open', keyVersion: event.keyVersion, ownRotations: 0, seen: null },
        effects: [{ name: 'deliver' }],
      };
    case 'keysChanged':
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
      if (event.keyVersion <= state.keyVersion) return stay(state);
      // A validation of a newer key set reveals a change whose notice was lost.
      if (state.ownRotations > 0) return stay(state);
      return {
        state: { name: 'validated', keyVersion: event.keyVersion },
        effects: [{ name: 'close', reason: 'keysRotated', keyVersion: event.keyVersion }],
      };
    case 'opened':
      if (event.keyVersion !== state.keyVersion) return stay(state);
      return { state, effects: [{ name: 'deliver' }] };
    case 'keysChanged':
      // A restored server is the one whose older version counts.
      if (event.reason === 'serverRestored') return closed(state.keyVersion, event);
      if (event.keyVersion <= state.keyVersion) return stay(state);
      if (state.ownRotations > 0) {
        if (state.seen !== null && state.seen.keyVersion >= event.keyVersion) return stay(state);
        return stay({ ...state, seen: { keyVersion: event.keyVersion, reason: event.reason } });
      }
      return closed(state.keyVersion, event);
    case 'rotationStarted':
      return stay({ ...state, ownRotations: state.ownRotations + 1 });
    case 'rotationEnded': {
      const ownRotations = Math.max(0, state.ownRotations - 1);
      const carried = event.keyVersion === state.keyVersion + 1;
      const keyVersion = carried ? event.keyVersion! : state.keyVersion;
      // A rotation that is not the very next version came after somebody else's change.
      const seen =
        !carried && event.keyVersion !== null && event.keyVersion > state.keyVersion
          ? newer(state.seen, { keyVersion: event.keyVersion, reason: 'keysRotated' })
          : state.seen;
      const open: OpenState = { name: 'open', keyVersion, ownRotations, seen };
      if (ownRotations > 0) return stay(open);
      if (seen !== null && seen.keyVersion > keyVersion) return closed(keyVersion, seen);
      return { state: { ...open, seen: null }, effects: [{ name: 'deliver' }] };
    }
    default:
      return unreachable(event);
  }
}

function newer(a: KeyChangeSeen | null, b: KeyChangeSeen): KeyChangeSeen {
  return a !== null && a.keyVersion > b.keyVersion ? a : b;
}

function closed(validatedVersion: number, change: KeyChangeSeen): GateStep {
  return {
    state: { name: 'validated', keyVersion: validatedVersion },
    effects: [{ name: 'close', reason: change.reason, keyVersion: change.keyVersion }],
  };
}

function stay(state: GateState): GateStep {
  return { state, effects: [] };
}
