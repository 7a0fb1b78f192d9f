/** The events that the page keeps: a ring, so that a day of watching costs no more than a minute. */

export interface EventLog<Item> {
  readonly length: number;
  /** How many were pushed out by newer ones since the last `clear`. */
  readonly forgottenCount: number;
  /** @param index from 0, the oldest, to `length` - 1 */
  at(index: number): Item | undefined;
  append(items: readonly Item[]): void;
  clear(): void;
  /** Oldest first. */
  toArray(): Item[];
}

/** @param capacity the most that is kept; the oldest goes first */
export function createEventLog<Item>(capacity: number): EventLog<Item> {
  let ring: Item[] = [];
  /** Where the oldest lies, once the ring is full. */
  let head = 0;
  let forgottenCount = 0;

  const at = (index: number): Item | undefined =>
    index < 0 || index >= ring.length ? undefined : ring[(head + index) % ring.length];
  return {
    get length() {
      return ring.length;
    },
    get forgottenCount() {
      return forgottenCount;
    },
    at,
    append(items) {
      for (const item of items) {
        if (ring.length < capacity) ring.push(item);
        else {
          ring[head] = item;
          head = (head + 1) % capacity;
          forgottenCount += 1;
        }
      }
    },
    clear() {
      ring = [];
      head = 0;
      forgottenCount = 0;
    },
    toArray: () => Array.from(ring, (_, index) => at(index)!),
  };
}
