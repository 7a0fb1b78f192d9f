/** What the pages share: drawing on a feed's word, and asking again while one looks. */
import { useCallback, useEffect, useReducer, useRef, useState } from 'preact/hooks';

/** Renders again whenever `source` says that it changed. */
export function useChanges(source: { onChange(listener: () => void): () => void }): void {
  const [, renderAgain] = useReducer((times: number, _: null) => times + 1, 0);
  useEffect(() => source.onChange(() => renderAgain(null)), [source]);
}

const ASK_EVERY_MS = 2_000;

export interface Asked<Answer> {
  /** The latest; null before the first. It stays while a later one fails. */
  answer: Answer | null;
  /** A sentence; null while all is well. */
  trouble: string | null;
  askAgain: () => void;
}

/**
 * Asks at once, whenever `name` changes, and every two seconds while the page is seen.
 *
 * @param name says what is asked; an answer to an earlier one is thrown away
 */
export function useAsked<Answer>(name: string, ask: () => Promise<Answer>): Asked<Answer> {
  const [state, setState] = useState<{ name: string; answer: Answer | null; trouble: string | null }>({
    name,
    answer: null,
    trouble: null,
  });
  const latest = useRef({ name, ask });
  latest.current = { name, ask };

  const askNow = useCallback(async () => {
    const { name, ask } = latest.current;
    const put = (answer: Answer | null, trouble: string | null): void => {
      if (latest.current.name !== name) return;
      setState((old) => ({ name, answer: answer ?? (old.name === name ? old.answer : null), trouble }));
    };
    await ask().then(
      (answer) => put(answer, null),
      (error: Error) => put(null, error.message),
    );
  }, []);

  useEffect(() => {
    let isUnderWay = false;
    const look = async (): Promise<void> => {
      if (isUnderWay || document.hidden) return;
      isUnderWay = true;
      await askNow();
      isUnderWay = false;
    };
    void look();
    const timer = setInterval(look, ASK_EVERY_MS);
    return () => clearInterval(timer);
  }, [name, askNow]);

  const isCurrent = state.name === name;
  return {
    answer: isCurrent ? state.answer : null,
    trouble: isCurrent ? state.trouble : null,
    askAgain: () => void askNow(),
  };
}

/** Calls `action` for keys that are pressed while no field is being written in. */
export function useKeys(keys: Readonly<Record<string, (event: KeyboardEvent) => void>>): void {
  const latest = useRef(keys);
  latest.current = keys;
  useEffect(() => {
    const onKeyDown = (event: KeyboardEvent): void => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
      const target = event.target as HTMLElement;
      if (event.key !== 'Escape' && isBusyWith(target, event.key)) return;
      const action = latest.current[event.key];
      if (action === undefined) return;
      event.preventDefault();
      action(event);
    };
    addEventListener('keydown', onKeyDown);
    return () => removeEventListener('keydown', onKeyDown);
  }, []);
}

/** Whether the key means something to the element itself. */
function isBusyWith(element: HTMLElement, key: string): boolean {
  if (element.closest('input, select, textarea, dialog') !== null) return true;
  return key === ' ' && element.closest('button, a, summary') !== null;
}
