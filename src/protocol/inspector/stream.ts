/** What a viewer of the live stream is sent. */
import { z } from 'zod';
import { time } from '../ids.ts';
import { streamEvent } from './events.ts';
import { count } from './values.ts';

export const nodeState = z.object({
  node: z.string(),
  /** False for a node whose last sign of life is older than its lease: what it sees is missing here. */
  answering: z.boolean(),
});
export type NodeState = z.infer<typeof nodeState>;

/** `GET /api/stream`, server-sent events: the `data` of each is one frame as JSON. */
export const streamFrame = z.discriminatedUnion('type', [
  /** The first frame of every connection: what came before it, and since an earlier connection ended, is not shown. */
  z.object({ type: z.literal('hello'), node: z.string(), time }),
  z.object({
    type: z.literal('events'),
    events: z.array(streamEvent),
    /** Events that matched and were left out since the frame before, on any node: the viewer, or its line, is too slow. */
    dropped: count,
  }),
  /** At least every two seconds, so that a dead connection is noticed. */
  z.object({ type: z.literal('beat'), time, nodes: z.array(nodeState), droppedTotal: count }),
]);
export type StreamFrame = z.infer<typeof streamFrame>;
