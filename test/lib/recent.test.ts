import { describe, expect, it } from 'vitest';
import { createRecent } from '../../src/lib/recent.ts';

const keys = (count: number, prefix = ''): string[] =>
  Array.from({ length: count }, (_, i) => `${prefix}${i}`);

describe('what was used lately', () => {
  it('is kept: the last so many at least, and never more than twice as many', () => {
    const recent = createRecent<string>(100);
    const all = keys(1_000);
    for (const key of all) recent.set(key, key);
    const kept = all.filter((key) => recent.get(key) !== undefined);
    expect(kept.length).toBeLessThanOrEqual(200);
    expect(kept.slice(-100)).toEqual(all.slice(-100));
  });

  it('is kept by being read, however much else comes', () => {
    const recent = createRecent<number>(10);
    recent.set('mine', 1);
    for (const key of keys(1_000)) {
      recent.set(key, 0);
      expect(recent.get('mine')).toBe(1);
    }
  });

  it('is the newest value, and nothing once it was deleted or cleared', () => {
    const recent = createRecent<number>(2);
    recent.set('a', 1);
    recent.turn();
    recent.set('a', 2);
    expect(recent.get('a')).toBe(2);
    recent.delete('a');
    expect(recent.get('a')).toBeUndefined();
    recent.set('b', 1);
    recent.clear();
    expect(recent.get('b')).toBeUndefined();
  });

  it('is forgotten after two turns without use', () => {
    const recent = createRecent<number>(10);
    recent.set('used', 1);
    recent.set('unused', 1);
    recent.turn();
    expect(recent.get('used')).toBe(1);
    recent.turn();
    expect(recent.get('used')).toBe(1);
    expect(recent.get('unused')).toBeUndefined();
  });

  it('holds up nobody when there is a million of it', () => {
    const recent = createRecent<number>(50_000);
    // With entries deleted one by one this takes a minute.
    for (const key of keys(1_000_000)) recent.set(key, 1);
    expect(recent.get('999999')).toBe(1);
  });
});
