/** Storing: the statement for a batch of requests, what it is given, and how its rows answer each of them. */
import { randomUUID } from 'node:crypto';
import { sql } from 'drizzle-orm';
import {
  type MessageToStore,
  type StoredMessage,
  type StoreRequest,
  type StoreResult,
  WAITING_TOLD_MAX,
} from '../../ports/message-store.ts';
import { decodedLength } from '../../protocol/base64.ts';
import { DEVICE_ID_MAX } from '../../protocol/limits.ts';
import { numberArray, plainArray, textArray } from './array-literal.ts';
import { hotStatement } from './database.ts';
import { MESSAGE } from './message-sql.ts';
import { devices, messageReceipts, messages } from './schema.ts';
import { msOf } from './time-sql.ts';

const { placeholder } = sql;

/** One addressed device of one request, or, where `missing`, one that should have been addressed. */
interface StoreRow {
  ord: number;
  device_id: number;
  missing: boolean;
  known: boolean;
  matches: boolean;
  is_full: boolean;
  /** When an earlier request with this `messageId` stored it. */
  repeated_at_ms: number | null;
  user_known: boolean;
  may_store: boolean;
  stored: boolean;
  sequence: number;
  id: string;
  key_version: number;
  identity_version: number;
  fence: number;
  waiting: number[];
}

/**
 * Judges the addressed devices and stores, for a whole batch of requests in one statement. The stamp is the identity
 * version in the statement's own snapshot: a key set that is replaced beside it gets a newer one, and the message is
 * bounced when it is read. What else waits is of that snapshot too: a message that its sender had acknowledged before it
 * sent this one is in it.
 */
export const storeStatement = hotStatement<StoreRow>(sql`
WITH requests AS MATERIALIZED (
  SELECT * FROM unnest(
    ${placeholder('ords')}::int4[], ${placeholder('userIds')}::text[], ${placeholder('ownDeviceIds')}::int2[],
    ${placeholder('senderUserIds')}::text[], ${placeholder('senderDeviceIds')}::int2[], ${placeholder('messageIds')}::uuid[],
    ${placeholder('sendAnyways')}::bool[], ${placeholder('nowMss')}::float8[], ${placeholder('expiresAtMss')}::float8[],
    ${placeholder('queueMaxs')}::int4[]
  ) AS q (ord, user_id, own_device_id, sender_user_id, sender_device_id, message_id, send_anyway, now_ms, expires_at_ms,
          queue_max)
),
asked AS MATERIALIZED (
  SELECT a.*, nextval('message_sequence') AS sequence
  FROM unnest(
    ${placeholder('itemOrds')}::int4[], ${placeholder('deviceIds')}::int2[], ${placeholder('registrationIds')}::int4[],
    ${placeholder('types')}::int2[], string_to_array(${placeholder('contents')}::text, ','), ${placeholder('ids')}::uuid[]
  ) AS a (ord, device_id, registration_id, type, content, id)
),
registered AS MATERIALIZED (
  SELECT q.ord, d.*, d.device_id = q.own_device_id AS own
  FROM requests q
  CROSS JOIN LATERAL (
    SELECT v.device_id, v.registration_id, v.identity_version, v.key_version, v.fence
    FROM ${devices} v
    WHERE v.user_id = q.user_id AND v.identity_key IS NOT NULL
    ORDER BY v.user_id, v.device_id
    LIMIT ${sql.raw(String(DEVICE_ID_MAX))}
  ) d
),
looked_up AS MATERIALIZED (
  SELECT a.ord, a.device_id, a.registration_id, a.sequence, a.id, q.user_id, q.sender_user_id, q.sender_device_id, q.message_id, q.queue_max,
         r.identity_version, r.key_version, r.fence, r.device_id IS NOT NULL AS known,
         coalesce(r.registration_id = a.registration_id, false) AS matches, s.stored_at AS repeated_of, w.waiting
  FROM asked a
  JOIN requests q ON q.ord = a.ord
  LEFT JOIN registered r ON r.ord = a.ord AND r.device_id = a.device_id AND NOT r.own
  LEFT JOIN LATERAL (
    SELECT c.stored_at FROM ${messageReceipts} c
    WHERE c.user_id = q.user_id AND c.device_id = a.device_id AND c.kind = ${MESSAGE}
      AND c.peer_user_id = q.sender_user_id AND c.peer_device_id = q.sender_device_id AND c.message_id = q.message_id
    LIMIT 1
  ) s ON true
  CROSS JOIN LATERAL (
    SELECT ARRAY(
      SELECT m.sequence FROM ${messages} m
      WHERE m.user_id = q.user_id AND m.device_id = a.device_id AND m.pending
      ORDER BY m.user_id, m.device_id, m.sequence
      LIMIT ${sql.raw(String(WAITING_TOLD_MAX + 1))}
    ) AS waiting
  ) w
),
missing AS MATERIALIZED (
  SELECT r.ord, r.device_id FROM registered r
  WHERE NOT r.own AND NOT EXISTS (SELECT 1 FROM asked a WHERE a.ord = r.ord AND a.device_id = r.device_id)
),
verdicts AS MATERIALIZED (
  SELECT q.ord, q.now_ms, q.expires_at_ms, u.ord IS NOT NULL AS user_known,
         q.send_anyway OR (l.all_match AND m.ord IS NULL) AS may_store
  FROM requests q
  JOIN (SELECT ord, bool_and(known AND matches) AS all_match FROM looked_up GROUP BY ord) l ON l.ord = q.ord
  LEFT JOIN (SELECT DISTINCT ord FROM missing) m ON m.ord = q.ord
  LEFT JOIN (SELECT DISTINCT ord FROM registered) u ON u.ord = q.ord
),
numbered AS MATERIALIZED (
  SELECT n.*, NOT (cardinality(waiting) <= ${sql.raw(String(WAITING_TOLD_MAX))} AND nth_of_batch + cardinality(waiting) <= queue_max)
           AS may_be_full
  FROM (
    SELECT l.*, v.now_ms, v.expires_at_ms, v.user_known, v.may_store,
           count(*) FILTER (WHERE l.matches AND l.repeated_of IS NULL AND v.may_store)
             OVER (PARTITION BY l.user_id, l.device_id ORDER BY l.sequence) AS nth_of_batch
    FROM looked_up l JOIN verdicts v ON v.ord = l.ord
  ) n
),
-- Only a queue that may be full is counted, and once however many messages are for it.
held AS MATERIALIZED (
  SELECT d.user_id, d.device_id, c.held
  FROM (SELECT user_id, device_id, max(queue_max) AS queue_max FROM numbered WHERE may_be_full GROUP BY user_id, device_id) d
  CROSS JOIN LATERAL (
    SELECT count(*) AS held FROM (
      SELECT 1 FROM ${messages} m
      WHERE m.user_id = d.user_id AND m.device_id = d.device_id AND m.pending AND m.kind = ${MESSAGE}
      LIMIT d.queue_max
    ) one
  ) c
),
judged AS MATERIALIZED (
  SELECT n.*, may_be_full AND nth_of_batch + (
           SELECT h.held FROM held h WHERE h.user_id = n.user_id AND h.device_id = n.device_id
         ) > queue_max AS is_full
  FROM numbered n
),
remembered AS (
  INSERT INTO ${messageReceipts}
    (user_id, device_id, kind, peer_user_id, peer_device_id, message_id, sequence, stored_at, waiting_at)
  SELECT j.user_id, j.device_id, ${MESSAGE}, j.sender_user_id, j.sender_device_id, j.message_id, j.sequence,
         to_timestamp(j.now_ms / 1000), to_timestamp(j.now_ms / 1000)
  FROM judged j
  WHERE j.may_store AND j.matches AND j.repeated_of IS NULL AND NOT j.is_full
  -- Two batches that share messages wait for each other in one direction.
  ORDER BY j.user_id, j.device_id, j.sender_user_id, j.sender_device_id, j.message_id
  ON CONFLICT DO NOTHING
  RETURNING sequence
),
fresh AS MATERIALIZED (SELECT sequence FROM remembered),
stored AS (
  INSERT INTO ${messages}
    (user_id, device_id, sequence, id, kind, peer_user_id, peer_device_id, message_id, type, content,
     identity_version, stored_at, expires_at)
  SELECT j.user_id, j.device_id, j.sequence, j.id, ${MESSAGE}, j.sender_user_id, j.sender_device_id, j.message_id, a.type,
         decode(a.content, 'base64'), j.identity_version, to_timestamp(j.now_ms / 1000),
         to_timestamp(j.expires_at_ms / 1000)
  FROM fresh f JOIN judged j ON j.sequence = f.sequence JOIN asked a ON a.sequence = f.sequence
)
SELECT j.ord, j.device_id::int4, false AS missing, j.known, j.matches, j.is_full, ${msOf('j.repeated_of')} AS repeated_at_ms,
       j.user_known, j.may_store, f.sequence IS NOT NULL AS stored, j.sequence, j.id, j.key_version, j.identity_version,
       j.fence, j.waiting
FROM judged j LEFT JOIN fresh f ON f.sequence = j.sequence
UNION ALL
SELECT ord, device_id::int4, true, true, false, false, NULL, true, false, false, NULL, NULL, NULL, NULL, NULL, NULL
FROM missing`);

export function bindStore(requests: readonly StoreRequest[]): Record<string, unknown> {
  const items: MessageToStore[] = [];
  const itemOrds: number[] = [];
  requests.forEach(({ messages: list }, ord) => {
    for (const message of list) {
      items.push(message);
      itemOrds.push(ord);
    }
  });
  return {
    ords: numberArray(requests.map((_, ord) => ord)),
    userIds: textArray(requests.map((request) => request.recipientUserId)),
    ownDeviceIds: numberArray(
      requests.map(({ sender, recipientUserId }) =>
        recipientUserId === sender.userId ? sender.deviceId : 0,
      ),
    ),
    senderUserIds: textArray(requests.map(({ sender }) => sender.userId)),
    senderDeviceIds: numberArray(requests.map(({ sender }) => sender.deviceId)),
    messageIds: plainArray(requests.map((request) => request.messageId)),
    sendAnyways: `{${requests.map((request) => request.sendAnyway).join(',')}}`,
    nowMss: numberArray(requests.map((request) => request.nowMs)),
    expiresAtMss: numberArray(requests.map((request) => request.expiresAtMs)),
    queueMaxs: numberArray(requests.map((request) => request.queueMax)),
    itemOrds: numberArray(itemOrds),
    deviceIds: numberArray(items.map((item) => item.deviceId)),
    registrationIds: numberArray(items.map((item) => item.registrationId)),
    types: numberArray(items.map((item) => item.type)),
    // Not as an array literal, which is read letter by letter.
    contents: items.map((item) => item.content).join(','),
    ids: plainArray(items.map(() => randomUUID())),
  };
}

/** @returns null for a request whose recipient user has no keys */
export function toStoreResults(
  requests: readonly StoreRequest[],
  rows: readonly StoreRow[],
): (StoreResult | null)[] {
  const rowsOf: StoreRow[][] = requests.map(() => []);
  for (const row of rows) rowsOf[row.ord]!.push(row);
  return requests.map((request, ord) => toStoreResult(request, rowsOf[ord]!));
}

function toStoreResult(request: StoreRequest, rows: readonly StoreRow[]): StoreResult | null {
  const result: StoreResult = {
    storedAtMs: request.nowMs,
    accepted: [],
    full: [],
    missingDevices: [],
    extraDevices: [],
    staleDevices: [],
    stored: false,
    fresh: [],
  };
  let userKnown = false;
  let mayStore = false;
  let allRepeated = true;
  let repeatedAtMs = Number.POSITIVE_INFINITY;
  for (const row of rows) {
    const deviceId = row.device_id;
    if (row.missing) {
      result.missingDevices.push(deviceId);
      continue;
    }
    userKnown ||= row.user_known;
    mayStore ||= row.may_store;
    if (!row.known) result.extraDevices.push(deviceId);
    else if (!row.matches) result.staleDevices.push(deviceId);
    if (row.repeated_at_ms === null) {
      allRepeated = false;
      if (row.matches) (row.is_full ? result.full : result.accepted).push(deviceId);
    } else {
      result.accepted.push(deviceId);
      repeatedAtMs = Math.min(repeatedAtMs, row.repeated_at_ms);
    }
    if (row.stored) result.fresh.push(toStored(row));
  }
  // What was accepted before stays accepted, whatever has become of the recipient's devices.
  if (!userKnown && !allRepeated) return null;
  if (allRepeated) result.storedAtMs = repeatedAtMs;
  result.stored = mayStore || allRepeated;
  if (rows.length > 1) {
    const { accepted, full, missingDevices, extraDevices, staleDevices } = result;
    for (const ids of [accepted, full, missingDevices, extraDevices, staleDevices]) ids.sort((a, b) => a - b);
  }
  return result;
}

function toStored(row: StoreRow): StoredMessage {
  return {
    deviceId: row.device_id,
    sequence: row.sequence,
    id: row.id,
    keyVersion: row.key_version,
    identityVersion: row.identity_version,
    fence: row.fence,
    waiting: row.waiting.length > WAITING_TOLD_MAX ? null : row.waiting,
  };
}

/** What a request weighs in a batch. */
export function contentBytes(request: StoreRequest): number {
  return request.messages.reduce((sum, message) => sum + decodedLength(message.content), 0);
}
