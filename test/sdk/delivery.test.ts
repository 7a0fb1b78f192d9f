/** Messages through the kit: handed over once and in order, and private halves kept for as long as they are needed. */
import { randomUUID } from 'node:crypto';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { systemClock } from '../../src/lib/clock.ts';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import { UndecryptableError } from '../../src/sdk/index.ts';
import { redisUrl } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { FEW_KEYS } from '../support/flow.ts';
import { enrol, send, startGateway, type TestGateway } from '../support/gateway.ts';
import { createManualClock } from '../support/manual-clock.ts';
import { startTcpProxy, type TcpProxy } from '../support/tcp-proxy.ts';
import { claimSession, closePhones, enrolPhone, hurriedClock, type Phone, POOL_LEVEL } from './phone.ts';

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
afterEach(() => {
  proxy.plugIn();
  closePhones();
});

async function pair(): Promise<{ phone: Phone; friend: Phone }> {
  const phone = await enrolPhone(proxy.url, bob);
  const friend = await enrolPhone(gateway.url, alice);
  await filled(phone);
  return { phone, friend };
}

/** Drained, and refilled to its level. */
async function filled(phone: Phone): Promise<void> {
  await eventually(async () => {
    expect(phone.client.snapshot()).toMatchObject({ state: 'ready', drainProgress: null });
    const { preKeyCount, pqPreKeyCount } = await phone.client.call('keyStatus', {});
    expect([preKeyCount, pqPreKeyCount]).toEqual([POOL_LEVEL, POOL_LEVEL]);
  });
}

function texts(phone: Phone): string[] {
  return phone.shown.map((line) => line.slice(line.indexOf(': ') + 2));
}

describe('messages that were sent while the device was offline', () => {
  it('all decrypt, each by a prekey that was claimed meanwhile', async () => {
    const { phone, friend } = await pair();
    const used = await phone.keys.oneTimePreKeys.ids();
    const last = Math.max(...used, ...(await phone.keys.pqOneTimePreKeys.ids()));
    phone.close();
    const sent: string[] = [];
    for (let index = 0; index < POOL_LEVEL + 3; index++) {
      // A new session for each: a new claim, until none is left and the last-resort key serves.
      friend.keys.forgetSession(bob);
      sent.push(`message ${index}`);
      await friend.say(bob.userId, sent.at(-1)!);
    }
    await phone.restart();
    const progress: unknown[] = [];
    phone.client.subscribe(({ drainProgress }) => drainProgress && progress.push(drainProgress));
    expect(await phone.client.start()).toBe('ready');
    await filled(phone);
    expect(texts(phone)).toEqual(sent);
    expect(progress).toContainEqual({ handled: 1, pending: sent.length });
    expect(phone.client.metrics()).toMatchObject({ decryptionFailures: 0, duplicatesDropped: 0 });
    // Used up: their private halves went with the decryption, and the next ids followed, none of them refused.
    const fresh = await phone.keys.oneTimePreKeys.ids();
    expect(fresh).toEqual(Array.from({ length: POOL_LEVEL }, (_, index) => last + 1 + index));
  });

  it('immunity 27: a claim whose first message is sent only after the owner has drained, restarted and refilled', async () => {
    const { phone, friend } = await pair();
    const claimed = await phone.keys.oneTimePreKeys.ids();
    await claimSession(friend, bob);
    for (let round = 0; round < 2; round++) {
      await phone.restart();
      expect(await phone.client.start()).toBe('ready');
      await filled(phone);
    }
    expect(await phone.keys.oneTimePreKeys.ids()).toHaveLength(claimed.length + 1);

    await friend.say(bob.userId, 'at last');
    await eventually(() => expect(texts(phone)).toEqual(['at last']));
    expect(phone.client.metrics()).toMatchObject({ decryptionFailures: 0, resets: [] });
    expect(await phone.keys.oneTimePreKeys.ids()).toHaveLength(claimed.length);
  });

  it('immunity 27: nothing is refilled before the queue is empty, and then it is', async () => {
    const { phone, friend } = await pair();
    phone.close();
    for (let index = 0; index < 4; index++) {
      friend.keys.forgetSession(bob);
      await friend.say(bob.userId, `message ${index}`);
    }
    await phone.restart();
    const counts: number[] = [];
    phone.beforeReceiving = async () => {
      counts.push((await phone.client.call('keyStatus', {})).preKeyCount);
    };
    await phone.client.start();
    await filled(phone);
    expect(counts).toEqual(Array(4).fill(POOL_LEVEL - 4));
  });

  it('are waited for no longer when the connection ends', async () => {
    const { phone, friend } = await pair();
    phone.close();
    await friend.say(bob.userId, 'hello');
    await phone.restart();
    phone.beforeReceiving = () => new Promise(() => {});
    expect(await phone.client.start()).toBe('ready');
    expect(phone.client.snapshot().drainProgress).toEqual({ handled: 0, pending: 1 });
    proxy.unplug();
    await eventually(() => expect(phone.client.state).not.toBe('ready'));
    expect(phone.client.snapshot().drainProgress).toBeNull();
  });

  it('are not waited for for ever: a message that keeps failing does not keep the pool empty', async () => {
    const time = createManualClock();
    const clock = {
      ...hurriedClock,
      nowMs: time.nowMs,
      after: (delayMs: number, action: () => void) => {
        const timer = time.after(delayMs, action);
        return () => timer.cancel();
      },
    };
    const { phone, friend } = await pair();
    phone.close();
    friend.keys.forgetSession(bob);
    await friend.say(bob.userId, 'cursed');
    await phone.restart({ clock });
    phone.beforeReceiving = async () => {
      throw new Error('the disk is full');
    };
    expect(await phone.client.start()).toBe('ready');
    expect(await phone.client.call('keyStatus', {})).toMatchObject({ preKeyCount: POOL_LEVEL - 1 });
    await time.advance(60_000);
    await filled(phone);
  });
});

describe('private halves', () => {
  const KEPT_MS = 60 * 86_400_000;

  /** A clock that a test sets, and what a client of a phone does by it at its next start. */
  function ageing() {
    let nowMs = Date.now();
    const clock = { ...hurriedClock, nowMs: () => nowMs };
    return {
      pass(ms: number): void {
        nowMs += ms;
      },
      /** Resolves when the pools are full again, and what is over has gone. */
      async restart(phone: Phone): Promise<void> {
        await phone.restart({ clock });
        await phone.client.start();
        await filled(phone);
        // The check waits for its turn after the refill.
        await phone.client.checkKeys();
      },
    };
  }

  it('of what was handed out and never used go when their time is over, and not before', async () => {
    const time = ageing();
    const { phone, friend } = await pair();
    const { oneTimePreKeys, pqOneTimePreKeys } = phone.keys;
    const held = [...(await oneTimePreKeys.ids()), ...(await pqOneTimePreKeys.ids())];
    await claimSession(friend, bob);
    const drainedAgain = async (): Promise<number[]> => {
      await time.restart(phone);
      return [...(await phone.keys.oneTimePreKeys.ids()), ...(await phone.keys.pqOneTimePreKeys.ids())];
    };
    expect(await drainedAgain()).toEqual(expect.arrayContaining(held));
    time.pass(KEPT_MS - 1);
    expect(await drainedAgain()).toEqual(expect.arrayContaining(held));
    time.pass(1);
    const left = await drainedAgain();
    expect(left).toHaveLength(2 * POOL_LEVEL);
    expect(held.filter((id) => !left.includes(id))).toHaveLength(2);
  });

  it('of a replaced signed prekey go when their time is over', async () => {
    const time = ageing();
    const { phone, friend } = await pair();
    await claimSession(friend, bob);
    await phone.keys.signedPreKey.generate(500);
    const drainedAgain = async (): Promise<number[]> => {
      await time.restart(phone);
      return await phone.keys.signedPreKey.ids();
    };
    expect(await drainedAgain()).toHaveLength(3);
    // Claimed before the rotation, sent after it.
    await friend.say(bob.userId, 'by the old key');
    await eventually(() => expect(texts(phone)).toEqual(['by the old key']));
    time.pass(KEPT_MS - 1);
    expect(await drainedAgain()).toHaveLength(3);
    time.pass(1);
    expect(await drainedAgain()).toHaveLength(1);
  });

  it('of what the gateway has lost go when their time is over', async () => {
    const time = ageing();
    const { phone } = await pair();
    const lost = await phone.keys.oneTimePreKeys.ids();
    phone.close();
    const elsewhere = await gateway.connect(bob);
    await elsewhere.call('resetKeys', {});
    elsewhere.close();
    const drainedAgain = async (): Promise<number[]> => {
      await time.restart(phone);
      return await phone.keys.oneTimePreKeys.ids();
    };
    expect(await drainedAgain()).toEqual(expect.arrayContaining(lost));
    time.pass(KEPT_MS);
    const left = await drainedAgain();
    expect(left).toHaveLength(POOL_LEVEL);
    expect(left.filter((id) => lost.includes(id))).toEqual([]);
  });

  it('that are gone are remembered no longer', async () => {
    const time = ageing();
    const { phone, friend } = await pair();
    await claimSession(friend, bob);
    await phone.keys.signedPreKey.generate(500);
    const rememberedAfterDrain = async () => {
      await time.restart(phone);
      const { offered, replaced } = (await phone.disk.kitStorage().load())!;
      return { offered: Object.keys(offered.ec).map(Number), replaced: Object.keys(replaced.ec) };
    };
    const { offered, replaced } = await rememberedAfterDrain();
    expect(offered).toHaveLength(POOL_LEVEL + 1);
    expect(replaced).toHaveLength(2);
    time.pass(KEPT_MS);
    await rememberedAfterDrain();
    const held = await phone.keys.oneTimePreKeys.ids();
    expect(held).toHaveLength(POOL_LEVEL);
    expect(await rememberedAfterDrain()).toEqual({ offered: held, replaced: [] });
  });
});

describe('an application that crashes', () => {
  it('after decrypting and before the acknowledgement shows the message once, and does not report it as failed', async () => {
    const { phone, friend } = await pair();
    const crashed = new Promise<void>((resolve) => {
      phone.afterReceiving = () => {
        proxy.unplug();
        resolve();
        // The process is gone: nothing is noted, nothing is answered.
        return new Promise(() => {});
      };
    });
    await friend.say(bob.userId, 'boom');
    await crashed;
    phone.afterReceiving = async () => {};
    await phone.restart();
    proxy.plugIn();
    await phone.client.start();
    await filled(phone);
    expect(texts(phone)).toEqual(['boom']);
    expect(phone.client.metrics()).toMatchObject({ duplicatesDropped: 1, decryptionFailures: 0 });
    // Processed, not failed: it does not come again, and the friend hears of no bounce.
    await friend.say(bob.userId, 'still there?');
    await eventually(() => expect(texts(phone)).toEqual(['boom', 'still there?']));
    expect(friend.bounces).toEqual([]);
  });

  it('in the middle of a page goes on with the rest of it', async () => {
    const { phone, friend } = await pair();
    phone.close();
    const sent = Array.from({ length: 20 }, (_, index) => `message ${index}`);
    for (const text of sent) await friend.say(bob.userId, text);
    let left = 10;
    const crashed = new Promise<void>((resolve) => {
      phone.afterReceiving = async () => {
        left -= 1;
        if (left > 0) return;
        proxy.unplug();
        resolve();
        await new Promise(() => {});
      };
    });
    await phone.restart();
    void phone.client.start().catch(() => {});
    await crashed;
    phone.afterReceiving = async () => {};
    await phone.restart();
    proxy.plugIn();
    await phone.client.start();
    await filled(phone);
    expect(texts(phone)).toEqual(sent);
    expect(phone.client.metrics()).toMatchObject({ duplicatesDropped: 10, decryptionFailures: 0 });
  });
});

describe('a handler that throws', () => {
  it('for the moment is asked again, and the message is not lost', async () => {
    const { phone, friend } = await pair();
    let failures = 1;
    phone.beforeReceiving = async () => {
      if (failures-- > 0) throw new Error('the disk is full');
    };
    await friend.say(bob.userId, 'patience');
    await eventually(() => expect(texts(phone)).toEqual(['patience']));
    expect(phone.client.metrics()).toMatchObject({ decryptionFailures: 0, duplicatesDropped: 0 });
  });

  it('for good makes the message bounce to its sender', async () => {
    const { phone, friend } = await pair();
    phone.beforeReceiving = async () => {
      throw new UndecryptableError('this makes no sense');
    };
    await friend.say(bob.userId, 'gibberish');
    await eventually(() => expect(friend.bounces).toMatchObject([{ reason: 'UNDECRYPTABLE' }]), {
      waitMaxMs: 20_000,
    });
    expect(phone.shown).toEqual([]);
    expect(phone.client.metrics().decryptionFailures).toBe(3);
  });

  it('does not hold up the messages after it', async () => {
    const { phone, friend } = await pair();
    await friend.say(bob.userId, 'one');
    await eventually(() => expect(texts(phone)).toEqual(['one']));
    let held = '';
    phone.beforeReceiving = async (envelope) => {
      held ||= envelope.messageId;
      if (envelope.messageId === held) throw new Error('not now');
    };
    await friend.say(bob.userId, 'two');
    await friend.say(bob.userId, 'three');
    await eventually(() => expect(texts(phone)).toEqual(['one', 'three']));
    phone.beforeReceiving = async () => {};
    await eventually(() => expect(texts(phone)).toEqual(['one', 'three', 'two']));
  });
});

describe('a message whose acknowledgement was lost', () => {
  it('is not handed over again, although hundreds that were put off come before it', async () => {
    // It stands still: what was put off is due again when the test says so.
    let nowMs = systemClock.nowMs();
    const other = await startGateway({ clock: { ...systemClock, nowMs: () => nowMs } });
    const line = await startTcpProxy(other.url);
    const handedOver: string[] = [];
    const putOff = new Set<string>();
    let isLocked = true;
    const phone = await enrolPhone(line.url, bob, {
      async onMessage({ content }) {
        const text = atob(content);
        if (text === 'the last') line.unplug();
        else if (isLocked) {
          putOff.add(text);
          throw new Error('the database is locked');
        }
        handedOver.push(text);
      },
    });
    const friend = await enrol(other, alice, FEW_KEYS);
    const { registrationId } = (await phone.keys.identity())!;
    const write = (text: string) => send(friend.client, { address: bob, device: { registrationId } }, text);
    const sent = Array.from({ length: 600 }, (_, index) => `message ${index}`);
    await Promise.all(sent.map(write));
    await eventually(() => expect(putOff.size).toBe(sent.length));
    await write('the last');
    await eventually(() => expect(handedOver).toEqual(['the last']));

    isLocked = false;
    nowMs += 130_000;
    line.plugIn();
    await eventually(() => expect(phone.client.metrics().duplicatesDropped).toBe(1));
    expect(handedOver).toHaveLength(sent.length + 1);
    expect(handedOver.filter((text) => text === 'the last')).toHaveLength(1);
    phone.close();
    await line.stop();
    await other.stop();
  });
});

describe('a new identity', () => {
  it('of the recipient brings what waited back to its sender, who can write to the new one', async () => {
    const { phone, friend } = await pair();
    await friend.say(bob.userId, 'hello');
    await eventually(() => expect(texts(phone)).toEqual(['hello']));
    await phone.client.reset('a fresh start');
    expect(phone.client.state).toBe('needsSetup');
    expect(await phone.client.setUp()).toBe('ready');

    // The old session names a registration id that is no more.
    await expect(friend.say(bob.userId, 'too late')).rejects.toMatchObject({ code: 'DEVICES_MISMATCHED' });
    friend.keys.forgetSession(bob);
    await friend.say(bob.userId, 'hello again');
    await eventually(() => expect(texts(phone)).toEqual(['hello', 'hello again']));
  });
});
