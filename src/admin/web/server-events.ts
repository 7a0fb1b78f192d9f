/** One line of server-sent events that comes back by itself, also from a silence that the browser doesn't notice. */
import { nowMs } from './time.ts';

/** `off` until it is opened, and after the session ended. */
export type LineStatus = 'off' | 'connecting' | 'live' | 'lost';

export interface ServerEvents {
  readonly status: LineStatus;
  /** Closes what was open before. */
  open(address: string): void;
  close(): void;
}

/** The server says something at least every two seconds. */
const SILENCE_MAX_MS = 7_000;
const WATCH_EVERY_MS = 1_000;
const RETRY_MS = 1_500;

export function createServerEvents<Frame>(options: {
  onFrame: (frame: Frame) => void;
  onStatus: () => void;
  /** Called where the server refuses the line, for the page to see whether it is still logged in. */
  onRefused: () => void;
}): ServerEvents {
  let source: EventSource | null = null;
  let status: LineStatus = 'off';
  let heardMs = 0;
  let watch: ReturnType<typeof setInterval> | undefined;
  let retry: ReturnType<typeof setTimeout> | undefined;

  function become(next: LineStatus): void {
    status = next;
    options.onStatus();
  }

  function connect(address: string): void {
    source?.close();
    const current = new EventSource(address);
    source = current;
    heardMs = nowMs();
    current.onmessage = ({ data }) => {
      heardMs = nowMs();
      if (status !== 'live') become('live');
      options.onFrame(JSON.parse(data as string) as Frame);
    };
    current.onerror = () => {
      become('lost');
      if (current.readyState !== EventSource.CLOSED) return;
      // Refused rather than broken: the browser does not try again.
      options.onRefused();
      retry = setTimeout(() => source === current && connect(address), RETRY_MS);
    };
  }

  function close(): void {
    source?.close();
    source = null;
    clearInterval(watch);
    clearTimeout(retry);
    become('off');
  }

  return {
    get status() {
      return status;
    },
    open(address) {
      close();
      become('connecting');
      connect(address);
      watch = setInterval(() => {
        if (nowMs() - heardMs < SILENCE_MAX_MS) return;
        become('lost');
        connect(address);
      }, WATCH_EVERY_MS);
    },
    close,
  };
}
