import { expect, it } from 'vitest';
import { ClaimLedger } from '../../src/load-test/claim-ledger.ts';
import type { DeviceBundle } from '../../src/protocol/keys.ts';

type Pq = { keyId: number; lastResort: boolean };

function bundle(
  keyId: number | null,
  absent?: 'noneLeft' | 'limited',
  { pq = null }: { pq?: Pq | null } = {},
): DeviceBundle {
  return {
    oneTimePreKey: keyId === null ? null : { keyId, publicKey: '' },
    pqPreKey: pq === null ? null : { ...pq, publicKey: '', signature: '' },
    ...(absent === undefined ? {} : { oneTimePreKeyAbsent: absent }),
  } as DeviceBundle;
}

it('finds a one-time prekey that is handed out twice, and tells bundles without by their reason', () => {
  const ledger = new ClaimLedger();
  for (const keyId of [1, 2, 3]) ledger.claimed({ target: 'bob', bundle: bundle(keyId) });
  ledger.claimed({ target: 'carol', bundle: bundle(1) });
  expect(ledger.counts()).toEqual({
    withOneTimePreKey: 4,
    handedOutTwice: 0,
    noneLeft: 0,
    limited: 0,
    withPqOneTimePreKey: 0,
    withPqLastResortPreKey: 0,
  });
  ledger.claimed({ target: 'bob', bundle: bundle(2) });
  ledger.claimed({ target: 'bob', bundle: bundle(null, 'noneLeft') });
  for (let claim = 0; claim < 2; claim++) ledger.claimed({ target: 'bob', bundle: bundle(null, 'limited') });
  expect(ledger.counts()).toMatchObject({
    withOneTimePreKey: 5,
    handedOutTwice: 1,
    noneLeft: 1,
    limited: 2,
  });
});

it('finds a PQ one that is handed out twice, which the ids of the others and the last resort are not', () => {
  const ledger = new ClaimLedger();
  const claimed = (keyId: number, pq: Pq) =>
    ledger.claimed({ target: 'bob', bundle: bundle(keyId, undefined, { pq }) });
  claimed(1, { keyId: 2, lastResort: false });
  claimed(2, { keyId: 1, lastResort: false });
  for (const keyId of [3, 4]) claimed(keyId, { keyId: 2, lastResort: true });
  expect(ledger.counts()).toMatchObject({
    withPqOneTimePreKey: 2,
    withPqLastResortPreKey: 2,
    handedOutTwice: 0,
  });
  claimed(5, { keyId: 2, lastResort: false });
  expect(ledger.counts()).toMatchObject({ withPqOneTimePreKey: 3, handedOutTwice: 1 });
});
