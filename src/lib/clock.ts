/** Time, passed in: the only file that reads the system's clock or sets a timer for a rule. */

/** A pending timer; `cancel` is idempotent. */
export interface Timer {
  cancel(): void;
}

/** A source of time. Tests hand in one that they move by hand. */
export interface Clock {
  /** Milliseconds since the Unix epoch. */
  nowMs(): number;
  /** Calls `action` once, `delayMs` from now. Never keeps the process alive by itself. */
  after(delayMs: number, action: () => void): Timer;
}

/** Longer delays overflow the runtime's timer and would fire at once. */
const TIMER_DELAY_MAX_MS = 2 ** 31 - 1;

export const systemClock: Clock = {
  nowMs: () => Date.now(),
  after: (delayMs, action) => new SystemTimer(delayMs, action),
};

/** A class, because every open socket holds one. */
class SystemTimer implements Timer {
  #handle: NodeJS.Timeout;

  constructor(delayMs: number, action: () => void) {
    this.#handle = this.#arm(Math.max(0, delayMs), action);
  }

  cancel(): void {
    clearTimeout(this.#handle);
  }

  #arm(leftMs: number, action: () => void): NodeJS.Timeout {
    if (leftMs <= TIMER_DELAY_MAX_MS) return setTimeout(action, leftMs).unref();
    return setTimeout(() => {
      this.#handle = this.#arm(leftMs - TIMER_DELAY_MAX_MS, action);
    }, TIMER_DELAY_MAX_MS).unref();
  }
}

/** For measuring: it tells fractions of a millisecond and never steps back. Its timers are the system's. */
export const steadyClock: Clock = {
  nowMs: () => performance.timeOrigin + performance.now(),
  after: systemClock.after,
};

/** Whether `periodMs` have passed since. A clock that was set back can't tell: then they have. */
export function hasPassed(clock: Clock, sinceMs: number, periodMs: number): boolean {
  const ageMs = clock.nowMs() - sinceMs;
  return ageMs < 0 || ageMs >= periodMs;
}

/** Calls `action` every `periodMs`; a run that is still under way is never overlapped. `action` must not reject. */
export function every(clock: Clock, periodMs: number, action: () => Promise<void>): Timer {
  let cancelled = false;
  let timer: Timer;
  const arm = (): void => {
    timer = clock.after(periodMs, () => {
      void action().finally(() => {
        if (!cancelled) arm();
      });
    });
  };
  arm();
  return {
    cancel() {
      cancelled = true;
      timer.cancel();
    },
  };
}

/** Resolves after this time, or when `signal` is raised. */
export function pause(clock: Clock, delayMs: number, signal: AbortSignal): Promise<void> {
  if (signal.aborted) return Promise.resolve();
  return new Promise((resolve) => {
    const end = (): void => {
      timer.cancel();
      signal.removeEventListener('abort', end);
      resolve();
    };
    const timer = clock.after(delayMs, end);
    signal.addEventListener('abort', end);
  });
}

/** Keeps the process alive until it is cancelled: the timers of a clock never do, and a command may wait for nothing else. */
export function stayAwake(): Timer {
  const handle = setInterval(() => {}, TIMER_DELAY_MAX_MS);
  return { cancel: () => clearInterval(handle) };
}
