/** Time and chance as the kit uses them; a test hands in its own. */
export interface KitClock {
  /** Milliseconds since the Unix epoch. */
  nowMs(): number;
  /** Calls `action` once, `delayMs` from now. @returns cancels; idempotent */
  after(delayMs: number, action: () => void): () => void;
  /** From 0 to 1. */
  random(): number;
}

export const systemKitClock: KitClock = {
  nowMs: () => Date.now(),
  after(delayMs, action) {
    const timer = setTimeout(action, delayMs);
    return () => clearTimeout(timer);
  },
  random: () => Math.random(),
};
