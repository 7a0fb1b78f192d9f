/**
 * Counts of many keys, in typed arrays. A key that is charged for the first time, as most pairs of users are, leaves
 * nothing to the garbage collector, and one that was charged before is found without following references. That is an
 * eighth of the time that a claim takes the process, measured beside a `Map` of objects.
 *
 * A key is held as 64 bits of its hash. Seeds and multipliers are this process's own, so that nobody can choose a key that
 * counts as another's; by chance any two of 100,000 do once in some billions of times, and then share their points.
 *
 * They are kept in two generations, of which the older one is forgotten as a whole.
 */
import { randomInt } from 'node:crypto';

/** Of a key, as a table holds it; never 0 and 0. */
export interface KeyHash {
  readonly high: number;
  readonly low: number;
}

/** What is counted of a key, by its place among the key's values. */
export const COUNT = { window: 0, endsAtMs: 1, known: 2, underWay: 3, untold: 4 } as const;
const VALUES = 5;

const CAPACITY_MIN = 1_024;
const SEED_END = 2 ** 32;
const [HIGH_SEED, LOW_SEED] = [randomInt(SEED_END), randomInt(SEED_END)];
// Odd, or they would lose what stands in the upper bits.
const [HIGH_MULTIPLIER, LOW_MULTIPLIER] = [randomInt(SEED_END) | 1, randomInt(SEED_END) | 1];
const SEPARATOR = '/'.charCodeAt(0);

/** Of a key that is made of one part or two, neither of which has a `/` where there are two. */
export function hashOf(key: string, subkey: string): KeyHash {
  // As the table has them, also of a key without a letter.
  let high = HIGH_SEED | 0;
  let low = LOW_SEED | 0;
  const { length } = key;
  const end = subkey === '' ? length : length + 1 + subkey.length;
  for (let at = 0; at < end; at++) {
    const unit =
      at < length ? key.charCodeAt(at) : at === length ? SEPARATOR : subkey.charCodeAt(at - length - 1);
    high = Math.imul(high ^ unit, HIGH_MULTIPLIER);
    high ^= high >>> 15;
    low = Math.imul(low ^ unit, LOW_MULTIPLIER);
    low = (low << 13) | (low >>> 19);
  }
  low = Math.imul(low ^ (low >>> 16), HIGH_MULTIPLIER);
  low ^= low >>> 13;
  return { high, low: high === 0 && low === 0 ? 1 : low };
}

/** The counts of one limit: at most 48 bytes for each of four times `keysMax` slots, rounded up to a power of two. */
export class Counts {
  readonly #keysMax: number;
  readonly #onFull: () => void;
  #newer = new Generation(CAPACITY_MIN);
  #older = new Generation(CAPACITY_MIN);

  /**
   * @param keysMax keys of one generation: at least so many of the last used are kept, at most twice as many
   * @param onFull called when a full generation is followed by a new one
   */
  constructor(keysMax: number, onFull: () => void) {
    this.#keysMax = keysMax;
    this.#onFull = onFull;
  }

  /**
   * Where the values of a key begin in `values`, until the next call; -1 where nothing is known of it. What is found counts as
   * used.
   */
  find(hash: KeyHash): number {
    const newer = this.#newer.slotOf(hash);
    if (newer >= 0) return newer * VALUES;
    const older = this.#older;
    const slot = older.slotOf(hash);
    if (slot < 0) return -1;
    const from = slot * VALUES;
    const at = this.add(hash);
    for (let value = 0; value < VALUES; value++) this.values[at + value] = older.values[from + value]!;
    return at;
  }

  /** Takes in a key that `find` has just not found. @returns where its values begin, all 0 */
  add(hash: KeyHash): number {
    if (this.#newer.size >= this.#keysMax) {
      this.turn();
      this.#onFull();
    }
    if (this.#newer.isCrowded()) this.#newer = this.#newer.grown();
    return this.#newer.take(hash) * VALUES;
  }

  /** Of all keys of the present generation, those of each in the order of `COUNT`; another array after the next call. */
  get values(): Float64Array {
    return this.#newer.values;
  }

  /** Begins a new generation: what is not used before the next one begins is forgotten then. */
  turn(): void {
    this.#older = this.#newer;
    this.#newer = new Generation(CAPACITY_MIN);
  }
}

/** A hash table whose slots are looked through one after the other; half of them stay free, or more. */
class Generation {
  /** Two for each slot; both 0 where it is free. */
  readonly #hashes: Int32Array;
  readonly values: Float64Array;
  readonly #mask: number;
  size = 0;

  /** @param capacity a power of two */
  constructor(capacity: number) {
    this.#hashes = new Int32Array(2 * capacity);
    this.values = new Float64Array(VALUES * capacity);
    this.#mask = capacity - 1;
  }

  /** @returns the key's slot; less than 0 where it has none: the one that it would take is `~` of that then */
  slotOf({ high, low }: KeyHash): number {
    const hashes = this.#hashes;
    const mask = this.#mask;
    for (let slot = low & mask; ; slot = (slot + 1) & mask) {
      const [itsHigh, itsLow] = [hashes[2 * slot]!, hashes[2 * slot + 1]!];
      if (itsHigh === high && itsLow === low) return slot;
      if (itsHigh === 0 && itsLow === 0) return ~slot;
    }
  }

  take(hash: KeyHash): number {
    const slot = ~this.slotOf(hash);
    this.#hashes[2 * slot] = hash.high;
    this.#hashes[2 * slot + 1] = hash.low;
    this.size += 1;
    return slot;
  }

  isCrowded(): boolean {
    return 2 * this.size > this.#mask;
  }

  grown(): Generation {
    const larger = new Generation(2 * (this.#mask + 1));
    for (let slot = 0; slot <= this.#mask; slot++) {
      const hash = { high: this.#hashes[2 * slot]!, low: this.#hashes[2 * slot + 1]! };
      if (hash.high === 0 && hash.low === 0) continue;
      const [from, to] = [slot * VALUES, larger.take(hash) * VALUES];
      for (let value = 0; value < VALUES; value++) larger.values[to + value] = this.values[from + value]!;
    }
    return larger;
  }
}
