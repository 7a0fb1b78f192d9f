/** What the scenarios do and count, at a gateway that answers as it is told to and on a clock that is moved by hand. */
import { beforeEach, describe, expect, it, onTestFinished } from 'vitest';
import { type PartPlan, partOf } from '../../src/load-test/load-plan.ts';
import { type LoadTest, startLoadTest } from '../../src/load-test/load-test.ts';
import { scheduleOf } from '../../src/load-test/schedule.ts';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import { eventually } from '../support/eventually.ts';
import { tokenFor } from '../support/gateway.ts';
import { createManualClock, type ManualClock } from '../support/manual-clock.ts';
import { type Asked, refusal, startToldGateway, type ToldGateway } from './told-gateway.ts';

let clock: ManualClock;
beforeEach(() => {
  clock = createManualClock();
});

async function start(url: string, ...parts: PartPlan[]): Promise<LoadTest> {
  const count = parts.reduce((sum, { deviceCount }) => sum + deviceCount, 0);
  const addresses: DeviceAddress[] = Array.from({ length: count }, (_, index) => ({
    userId: `load-${index}`,
    deviceId: 1,
  }));
  const interrupted = new AbortController();
  onTestFinished(() => interrupted.abort());
  return startLoadTest({
    plan: { url, parts },
    credentials: await Promise.all(
      addresses.map(async (address) => ({ address, token: await tokenFor(address) })),
    ),
    clock,
    random: Math.random,
    interrupted: interrupted.signal,
    keygateVersion: '0.0.0',
  });
}

const BRIEF = { deviceCount: 3, ratePerSecond: 30, durationMs: 1_000, contentBytes: 10, backlogLength: 2 };

async function running(test: LoadTest): Promise<void> {
  await eventually(() => expect(test.progress().phase).toBe('running'));
}

/** Moves time on until it is over. */
async function resultOf(test: LoadTest) {
  let isOver = false;
  test.result.then(
    () => (isOver = true),
    () => (isOver = true),
  );
  await eventually(async () => {
    await clock.advance(500);
    return isOver;
  });
  return await test.result;
}

/** Resolves when every device has heard all that it was told, and the gateway what was asked until then. */
async function settled({ sockets }: ToldGateway): Promise<void> {
  await Promise.all([...sockets.values()].map((socket) => socket.emitWithAck('messages', { envelopes: [] })));
}

/** Hands each message to its recipient as soon as it is stored. */
function delivering(gateway: () => ToldGateway) {
  let envelopes = 0;
  return ({ input }: Asked<'sendMessages'>) => {
    const { messageId, userId, envelopes: sent } = input;
    const stored = { storedAt: new Date().toISOString(), sender: { userId: 'somebody', deviceId: 1 } };
    const envelope = {
      id: String(++envelopes),
      kind: 'message',
      messageId,
      type: 2,
      content: sent[0]!.content,
    };
    gateway()
      .sockets.get(userId)
      ?.emit('messages', { envelopes: [{ ...envelope, ...stored }] }, () => {});
    return { storedAt: stored.storedAt, accepted: [1], rejected: [] };
  };
}

describe('devices that get ready', () => {
  it('come back when they are told to, over a new connection, and what held them up is shown until then', async () => {
    let refusals = 0;
    const gateway = await startToldGateway({
      uploadKeys: ({ userId }) => {
        const isHeldUp = userId === 'load-0' && refusals === 0;
        if (isHeldUp) refusals += 1;
        return isHeldUp ? refusal('UNAVAILABLE', 60_000) : { keyVersion: 1 };
      },
    });
    const test = await start(gateway.url, partOf('chat', BRIEF));
    await eventually(() => expect(test.progress().refusal).toBe('UNAVAILABLE'));
    const first = gateway.sockets.get('load-0')!;
    await eventually(() => expect(first.connected).toBe(false));
    await clock.advance(59_999);
    expect(gateway.names()).toEqual(['uploadKeys']);
    // They are spread over half as long again.
    await clock.advance(30_001);
    await running(test);
    expect(test.progress()).toMatchObject({ refusal: null, preparedCount: 3 });
    expect(gateway.sockets.get('load-0')).not.toBe(first);
  });

  it('give up after ten minutes of being told so', async () => {
    let refusals = 0;
    const gateway = await startToldGateway({
      uploadKeys({ userId }) {
        if (userId !== 'load-0') return { keyVersion: 1 };
        refusals += 1;
        return refusal('UNAVAILABLE', 60_000);
      },
    });
    const beganMs = clock.nowMs();
    const test = await start(gateway.url, partOf('chat', BRIEF));
    const failure = expect(test.result).rejects.toThrow('UNAVAILABLE: told to: UNAVAILABLE');
    for (let tries = 1; ; tries++) {
      await eventually(() => expect(refusals).toBe(tries));
      // It waits, or has given up.
      await eventually(() => expect(gateway.sockets.get('load-0')!.connected).toBe(false));
      if (clock.nowMs() - beganMs > 10 * 60_000) break;
      await clock.advance(90_000);
    }
    await failure;
  });

  it('fill queues at the pace that they are told', async () => {
    let sends = 0;
    const gateway = await startToldGateway({
      sendMessages: () =>
        ++sends === 1 ? refusal('RATE_LIMITED', 5_000) : { storedAt: '', accepted: [1], rejected: [] },
    });
    const test = await start(gateway.url, partOf('backlog', BRIEF));
    // The others have filled theirs: two messages each.
    await eventually(() => expect(sends).toBe(1 + 2 * 2));
    await settled(gateway);
    await clock.advance(4_999);
    await settled(gateway);
    expect(sends).toBe(5);
    await clock.advance(1);
    await running(test);
    expect(sends).toBe(7);
  });

  it('fill no queues where they are refused for good', async () => {
    const gateway = await startToldGateway({ sendMessages: () => refusal('KEYS_OUT_OF_SYNC') });
    const test = await start(gateway.url, partOf('backlog', BRIEF));
    await expect(test.result).rejects.toThrow('the devices can not be prepared: told to: KEYS_OUT_OF_SYNC');
  });
});

describe('a part that begins later', () => {
  it('is measured from when it begins, and the test lasts until it has ended', async () => {
    const gateway = await startToldGateway();
    const late = partOf('connect', { ...BRIEF, delayMs: 5_000 });
    const test = await start(gateway.url, late);
    await running(test);
    expect(test.progress().durationMs).toBe(6_000);
    await clock.advance(4_990);
    expect(test.progress().parts[0]!.offered).toBe(0);
    const [part] = (await resultOf(test)).parts;
    expect(part!.offeringMs).toBeLessThan(1_000);
    expect(part!.rates.offered.slice(0, 4).every((count) => count > 0)).toBe(true);
  });
});

describe('claims', () => {
  const bundleOf = (identityKey: string) => ({
    devices: [{ deviceId: 1, identityKey, oneTimePreKey: null, oneTimePreKeyAbsent: 'noneLeft' }],
  });

  it('are of others, and what is of another identity than the target’s is a wrong answer', async () => {
    const identityKeys = new Map<string, string>();
    const claims: string[] = [];
    const gateway = await startToldGateway({
      uploadKeys: ({ userId, input }) => {
        identityKeys.set(userId, input.identityKey);
        return { keyVersion: 1 };
      },
      requestBundle: ({ userId, input }) => {
        claims.push(`${userId} of ${input.userId}`);
        // The tenth gets somebody else's.
        return bundleOf(identityKeys.get(claims.length === 10 ? userId : input.userId)!);
      },
    });
    const test = await start(gateway.url, partOf('claims', BRIEF));
    await running(test);
    const [part] = (await resultOf(test)).parts;
    expect(part).toMatchObject({ completed: 29, failed: 1, failures: { WRONG_ANSWER: 1 } });
    expect(part!.claims).toMatchObject({ noneLeft: 29 });
    for (const pair of claims) expect(pair).not.toMatch(/^(.+) of \1$/);
  });

  it('of a device with PQ prekeys bring one, or are a wrong answer', async () => {
    let identityKey = '';
    const gateway = await startToldGateway({
      uploadKeys: ({ input }) => {
        identityKey = input.identityKey;
        return { keyVersion: 1 };
      },
      requestBundle: () => ({ devices: [{ ...bundleOf(identityKey).devices[0], pqPreKey: null }] }),
    });
    const plan = partOf('claims', { ...BRIEF, deviceCount: 2, ratePerSecond: 1, hasPq: true });
    const test = await start(gateway.url, plan);
    await running(test);
    const [part] = (await resultOf(test)).parts;
    expect(part).toMatchObject({ completed: 0, failures: { WRONG_ANSWER: 1 } });
  });

  it('that were never answered are asked again under the same id', async () => {
    const claimIds: string[] = [];
    let identityKey = '';
    const gateway = await startToldGateway({
      uploadKeys: ({ input }) => {
        identityKey = input.identityKey;
        return { keyVersion: 1 };
      },
      requestBundle: ({ input, socket }) => {
        claimIds.push(input.claimId);
        if (claimIds.length > 1) return bundleOf(identityKey);
        socket.conn.close();
        return null;
      },
    });
    const plan = partOf('claims', { ...BRIEF, deviceCount: 2, ratePerSecond: 1 });
    const test = await start(gateway.url, plan);
    await running(test);
    const [part] = (await resultOf(test)).parts;
    expect(claimIds).toHaveLength(2);
    expect(claimIds[1]).toBe(claimIds[0]);
    expect(part).toMatchObject({ completed: 1, failed: 0, failures: { DISCONNECTED: 1 } });
  });
});

it('no more than 20,000 operations of a part are under way at once: what is due beyond is withheld', async () => {
  const gateway = await startToldGateway({ requestBundle: () => null });
  const plan = partOf('claims', { deviceCount: 2, ratePerSecond: 20_500_000, durationMs: 1 });
  const test = await start(gateway.url, plan);
  await running(test);
  await clock.advance(plan.durationMs);
  expect(test.progress().parts[0]).toMatchObject({ offered: 20_500, underWay: 20_000 });
  await gateway.stop();
  const { parts, warnings } = await resultOf(test);
  expect(parts[0]).toMatchObject({ withheld: 500, unfinished: 20_000 });
  expect(warnings.join()).toContain('500 operations were not sent');
});

describe('messages', () => {
  it('that the recipient has no room for are counted by that', async () => {
    const gateway = await startToldGateway({
      sendMessages: () => ({ storedAt: '', accepted: [], rejected: [{ deviceId: 1, code: 'QUEUE_FULL' }] }),
    });
    const test = await start(gateway.url, partOf('chat', BRIEF));
    await running(test);
    const { parts } = await resultOf(test);
    expect(parts[0]!.failures).toEqual({ QUEUE_FULL: 30 });
  });

  it('are not proven lost where the gateway is gone before it could be asked for them', async () => {
    let stored = 0;
    const gateway = await startToldGateway({
      sendMessages: () => {
        stored += 1;
        return { storedAt: '', accepted: [1], rejected: [] };
      },
    });
    const test = await start(gateway.url, partOf('chat', BRIEF));
    await running(test);
    await eventually(async () => {
      await clock.advance(100);
      expect(stored).toBe(30);
    });
    await settled(gateway);
    await gateway.stop();
    await eventually(async () => {
      await clock.advance(500);
      expect(test.progress().phase).toBe('ending');
    });
    const { faults, parts } = await resultOf(test);
    expect(parts[0]!.messages).toMatchObject({ stored: 30, lost: 0, unproven: 30 });
    expect(faults).toContain(
      'chat: 30 stored messages have not come, and the gateway could not be asked for them',
    );
  });

  it('are sent whatever further devices their recipients have', async () => {
    const wanted: unknown[] = [];
    const gateway: ToldGateway = await startToldGateway({
      sendMessages: (asked) => {
        wanted.push(asked.input.onMismatch);
        return delivering(() => gateway)(asked);
      },
    });
    const test = await start(gateway.url, partOf('chat', BRIEF));
    await running(test);
    await resultOf(test);
    expect(new Set(wanted)).toEqual(new Set(['sendAnyway']));
  });
});

describe('devices that come back', () => {
  it('wait twice as long after each failure, and as long as they are told', async () => {
    let isRefused = false;
    let retryAfterMs: number | undefined;
    const gateway: ToldGateway = await startToldGateway({
      clientReady: ({ socket }) => {
        if (isRefused) return refusal('UNAVAILABLE', retryAfterMs);
        setImmediate(() => socket.emit('queueEmpty', { deliveredCount: 0 }));
        return { pendingCount: 0, keyVersion: 1 };
      },
    });
    const test = await start(
      gateway.url,
      partOf('chat', { ...BRIEF, ratePerSecond: 0.001, durationMs: 3_600_000 }),
    );
    await running(test);
    isRefused = true;
    gateway.asked.length = 0;
    const tries = () => gateway.names().filter((name) => name === 'clientReady').length;
    gateway.sockets.get('load-2')!.conn.close();
    // Each waits from one to two times 250, 500, 1000 … 8000 ms.
    for (const [failures, waitMs] of [250, 500, 1_000, 2_000, 4_000, 8_000, 8_000].entries()) {
      await eventually(() => expect(tries()).toBe(failures + 1));
      await settled(gateway);
      await clock.advance(waitMs - 1);
      await settled(gateway);
      expect(tries()).toBe(failures + 1);
      if (failures === 6) retryAfterMs = 100_000;
      await clock.advance(waitMs + 1);
    }
    await eventually(() => expect(tries()).toBe(8));
    await settled(gateway);
    await clock.advance(99_999);
    await settled(gateway);
    expect(tries()).toBe(8);
    await clock.advance(1);
    await eventually(() => expect(tries()).toBe(9));
  });

  it('are cut again by the next storm', async () => {
    const gateway: ToldGateway = await startToldGateway({
      sendMessages: (asked) => delivering(() => gateway)(asked),
    });
    const storms = partOf('storm', { deviceCount: 3, durationMs: 20_000, contentBytes: 10 });
    expect(scheduleOf(storms).count).toBe(6);
    const test = await start(gateway.url, storms);
    await running(test);
    await clock.advance(0);
    // This gateway keeps nothing for whoever was away when its neighbour wrote to it: the way back is what counts.
    const back = () => gateway.names().filter((name) => name === 'clientReady').length;
    await eventually(() => expect(back()).toBe(6));
    await settled(gateway);
    await clock.advance(10_000);
    await eventually(() => expect(back()).toBe(9));
  });
});
