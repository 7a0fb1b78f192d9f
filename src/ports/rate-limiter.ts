/** Counts of what was done lately, over all nodes: what the limits of the requests are judged by. */

export interface Limit {
  name: string;
  /** What one key may be charged within a window. */
  points: number;
  windowMs: number;
}

export interface Charge {
  /** A limit that the limiter was not made with is switched off: its charges count for nothing. */
  limit: string;
  /** Whom it counts against. */
  key: string;
  /** For what, or towards whom, where that is counted apart; together they are one key. Neither has a `/` then. */
  subkey?: string;
  points: number;
  /** A hit of it is told of and refuses nothing: the other charges are made all the same. */
  onlyTells?: boolean;
  /** It is judged, and charged by `note` when it has come to pass: what is refused later costs nobody anything. */
  onlyJudged?: boolean;
}

export interface LimitHit {
  limit: string;
  /** When the window ends in which too much was charged; above 0. */
  retryAfterMs: number;
}

export interface RateLimiter {
  /**
   * Charges everything that a request costs, in one round trip to the shared counts at most; answers at once where
   * no count is near its limit. Where one of them is known to be spent, none of the others is charged, unless it
   * `onlyTells`.
   *
   * A window begins with the first charge of a key. What was refused is not held against the key, so that a key gets
   * its points in every window however hard it is pressed. A node tells the others of a key's charges in shares of a
   * sixteenth of its limit, and of each one from the last sixteenth on: all nodes together let through the limit, and
   * less than a sixteenth of it more for each node beyond the first. With the shared counts away, each node holds the
   * limits by its own.
   *
   * @param charges at most one of each limit
   * @returns the limits that were hit; empty where everything may pass. Never throws or rejects
   */
  charge(charges: readonly Charge[]): readonly LimitHit[] | Promise<readonly LimitHit[]>;

  /** Charges what has come to pass, also beyond the limit. */
  note(charge: Charge): void;
}
