import { expect, it } from 'vitest';
import { nestsDeeper } from '../../src/lib/json-depth.ts';

const filler = `"${'x'.repeat(2_000)}"`;
const nested = (depth: number): string => `${'['.repeat(depth)}${filler}${']'.repeat(depth)}`;

it('tells whether lists and objects are nested deeper than they may', () => {
  expect(nestsDeeper(nested(16), 16)).toBe(false);
  expect(nestsDeeper(nested(17), 16)).toBe(true);
  expect(nestsDeeper(`${'{"a":'.repeat(17)}${filler}${'}'.repeat(17)}`, 16)).toBe(true);
  expect(nestsDeeper(`[${nested(15)},${nested(15)},${'[],'.repeat(1_000)}{}]`, 16)).toBe(false);
});

it('is not misled by what stands in strings', () => {
  const brackets = '['.repeat(2_000);
  expect(nestsDeeper(`["${brackets}"]`, 16)).toBe(false);
  expect(nestsDeeper(`["\\"${brackets}"]`, 16)).toBe(false);
  expect(nestsDeeper(`["\\\\",${brackets}]`, 16)).toBe(true);
  expect(nestsDeeper(`["\\\\\\"${brackets}"]`, 16)).toBe(false);
  expect(nestsDeeper(`["${brackets}`, 16)).toBe(false);
});

it('lets short texts pass, which no depth makes slow', () => {
  expect(nestsDeeper('['.repeat(1_000), 16)).toBe(false);
});
