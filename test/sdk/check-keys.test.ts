/** One look at the device's own keys: which faults are of the whole key set, and which of single keys. */
import { beforeEach, describe, expect, it } from 'vitest';
import { inspectLocalKeys } from '../../src/sdk/check-keys.ts';
import { Disk, LibsignalKeys } from '../support/sdk-keys.ts';

let disk: Disk;
let keys: LibsignalKeys;

beforeEach(async () => {
  disk = new Disk();
  keys = new LibsignalKeys(disk, { userId: 'bob', deviceId: 1 });
  await keys.createIdentity();
  await keys.signedPreKey.generate(1);
  await keys.pqLastResortPreKey.generate(2);
});

async function faultOf() {
  return (await inspectLocalKeys(keys)).fault;
}

describe('a key set', () => {
  it('is whole without one-time prekeys', async () => {
    expect(await inspectLocalKeys(keys)).toEqual({ fault: null, broken: { ec: [], pq: [] } });
  });

  it.each([
    ['signedPreKey', 'signedPreKey/1'],
    ['pqLastResortPreKey', 'pqLastResort/2'],
  ])('is lost without its %s', async (name, record) => {
    disk.remove(record);
    expect(await faultOf()).toEqual({ missing: name, reason: `the ${name} is missing`, fresh: false });
  });

  it.each(['signedPreKey', 'pqLastResortPreKey'])(
    'is lost where its %s is signed by another identity key',
    async (name) => {
      if (name === 'pqLastResortPreKey') disk.remove('signedPreKey/1');
      await keys.createIdentity();
      if (name === 'pqLastResortPreKey') await keys.signedPreKey.generate(1);
      expect(await faultOf()).toEqual({
        missing: name,
        reason: `the ${name} is not signed by the identity key, or its private half can’t be read`,
        fresh: false,
      });
    },
  );

  it('is lost where its one-time prekeys can’t even be listed', async () => {
    keys.oneTimePreKeys.ids = async () => {
      throw new Error('the database is gone');
    };
    expect(await faultOf()).toMatchObject({ missing: 'identity', reason: 'no one-time prekey can be read' });
  });
});

describe('one-time prekeys', () => {
  it('of which the only one can’t be read are a fault of that one', async () => {
    await keys.oneTimePreKeys.generate([10]);
    await keys.pqOneTimePreKeys.generate([20]);
    disk.damage('preKey/10');
    disk.damage('pqPreKey/20');
    expect(await inspectLocalKeys(keys)).toEqual({ fault: null, broken: { ec: [10], pq: [20] } });
  });

  it('that don’t fit their public halves are broken too', async () => {
    await keys.oneTimePreKeys.generate([10, 11, 12]);
    const { isReadable } = keys.oneTimePreKeys;
    keys.oneTimePreKeys.isReadable = async (id) => id !== 11 && (await isReadable(id));
    expect(await inspectLocalKeys(keys)).toEqual({ fault: null, broken: { ec: [11], pq: [] } });
  });

  it('are given up where none of three that lie apart can be read, and not before', async () => {
    const ids = Array.from({ length: 9 }, (_, index) => 10 + index);
    await keys.oneTimePreKeys.generate(ids);
    // Of the others, the first, the last and the one in the middle are looked at.
    for (const id of [10, 11, 18]) disk.damage(`preKey/${id}`);
    expect(await inspectLocalKeys(keys)).toEqual({ fault: null, broken: { ec: [10, 11, 18], pq: [] } });
    disk.damage('preKey/15');
    expect(await faultOf()).toMatchObject({ missing: 'identity', reason: 'no one-time prekey can be read' });
  });
});
