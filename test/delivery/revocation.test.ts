/** Which tokens a revocation ends. */
import { expect, it } from 'vitest';
import { isRevoked } from '../../src/delivery/revocation.ts';

it.each([
  ['was issued before it', 0, true],
  ['was issued in its very second', 1_000, true],
  ['was issued after it', 2_000, false],
  ['does not say when it was issued', null, true],
])('a token that %s', (_, issuedAtMs, ends) => {
  expect(isRevoked({ issuedAtMs }, 1_000)).toBe(ends);
  expect(isRevoked({ issuedAtMs }, null)).toBe(false);
});
