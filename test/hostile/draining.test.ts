/** One attacker against one victim's one-time prekeys, with the limits that a gateway has by itself. */
import { randomUUID } from 'node:crypto';
import { describe, expect, it } from 'vitest';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import { gatewayFor, undoAfterEach } from '../support/flow.ts';
import type { Client } from '../support/gateway.ts';
import { ids, KeyMaker } from '../support/key-maker.ts';
import { createManualClock } from '../support/manual-clock.ts';
import { DEFAULT_LIMITS } from './target.ts';

const VICTIM = { userId: 'drained', deviceId: 1 };
const PRE_KEYS = 100;
const ATTACKING_DEVICES = 50;
const SECONDS = 60;
/** More would only be refused sooner: each device has as many under way as a socket carries out at once. */
const CLAIMS_PER_SECOND = 2;

const undo = undoAfterEach();

const bundleOf = (client: Client) =>
  client.call('requestBundle', { claimId: randomUUID(), userId: VICTIM.userId, deviceId: VICTIM.deviceId });

describe('immunity 13: fifty devices that claim a victim’s keys at full speed for a minute', () => {
  it.each<[string, (index: number) => DeviceAddress]>([
    ['of one user', (index) => ({ userId: 'greedy', deviceId: index + 1 })],
    ['of fifty users', (index) => ({ userId: `greedy-${index}`, deviceId: 1 })],
  ])('%s leave it at least half of them, and reachable', { timeout: 60_000 }, async (whose, addressOf) => {
    const clock = createManualClock();
    const gateway = await gatewayFor(undo, { clock, env: { ...DEFAULT_LIMITS } });
    const keys = new KeyMaker();
    const victim = await gateway.connect(VICTIM);
    await victim.call(
      'uploadKeys',
      keys.keySet({
        pqLastResortPreKey: keys.pq(1),
        oneTimePreKeys: ids(1, PRE_KEYS).map((id) => keys.oneTime(id)),
        pqOneTimePreKeys: ids(1_000, PRE_KEYS).map((id) => keys.pq(id)),
      }),
    );
    const friend = await gateway.connect({ userId: 'friend', deviceId: 1 });
    const attackers: Client[] = [];
    for (let index = 0; index < ATTACKING_DEVICES; index++)
      attackers.push(await gateway.connect(addressOf(index)));

    const outcomes = new Map<string, number>();
    for (let second = 0; second < SECONDS; second++) {
      await Promise.all(
        attackers.flatMap((attacker) =>
          Array.from({ length: CLAIMS_PER_SECOND }, async () => {
            const reply = await attacker.ask('requestBundle', {
              claimId: randomUUID(),
              userId: VICTIM.userId,
            });
            const outcome = reply.ok
              ? (reply.data.devices[0]!.oneTimePreKeyAbsent ?? 'with a one-time prekey')
              : reply.error.code;
            outcomes.set(outcome, (outcomes.get(outcome) ?? 0) + 1);
          }),
        ),
      );
      // Whoever means to write is answered all the while.
      if (second % 20 === 10) expect((await bundleOf(friend)).devices).toHaveLength(1);
      await clock.advance(1_000);
    }

    const left = await victim.call('keyStatus');
    process.stdout.write(
      `  hostile: ${ATTACKING_DEVICES} devices ${whose}, ${SECONDS} s: ${JSON.stringify(Object.fromEntries(outcomes))}; ` +
        `the victim keeps ${left.preKeyCount} of ${PRE_KEYS} and ${left.pqPreKeyCount} PQ ones\n`,
    );
    expect(left.preKeyCount).toBeGreaterThanOrEqual(PRE_KEYS / 2);
    expect(left.pqPreKeyCount).toBeGreaterThanOrEqual(PRE_KEYS / 2);
    const [bundle] = (await bundleOf(friend)).devices;
    expect(bundle).toMatchObject({ identityKey: keys.identityKey(), signedPreKey: { keyId: 1 } });
    // Beyond the limit that protects the victim a bundle costs nothing, and is as good for a first message.
    if (whose === 'of fifty users') {
      expect(bundle).toMatchObject({
        oneTimePreKey: null,
        oneTimePreKeyAbsent: 'limited',
        pqPreKey: { keyId: 1, lastResort: true },
      });
    }
  });
});
