import { randomUUID } from 'node:crypto';
import { UPLOAD_PRE_KEYS_MAX } from '../../protocol/limits.ts';
import { ClaimLedger } from '../claim-ledger.ts';
import { Failure, type LoadDevice } from '../device.ts';
import { scheduleOf } from '../schedule.ts';
import { createPresence } from './presence.ts';
import type { Scenario, Stage } from './scenario.ts';

/** Beyond what chance deals to a device, and what the gateway calls low. */
const POOL_RESERVE = 20;

/** Devices claim one-time prekeys of each other, and refill when they are told that they run low. */
export function createClaims(stage: Stage): Scenario {
  const { devices, meter, random, part } = stage;
  const presence = createPresence(stage);
  const ledger = new ClaimLedger();
  const claimsPerDevice = scheduleOf(part).count / devices.length;
  const poolLength = Math.min(UPLOAD_PRE_KEYS_MAX, Math.ceil(claimsPerDevice * 1.3) + POOL_RESERVE);

  async function refill(device: LoadDevice): Promise<void> {
    try {
      await device.ask('addPreKeys', device.keys.refill(UPLOAD_PRE_KEYS_MAX));
    } catch (error) {
      if (!(error instanceof Failure)) throw error;
      // The pool runs dry, which is seen in the bundles.
      meter.noted(error.code);
    }
  }

  function anyOther(turn: number): LoadDevice {
    const distance = 1 + Math.floor(random() * (devices.length - 1));
    return devices[(turn + distance) % devices.length]!;
  }

  return {
    async prepare(device) {
      await device.connect();
      await device.ask('uploadKeys', { ...device.keys.upload(poolLength), replaceIdentity: true });
      await device.openGate();
      device.listener.onPreKeysLow = () => void refill(device);
      presence.keep(device);
    },

    async operate({ index, startMs }) {
      const turn = index % devices.length;
      const claimer = devices[turn]!;
      const target = anyOther(turn);
      // The same claim id each time that it is asked: one key is spent.
      const request = { claimId: randomUUID(), ...target.address };
      const answer = await presence.untilAnswered(claimer, () => claimer.ask('requestBundle', request));
      const [bundle] = answer.devices;
      if (bundle?.identityKey !== target.keys.identityKey) throw new Failure('WRONG_ANSWER');
      if (part.hasPq && bundle.pqPreKey === null) throw new Failure('WRONG_ANSWER');
      ledger.claimed({ target: target.keys.identityKey, bundle });
      meter.step('claimed', startMs);
    },

    claims: () => ledger.counts(),
  };
}
