/** A viewer's connection: server-sent events that wait for nobody, and end with the session that opened them. */
import type { ServerResponse } from 'node:http';
import { type Clock, every } from '../lib/clock.ts';
import type { StreamFilter } from '../protocol/inspector/filter.ts';
import type { OverviewSample } from '../protocol/inspector/overview.ts';
import type { StreamFrame } from '../protocol/inspector/stream.ts';
import { isoTime } from './live-sockets.ts';
import type { Nodes } from './nodes.ts';
import { createOutbox } from './outbox.ts';

const BEAT_PERIOD_MS = 2_000;
/** Written and not yet taken by the viewer's network: beyond it nothing is added. */
const UNREAD_BYTES_MAX = 512 * 1024;
/** A viewer that takes nothing for so long is cut off; it may come back. */
const STALLED_MAX_MS = 30_000;
const RECONNECT_DELAY_MS = 1_000;

interface EventStream {
  /** @returns false where the viewer has not read what was written before; then nothing is written */
  write(frame: StreamFrame | OverviewSample): boolean;
}

/** Shows what matches until the response ends. */
export function streamEvents(
  response: ServerResponse,
  parts: { nodes: Nodes; filter: StreamFilter; clock: Clock; onDropped(count: number): void },
): void {
  const { nodes, filter, clock, onDropped } = parts;
  const stream = openStream(response, clock);
  let droppedTotal = 0;
  let isGreeted = false;
  const outbox = createOutbox({
    clock,
    send(events, dropped) {
      if (!isGreeted || !stream.write({ type: 'events', events, dropped })) return false;
      droppedTotal += dropped;
      if (dropped > 0) onDropped(dropped);
      return true;
    },
  });
  const { ready, leave } = nodes.view({ filter, outbox });
  // Whoever is greeted sees what happens from then on, on whichever node.
  void ready.then(() => {
    if (response.destroyed) return;
    isGreeted = true;
    stream.write({ type: 'hello', node: nodes.node, time: isoTime(clock.nowMs()) });
  });
  const beat = every(clock, BEAT_PERIOD_MS, async () => {
    stream.write({ type: 'beat', time: isoTime(clock.nowMs()), nodes: nodes.states(), droppedTotal });
  });
  response.once('close', () => {
    beat.cancel();
    leave();
    outbox.close();
  });
}

/** Shows each second's numbers until the response ends. */
export function streamOverview(
  response: ServerResponse,
  parts: {
    /** Calls back with each sample; returns how to end it. */
    watch(listener: (sample: OverviewSample) => void): () => void;
    clock: Clock;
  },
): void {
  const stream = openStream(response, parts.clock);
  const leave = parts.watch((sample) => stream.write(sample));
  response.once('close', leave);
}

function openStream(response: ServerResponse, clock: Clock): EventStream {
  response.writeHead(200, {
    'content-type': 'text/event-stream; charset=utf-8',
    'cache-control': 'no-store',
    'x-content-type-options': 'nosniff',
    // Proxies that gather an answer would show nothing until it ends.
    'x-accel-buffering': 'no',
  });
  response.write(`retry: ${RECONNECT_DELAY_MS}\n\n`);
  let takenAtMs = clock.nowMs();
  return {
    write(frame) {
      const nowMs = clock.nowMs();
      if (response.writableLength > UNREAD_BYTES_MAX) {
        if (nowMs - takenAtMs > STALLED_MAX_MS) response.destroy();
        return false;
      }
      takenAtMs = nowMs;
      response.write(`data: ${JSON.stringify(frame)}\n\n`);
      return true;
    },
  };
}
