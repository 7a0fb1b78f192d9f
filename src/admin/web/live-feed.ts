/** The live stream as the page keeps it: bounded, paused and filtered, told to whoever draws it once a frame. */
import { adminRoutes } from '../../protocol/inspector/admin-api.ts';
import type { StreamEvent } from '../../protocol/inspector/events.ts';
import { filterToQuery, matchesFilter, type StreamFilter } from '../../protocol/inspector/filter.ts';
import type { NodeState, StreamFrame } from '../../protocol/inspector/stream.ts';
import { checkSession } from './api.ts';
import { createEventLog, type EventLog } from './event-log.ts';
import { count } from './format.ts';
import { createServerEvents, type LineStatus } from './server-events.ts';

/** The page keeps so many events; at a few hundred bytes each that is some tens of megabytes. */
export const KEPT_EVENTS_MAX = 50_000;
/** So many more while the list stands still. */
export const WAITING_EVENTS_MAX = 10_000;

/** A line of the list. `id` is the page's own. */
export type LogLine =
  | { id: number; type: 'event'; event: StreamEvent }
  /** Something is missing here, or the list begins anew. */
  | { id: number; type: 'note'; text: string };

export interface LiveFeed {
  readonly log: EventLog<LogLine>;
  readonly status: LineStatus;
  readonly isPaused: boolean;
  /** Came since the list stands still, and will be shown when it moves on. */
  readonly waitingCount: number;
  /** Matched, and left out by the server because this viewer or its line was too slow. */
  readonly droppedCount: number;
  /** Left out by the page, to stay within its bounds. */
  readonly forgottenCount: number;
  readonly nodes: readonly NodeState[];
  /** Connects, or changes the filter: what was kept and still matches stays. */
  watch(filter: StreamFilter): void;
  setPaused(isPaused: boolean): void;
  clear(): void;
  stop(): void;
  /** @returns how to stop listening */
  onChange(listener: () => void): () => void;
}

export function createLiveFeed(): LiveFeed {
  const log = createEventLog<LogLine>(KEPT_EVENTS_MAX);
  const waiting = createEventLog<LogLine>(WAITING_EVENTS_MAX);
  const listeners = new Set<() => void>();
  let query: string | null = null;
  let lastId = 0;
  let isPaused = false;
  let droppedCount = 0;
  let forgottenWaitingCount = 0;
  let nodes: readonly NodeState[] = [];
  let isToldSoon = false;

  function tell(): void {
    if (isToldSoon) return;
    isToldSoon = true;
    requestAnimationFrame(() => {
      isToldSoon = false;
      for (const listener of listeners) listener();
    });
  }

  function note(text: string): LogLine {
    lastId += 1;
    return { id: lastId, type: 'note', text };
  }

  function take(lines: readonly LogLine[]): void {
    (isPaused ? waiting : log).append(lines);
    tell();
  }

  const line = createServerEvents<StreamFrame>({
    onFrame(frame) {
      if (frame.type === 'hello') {
        if (log.length > 0) take([note('Connected anew: what happened in between is not shown.')]);
      } else if (frame.type === 'beat') {
        nodes = frame.nodes;
        tell();
      } else {
        const lines: LogLine[] = [];
        if (frame.dropped > 0) {
          droppedCount += frame.dropped;
          lines.push(
            note(
              `${count(frame.dropped)} events were left out here: they came faster than they can be shown.`,
            ),
          );
        }
        for (const event of frame.events) {
          lastId += 1;
          lines.push({ id: lastId, type: 'event', event });
        }
        take(lines);
      }
    },
    onStatus: tell,
    onRefused: checkSession,
  });

  return {
    log,
    get status() {
      return line.status;
    },
    get isPaused() {
      return isPaused;
    },
    get waitingCount() {
      return waiting.length;
    },
    get droppedCount() {
      return droppedCount;
    },
    get forgottenCount() {
      return log.forgottenCount + forgottenWaitingCount;
    },
    get nodes() {
      return nodes;
    },
    watch(filter) {
      const wanted = filterToQuery(filter);
      if (wanted === query) return;
      const isFirst = query === null;
      query = wanted;
      if (!isFirst) {
        const kept = log
          .toArray()
          .filter((item) => item.type === 'event' && matchesFilter(filter, item.event));
        log.clear();
        waiting.clear();
        const chosen = [...new URLSearchParams(wanted)].map(([name, value]) => `${name} ${value}`).join(', ');
        log.append([...kept, note(`From here on: ${chosen === '' ? 'everything' : chosen}.`)]);
      }
      line.open(adminRoutes.stream.path + (wanted === '' ? '' : `?${wanted}`));
      tell();
    },
    setPaused(paused) {
      isPaused = paused;
      if (!paused) {
        forgottenWaitingCount += waiting.forgottenCount;
        if (waiting.forgottenCount > 0) {
          log.append([note(`${count(waiting.forgottenCount)} events came while paused and were not kept.`)]);
        }
        log.append(waiting.toArray());
        waiting.clear();
      }
      tell();
    },
    clear() {
      log.clear();
      waiting.clear();
      droppedCount = 0;
      forgottenWaitingCount = 0;
      tell();
    },
    stop() {
      query = null;
      line.close();
    },
    onChange(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
  };
}
