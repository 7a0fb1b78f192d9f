import { expect, it } from 'vitest';
import { ClaimLedger } from '../../src/load-test/claim-ledger.ts';
import type { DeviceBundle } from '../../src/protocol/keys.ts';

function bundle(keyId: number | null, absent?: 'noneLeft' | 'limited'): DeviceBundle {
  return {
    oneTimePreKey: keyId === null ? null : { keyId, publicKey: '' },
    ...(absent === undefined ? {} : { oneTimePreKeyAbsent: absent }),
  } as DeviceBundle;
}

it('finds a one-time prekey that is handed out twice, and tells bundles without by their reason', () => {
  const ledger = new ClaimLedger();
  for (const keyId of [1, 2, 3]) ledger.claimed({ target: 'bob', bundle: bundle(keyId) });
  ledger.claimed({ target: 'carol', bundle: bundle(1) });
  expect(ledger.counts()).toEqual({ withOneTimePreKey: 4, handedOutTwice: 0, noneLeft: 0, limited: 0 });
  ledger.claimed({ target: 'bob', bundle: bundle(2) });
  ledger.claimed({ target: 'bob', bundle: bundle(null, 'noneLeft') });
  for (let claim = 0; claim < 2; claim++) ledger.claimed({ target: 'bob', bundle: bundle(null, 'limited') });
  expect(ledger.counts()).toEqual({ withOneTimePreKey: 5, handedOutTwice: 1, noneLeft: 1, limited: 2 });
});
