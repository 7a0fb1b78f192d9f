/** The whole installation, second by second. */
import { z } from 'zod';
import { time } from '../ids.ts';
import { nodeState } from './stream.ts';
import { count, deviceKey } from './values.ts';

/** One second of the whole installation. */
export const overviewSample = z.object({
  time,
  nodes: z.array(nodeState),
  sockets: count,
  gates: z.object({ connected: count, validated: count, open: count }),
  /** In the last second. */
  eventsPerSecond: z.number(),
  requests: z.array(
    z.object({
      event: z.string(),
      count,
      errorCount: count,
      p50Ms: z.number(),
      p99Ms: z.number(),
    }),
  ),
  /** Handed out in the last second; `fallback` went out without a one-time prekey. */
  preKeys: z.object({ ec: count, pq: count, fallback: count }),
  messages: z.object({ stored: count, pushed: count, acknowledged: count, bounced: count }),
  /** Devices with a pool below the threshold, lowest first, at most 20; null where the store did not say in time. */
  lowDevices: z
    .array(z.object({ device: deviceKey, availableCount: count, pqAvailableCount: count }))
    .nullable(),
  /** Events that the viewers of the asked node were not sent, since it started. */
  droppedTotal: count,
});
export type OverviewSample = z.infer<typeof overviewSample>;
