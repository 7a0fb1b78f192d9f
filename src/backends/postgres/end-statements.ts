/** How an envelope leaves its queue, or stays for now: acknowledged, put off, or bounced to its sender. */
import { type SQL, sql } from 'drizzle-orm';
import type { Reader } from '../../ports/message-store.ts';
import type { BounceReason } from '../../protocol/envelope.ts';
import type { DeviceAddress } from '../../protocol/ids.ts';
import { numberArray, textArray } from './array-literal.ts';
import { hotStatement } from './database.ts';
import { ofDevice } from './device-sql.ts';
import { BOUNCE, MESSAGE, PUT_OFF_MAX_MS } from './message-sql.ts';
import { devices, messageReceipts, messages } from './schema.ts';
import { momentOf, msOf } from './time-sql.ts';

const { placeholder } = sql;

/** How long an envelope that failed is put off, by how often it has failed; the last one repeats. */
const TEMPORARY_DELAYS_MS = [1_000, 5_000, 30_000, PUT_OFF_MAX_MS];
/** The same, until it has been offered often enough. */
const UNDECRYPTABLE_DELAYS_MS = [1_000, 5_000];
/** Offers of an undecryptable envelope before it turns into a bounce. */
const UNDECRYPTABLE_OFFERS = UNDECRYPTABLE_DELAYS_MS.length + 1;
/** Rows of one user that a statement of a bounce's way home takes: it holds them until it is on disk. */
const SETTLED_AT_ONCE = 64;

export interface AcknowledgeRequest {
  reader: Reader;
  sequences: readonly number[];
}

/**
 * Who holds a row is bouncing it, or acknowledging it too: the row is left to him. Nobody waits, so that nobody waits in
 * a circle; a message whose bounce does not come about is offered again.
 */
export const acknowledgeStatement = hotStatement<{ ord: number; deleted: number }>(sql`
WITH processed AS MATERIALIZED (
  SELECT s.ord, m.row_place
  FROM (
    SELECT a.ord, a.user_id, a.device_id, unnest(a.sequences::int8[]) AS sequence
    FROM unnest(
      ${placeholder('ords')}::int4[], ${placeholder('userIds')}::text[], ${placeholder('deviceIds')}::int2[],
      ${placeholder('fences')}::int8[], ${placeholder('sequences')}::text[]
    ) AS a (ord, user_id, device_id, fence, sequences)
    CROSS JOIN LATERAL (
      SELECT 1 FROM ${devices} v
      WHERE v.user_id = a.user_id AND v.device_id = a.device_id AND v.fence = a.fence
      LIMIT 1
    ) served
  ) s
  CROSS JOIN LATERAL (
    SELECT v.ctid AS row_place FROM ${messages} v
    WHERE v.user_id = s.user_id AND v.device_id = s.device_id AND v.sequence = s.sequence AND v.pending
    LIMIT 1
    FOR UPDATE SKIP LOCKED
  ) m
),
deleted AS (
  DELETE FROM ${messages} WHERE ctid = ANY (ARRAY(SELECT row_place FROM processed)) RETURNING ctid AS row_place
)
-- One that is acknowledged twice at once was deleted once; one that moved on before it was locked, not at all.
SELECT ord, count(*)::int4 AS deleted FROM (
  SELECT min(p.ord) AS ord FROM processed p JOIN deleted d ON d.row_place = p.row_place GROUP BY p.row_place
) first GROUP BY ord`);

export function bindAcknowledge(requests: readonly AcknowledgeRequest[]): Record<string, unknown> {
  return {
    ords: numberArray(requests.map((_, ord) => ord)),
    userIds: textArray(requests.map(({ reader }) => reader.device.userId)),
    deviceIds: numberArray(requests.map(({ reader }) => reader.device.deviceId)),
    fences: numberArray(requests.map(({ reader }) => reader.fence)),
    sequences: textArray(requests.map(({ sequences }) => numberArray(sequences))),
  };
}

// ── Put off ─────────────────────────────────────────────────────────────────────────────────────────────

const isServed = sql`EXISTS (SELECT 1 FROM ${devices} WHERE ${ofDevice} AND fence = ${placeholder('fence')}::int8)`;

/** Probes the index for each of a list's rows; a join by hash alone would read the whole queue. */
const ofListed = sql`m.user_id = ${placeholder('userId')} AND m.device_id = ${placeholder('deviceId')}
  AND m.sequence = ANY (${placeholder('sequences')}::int8[])`;

const isLastOffer = sql`(f.undecryptable AND m.undecryptable_count + 1 >= ${sql.raw(String(UNDECRYPTABLE_OFFERS))})`;

export const putOffStatement = hotStatement<{ pending: boolean; due_at_ms: number | null }>(sql`
WITH failed AS MATERIALIZED (
  SELECT * FROM unnest(${placeholder('sequences')}::int8[], ${placeholder('undecryptable')}::bool[])
    AS f (sequence, undecryptable)
),
-- In the order in which every statement locks a queue's rows: what is dropped would be locked behind what is not.
locked AS MATERIALIZED (
  SELECT l.sequence FROM failed f
  CROSS JOIN LATERAL (
    SELECT v.sequence FROM ${messages} v
    WHERE v.user_id = ${placeholder('userId')} AND v.device_id = ${placeholder('deviceId')} AND v.sequence = f.sequence
      AND v.pending
    LIMIT 1
    FOR UPDATE
  ) l
),
dropped AS (
  -- A bounce that nobody can read is nobody's loss: it is never bounced itself.
  DELETE FROM ${messages} m USING failed f JOIN locked l ON l.sequence = f.sequence
  WHERE ${ofListed} AND m.sequence = f.sequence AND m.pending AND m.kind = ${BOUNCE} AND ${isLastOffer} AND ${isServed}
)
UPDATE ${messages} m SET
  undecryptable_count = m.undecryptable_count + f.undecryptable::int4,
  temporary_count = least(m.temporary_count + (NOT f.undecryptable)::int4, 1000),
  pending = NOT ${isLastOffer},
  bounce_reason = CASE WHEN ${isLastOffer} THEN 'UNDECRYPTABLE' ELSE m.bounce_reason END,
  content = CASE WHEN ${isLastOffer} THEN NULL ELSE m.content END,
  due_at = CASE
    WHEN ${isLastOffer} THEN NULL
    WHEN f.undecryptable THEN ${momentOf(placeholder('nowMs'))} + ${delayOf('m.undecryptable_count', UNDECRYPTABLE_DELAYS_MS)}
    ELSE ${momentOf(placeholder('nowMs'))} + ${delayOf('m.temporary_count', TEMPORARY_DELAYS_MS)} END
FROM failed f JOIN locked l ON l.sequence = f.sequence
WHERE ${ofListed} AND m.sequence = f.sequence AND m.pending AND ${isServed} AND NOT (m.kind = ${BOUNCE} AND ${isLastOffer})
RETURNING m.pending, ${msOf('m.due_at')} AS due_at_ms`);

/** Statements lock a queue's rows in one order, whatever the list's, so that no two can deadlock. */
export function inOrder<Item extends { sequence: number }>(items: readonly Item[]): Item[] {
  return [...items].sort((a, b) => a.sequence - b.sequence);
}

/** An interval by how often it has failed before; the last one repeats. */
function delayOf(countColumn: string, delaysMs: readonly number[]): SQL {
  const seconds = delaysMs.map((delay) => delay / 1000).join(', ');
  return sql.raw(
    `make_interval(secs => (ARRAY[${seconds}]::float8[])[least(${countColumn} + 1, ${delaysMs.length})])`,
  );
}

// ── Bounced ─────────────────────────────────────────────────────────────────────────────────────────────

export const bounceStatement = hotStatement<never>(sql`
UPDATE ${messages} m SET pending = false, bounce_reason = b.reason, content = NULL, due_at = NULL
FROM unnest(${placeholder('sequences')}::int8[], ${placeholder('reasons')}::text[]) AS b (sequence, reason)
WHERE ${ofListed} AND m.sequence = b.sequence AND m.pending AND m.kind = ${MESSAGE}`);

export interface BouncedRow {
  user_id: string;
  device_id: number;
  sequence: number;
  peer_user_id: string;
  peer_device_id: number;
  message_id: string;
  bounce_reason: BounceReason;
}

/**
 * Bounced rows that still lie with their recipients: those of one device, or of any; a device's in no order, so that the
 * index of just these rows is what gives them.
 */
export function bouncedStatement(of: DeviceAddress | null, limit: number): SQL {
  return sql`
    SELECT user_id, device_id, sequence, peer_user_id, peer_device_id, message_id, bounce_reason
    FROM ${messages}
    WHERE NOT pending ${of === null ? sql`` : sql`AND user_id = ${of.userId} AND device_id = ${of.deviceId}`}
    ORDER BY user_id, device_id
    LIMIT ${limit}`;
}

/** The receipt makes the copy happen once, however often a crash between the two steps makes it be tried. */
export const copyBounceStatement = hotStatement<never>(sql`
WITH bounced AS MATERIALIZED (
  SELECT b.*, nextval('message_sequence') AS sequence
  FROM unnest(
    ${placeholder('deviceIds')}::int2[], ${placeholder('recipientUserIds')}::text[],
    ${placeholder('recipientDeviceIds')}::int2[], ${placeholder('messageIds')}::uuid[],
    ${placeholder('reasons')}::text[], ${placeholder('ids')}::uuid[]
  ) AS b (device_id, recipient_user_id, recipient_device_id, message_id, reason, id)
),
remembered AS (
  INSERT INTO ${messageReceipts}
    (user_id, device_id, kind, peer_user_id, peer_device_id, message_id, sequence, stored_at, waiting_at)
  SELECT ${placeholder('userId')}, b.device_id, ${BOUNCE}, b.recipient_user_id, b.recipient_device_id, b.message_id,
         b.sequence, ${momentOf(placeholder('nowMs'))}, ${momentOf(placeholder('nowMs'))}
  FROM bounced b
  ORDER BY b.device_id, b.recipient_user_id, b.recipient_device_id, b.message_id
  ON CONFLICT DO NOTHING
  RETURNING sequence
)
INSERT INTO ${messages}
  (user_id, device_id, sequence, id, kind, peer_user_id, peer_device_id, message_id, bounce_reason, identity_version,
   stored_at, expires_at)
SELECT ${placeholder('userId')}, b.device_id, b.sequence, b.id, ${BOUNCE}, b.recipient_user_id, b.recipient_device_id,
       b.message_id, b.reason, 0, ${momentOf(placeholder('nowMs'))}, ${momentOf(placeholder('expiresAtMs'))}
FROM remembered r JOIN bounced b ON b.sequence = r.sequence`);

export const removeBouncedStatement = hotStatement<{ sequence: number }>(sql`
DELETE FROM ${messages}
WHERE ctid = ANY (ARRAY(
  SELECT m.ctid
  FROM unnest(${placeholder('deviceIds')}::int2[], ${placeholder('sequences')}::int8[]) AS b (device_id, sequence)
  CROSS JOIN LATERAL (
    SELECT v.ctid FROM ${messages} v
    WHERE v.user_id = ${placeholder('userId')} AND v.device_id = b.device_id AND v.sequence = b.sequence
      AND NOT v.pending
    LIMIT 1
  ) m))
RETURNING sequence`);

/** The rows of each key, in groups of at most `SETTLED_AT_ONCE`. */
export function fewOfOne<Row>(
  rows: readonly Row[],
  keyOf: (row: Row) => string,
): [key: string, rows: Row[]][] {
  const groups: [string, Row[]][] = [];
  const open = new Map<string, Row[]>();
  for (const row of rows) {
    const key = keyOf(row);
    const group = open.get(key);
    if (group !== undefined && group.length < SETTLED_AT_ONCE) {
      group.push(row);
      continue;
    }
    const begun = [row];
    open.set(key, begun);
    groups.push([key, begun]);
  }
  return groups;
}
