/**
 * What was used lately, by key. It is kept in two generations, of which the older one is forgotten as a whole: a `Map`
 * whose oldest entries are deleted one by one walks over the holes they leave, tens of microseconds for each new entry
 * at 100,000.
 */
export interface Recent<Value> {
  /** What is found counts as used. */
  get(key: string): Value | undefined;
  set(key: string, value: Value): void;
  delete(key: string): void;
  clear(): void;
  /** Begins a new generation: what is not used before the next one begins is forgotten then. */
  turn(): void;
}

/**
 * @param generationMax entries of one generation: at least so many of the last used are kept, at most twice as many
 * @param onFull called when a full generation is followed by a new one
 */
export function createRecent<Value>(generationMax: number, onFull: () => void = () => {}): Recent<Value> {
  let newer = new Map<string, Value>();
  let older = new Map<string, Value>();

  function turn(): void {
    older = newer;
    newer = new Map();
  }

  function set(key: string, value: Value): void {
    if (newer.size >= generationMax) {
      turn();
      onFull();
    }
    newer.set(key, value);
  }

  return {
    get(key) {
      const value = newer.get(key);
      if (value !== undefined) return value;
      const aged = older.get(key);
      if (aged !== undefined) set(key, aged);
      return aged;
    },
    set,
    delete(key) {
      newer.delete(key);
      older.delete(key);
    },
    clear() {
      newer = new Map();
      older = new Map();
    },
    turn,
  };
}
