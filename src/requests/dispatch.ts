/** What every request of both doors goes through: parse, limit, time, handle, and the only catch. */
import { randomUUID } from 'node:crypto';
import type { Clock } from '../lib/clock.ts';
import { TOO_LARGE } from '../protocol/envelope.ts';
import { GatewayError, type Issue } from '../protocol/errors.ts';
import {
  type InputIssue,
  type ParsedInput,
  parseRequest,
  type Reply,
  type RequestName,
} from '../protocol/events.ts';
import { ISSUES_MAX, VALIDATE_PRE_KEYS_MAX } from '../protocol/limits.ts';
import type { Directory } from './directory.ts';
import type { Handlers, RequestContext } from './handlers.ts';
import type { Limits } from './limits.ts';
import type { Observer } from './observe.ts';

/** Answers one request; never throws and never rejects. */
export type Dispatch = <Name extends RequestName>(
  name: Name,
  input: unknown,
  context: RequestContext,
  /** Of the frame that brought it, where one did. */
  bytes?: number,
) => Promise<Reply<Name>>;

export function createDispatch(parts: {
  handlers: Handlers;
  limits: Limits;
  directory: Directory;
  observer: Observer;
  clock: Clock;
}): Dispatch {
  const { handlers, limits, directory, observer, clock } = parts;
  return async (name, raw, context, bytes) => {
    type Name = typeof name;
    const startedMs = clock.nowMs();
    const { device, door, connection, isArrivalCharged = false } = context;
    let input: ParsedInput<Name> | undefined;
    let reply: Reply<Name>;
    try {
      try {
        input = parseInput(name, raw, bytes);
      } catch (fault) {
        // What can't be read has cost something too.
        await limits.chargeRequest(device, name, null, { isArrivalCharged });
        throw fault;
      }
      const admission = limits.chargeRequest(device, name, input, { isArrivalCharged });
      // Mostly known at once: waiting for it all the same would cost each request a turn.
      const { isTargetSpared } = admission instanceof Promise ? await admission : admission;
      const data = await handlers[name](isTargetSpared ? { ...context, isTargetSpared } : context, input);
      reply = { ok: true, data };
    } catch (error) {
      const refusal = await directory.veiled(
        error instanceof GatewayError ? error : internal(error),
        startedMs,
      );
      reply = { ok: false, error: refusal.toObject() };
    }
    observer.requestEnded({
      door,
      device,
      name,
      code: reply.ok ? null : reply.error.code,
      durationMs: clock.nowMs() - startedMs,
      fence: connection?.session.fence,
      bytes,
      input,
      reply,
    });
    return reply;

    function internal(error: unknown): GatewayError {
      const errorId = randomUUID();
      observer.requestFailed({ name, device, errorId, error });
      return new GatewayError('INTERNAL', undefined, { details: { errorId } });
    }
  };
}

/** The longest list of any request: a longer one is refused before its items are looked at. */
const LIST_LENGTH_MAX = VALIDATE_PRE_KEYS_MAX;
/** No request has so many; more are refused before their names are looked at. */
const FIELDS_MAX = 1_000;
/** The same of all that a request holds: the fields of a hundred keys, and of an envelope for each device. */
const FIELDS_IN_ALL_MAX = 4_000;
/** What is smaller holds too few names to take long. */
const LARGE_BYTES = 64 * 1024;

/** @throws GatewayError BAD_REQUEST with the path of each fault, PAYLOAD_TOO_LARGE where size is the only fault */
function parseInput<Name extends RequestName>(
  name: Name,
  input: unknown,
  bytes = LARGE_BYTES,
): ParsedInput<Name> {
  if (bytes >= LARGE_BYTES && fieldsLeft(input, FIELDS_IN_ALL_MAX) < 0) {
    throw badRequest([{ path: [], message: 'has too many fields, or binary data' }]);
  }
  if (typeof input === 'object' && input !== null) {
    let fields = 0;
    // Not by `Object.entries`: of a hundred thousand names it would take a third of a second to make a list.
    for (const field in input) {
      fields += 1;
      if (fields > FIELDS_MAX) throw badRequest([{ path: [], message: 'has too many fields' }]);
      const value = (input as Record<string, unknown>)[field];
      if (Array.isArray(value) && value.length > LIST_LENGTH_MAX) {
        throw badRequest([{ path: [shortened(field)], message: 'has too many items' }]);
      }
    }
  }
  const parsed = parseRequest(name, input);
  if (parsed.success) return parsed.data;
  const found = parsed.error.issues;
  const issues = found.slice(0, ISSUES_MAX).flatMap(toIssues).slice(0, ISSUES_MAX);
  if (found.every((issue) => 'params' in issue && issue.params === TOO_LARGE)) {
    throw new GatewayError('PAYLOAD_TOO_LARGE', undefined, { details: { issues } });
  }
  throw badRequest(issues);
}

/** @returns how many more fields than those of `value` there may be; below 0 as soon as there are too many */
function fieldsLeft(value: unknown, left: number): number {
  if (typeof value !== 'object' || value === null) return left;
  // An attachment, whose every byte would count as a field.
  if (ArrayBuffer.isView(value)) return -1;
  let rest = left;
  if (Array.isArray(value)) {
    // Too long a list of the request's own is told by its name.
    if (value.length > LIST_LENGTH_MAX) return rest;
    for (const item of value) {
      rest = fieldsLeft(item, rest);
      if (rest < 0) break;
    }
    return rest;
  }
  for (const name in value) {
    rest -= 1;
    if (rest < 0) break;
    rest = fieldsLeft((value as Record<string, unknown>)[name], rest);
  }
  return rest;
}

const DRAINING_RETRY_MS = 2_000;

/** What a node that is about to stop answers by both doors: another one, or the next, is there soon. */
export function draining(): GatewayError {
  return new GatewayError('UNAVAILABLE', 'this server is draining', { retryAfterMs: DRAINING_RETRY_MS });
}

export function badRequest(issues: Issue[]): GatewayError {
  const [first] = issues;
  const where = first?.path.join('.') || 'the request';
  return new GatewayError('BAD_REQUEST', `${where}: ${first?.message ?? 'is malformed'}`, {
    details: { issues },
  });
}

function toIssues(issue: InputIssue): Issue[] {
  const path = issue.path.map((part) => (typeof part === 'number' ? part : shortened(String(part))));
  if (issue.code === 'unrecognized_keys') {
    return issue.keys
      .slice(0, ISSUES_MAX)
      .map((key) => ({ path: [...path, shortened(key)], message: 'is not a field of this request' }));
  }
  return [{ path, message: shortened(issue.message) }];
}

/** What a client sent comes back in no greater length than a name has. */
function shortened(text: string): string {
  return text.length > 120 ? `${text.slice(0, 117)}…` : text;
}
