/** Waits for a condition that no event tells of: looks often, gives up at a deadline, says what it saw. */
import { setTimeout as pause } from 'node:timers/promises';

const POLL_MS = 5;
const WAIT_MAX_MS = 10_000;

/**
 * Calls `check` until it returns without throwing something other than `false`.
 *
 * @param check an assertion that throws until it holds, or a predicate
 * @returns what `check` returned
 * @throws Error with the last failure, when it doesn't hold within `waitMaxMs`
 */
export async function eventually<T>(
  check: () => T | Promise<T>,
  { waitMaxMs = WAIT_MAX_MS, that = 'the condition' }: { waitMaxMs?: number; that?: string } = {},
): Promise<T> {
  const deadline = AbortSignal.timeout(waitMaxMs);
  let lastFailure: unknown = 'it returned false';
  do {
    try {
      const result = await check();
      if (result !== false) return result;
      lastFailure = 'it returned false';
    } catch (error) {
      lastFailure = error;
    }
    await pause(POLL_MS);
  } while (!deadline.aborted);
  const failure = lastFailure instanceof Error ? lastFailure.message : String(lastFailure);
  throw new Error(`Within ${waitMaxMs} ms, ${that} did not come true: ${failure}`, { cause: lastFailure });
}
