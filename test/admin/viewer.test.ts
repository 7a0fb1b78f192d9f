/** A viewer over a real connection that it does not read, and the time that it is given. */
import { createServer } from 'node:http';
import { type AddressInfo, connect, type Socket } from 'node:net';
import { describe, expect, it } from 'vitest';
import type { Nodes, Viewer } from '../../src/admin/nodes.ts';
import { FLUSH_EVENTS_MAX, FLUSH_PERIOD_MS } from '../../src/admin/outbox.ts';
import { streamEvents } from '../../src/admin/viewer.ts';
import type { StreamEvent } from '../../src/protocol/inspector/events.ts';
import { streamFrame } from '../../src/protocol/inspector/stream.ts';
import { eventually } from '../support/eventually.ts';
import { undoAfterEach } from '../support/flow.ts';
import { createManualClock } from '../support/manual-clock.ts';

const undo = undoAfterEach();

const event: StreamEvent = {
  time: '2026-03-01T12:00:00.000Z',
  node: 'here',
  number: 1,
  device: 'alice.1',
  socket: 7,
  gate: 'open',
  kind: 'request',
  event: 'keyStatus',
  direction: 'in',
  door: 'socket',
  bytes: 100,
  latencyMs: 1,
  code: null,
  input: null,
  // What a page of redacted payload weighs.
  answer: 'x'.repeat(4_096),
};

/** A viewer whose client has asked, and reads nothing until it is told to. `ready`: the other nodes serve it. */
async function openViewer(ready: Promise<void> = Promise.resolve()) {
  const clock = createManualClock();
  let viewer: Viewer | undefined;
  let hasLeft = false;
  let droppedTotal = 0;
  const nodes = {
    node: 'here',
    states: () => [],
    view(one: Viewer) {
      viewer = one;
      const leave = (): void => {
        hasLeft = true;
      };
      return { ready, leave };
    },
  } as unknown as Nodes;
  const server = createServer((_, response) => {
    const onDropped = (count: number): void => {
      droppedTotal += count;
    };
    streamEvents(response, { nodes, filter: {}, clock, onDropped });
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  undo.push(() => {
    server.closeAllConnections();
    server.close();
  });
  const socket: Socket = connect((server.address() as AddressInfo).port, '127.0.0.1');
  undo.push(() => socket.destroy());
  socket.on('error', () => {});
  socket.pause();
  socket.write('GET / HTTP/1.1\r\nhost: x\r\n\r\n');
  await eventually(() => viewer !== undefined);
  let offered = 0;
  return {
    clock,
    socket,
    viewer: () => viewer!,
    hasLeft: () => hasLeft,
    droppedTotal: () => droppedTotal,
    offered: () => offered,
    /** Offers more than fits into one frame. @returns how many were taken */
    flood(): number {
      let taken = 0;
      for (let i = 0; i < FLUSH_EVENTS_MAX + 50; i++) {
        offered += 1;
        if (viewer!.outbox.offer(event)) taken += 1;
      }
      return taken;
    },
  };
}

describe('a viewer that has asked', () => {
  it('is greeted when every node shows it what happens there, and sees nothing before that', async () => {
    let resolve = (): void => {};
    const ready = new Promise<void>((done) => {
      resolve = done;
    });
    const { clock, socket, viewer } = await openViewer(ready);
    let text = '';
    socket.setEncoding('utf8').on('data', (chunk: string) => {
      text += chunk;
    });
    socket.resume();
    await eventually(() => text.includes('retry: '));
    viewer().outbox.offer(event);
    await clock.advance(FLUSH_PERIOD_MS);
    resolve();
    await eventually(() => text.includes('"hello"'));
    expect(text).not.toContain('"events"');
    await clock.advance(FLUSH_PERIOD_MS);
    await eventually(() => expect(sums(text)).toEqual({ events: 1, dropped: 0 }));
  });
});

describe('a viewer that stops reading', () => {
  it('is offered no more than one frame beyond what its network takes, and told what it missed', async () => {
    const { clock, socket, flood, offered, droppedTotal } = await openViewer();
    let taken = 0;
    let refusedRounds = 0;
    // The kernel takes some megabytes of what nobody reads; after that nothing is taken at all.
    await eventually(
      async () => {
        const now = flood();
        taken += now;
        refusedRounds = now === 0 ? refusedRounds + 1 : 0;
        await clock.advance(FLUSH_PERIOD_MS);
        await new Promise((resolve) => setImmediate(resolve));
        return refusedRounds > 20;
      },
      { waitMaxMs: 20_000 },
    );
    expect(offered()).toBeGreaterThan(taken + 20 * FLUSH_EVENTS_MAX);

    let text = '';
    socket.setEncoding('utf8').on('data', (chunk: string) => {
      text += chunk;
    });
    socket.resume();
    await eventually(async () => {
      await clock.advance(FLUSH_PERIOD_MS);
      return droppedTotal() === offered() - taken;
    });
    await eventually(() => expect(sums(text)).toEqual({ events: taken, dropped: offered() - taken }));
    await eventually(async () => {
      await clock.advance(1_000);
      expect(text).toContain(`"droppedTotal":${offered() - taken}`);
    });
  });

  it('is cut off after half a minute, and costs nothing from then on', async () => {
    const { clock, flood, hasLeft } = await openViewer();
    await clock.advance(20_000);
    let takenAtMs = clock.nowMs();
    await eventually(
      async () => {
        if (flood() > 0) takenAtMs = clock.nowMs();
        await clock.advance(1_000);
        await new Promise((resolve) => setImmediate(resolve));
        return hasLeft();
      },
      { waitMaxMs: 20_000 },
    );
    // Counted from the last of the floods, before which a frame was taken.
    expect(clock.nowMs() - takenAtMs).toBeGreaterThan(29_000);
    expect(clock.nowMs() - takenAtMs).toBeLessThan(40_000);
    expect(flood()).toBeLessThanOrEqual(FLUSH_EVENTS_MAX);
    expect(clock.timerCount()).toBe(0);
  });
});

/** What all whole frames of a chunked answer hold. */
function sums(text: string): { events: number; dropped: number } {
  const total = { events: 0, dropped: 0 };
  // The chunks' lengths stand on lines of their own, between the frames or within them.
  const body = text.replace(/\r\n[0-9a-f]+\r\n/g, '');
  for (const [, data] of body.matchAll(/data: (.*)\n\n/g)) {
    const frame = streamFrame.parse(JSON.parse(data!));
    if (frame.type !== 'events') continue;
    total.events += frame.events.length;
    total.dropped += frame.dropped;
  }
  return total;
}
