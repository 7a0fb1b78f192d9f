/** What stands in a key's place on a screen: alike on all nodes of one installation, and nowhere else. */
import { randomBytes } from 'node:crypto';
import { expect, it } from 'vitest';
import { createRedactor } from '../../src/admin/redactor.ts';

it('makes digests that nobody without the installation’s key can make, too short to search for a key by', () => {
  const [ours, theirs] = [randomBytes(32), randomBytes(32)];
  const input = { localIdentityKey: randomBytes(33).toString('base64'), localSignedPreKeyId: 1 };
  const shownBy = (key: Uint8Array) => createRedactor(key).input('validateKeys', input);
  expect(shownBy(ours)).toEqual({
    localIdentityKey: { bytes: 33, digest: expect.stringMatching(/^[0-9a-f]{10}$/) },
    localSignedPreKeyId: 1,
  });
  expect(shownBy(ours)).toEqual(shownBy(Buffer.from(ours)));
  expect(shownBy(ours)).not.toEqual(shownBy(theirs));
});
