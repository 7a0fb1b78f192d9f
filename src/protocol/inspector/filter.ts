/** Which events a viewer is shown: it runs on the server, and stands in the addresses of pages and streams. */
import { z } from 'zod';
import { errorCode } from '../errors.ts';
import { uuid } from '../ids.ts';
import { direction, type StreamEvent, streamEventNames } from './events.ts';
import { gateName } from './values.ts';

const LIST_LENGTH_MAX = 32;

/** All parts must hold; a part that is absent always holds. */
export const streamFilter = z.strictObject({
  /** Devices (`alice.1`) or users (`alice`, every device of hers); also matches the other party of a claim or message. */
  device: z.array(z.string().min(1).max(140)).max(LIST_LENGTH_MAX).optional(),
  /** Names of {@link streamEventNames}. */
  event: z
    .array(
      z.string().refine((name) => streamEventNames.includes(name), 'is no request, push or kind of event'),
    )
    .max(LIST_LENGTH_MAX)
    .optional(),
  direction: z.array(direction).max(LIST_LENGTH_MAX).optional(),
  /** Error codes, or `ok`: what was answered, or refused at the handshake. */
  code: z
    .array(z.enum([...errorCode.options, 'ok'], `must be ok or one of ${errorCode.options.join(', ')}`))
    .max(LIST_LENGTH_MAX)
    .optional(),
  /** Only what took longer than so many milliseconds. */
  slowerThanMs: z.number().min(0).max(3_600_000).optional(),
  /** The gate's state when it happened. */
  gate: z.array(gateName).max(LIST_LENGTH_MAX).optional(),
  /** One message's life: the requests and pushes around it are not matched. */
  messageId: uuid.optional(),
});
export type StreamFilter = z.infer<typeof streamFilter>;

/** Whether a viewer with `filter` is shown `event`. */
export function matchesFilter(filter: StreamFilter, event: StreamEvent): boolean {
  if (filter.event !== undefined && !filter.event.includes(event.event)) return false;
  if (filter.direction !== undefined && !filter.direction.includes(event.direction)) return false;
  if (filter.gate !== undefined && (event.gate === null || !filter.gate.includes(event.gate))) return false;
  if (filter.device !== undefined) {
    const peer = 'peer' in event ? event.peer : null;
    if (!filter.device.some((name) => isOfDevice(name, event.device) || isOfDevice(name, peer))) return false;
  }
  if (filter.code !== undefined) {
    if (!('code' in event) || !filter.code.includes(event.code ?? 'ok')) return false;
  }
  if (filter.slowerThanMs !== undefined) {
    const latencyMs = 'latencyMs' in event ? event.latencyMs : null;
    if (latencyMs === null || latencyMs <= filter.slowerThanMs) return false;
  }
  if (filter.messageId !== undefined) {
    return event.kind === 'message' && event.messageId === filter.messageId;
  }
  return true;
}

/** Whether `key` (`alice.1`) is the device, or a device of the user, that `name` names. */
export function isOfDevice(name: string, key: string | null): boolean {
  return key !== null && (key === name || key.slice(0, key.lastIndexOf('.')) === name);
}

/** The filter as a page's or a stream's address holds it: `device=alice.1&event=requestBundle,gate&slowerThanMs=100`. */
export function filterToQuery(filter: StreamFilter): string {
  const query = new URLSearchParams();
  for (const name of FILTER_FIELDS) {
    const value = filter[name];
    if (value === undefined || (Array.isArray(value) && value.length === 0)) continue;
    query.set(name, Array.isArray(value) ? value.join(',') : String(value));
  }
  // Commas, colons and the like stand in a query as they are; it is meant to be read.
  return query.toString().replaceAll('%2C', ',').replaceAll('%3A', ':').replaceAll('%40', '@');
}

/**
 * The inverse of {@link filterToQuery}. Fields that are not a filter's are passed over.
 *
 * @returns the filter, or for a bad value one sentence that names its field
 */
export function filterFromQuery(
  query: string | URLSearchParams,
): { ok: true; filter: StreamFilter } | { ok: false; message: string } {
  const given = new URLSearchParams(query);
  const raw: Record<string, unknown> = {};
  for (const name of FILTER_FIELDS) {
    const values = given
      .getAll(name)
      .flatMap((text) => text.split(','))
      .map((text) => text.trim())
      .filter((text) => text !== '');
    if (values.length === 0) continue;
    if (name === 'slowerThanMs') raw[name] = Number(values[0]);
    else if (name === 'messageId') raw[name] = values[0];
    else raw[name] = values;
  }
  const parsed = streamFilter.safeParse(raw);
  if (parsed.success) return { ok: true, filter: parsed.data };
  const [issue] = parsed.error.issues;
  return { ok: false, message: `${String(issue?.path[0])}: ${issue?.message}` };
}

const FILTER_FIELDS = Object.keys(streamFilter.shape) as (keyof StreamFilter)[];
