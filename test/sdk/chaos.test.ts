/**
 * A chat of ten devices while their gateway is killed and started again, over and over. It lasts so many kills, each
 * of them in the middle of the talk, rather than so many seconds: a slow machine would see fewer of them.
 */
import { randomUUID } from 'node:crypto';
import { afterAll, afterEach, beforeAll, expect, it } from 'vitest';
import { systemKitClock } from '../../src/sdk/index.ts';
import { createDatabase, redisUrl } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { type GatewayProcess, startGatewayProcess } from '../support/gateway-process.ts';
import { closePhones, enrolPhone, type Phone } from './phone.ts';

const DEVICES = 10;
const KILLS = 8;
/** Messages that are shown between a start of the gateway and its end. */
const SHOWN_BETWEEN = 120;

let database: Awaited<ReturnType<typeof createDatabase>>;
let gateway: GatewayProcess;

beforeAll(async () => {
  database = await createDatabase();
  gateway = await startGatewayProcess({ databaseUrl: database.url, redisUrl: redisUrl() });
});
afterEach(closePhones);
afterAll(async () => {
  await gateway.stop();
  await database.drop();
});

it('every message is decrypted once by the application, in order, over kills and restarts of the gateway', async () => {
  const run = randomUUID().slice(0, 8);
  const phones = await Promise.all(
    Array.from({ length: DEVICES }, (_, index) =>
      enrolPhone(gateway.url, { userId: `user${index}-${run}`, deviceId: 1 }, { clock: systemKitClock }),
    ),
  );
  /** What each phone is to be shown of each other, in the order in which it was sent. */
  const expected = new Map(phones.map((phone) => [phone, new Map<string, string[]>()]));
  let chatting = true;

  async function talk(phone: Phone): Promise<void> {
    const from = `${phone.address.userId}.1`;
    for (let count = 0; chatting; count++) {
      const listener = phones[(phones.indexOf(phone) + 1 + (count % (DEVICES - 1))) % DEVICES]!;
      const text = `message ${count}`;
      await phone.say(listener.address.userId, text);
      const ofListener = expected.get(listener)!;
      ofListener.set(from, [...(ofListener.get(from) ?? []), `${from}: ${text}`]);
    }
  }

  const shownCount = (): number => phones.reduce((sum, phone) => sum + phone.shown.length, 0);
  const talks = phones.map(talk);
  for (let kill = 0; kill < KILLS; kill++) {
    const before = shownCount();
    await eventually(() => expect(shownCount()).toBeGreaterThan(before + SHOWN_BETWEEN), {
      waitMaxMs: 60_000,
    });
    await gateway.kill('SIGKILL');
    await gateway.restart();
  }
  chatting = false;
  await Promise.all(talks);

  const sentCount = [...expected.values()].flatMap((senders) => [...senders.values()]).flat().length;
  await eventually(() => expect(shownCount()).toBeGreaterThanOrEqual(sentCount), { waitMaxMs: 60_000 });
  for (const phone of phones) {
    for (const [from, lines] of expected.get(phone)!) {
      expect(phone.shown.filter((line) => line.startsWith(`${from}: `))).toEqual(lines);
    }
    const { resets, decryptionFailures, identityRegenerations, reconnects } = phone.client.metrics();
    expect({ resets, decryptionFailures, identityRegenerations }).toEqual({
      resets: [],
      decryptionFailures: 0,
      identityRegenerations: 1,
    });
    // One that was waiting may have missed a gateway that lived shortly.
    expect(reconnects).toBeGreaterThan(0);
    expect(phone.bounces).toEqual([]);
  }
  expect(shownCount()).toBe(sentCount);
  const dropped = phones.reduce((sum, phone) => sum + phone.client.metrics().duplicatesDropped, 0);
  console.info(`${sentCount} messages over ${KILLS} kills, ${dropped} redeliveries dropped`);
}, 240_000);
