/** The page's clock and the ways in which it writes times and durations. */

export function nowMs(): number {
  return Date.now();
}

/** `14:03:07.482`, in the reader's time zone. */
export function clockTime(timeMs: number): string {
  const time = new Date(timeMs);
  const two = (value: number): string => String(value).padStart(2, '0');
  const seconds = `${two(time.getSeconds())}.${String(time.getMilliseconds()).padStart(3, '0')}`;
  return `${two(time.getHours())}:${two(time.getMinutes())}:${seconds}`;
}

const SECOND_MS = 1_000;
const MINUTE_MS = 60 * SECOND_MS;
const HOUR_MS = 60 * MINUTE_MS;
const DAY_MS = 24 * HOUR_MS;

/** Two units at most: `3 d 4 h`, `12 min`, `4.2 s`, `18 ms`. */
export function duration(durationMs: number): string {
  if (durationMs < 10) return `${durationMs.toFixed(1)} ms`;
  if (durationMs < SECOND_MS) return `${Math.round(durationMs)} ms`;
  if (durationMs < MINUTE_MS) return `${(durationMs / SECOND_MS).toFixed(1)} s`;
  if (durationMs < HOUR_MS) return `${Math.round(durationMs / MINUTE_MS)} min`;
  if (durationMs < DAY_MS) return twoUnits(durationMs, HOUR_MS, 'h', MINUTE_MS, 'min');
  return twoUnits(durationMs, DAY_MS, 'd', HOUR_MS, 'h');
}

function twoUnits(
  durationMs: number,
  big: number,
  bigName: string,
  small: number,
  smallName: string,
): string {
  const bigs = Math.floor(durationMs / big);
  const smalls = Math.floor((durationMs % big) / small);
  return smalls === 0 ? `${bigs} ${bigName}` : `${bigs} ${bigName} ${smalls} ${smallName}`;
}

/** `3 min ago` or `in 3 min`. */
export function relative(timeMs: number, referenceMs: number): string {
  const awayMs = timeMs - referenceMs;
  if (Math.abs(awayMs) < SECOND_MS) return 'now';
  return awayMs < 0 ? `${duration(-awayMs)} ago` : `in ${duration(awayMs)}`;
}
