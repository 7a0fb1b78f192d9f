/** Holds what was asked of one device's keys, and what was answered, against the model. */
import { lineOf, type Noted } from './history.ts';
import {
  explain,
  fingerprint,
  type KeyAnswer,
  type KeyModelLimits,
  type KeyRequest,
  type KeyState,
  NO_KEYS,
} from './key-model.ts';
import { contradictionIn } from './linearize.ts';

export type KeyEntry = Noted<KeyRequest, KeyAnswer>;

/**
 * @returns null where some order explains every answer; else a report
 * @throws Error where the search met too many states to tell
 */
export function contradiction(history: readonly KeyEntry[], limits: KeyModelLimits): string | null {
  const machine = {
    initial: NO_KEYS,
    explain: (state: KeyState, request: KeyRequest, answer: KeyAnswer | null) =>
      explain(state, request, answer, limits),
    fingerprint,
  };
  return contradictionIn(judged(history), machine, lineOf, history);
}

/**
 * What a refusal says about order. A request that took long while the keys were changed beside it may be refused for
 * that alone: it has changed nothing, or, where the server says UNAVAILABLE, may have been carried out all the same.
 */
function judged(history: readonly KeyEntry[]): KeyEntry[] {
  return history.flatMap((entry) => {
    const changes = changesThatExcuse(entry);
    if (!history.some((other) => changes.includes(other.request.name) && isBeside(entry, other)))
      return [entry];
    if (entry.answer?.ok !== false || entry.answer.code !== 'UNAVAILABLE') return [];
    return [{ ...entry, answer: null, answeredAt: Number.POSITIVE_INFINITY }];
  });
}

/** Requests beside which this one's refusal needs no other reason. */
function changesThatExcuse({ request, answer }: KeyEntry): readonly KeyRequest['name'][] {
  if (answer?.ok !== false) return [];
  const replacing = ['uploadKeys', 'resetKeys'] as const;
  if (answer.code === 'UNAVAILABLE') return [...replacing, 'rotateSignedPreKey'];
  if (answer.code !== 'KEYS_OUT_OF_SYNC') return [];
  // One-time prekeys do not say which identity's they are.
  if (request.name === 'addPreKeys') return replacing;
  // By HTTP, an upload is of the keys that stood when it came in, where it names none.
  const isOfItsArrival = request.name === 'uploadKeys' && request.ifKeyVersion === null;
  return isOfItsArrival ? [...replacing, 'rotateSignedPreKey'] : [];
}

/** Whether `other` may have been carried out while `entry` was under way. */
function isBeside(entry: KeyEntry, other: KeyEntry): boolean {
  if (other === entry || other.askedAt > entry.answeredAt || other.answeredAt < entry.askedAt) return false;
  return other.answer === null || other.answer.ok || other.answer.code === 'UNAVAILABLE';
}
