/** What a node deleted last: a statement that began before may still have seen it wait. */
import { createRecent } from '../lib/recent.ts';

/** The numbers of the messages that this node deleted last, at least `DELETED_MAX` of them. */
export interface DeletedLately {
  add(sequences: readonly number[]): void;
  has(sequence: number): boolean;
}

/** So many are deleted in about a second at most, and no statement takes so long while they are. */
const DELETED_MAX = 10_000;

export function createDeletedLately(): DeletedLately {
  const sequences = createRecent<true, number>(DELETED_MAX);
  return {
    add(list) {
      for (const sequence of list) sequences.set(sequence, true);
    },
    has: (sequence) => sequences.get(sequence) === true,
  };
}
