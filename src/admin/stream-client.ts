/** Reads the inspector's stream as a program does: with the admin token, and coming back by itself. */
import { type Clock, pause } from '../lib/clock.ts';
import { filterToQuery, type StreamFilter } from '../protocol/inspector/filter.ts';
import { type StreamFrame, streamFrame } from '../protocol/inspector/stream.ts';

export interface StreamClientOptions {
  /** Of the admin listener. */
  url: string;
  token: string;
  filter: StreamFilter;
  clock: Clock;
  /** Ends the reading. */
  signal: AbortSignal;
  onFrame(frame: StreamFrame): void;
  /** The connection is gone, or could not be made; it is tried again after `delayMs`. */
  onLost(reason: string, delayMs: number): void;
}

/** The server would say the same however often it is asked. */
class RefusedForGoodError extends Error {
  override readonly name = 'RefusedForGoodError';
}

/** Three beats are missing by then. */
const SILENCE_MAX_MS = 7_000;
const RETRY_DELAY_MIN_MS = 250;
const RETRY_DELAY_MAX_MS = 5_000;
/** A frame is far smaller; what has no end must not fill the memory. */
const FRAME_LENGTH_MAX = 8 * 1024 * 1024;

/**
 * Reads until `signal` says to end.
 *
 * @throws RefusedForGoodError where the token or the filter is refused, or another server answers
 */
export async function readStream(options: StreamClientOptions): Promise<void> {
  const { url, clock, signal, onFrame, onLost } = options;
  const { origin } = new URL(url);
  let failures = 0;
  while (!signal.aborted) {
    let reason: string;
    try {
      await readOnce(options, (frame) => {
        failures = 0;
        onFrame(frame);
      });
      reason = `${origin} ended the stream`;
    } catch (error) {
      if (error instanceof RefusedForGoodError) throw error;
      reason = lossReason(error, origin);
    }
    if (signal.aborted) return;
    const delayMs = Math.min(RETRY_DELAY_MAX_MS, RETRY_DELAY_MIN_MS * 2 ** Math.min(failures++, 10));
    onLost(reason, delayMs);
    await pause(clock, delayMs, signal);
  }
}

async function readOnce(
  { url, token, filter, clock, signal }: StreamClientOptions,
  onFrame: (frame: StreamFrame) => void,
): Promise<void> {
  const silence = new AbortController();
  const cut = (): void => silence.abort(new Error('it says nothing'));
  let timer = clock.after(SILENCE_MAX_MS, cut);
  try {
    const response = await fetch(new URL(`/api/stream?${filterToQuery(filter)}`, url), {
      headers: { authorization: `Bearer ${token}` },
      signal: AbortSignal.any([signal, silence.signal]),
    });
    if (!response.ok || response.body === null) throw await refusalOf(response);
    let text = '';
    const decoder = new TextDecoder();
    for await (const chunk of response.body) {
      timer.cancel();
      timer = clock.after(SILENCE_MAX_MS, cut);
      text += decoder.decode(chunk, { stream: true });
      if (text.length > FRAME_LENGTH_MAX) throw new Error('it sends a frame without an end');
      const blocks = text.split('\n\n');
      text = blocks.pop() ?? '';
      for (const block of blocks) {
        if (!block.startsWith('data: ')) continue;
        const frame = streamFrame.safeParse(JSON.parse(block.slice('data: '.length)));
        // A newer server may tell what this version does not know.
        if (frame.success) onFrame(frame.data);
      }
    }
  } finally {
    timer.cancel();
  }
}

async function refusalOf(response: Response): Promise<Error> {
  const body: unknown = await response.json().catch(() => null);
  const { error } = (body ?? {}) as { error?: { message?: unknown } };
  const message = typeof error?.message === 'string' ? error.message : `HTTP ${response.status}`;
  const isForGood = response.status < 500 && response.status !== 429;
  if (!isForGood) return new Error(message);
  const { origin } = new URL(response.url);
  return new RefusedForGoodError(
    response.status === 404 ? `${origin} ${whoAnswers(body)}` : `${origin}: ${message}`,
  );
}

/** Who has no stream, by the form in which it says so. */
function whoAnswers(body: unknown): string {
  const { success, error } = (body ?? {}) as { success?: unknown; error?: unknown };
  if (success === false) {
    return 'is where the gateway’s clients connect: the inspector is on its second listener, at ADMIN_PORT';
  }
  return error === 'not found'
    ? 'has its inspector switched off: set ADMIN_TOKEN for that gateway'
    : 'has no inspector: is it the second listener of a gateway?';
}

function lossReason(error: unknown, origin: string): string {
  const { message, cause } = error instanceof Error ? error : { message: String(error), cause: undefined };
  if (!(cause instanceof Error)) return `${origin}: ${message}`;
  const reason = 'code' in cause ? String(cause.code) : cause.message;
  return message === 'fetch failed'
    ? `${origin} can not be reached (${reason})`
    : `${origin}: ${message} (${reason})`;
}
