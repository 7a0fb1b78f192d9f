/** The courier by itself: whom it looks at, and that it forgets those who left. */
import { beforeEach, describe, expect, it } from 'vitest';
import { createInProcessBus } from '../../src/backends/in-process/bus.ts';
import { type Courier, createCourier } from '../../src/delivery/courier.ts';
import { noReports } from '../../src/delivery/reports.ts';
import type { ServedSocket } from '../../src/delivery/session.ts';
import { silentLog } from '../../src/lib/log.ts';
import type { Bus } from '../../src/ports/bus.ts';
import type { DeviceProof, MessageStore } from '../../src/ports/message-store.ts';
import { addressKey, type DeviceAddress } from '../../src/protocol/ids.ts';
import { eventually } from '../support/eventually.ts';
import { createManualClock, type ManualClock } from '../support/manual-clock.ts';

const BOB: DeviceAddress = { userId: 'bob', deviceId: 1 };
const SWEEP_MS = 15_000;

let clock: ManualClock;
let bus: Bus;
let courier: Courier;
let fence: number;
/** What the store was asked: `read bob.1`, and so on. */
let asked: string[];
/** Whose bounces were to be brought home. */
let settled: (DeviceAddress | null)[];
let settleFails: boolean;

/** Queues that are empty, of devices whose keys are at version 1. */
function emptyQueues(): MessageStore {
  const proof: DeviceProof = {
    keyVersion: 1,
    identityVersion: 1,
    hasKeys: true,
    fence: 0,
    availableCounts: { ec: 100, pq: 100 },
    offersPq: true,
    countVersion: 1,
    lowNoticeVersion: 0,
    revokedAtMs: null,
  };
  const note = (what: string, device: DeviceAddress): void => {
    asked.push(`${what} ${addressKey(device)}`);
  };
  return {
    store: async () => null,
    connect: async () => ({ fence: ++fence, lowNoticeVersion: 0, revokedAtMs: null }),
    serve: async () => ({ proof, served: true, pendingCount: 0, newestSequence: 0 }),
    async read({ device, fence }) {
      note('read', device);
      return {
        proof: { ...proof, fence },
        envelopes: [],
        unreadable: [],
        oldestSequence: null,
        nextDueAtMs: null,
        more: false,
      };
    },
    async prove(device) {
      note('prove', device);
      return proof;
    },
    acknowledge: async () => 0,
    putOff: async () => ({ nextDueAtMs: null, bounced: false }),
    bounce: async () => {},
    settleBounces: async () => ({ bounced: [], senders: [], more: false }),
    bounceStale: async () => 0,
    sweep: async () => 0,
    revokedSince: async () => [],
    async noteServed(readers) {
      for (const { device } of readers) note('still served', device);
    },
    async inNeedOfALook(readers) {
      for (const { device } of readers) note('sweep', device);
      return [];
    },
  };
}

interface Seen extends ServedSocket {
  events: string[];
}

function socket(): Seen {
  const events: string[] = [];
  return {
    isOpen: () => true,
    events,
    push: (name) => events.push(name),
    pushMessages: async () => null,
    close: () => events.push('closed'),
    displace: () => events.push('cut'),
  };
}

beforeEach(async () => {
  clock = createManualClock();
  fence = 0;
  asked = [];
  settled = [];
  settleFails = false;
  bus = createInProcessBus({ log: silentLog });
  const messages = emptyQueues();
  const bounces = {
    async settle(of: DeviceAddress | null) {
      settled.push(of);
      if (settleFails) throw new Error('the store is away');
    },
    bounceStale: async () => 0,
  };
  courier = createCourier({
    messages,
    bus,
    bounces,
    clock,
    log: silentLog,
    lowThreshold: 10,
    reports: noReports,
  });
  await bus.start(courier);
  courier.start();
});

async function attachOpen(device: DeviceAddress, to = socket()) {
  const session = await courier.attach(device, to);
  session.validated(1);
  await session.ready(null);
  await eventually(() => to.events.includes('queueEmpty'));
  return session;
}

describe('the courier', () => {
  it('asks again after each sweep whether one that only sends has keys: no poke may have told of their end', async () => {
    const carol = { userId: 'carol', deviceId: 1 };
    const session = await courier.attach(carol, socket());
    for (let sweeps = 0; sweeps < 2; sweeps++) {
      asked = [];
      for (let i = 0; i < 3; i++) expect(await session.hasKeys()).toBe(true);
      expect(asked).toEqual(['prove carol.1']);
      await clock.advance(SWEEP_MS);
    }
  });

  it('sweeps those whose gate is open, and looks at those that a poke or a gap points at', async () => {
    await attachOpen(BOB);
    await courier.attach({ userId: 'carol', deviceId: 1 }, socket());
    asked = [];
    await clock.advance(SWEEP_MS);
    expect(asked).toEqual(['sweep bob.1']);
    bus.poke([BOB]);
    await eventually(() => expect(asked).toEqual(['sweep bob.1', 'read bob.1']));
    courier.onGap();
    await eventually(() =>
      expect(asked).toEqual(['sweep bob.1', 'read bob.1', 'read bob.1', 'prove carol.1']),
    );
  });

  it('brings home what an interrupted bounce left, and sweeps on where that fails', async () => {
    await attachOpen(BOB);
    asked = [];
    settleFails = true;
    await clock.advance(SWEEP_MS);
    await eventually(() => expect(asked).toEqual(['sweep bob.1']));
    expect(settled).toEqual([null]);
  });

  it('forgets a thousand sessions that ended: nobody is swept, looked at or leased', async () => {
    const devices = Array.from({ length: 1_000 }, (_, i) => ({ userId: `user${i}`, deviceId: 1 }));
    const sessions = await Promise.all(devices.map((device) => attachOpen(device)));
    for (const session of sessions) session.detach();
    asked = [];
    await clock.advance(SWEEP_MS * 2);
    bus.poke(devices);
    for (const device of devices) courier.onPoke(device);
    courier.onGap();
    await clock.advance(SWEEP_MS);
    expect(asked).toEqual([]);
  });

  it('forgets an older connection when a newer one comes, and its late end takes nothing away', async () => {
    const olderSocket = socket();
    const older = await attachOpen(BOB, olderSocket);
    await attachOpen(BOB);
    expect(olderSocket.events).toEqual(['queueEmpty', 'displaced', 'cut']);
    older.detach();
    asked = [];
    bus.poke([BOB]);
    await eventually(() => expect(asked).toEqual(['read bob.1']));
    await clock.advance(SWEEP_MS);
    expect(asked).toEqual(['read bob.1', 'sweep bob.1']);
  });

  it('notes each hour who is still served, and nobody whose gate is closed', async () => {
    await attachOpen(BOB);
    await courier.attach({ userId: 'carol', deviceId: 1 }, socket());
    asked = [];
    await clock.advance(3_600_000 - SWEEP_MS);
    expect(asked).not.toContain('still served bob.1');
    await clock.advance(3_600_000);
    await eventually(() =>
      expect(asked.filter((line) => line.startsWith('still'))).toEqual(['still served bob.1']),
    );
  });

  it('notes it also after the clock was set back by a day', async () => {
    await attachOpen(BOB);
    await clock.advance(-86_400_000);
    courier.stop();
    courier.start();
    await clock.advance(SWEEP_MS);
    await eventually(() => expect(asked).toContain('still served bob.1'));
  });

  it('cuts a connection that was overtaken while it was taken in', async () => {
    const newerSocket = socket();
    fence = 10;
    const newer = await attachOpen(BOB, newerSocket);
    fence = 5;
    const olderSocket = socket();
    await courier.attach(BOB, olderSocket);
    expect(olderSocket.events).toEqual(['displaced', 'cut']);
    asked = [];
    bus.poke([BOB]);
    await eventually(() => expect(asked).toEqual(['read bob.1']));
    expect(newerSocket.events).toEqual(['queueEmpty']);
    newer.detach();
  });

  it('lets a connection that ended while it was numbered displace nobody', async () => {
    const served = socket();
    await attachOpen(BOB, served);
    const gone = { ...socket(), isOpen: () => false };
    const late = await courier.attach(BOB, gone);
    expect(late.fence).toBeGreaterThan(1);
    expect([...gone.events, ...served.events]).toEqual(['queueEmpty']);
    asked = [];
    bus.poke([BOB]);
    await eventually(() => expect(asked).toEqual(['read bob.1']));
  });

  it('sweeps every open gate, however many there are', async () => {
    const devices = Array.from({ length: 501 }, (_, i) => ({ userId: `user${i}`, deviceId: 1 }));
    for (const device of devices) await attachOpen(device);
    asked = [];
    await clock.advance(SWEEP_MS);
    await eventually(() => expect(new Set(asked).size).toBe(501));
    expect(asked).toHaveLength(501);
  });

  it('cuts a connection whose device was taken over elsewhere while it was taken in', async () => {
    await bus.acquire({ device: BOB, fence: 7 });
    const to = socket();
    await courier.attach(BOB, to);
    expect(to.events).toEqual(['displaced', 'cut']);
  });

  it('gives a lease back when its session ends', async () => {
    const session = await attachOpen(BOB);
    session.detach();
    expect(await bus.acquire({ device: BOB, fence: session.fence - 1 })).toBe(true);
  });

  it('tells a displaced session once, whoever tells of it', async () => {
    const to = socket();
    const session = await attachOpen(BOB, to);
    const lease = { device: BOB, fence: session.fence };
    courier.onDisplaced({ ...lease, fence: session.fence - 1 });
    expect(to.events).toEqual(['queueEmpty']);
    courier.onDisplaced(lease);
    courier.onDisplaced(lease);
    expect(to.events).toEqual(['queueEmpty', 'displaced', 'cut']);
  });
});
