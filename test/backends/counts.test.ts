import { describe, expect, it } from 'vitest';
import { COUNT, Counts, hashOf } from '../../src/backends/in-process/counts.ts';

const counts = (keysMax: number, onFull = () => {}) => new Counts(keysMax, onFull);

/** The untold points of a key; null where nothing is known of it. */
function untoldOf(of: Counts, key: string): number | null {
  const at = of.find(hashOf(key, ''));
  return at < 0 ? null : of.values[at + COUNT.untold]!;
}

function charge(of: Counts, key: string): void {
  const hash = hashOf(key, '');
  const found = of.find(hash);
  const at = found < 0 ? of.add(hash) : found;
  of.values[at + COUNT.untold]! += 1;
}

describe('the hash of a key', () => {
  it('differs for keys that differ by little', () => {
    const seen = new Set<string>();
    const users = Array.from({ length: 400 }, (_, nth) => `user-${nth}`);
    for (const asker of users) {
      for (const asked of users) {
        const { high, low } = hashOf(asker, asked);
        seen.add(`${high} ${low}`);
      }
    }
    expect(seen.size).toBe(160_000);
  });

  it('spreads such keys over the slots of a table', () => {
    const slots = new Set<number>();
    for (let nth = 0; nth < 4_096; nth++) slots.add(hashOf('user-1', `user-${nth}`).low & 4_095);
    // Of so many thrown at random, 1 − 1/e are hit.
    expect(slots.size / 4_096).toBeGreaterThan(0.58);
  });

  it('tells where the first part ends', () => {
    expect(hashOf('ab', 'c')).not.toEqual(hashOf('a', 'bc'));
    expect(hashOf('ab', '')).not.toEqual(hashOf('a', 'b'));
  });
});

describe('counts', () => {
  it('keep every value of every key over the growth of their table', () => {
    const all = counts(50_000);
    for (let round = 0; round < 2; round++) {
      for (let nth = 0; nth < 20_000; nth++) {
        const hash = hashOf(`key-${nth}`, '');
        const at = round === 0 ? all.add(hash) : all.find(hash);
        for (const value of Object.values(COUNT)) {
          if (round === 0) all.values[at + value] = nth * 10 + value;
          else expect(all.values[at + value]).toBe(nth * 10 + value);
        }
      }
    }
  });

  it('are kept of the keys used last, with what was counted of them', () => {
    let fullCount = 0;
    const few = counts(1_000, () => fullCount++);
    charge(few, 'kept');
    for (let nth = 0; nth < 10_000; nth++) {
      charge(few, `passing-${nth}`);
      if (nth % 900 === 0) charge(few, 'kept');
    }
    expect(untoldOf(few, 'kept')).toBe(13);
    expect(untoldOf(few, 'passing-9999')).toBe(1);
    expect(untoldOf(few, 'passing-0')).toBeNull();
    expect(fullCount).toBeGreaterThanOrEqual(9);
    expect(fullCount).toBeLessThanOrEqual(11);
  });

  it('are kept with every value when a key of the older generation is used, also where that begins a new one', () => {
    const keysMax = 1_000;
    for (const othersCount of [0, keysMax - 1, keysMax]) {
      const some = counts(keysMax);
      const hash = hashOf('kept', '');
      const first = some.add(hash);
      for (const value of Object.values(COUNT)) some.values[first + value] = value + 7;
      some.turn();
      for (let nth = 0; nth < othersCount; nth++) charge(some, `other-${nth}`);
      const at = some.find(hash);
      expect(Object.values(COUNT).map((value) => some.values[at + value]! - value)).toEqual(Array(5).fill(7));
    }
  });

  it('are kept apart for hashes of which one half is the same, or 0', () => {
    const few = counts(1_000);
    const hashes = [
      { high: 3, low: 5 },
      { high: 4, low: 5 },
      { high: 3, low: 6 },
      { high: 3, low: 0 },
      { high: 4, low: 0 },
      { high: 0, low: 5 },
    ];
    for (const [nth, hash] of hashes.entries()) {
      expect(few.find(hash)).toBe(-1);
      const at = few.add(hash);
      few.values[at + COUNT.untold] = nth;
    }
    expect(hashes.map((hash) => few.values[few.find(hash) + COUNT.untold])).toEqual([0, 1, 2, 3, 4, 5]);
  });

  it('are kept of a key without a letter', () => {
    const few = counts(1_000);
    for (let times = 0; times < 3; times++) charge(few, '');
    expect(untoldOf(few, '')).toBe(3);
  });

  it('are forgotten with the second new generation', () => {
    const some = counts(1_000);
    charge(some, 'used');
    charge(some, 'unused');
    some.turn();
    charge(some, 'used');
    some.turn();
    expect(untoldOf(some, 'used')).toBe(2);
    expect(untoldOf(some, 'unused')).toBeNull();
  });
});
