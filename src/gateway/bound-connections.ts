/**
 * Bounds the connections that both doors have open, from when the system hands them over: a process that has no file
 * descriptor left reaches neither its store nor whoever asks for its health, and Node tells it nothing of it.
 */
import type { Server as HttpServer } from 'node:http';
import type { Clock } from '../lib/clock.ts';
import type { Log } from '../lib/log.ts';
import type { Observer } from '../requests/observe.ts';

/** For connections to the engines, the second listener, and what is read of files. */
const FILES_FOR_ALL_ELSE = 256;
const REPORT_PERIOD_MS = 60_000;
/** It looks at every connection. */
const CLEARING_PERIOD_MS = 1_000;

/**
 * @param configuredMax 0 for no bound
 * @param openFilesMax files of the process; null for no bound
 * @returns null for no bound
 */
export function connectionsMax(configuredMax: number, openFilesMax: number | null): number | null {
  const bounds: number[] = [];
  if (configuredMax > 0) bounds.push(configuredMax);
  if (openFilesMax !== null)
    bounds.push(Math.max(openFilesMax - FILES_FOR_ALL_ELSE, Math.floor(openFilesMax / 3)));
  return bounds.length === 0 ? null : Math.min(...bounds);
}

/**
 * Connections beyond `max` are closed before anything is read of them, and a proxy may try its next node. Those of HTTP
 * that are kept alive for a next request make room then, and since Node 26 those that have not sent anything yet.
 */
export function boundConnections(
  server: HttpServer,
  parts: { max: number; clock: Clock; log: Log; observer: Pick<Observer, 'limitHit'> },
): void {
  const { max, clock, log, observer } = parts;
  let isReported = false;
  let isCleared = false;
  server.maxConnections = max;
  server.on('drop', () => {
    observer.limitHit({ limit: 'connections', device: null });
    if (!isCleared) {
      isCleared = true;
      clock.after(CLEARING_PERIOD_MS, () => {
        isCleared = false;
      });
      server.closeIdleConnections();
    }
    if (isReported) return;
    isReported = true;
    clock.after(REPORT_PERIOD_MS, () => {
      isReported = false;
    });
    log.warn({ connectionsMax: max }, 'connections are closed unread: this node has as many as it may have');
  });
}
