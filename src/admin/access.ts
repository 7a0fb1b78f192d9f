/** Who may look: the admin token, the sessions that it is exchanged for, and how often it may be guessed. */
import { createHash, randomBytes, timingSafeEqual } from 'node:crypto';
import type { Clock, Timer } from '../lib/clock.ts';
import type { Log } from '../lib/log.ts';
import { createRecent } from '../lib/recent.ts';

export interface Access {
  /**
   * Exchanges the token for a session.
   *
   * @param address where the try comes from: each address has its own patience, and those that have never shown the
   *   right token have one together
   */
  login(token: string, address: string): LoginOutcome;
  /** Whether the token is right, without a session; wrong ones count as tries like those of `login`. */
  check(token: string, address: string): Exclude<LoginOutcome, { kind: 'session' }> | { kind: 'right' };
  /** Null for an id that never was a session's, or is none any more. */
  session(id: string | undefined): Session | null;
  /** Ends the session: its id is worth nothing from now on, and what was opened with it is told. */
  logout(id: string): void;
}

export type LoginOutcome =
  | { kind: 'session'; id: string }
  | { kind: 'wrong' }
  | { kind: 'throttled'; retryAfterMs: number };

export interface Session {
  expiresAtMs: number;
  /** Calls `action` when the session ends, however it does; returns how to call that off. */
  onEnd(action: () => void): () => void;
}

const SESSION_LIFETIME_MS = 12 * 3_600_000;
const SESSIONS_MAX = 256;
/** Wrong tokens in a row before an address has to wait, and before everybody has. */
const FREE_TRIES = 5;
const FREE_TRIES_OF_ALL = 50;
const WAIT_MIN_MS = 1_000;
const WAIT_MAX_MS = 60_000;
/** After so long without a wrong token, the tries before it are forgotten. */
const PATIENCE_MS = 15 * 60_000;
const ADDRESSES_MAX = 10_000;
const KNOWN_ADDRESSES_MAX = 1_000;
/** No address: stands for all of them together. */
const ALL = '';

interface Tries {
  wrongCount: number;
  lastAtMs: number;
  waitsUntilMs: number;
}

interface OpenSession {
  expiresAtMs: number;
  endings: Set<() => void>;
  expiry: Timer;
}

export function createAccess(parts: { token: string; clock: Clock; log: Log }): Access {
  const { clock, log } = parts;
  const tokenDigest = digestOf(parts.token);
  /** By the digest of the id: what is compared says nothing of what would have been right. */
  const sessions = new Map<string, OpenSession>();
  const tries = new Map<string, Tries>();
  /** Addresses that have shown the right token: guesses from elsewhere don't keep them out. */
  const known = createRecent<true>(KNOWN_ADDRESSES_MAX);

  function triesOf(address: string): Tries {
    const known = tries.get(address);
    const nowMs = clock.nowMs();
    if (known !== undefined && nowMs - known.lastAtMs < PATIENCE_MS) return known;
    return { wrongCount: 0, lastAtMs: nowMs, waitsUntilMs: 0 };
  }

  function judge(
    token: string,
    address: string,
  ): { kind: 'right' } | Exclude<LoginOutcome, { kind: 'session' }> {
    const nowMs = clock.nowMs();
    const ofAllMs = known.get(address) === true ? 0 : triesOf(ALL).waitsUntilMs;
    const waitsUntilMs = Math.max(triesOf(address).waitsUntilMs, ofAllMs);
    // While an address waits not even the right token is looked at: or guessing would only be slower, not limited.
    if (waitsUntilMs > nowMs) return { kind: 'throttled', retryAfterMs: waitsUntilMs - nowMs };
    if (timingSafeEqual(digestOf(token), tokenDigest)) {
      tries.delete(address);
      known.set(address, true);
      return { kind: 'right' };
    }
    log.warn({ address }, 'admin: a wrong token was shown');
    noteWrong(address, FREE_TRIES);
    noteWrong(ALL, FREE_TRIES_OF_ALL);
    return { kind: 'wrong' };
  }

  function noteWrong(address: string, freeTries: number): void {
    const known = triesOf(address);
    const nowMs = clock.nowMs();
    const wrongCount = known.wrongCount + 1;
    const excess = wrongCount - freeTries;
    const waitMs = excess < 0 ? 0 : Math.min(WAIT_MAX_MS, WAIT_MIN_MS * 2 ** Math.min(excess, 16));
    // Set anew, so that the oldest stands first.
    tries.delete(address);
    tries.set(address, { wrongCount, lastAtMs: nowMs, waitsUntilMs: nowMs + waitMs });
    dropOldest(tries, ADDRESSES_MAX);
  }

  function end(key: string): void {
    const session = sessions.get(key);
    sessions.delete(key);
    session?.expiry.cancel();
    for (const action of session?.endings ?? []) action();
  }

  return {
    check: judge,

    login(token, address) {
      const outcome = judge(token, address);
      if (outcome.kind !== 'right') return outcome;
      const [oldest] = sessions.keys();
      if (sessions.size >= SESSIONS_MAX && oldest !== undefined) end(oldest);
      const id = randomBytes(32).toString('base64url');
      const key = keyOf(id);
      sessions.set(key, {
        expiresAtMs: clock.nowMs() + SESSION_LIFETIME_MS,
        endings: new Set(),
        expiry: clock.after(SESSION_LIFETIME_MS, () => end(key)),
      });
      log.info({ address }, 'admin: logged in');
      return { kind: 'session', id };
    },

    session(id) {
      if (id === undefined) return null;
      const key = keyOf(id);
      const session = sessions.get(key);
      if (session === undefined) return null;
      if (session.expiresAtMs <= clock.nowMs()) {
        end(key);
        return null;
      }
      return {
        expiresAtMs: session.expiresAtMs,
        onEnd(action) {
          session.endings.add(action);
          return () => session.endings.delete(action);
        },
      };
    },

    logout: (id) => end(keyOf(id)),
  };
}

function digestOf(text: string): Buffer {
  return createHash('sha256').update(text).digest();
}

function keyOf(id: string): string {
  return digestOf(id).toString('base64');
}

function dropOldest(map: Map<string, unknown>, sizeMax: number): void {
  const [oldest] = map.keys();
  if (map.size > sizeMax && oldest !== undefined) map.delete(oldest);
}
