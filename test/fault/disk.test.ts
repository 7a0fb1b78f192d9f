/** The embedded store on a disk that is full. */
import { randomUUID } from 'node:crypto';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { eventually } from '../support/eventually.ts';
import { someone } from '../support/flow.ts';
import { contents, enrol, open, type Party } from '../support/gateway.ts';
import { type GatewayProcess, startGatewayProcess } from '../support/gateway-process.ts';
import { type SmallDisk, smallDisk } from '../support/small-disk.ts';
import { seeded } from './random.ts';

/** An empty store takes some sixty. */
const DISK_MB = 144;
const REFUSALS = 6;

let disk: SmallDisk;
let gateway: GatewayProcess;
beforeAll(async () => {
  disk = await smallDisk(DISK_MB);
  gateway = await startGatewayProcess(
    { dataDir: join(disk.dir, 'data') },
    { LOG_LEVEL: 'warn' },
    { through: disk.through },
  );
});
afterAll(async () => {
  await gateway?.stop();
  await disk?.remove();
});

/** Asks for one thing until it is answered with success, or refused. */
async function sendOnce(from: Party, to: Party, message: { id: string; text: string; bytes: number }) {
  const content = Buffer.from(message.text.padEnd(message.bytes)).toString('base64');
  return await from.client.ask('sendMessages', {
    messageId: message.id,
    userId: to.address.userId,
    envelopes: [{ deviceId: 1, registrationId: to.device.registrationId, type: 1, content }],
  });
}

describe('a full disk under the embedded store', () => {
  it.each([1, 2, 3])(
    'refuses with UNAVAILABLE what it can’t hold, loses nothing that it took, and goes on when there is room (seed %i)',
    { timeout: 120_000 },
    async (seed) => {
      const random = seeded(seed);
      const alice = await enrol(gateway, someone(), { oneTimePreKeys: 1, pqOneTimePreKeys: 0 });
      const bob = await enrol(gateway, someone(), { oneTimePreKeys: 100, pqOneTimePreKeys: 0 });
      const accepted: string[] = [];
      const refused: { id: string; text: string; bytes: number }[] = [];
      const given = new Map<string, number | undefined>();
      const refusedClaims: string[] = [];
      let count = 0;
      const sendNext = async (): Promise<void> => {
        const message = { id: randomUUID(), text: `${++count}`, bytes: 2_000 + random.below(60_000) };
        const reply = await sendOnce(alice, bob, message);
        if (reply.ok) accepted.push(message.text);
        else {
          expect(reply.error).toMatchObject({ code: 'UNAVAILABLE', retryAfterMs: expect.any(Number) });
          refused.push(message);
        }
      };
      const claim = async (claimId: string): Promise<void> => {
        const reply = await alice.client.ask('requestBundle', { claimId, userId: bob.address.userId });
        if (reply.ok) given.set(claimId, reply.data.devices[0]!.oneTimePreKey?.keyId);
        else {
          expect(reply.error.code).toBe('UNAVAILABLE');
          refusedClaims.push(claimId);
        }
      };
      for (let i = 0; i < 5; i++) {
        await sendNext();
        await claim(randomUUID());
      }
      await disk.fill(gateway.pid);
      while (refused.length < REFUSALS) {
        await sendNext();
        await claim(randomUUID());
      }
      expect(await gateway.output()).toMatch(/"level":"warn".*No space left on device/);
      await disk.free(gateway.pid);

      await eventually(async () => {
        const before = refused.length;
        await sendNext();
        expect(refused.length).toBe(before);
      });
      for (const message of refused) {
        expect((await sendOnce(alice, bob, message)).ok).toBe(true);
        accepted.push(message.text);
      }
      // What was refused is given now; the same claim again has the same answer.
      for (const claimId of refusedClaims.splice(0)) await claim(claimId);
      expect(refusedClaims).toEqual([]);
      for (const [claimId, keyId] of given) {
        const again = await alice.client.call('requestBundle', { claimId, userId: bob.address.userId });
        expect(again.devices[0]!.oneTimePreKey?.keyId).toBe(keyId);
      }
      expect(new Set(given.values()).size).toBe(given.size);
      await open(bob);
      await bob.client.next('queueEmpty');
      expect(contents(bob.client).map((text) => text.trim())).toEqual(accepted);
    },
  );
});
