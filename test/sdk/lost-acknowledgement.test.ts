/** The gateway does what it is asked, and the answer is lost with the connection: as if it had not been lost. */
import { randomUUID } from 'node:crypto';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { type RequestData, type RequestName, requestNames } from '../../src/protocol/events.ts';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import { redisUrl } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { startGateway, type TestGateway, tokenFor } from '../support/gateway.ts';
import { startTcpProxy, type TcpProxy } from '../support/tcp-proxy.ts';
import { claimSession, closePhones, enrolPhone, installPhone, type Phone, POOL_LEVEL } from './phone.ts';

let gateway: TestGateway;
let proxy: TcpProxy;
let bob: DeviceAddress;
let alice: DeviceAddress;

beforeAll(async () => {
  gateway = await startGateway({ redisUrl: redisUrl() });
  proxy = await startTcpProxy(gateway.url);
});
afterAll(async () => {
  await proxy.stop();
  await gateway.stop();
});
beforeEach(() => {
  const run = randomUUID().slice(0, 8);
  bob = { userId: `bob-${run}`, deviceId: 1 };
  alice = { userId: `alice-${run}`, deviceId: 1 };
});
afterEach(closePhones);

/** A phone behind the proxy, and a friend whom nothing befalls. */
async function pair(): Promise<{ phone: Phone; friend: Phone }> {
  const phone = await enrolPhone(proxy.url, bob);
  const friend = await enrolPhone(gateway.url, alice);
  for (const { client } of [phone, friend]) {
    await eventually(() => expect(client.snapshot().drainProgress).toBeNull());
    // The look at the pools that follows has its turn before it.
    await client.checkKeys();
  }
  return { phone, friend };
}

async function counts(phone: Phone) {
  const { preKeyCount, pqPreKeyCount, keyVersion } = await phone.client.call('keyStatus', {});
  return { preKeyCount, pqPreKeyCount, keyVersion };
}

/** Asks, and loses the answer once. */
async function callAndLose<Name extends RequestName>(
  phone: Phone,
  name: Name,
  input: Parameters<typeof phone.client.call<Name>>[1],
): Promise<RequestData<Name>> {
  const lost = proxy.loseAnswerOf(name);
  const [answer] = await Promise.all([phone.client.call(name, input), lost]);
  return answer;
}

/** What is asked for, and what must be true afterwards. */
const cases: { [Name in RequestName]: (parties: { phone: Phone; friend: Phone }) => Promise<void> } = {
  async uploadKeys({ phone }) {
    const before = await counts(phone);
    const { identityKey, registrationId } = (await phone.keys.identity())!;
    await phone.keys.signedPreKey.generate(900);
    const answer = await callAndLose(phone, 'uploadKeys', {
      identityKey,
      registrationId,
      signedPreKey: (await phone.keys.signedPreKey.read())!,
      ifKeyVersion: before.keyVersion,
    });
    expect(answer.keyVersion).toBe(before.keyVersion + 1);
    expect(await counts(phone)).toEqual({ ...before, keyVersion: before.keyVersion + 1 });
  },
  async addPreKeys({ phone }) {
    const before = await counts(phone);
    await phone.keys.oneTimePreKeys.generate([900, 901]);
    const answer = await callAndLose(phone, 'addPreKeys', {
      oneTimePreKeys: await phone.keys.oneTimePreKeys.read([900, 901]),
    });
    expect(answer.oneTimePreKeys.conflicts).toEqual([]);
    expect(await counts(phone)).toEqual({ ...before, preKeyCount: before.preKeyCount + 2 });
  },
  async withdrawPreKeys({ phone }) {
    const before = await counts(phone);
    const [id] = await phone.keys.oneTimePreKeys.ids();
    const answer = await callAndLose(phone, 'withdrawPreKeys', { preKeyIds: [id!] });
    expect(answer.availableCount).toBe(before.preKeyCount - 1);
  },
  async rotateSignedPreKey({ phone }) {
    const { keyVersion } = await counts(phone);
    await phone.keys.signedPreKey.generate(900);
    const answer = await callAndLose(phone, 'rotateSignedPreKey', {
      signedPreKey: (await phone.keys.signedPreKey.read())!,
      ifKeyVersion: keyVersion,
    });
    expect(answer.keyVersion).toBe(keyVersion + 1);
    expect(await counts(phone)).toMatchObject({ keyVersion: keyVersion + 1 });
  },
  async resetKeys({ phone }) {
    const { keyVersion } = await counts(phone);
    const lost = proxy.loseAnswerOf('resetKeys');
    await Promise.all([phone.client.reset('the user asked for it'), lost]);
    expect(await counts(phone)).toEqual({ preKeyCount: 0, pqPreKeyCount: 0, keyVersion: keyVersion + 1 });
    expect(phone.client.metrics().resets).toHaveLength(1);
  },
  async keyStatus({ phone }) {
    const answer = await callAndLose(phone, 'keyStatus', {});
    expect(answer.identityKey).toBe((await phone.keys.identity())?.identityKey);
  },
  async keyStats({ phone }) {
    expect(await callAndLose(phone, 'keyStats', {})).toMatchObject({ availablePreKeys: POOL_LEVEL });
  },
  async checkPreKeys({ phone }) {
    expect(await callAndLose(phone, 'checkPreKeys', {})).toMatchObject({ availableCount: POOL_LEVEL });
  },
  async validateKeys({ phone }) {
    await phone.restart();
    const lost = proxy.loseAnswerOf('validateKeys');
    const [end] = await Promise.all([phone.client.start(), lost]);
    expect(end).toBe('ready');
  },
  async requestBundle({ phone, friend }) {
    await phone.client.call('requestBundle', { claimId: randomUUID(), ...alice });
    const before = await counts(friend);
    const lost = proxy.loseAnswerOf('requestBundle');
    await Promise.all([claimSession(phone, alice), lost]);
    await phone.say(alice.userId, 'one key, one session');
    await eventually(() => expect(friend.shown).toEqual([`${bob.userId}.1: one key, one session`]));
    expect((await counts(friend)).preKeyCount).toBe(before.preKeyCount - 1);
  },
  async listDevices({ phone }) {
    const { devices } = await callAndLose(phone, 'listDevices', { userId: alice.userId });
    expect(devices).toHaveLength(1);
  },
  async sendMessages({ phone, friend }) {
    await phone.say(alice.userId, 'first');
    const lost = proxy.loseAnswerOf('sendMessages');
    await Promise.all([phone.say(alice.userId, 'second'), lost]);
    await phone.say(alice.userId, 'third');
    await eventually(() => expect(friend.shown).toHaveLength(3));
    expect(friend.shown.map((line) => line.split(': ')[1])).toEqual(['first', 'second', 'third']);
    expect(friend.client.metrics().duplicatesDropped).toBe(0);
  },
  async clientReady({ phone, friend }) {
    phone.close();
    await friend.say(bob.userId, 'are you there?');
    await phone.restart();
    const lost = proxy.loseAnswerOf('clientReady');
    const [end] = await Promise.all([phone.client.start(), lost]);
    expect(end).toBe('ready');
    await eventually(() => expect(phone.shown).toEqual([`${alice.userId}.1: are you there?`]));
    await eventually(() => expect(phone.client.snapshot().drainProgress).toBeNull());
  },
  async refreshToken({ phone }) {
    const token = await tokenFor(bob, { ttlMs: 7_200_000 });
    const { expiresAt } = await callAndLose(phone, 'refreshToken', { token });
    expect(Date.parse(expiresAt)).toBeGreaterThan(Date.now() + 7_000_000);
  },
};

describe('the acknowledgement of', () => {
  it.each(requestNames)('%s is lost, and the result is as if it had not been', async (name) => {
    const parties = await pair();
    await cases[name](parties);
    // Whatever it was, the device is as it should be.
    if (name !== 'resetKeys') {
      await eventually(() => expect(parties.phone.client.state).toBe('ready'));
      expect(await parties.phone.client.checkKeys()).toMatchObject({ needsSetup: false, missingKeys: [] });
    }
  });

  it('each request of a set-up is lost in turn, and one key set is made', async () => {
    for (const name of ['keyStatus', 'uploadKeys', 'validateKeys', 'clientReady'] as const) {
      const phone = await installPhone(proxy.url, { ...bob, userId: `${bob.userId}-${name}` });
      await phone.client.start();
      const lost = proxy.loseAnswerOf(name);
      const [end] = await Promise.all([phone.client.setUp(), lost]);
      expect(end).toBe('ready');
      expect(await counts(phone)).toEqual({
        preKeyCount: POOL_LEVEL,
        pqPreKeyCount: POOL_LEVEL,
        keyVersion: 1,
      });
      expect(phone.client.metrics()).toMatchObject({ identityRegenerations: 1, resets: [] });
      phone.close();
    }
  });

  it('a page of messages is lost, and they are not shown twice', async () => {
    const { phone, friend } = await pair();
    const handedOver: string[] = [];
    phone.beforeReceiving = async ({ id }) => {
      handedOver.push(id);
    };
    const lost = proxy.loseAcknowledgement();
    await friend.say(bob.userId, 'only once');
    await lost;
    await friend.say(bob.userId, 'and then this');
    await eventually(() => expect(phone.shown).toHaveLength(2));
    expect(phone.shown.map((line) => line.split(': ')[1])).toEqual(['only once', 'and then this']);
    await eventually(() => expect(phone.client.metrics().duplicatesDropped).toBe(1));
    expect(phone.client.metrics().decryptionFailures).toBe(0);
    // The kit knew it by its id: the application was not even asked.
    expect(handedOver).toHaveLength(2);
  });

  it.each(['uploadKeys', 'rotateSignedPreKey', 'resetKeys'] as const)(
    '%s is lost, and it is not repeated, since it could undo a newer change of keys',
    async (name) => {
      const { phone } = await pair();
      const { identityKey, registrationId } = (await phone.keys.identity())!;
      await phone.keys.signedPreKey.generate(900);
      const signedPreKey = (await phone.keys.signedPreKey.read())!;
      const inputs = {
        uploadKeys: { identityKey, registrationId, signedPreKey },
        rotateSignedPreKey: { signedPreKey },
        resetKeys: {},
      };
      const lost = proxy.loseAnswerOf(name);
      await expect(phone.client.call(name, inputs[name])).rejects.toMatchObject({ code: 'UNANSWERED' });
      await lost;
    },
  );
});
