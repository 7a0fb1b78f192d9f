/**
 * Whether some order of requests, one after another, gives all the answers that were seen, where none is carried out
 * before it was asked or after it was answered. The search of Wing and Gong, which never looks twice at the same state
 * with the same requests behind it.
 */

/** A request of a history. Moments are places in the one order in which its observer saw everything. */
export interface Entry<Request, Answer> {
  request: Request;
  /** Null where none came: it may have been carried out at any time since it was asked, or never. */
  answer: Answer | null;
  askedAt: number;
  /** Infinity where no answer came. */
  answeredAt: number;
}

export interface Machine<State, Request, Answer> {
  initial: State;
  /** @returns the state after it; null where the request can't have been answered so in this state */
  explain(state: State, request: Request, answer: Answer | null): State | null;
  /** The same for two states that nothing can tell apart. */
  fingerprint(state: State): string;
}

export type Verdict<State, Request, Answer> =
  | { verdict: 'linearizable' }
  /** `explained`: an order as long as there is any; `state`: what it leads to; `stuck`: what none of the rest goes on from. */
  | {
      verdict: 'refused';
      explained: readonly Entry<Request, Answer>[];
      state: State;
      stuck: readonly Entry<Request, Answer>[];
    }
  /** Too many states were met: the history is neither accepted nor refused. */
  | { verdict: 'undecided' };

/** @param statesMax states to look at, at most */
export function linearize<State, Request, Answer>(
  history: readonly Entry<Request, Answer>[],
  machine: Machine<State, Request, Answer>,
  { statesMax }: { statesMax: number },
): Verdict<State, Request, Answer> {
  const entries = [...history].sort((one, other) => one.askedAt - other.askedAt);
  const order: Entry<Request, Answer>[] = [];
  const done = entries.map(() => false);
  const met = new Set<string>();
  let answeredLeft = entries.filter((entry) => entry.answer !== null).length;
  let longest: Extract<Verdict<State, Request, Answer>, { verdict: 'refused' }> | null = null;

  /** What may come next: nothing that was answered before it was asked is left. */
  function open(): number[] {
    let firstAnswer = Number.POSITIVE_INFINITY;
    entries.forEach((entry, index) => {
      if (!done[index]) firstAnswer = Math.min(firstAnswer, entry.answeredAt);
    });
    return entries.flatMap((entry, index) => (!done[index] && entry.askedAt < firstAnswer ? [index] : []));
  }

  function visit(state: State): 'linearizable' | 'refused' | 'undecided' {
    if (answeredLeft === 0) return 'linearizable';
    const key = `${done.map(Number).join('')}${machine.fingerprint(state)}`;
    if (met.has(key)) return 'refused';
    if (met.size === statesMax) return 'undecided';
    met.add(key);
    const next = open();
    if (longest === null || order.length > longest.explained.length) {
      const stuck = next.map((index) => entries[index]!);
      longest = { verdict: 'refused', explained: [...order], state, stuck };
    }
    for (const index of next) {
      const entry = entries[index]!;
      const after = machine.explain(state, entry.request, entry.answer);
      if (after === null) continue;
      done[index] = true;
      order.push(entry);
      if (entry.answer !== null) answeredLeft -= 1;
      const verdict = visit(after);
      if (entry.answer !== null) answeredLeft += 1;
      order.pop();
      done[index] = false;
      if (verdict !== 'refused') return verdict;
    }
    return 'refused';
  }

  const verdict = visit(machine.initial);
  return verdict === 'refused' ? longest! : { verdict };
}

/** Far beyond what the histories of the tests need. */
const STATES_MAX = 200_000;

/**
 * @param lineOf what is told of an entry
 * @param seen the history as it is told, where some of it is not judged
 * @returns null where some order explains every answer; else a report
 * @throws Error where the search met too many states to tell
 */
export function contradictionIn<State, Request, Answer, Seen extends Entry<Request, Answer>>(
  history: readonly Seen[],
  machine: Machine<State, Request, Answer>,
  lineOf: (entry: Seen) => string,
  seen: readonly Seen[] = history,
): string | null {
  const verdict = linearize(history, machine, { statesMax: STATES_MAX });
  const told = (entries: readonly Entry<Request, Answer>[]): string =>
    entries.map((entry) => `  ${lineOf(entry as Seen)}`).join('\n');
  switch (verdict.verdict) {
    case 'linearizable':
      return null;
    case 'undecided':
      throw new Error(`more than ${STATES_MAX} states: nothing can be told of\n${told(seen)}`);
    case 'refused':
      return [
        `no order explains the answers. What was seen:\n${told(seen)}`,
        `the longest order that does:\n${told(verdict.explained)}`,
        `which leads to\n  ${JSON.stringify(verdict.state)}`,
        `and to none of\n${told(verdict.stuck)}`,
      ].join('\n');
  }
}
