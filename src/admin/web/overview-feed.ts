/** The last minutes of the whole installation, one sample a second. */
import { adminRoutes } from '../../protocol/inspector/admin-api.ts';
import type { OverviewSample } from '../../protocol/inspector/overview.ts';
import { checkSession } from './api.ts';
import { createServerEvents, type LineStatus } from './server-events.ts';

export const SAMPLES_MAX = 600;

export interface OverviewFeed {
  readonly status: LineStatus;
  /** Oldest first; another list after each sample. */
  readonly samples: readonly OverviewSample[];
  start(): void;
  stop(): void;
  /** @returns how to stop listening */
  onChange(listener: () => void): () => void;
}

export function createOverviewFeed(): OverviewFeed {
  const listeners = new Set<() => void>();
  let samples: readonly OverviewSample[] = [];
  const tell = (): void => {
    for (const listener of listeners) listener();
  };
  const line = createServerEvents<OverviewSample>({
    onFrame(sample) {
      samples = [...samples.slice(-(SAMPLES_MAX - 1)), sample];
      tell();
    },
    onStatus: tell,
    onRefused: checkSession,
  });
  /** A browser holds few lines to one server at once: a page out of sight leaves its line to others. */
  function followSight(): void {
    if (document.hidden) line.close();
    else line.open(adminRoutes.overview.path);
  }
  return {
    get status() {
      return line.status;
    },
    get samples() {
      return samples;
    },
    start() {
      document.addEventListener('visibilitychange', followSight);
      followSight();
    },
    stop() {
      document.removeEventListener('visibilitychange', followSight);
      line.close();
      samples = [];
    },
    onChange(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
  };
}
