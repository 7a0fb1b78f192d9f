/**
 * Events on their way to one viewer: gathered for a moment, sent together, and counted instead of kept where they come
 * faster than the viewer takes them. Nobody ever waits for a viewer.
 */
import type { Clock, Timer } from '../lib/clock.ts';
import type { StreamEvent } from '../protocol/inspector/events.ts';

export interface Outbox {
  hasRoom(): boolean;
  /** @returns false where there is no room: the event is counted as dropped */
  offer(event: StreamEvent): boolean;
  /** Counts events that were dropped elsewhere on their way. */
  drop(count: number): void;
  close(): void;
}

/** How long events gather. */
export const FLUSH_PERIOD_MS = 100;
/** Events sent together: more are no use to a person, and would cost the gateway more than the viewer is worth. */
export const FLUSH_EVENTS_MAX = 250;

/**
 * @param options.send hands over what gathered; false where the viewer takes nothing at the moment: then the events are
 *   kept, and offered again a moment later
 */
export function createOutbox(options: {
  clock: Clock;
  send(events: StreamEvent[], dropped: number): boolean;
}): Outbox {
  const { clock, send } = options;
  let waiting: StreamEvent[] = [];
  let dropped = 0;
  let timer: Timer | null = null;
  let isClosed = false;

  function schedule(): void {
    if (timer === null && !isClosed) timer = clock.after(FLUSH_PERIOD_MS, flush);
  }

  function flush(): void {
    timer = null;
    if (isClosed) return;
    if (send(waiting, dropped)) {
      waiting = [];
      dropped = 0;
    } else schedule();
  }

  const hasRoom = (): boolean => waiting.length < FLUSH_EVENTS_MAX;

  return {
    hasRoom,

    offer(event) {
      schedule();
      if (!hasRoom()) {
        dropped += 1;
        return false;
      }
      waiting.push(event);
      return true;
    },

    drop(count) {
      if (count === 0) return;
      schedule();
      dropped += count;
    },

    close() {
      isClosed = true;
      timer?.cancel();
      waiting = [];
    },
  };
}
