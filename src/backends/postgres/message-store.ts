/** Queues in PostgreSQL: every read and deletion proves, in its own statement, who is asking and for which key set. */
import { randomUUID } from 'node:crypto';
import { type SQL, sql } from 'drizzle-orm';
import type { PgTable } from 'drizzle-orm/pg-core';
import { createGatherer } from '../../lib/gather.ts';
import {
  type DeviceProof,
  type MessageStore,
  type MessageToStore,
  type Page,
  type QueuedEnvelope,
  type Reader,
  type StoredMessage,
  type StoreRequest,
  type StoreResult,
  WAITING_TOLD_MAX,
} from '../../ports/message-store.ts';
import { decodedLength } from '../../protocol/base64.ts';
import type { BounceReason } from '../../protocol/envelope.ts';
import { addressKey, addressOfKey, type DeviceAddress } from '../../protocol/ids.ts';
import { DEVICE_ID_MAX } from '../../protocol/limits.ts';
import { numberArray, plainArray, textArray } from './array-literal.ts';
import { base64 } from './base64.ts';
import { type Database, hotStatement } from './database.ts';
import { devices, ENVELOPE_KIND, messageReceipts, messages } from './schema.ts';
import { momentOf, msOf } from './time-sql.ts';

const { placeholder } = sql;
const MESSAGE = sql.raw(String(ENVELOPE_KIND.message));
const BOUNCE = sql.raw(String(ENVELOPE_KIND.bounce));

/** No envelope is put off for longer. */
const PUT_OFF_MAX_MS = 120_000;
/** How long an envelope that failed is put off, by how often it has failed; the last one repeats. */
const TEMPORARY_DELAYS_MS = [1_000, 5_000, 30_000, PUT_OFF_MAX_MS];
/** The same, until it has been offered often enough. */
const UNDECRYPTABLE_DELAYS_MS = [1_000, 5_000];
/** Offers of an undecryptable envelope before it turns into a bounce. */
const UNDECRYPTABLE_OFFERS = UNDECRYPTABLE_DELAYS_MS.length + 1;
/** A statement that stored under an old stamp ends within this time of the wipe. */
const STALE_WINDOW_MS = 3_600_000;

/** Requests in one statement, and the bytes and rows that they bring or ask for. */
const STORE_BATCH = { requests: 128, bytes: 1 << 20 };
const READ_BATCH = { requests: 64, bytes: 4 << 20 };
const CONNECT_BATCH = 128;
const ACKNOWLEDGE_BATCH = { requests: 256, rows: 1_024 };

type Connected = Awaited<ReturnType<MessageStore['connect']>>;

interface ReadRequest {
  reader: Reader;
  page: Parameters<MessageStore['read']>[1];
}

interface AcknowledgeRequest {
  reader: Reader;
  sequences: readonly number[];
}

export function createMessageStore(database: Database): MessageStore {
  const stores = createGatherer<StoreRequest, StoreResult | null>({
    batchMax: STORE_BATCH.requests,
    weight: { of: contentBytes, max: STORE_BATCH.bytes },
    run: async (requests) =>
      toStoreResults(requests, await database.hot(storeStatement, bindStore(requests))),
  });
  const reads = createGatherer<ReadRequest, Page | null>({
    batchMax: READ_BATCH.requests,
    weight: { of: ({ page }) => page.bytesMax, max: READ_BATCH.bytes },
    run: async (requests) => toPages(requests, await database.hot(readStatement, bindRead(requests))),
  });
  const acknowledgements = createGatherer<AcknowledgeRequest, number>({
    batchMax: ACKNOWLEDGE_BATCH.requests,
    weight: { of: ({ sequences }) => sequences.length, max: ACKNOWLEDGE_BATCH.rows },
    async run(requests) {
      const rows = await database.hot(acknowledgeStatement, bindAcknowledge(requests));
      const counts = requests.map(() => 0);
      for (const { ord, deleted } of rows) counts[ord] = deleted;
      return counts;
    },
  });

  const connects = createGatherer<DeviceAddress, Connected>({
    batchMax: CONNECT_BATCH,
    async run(connecting) {
      const rows = await database.hot(connectStatement, {
        ords: numberArray(connecting.map((_, ord) => ord)),
        userIds: textArray(connecting.map((device) => device.userId)),
        deviceIds: numberArray(connecting.map((device) => device.deviceId)),
      });
      return rows.map((row) => ({
        fence: row.fence,
        lowNoticeVersion: row.low_notice_version,
        revokedAtMs: row.revoked_at_ms,
      }));
    },
  });

  return {
    store: (request) => stores.submit(request),

    connect: (device) => connects.submit(device),

    async serve({ device, fence }, keyVersion, nowMs) {
      const [row] = await database.hot(serveStatement, { ...device, fence, keyVersion, nowMs });
      if (row === undefined) return null;
      return {
        proof: toProof(row),
        served: row.served,
        pendingCount: row.pending_count,
        newestSequence: row.newest_sequence,
      };
    },

    read: (reader, page) => reads.submit({ reader, page }),

    async prove(device) {
      const [row] = await database.hot(proveStatement, { ...device });
      return row === undefined ? null : toProof(row);
    },

    acknowledge: (reader, sequences) => acknowledgements.submit({ reader, sequences }),

    async putOff({ device, fence }, unsorted, nowMs) {
      const failures = inOrder(unsorted);
      const rows = await database.hot(putOffStatement, {
        ...device,
        fence,
        sequences: numberArray(failures.map((failure) => failure.sequence)),
        undecryptable: `{${failures.map((failure) => failure.reason === 'undecryptable').join(',')}}`,
        nowMs,
      });
      const dueTimes = rows.filter((row) => row.pending).map((row) => row.due_at_ms!);
      return {
        nextDueAtMs: dueTimes.length === 0 ? null : Math.min(...dueTimes),
        bounced: rows.some((row) => !row.pending),
      };
    },

    async bounce(device, unsorted) {
      const unreadable = inOrder(unsorted);
      await database.hot(bounceStatement, {
        ...device,
        sequences: numberArray(unreadable.map((item) => item.sequence)),
        reasons: textArray(unreadable.map((item) => item.reason)),
      });
    },

    async settleBounces(of, { nowMs, expiresAtMs, limit }) {
      const bounced = await database.run(
        async (db) =>
          (await db.execute(sql`
          SELECT user_id, device_id, sequence, peer_user_id, peer_device_id, message_id, bounce_reason
          FROM ${messages}
          WHERE NOT pending ${of === null ? sql`` : sql`AND user_id = ${of.userId} AND device_id = ${of.deviceId}`}
          ORDER BY user_id, device_id, sequence
          LIMIT ${limit}`)) as unknown as BouncedRow[],
      );
      const senders = new Map<string, DeviceAddress>();
      // One sender's rows, then one recipient's rows: no statement spans two users.
      for (const [userId, rows] of fewOfOne(bounced, (row) => row.peer_user_id)) {
        await database.hot(copyBounceStatement, {
          userId,
          deviceIds: numberArray(rows.map((row) => row.peer_device_id)),
          recipientUserIds: textArray(rows.map((row) => row.user_id)),
          recipientDeviceIds: numberArray(rows.map((row) => row.device_id)),
          messageIds: textArray(rows.map((row) => row.message_id)),
          reasons: textArray(rows.map((row) => row.bounce_reason)),
          ids: textArray(rows.map(() => randomUUID())),
          nowMs,
          expiresAtMs,
        });
        for (const row of rows) {
          const sender = { userId, deviceId: row.peer_device_id };
          senders.set(addressKey(sender), sender);
        }
      }
      const home: BouncedRow[] = [];
      for (const [userId, rows] of fewOfOne(bounced, (row) => row.user_id)) {
        const removed = await database.hot(removeBouncedStatement, {
          userId,
          deviceIds: numberArray(rows.map((row) => row.device_id)),
          sequences: numberArray(rows.map((row) => row.sequence)),
        });
        // What another node settled at the same time is not counted twice.
        const sequences = new Set(removed.map((row) => row.sequence));
        home.push(...rows.filter((row) => sequences.has(row.sequence)));
      }
      return {
        bounced: home.map((row) => ({
          recipient: { userId: row.user_id, deviceId: row.device_id },
          sender: { userId: row.peer_user_id, deviceId: row.peer_device_id },
          messageId: row.message_id,
          reason: row.bounce_reason,
        })),
        senders: [...senders.values()],
        more: bounced.length === limit,
      };
    },

    async bounceStale(of, cut) {
      return await database.upkeep(async (tx) => (await tx.execute(staleStatement(of, cut))).count);
    },

    async sweep({ nowMs, forgetBeforeMs, limit }) {
      let touched = 0;
      const failures: unknown[] = [];
      for (const statement of sweepStatements({ nowMs, forgetBeforeMs, limit })) {
        try {
          touched += await database.upkeep(async (tx) => (await tx.execute(statement)).count);
        } catch (error) {
          failures.push(error);
        }
      }
      if (failures.length > 0) throw failures[0];
      return touched;
    },

    async revokedSince(sinceMs, limit) {
      const rows = await database.hot(revokedStatement, { sinceMs, limit });
      return rows.map((row) => ({ userId: row.user_id, deviceId: row.device_id }));
    },

    async noteServed(readers, nowMs) {
      if (readers.length === 0) return;
      // A row that another holds is being changed or claimed from: it is noted the next time.
      await database.run(
        async (db) =>
          await db.execute(sql`
          UPDATE ${devices} SET served_at = ${momentOf(nowMs)}
          WHERE ctid = ANY (ARRAY(
            SELECT d.row_place
            FROM unnest(
              ${textArray(readers.map((reader) => reader.device.userId))}::text[],
              ${numberArray(readers.map((reader) => reader.device.deviceId))}::int2[],
              ${numberArray(readers.map((reader) => reader.fence))}::int8[]
            ) AS a (user_id, device_id, fence)
            CROSS JOIN LATERAL (
              SELECT v.ctid AS row_place FROM ${devices} v
              WHERE v.user_id = a.user_id AND v.device_id = a.device_id AND v.fence = a.fence
                AND (v.served_at IS NULL OR v.served_at <= ${momentOf(nowMs - SERVED_NOTED_MS)})
              LIMIT 1
              FOR NO KEY UPDATE SKIP LOCKED
            ) d))`),
      );
    },

    async inNeedOfALook(readers, nowMs) {
      if (readers.length === 0) return [];
      const rows = await database.hot(lookStatement, {
        userIds: textArray(readers.map((reader) => reader.device.userId)),
        deviceIds: numberArray(readers.map((reader) => reader.device.deviceId)),
        fences: numberArray(readers.map((reader) => reader.fence)),
        keyVersions: numberArray(readers.map((reader) => reader.keyVersion)),
        noticeVersions: numberArray(readers.map((reader) => reader.lowNoticeVersion)),
        inFlightCounts: numberArray(readers.map((reader) => reader.inFlight)),
        nowMs,
      });
      return rows.map((row) => ({ userId: row.user_id, deviceId: row.device_id }));
    },
  };
}

/** Half of the shortest time after which a device may count as idle. */
const SERVED_NOTED_MS = 12 * 3_600_000;

/** Statements lock a queue's rows in one order, whatever the list's, so that no two can deadlock. */
function inOrder<Item extends { sequence: number }>(items: readonly Item[]): Item[] {
  return [...items].sort((a, b) => a.sequence - b.sequence);
}

/**
 * Whether a message may be offered now. One that is due later than anything is ever put off was put off by a clock that
 * has been set back since.
 */
function isDue(now: SQL): SQL {
  return sql`(m.due_at IS NULL OR m.due_at <= ${now} OR m.due_at > ${now} + ${PUT_OFF_MAX})`;
}

const PUT_OFF_MAX = sql.raw(`interval '${PUT_OFF_MAX_MS / 1000} seconds'`);

const ofDevice = sql`user_id = ${placeholder('userId')} AND device_id = ${placeholder('deviceId')}`;

// ── Storing ─────────────────────────────────────────────────────────────────────────────────────────────

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

function contentBytes(request: StoreRequest): number {
  return request.messages.reduce((sum, message) => sum + decodedLength(message.content), 0);
}

function bindStore(requests: readonly StoreRequest[]): Record<string, unknown> {
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
function toStoreResults(
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

/**
 * Judges the addressed devices and stores, for a whole batch of requests in one statement. The stamp is the identity
 * version in the statement's own snapshot: a key set that is replaced beside it gets a newer one, and the message is
 * bounced when it is read. What else waits is of that snapshot too: a message that its sender had acknowledged before it
 * sent this one is in it.
 */
const storeStatement = hotStatement<StoreRow>(sql`
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

// ── Proofs ──────────────────────────────────────────────────────────────────────────────────────────────

interface ProofRow {
  key_version: number;
  identity_version: number;
  has_keys: boolean;
  fence: number;
  ec_available: number;
  pq_available: number;
  offers_pq: boolean;
  count_version: number;
  low_notice_version: number;
  revoked_at_ms: number | null;
}

const REVOKED_AT_MS = '(extract(epoch FROM revoked_at) * 1000)::float8 AS revoked_at_ms';
const PROOF_COLUMNS = sql.raw(
  `key_version, identity_version, identity_key IS NOT NULL AS has_keys, fence, ec_available, pq_available,
   offers_pq OR pq_available + pq_claimed > 0 AS offers_pq, count_version, low_notice_version, ${REVOKED_AT_MS}`,
);

function toProof(row: ProofRow): DeviceProof {
  return {
    keyVersion: row.key_version,
    identityVersion: row.identity_version,
    hasKeys: row.has_keys,
    fence: row.fence,
    availableCounts: { ec: row.ec_available, pq: row.pq_available },
    offersPq: row.offers_pq,
    countVersion: row.count_version,
    lowNoticeVersion: row.low_notice_version,
    revokedAtMs: row.revoked_at_ms,
  };
}

const proveStatement = hotStatement<ProofRow>(sql`SELECT ${PROOF_COLUMNS} FROM ${devices} WHERE ${ofDevice}`);

const connectStatement = hotStatement<{
  fence: number;
  low_notice_version: number;
  revoked_at_ms: number | null;
}>(sql`
WITH connecting AS MATERIALIZED (
  -- In the order in which they came: of two connections of one device the later gets the higher number.
  SELECT a.*, nextval('connection_fence') AS fence
  FROM unnest(${placeholder('ords')}::int4[], ${placeholder('userIds')}::text[], ${placeholder('deviceIds')}::int2[])
    AS a (ord, user_id, device_id)
)
SELECT c.fence, coalesce(d.low_notice_version, 0) AS low_notice_version, d.revoked_at_ms
FROM connecting c
LEFT JOIN LATERAL (
  SELECT v.low_notice_version, ${sql.raw(REVOKED_AT_MS)} FROM ${devices} v
  WHERE v.user_id = c.user_id AND v.device_id = c.device_id
  LIMIT 1
) d ON true
ORDER BY c.ord`);

// The locked row's own columns are returned, not the snapshot's: a change that came between shows.
const serveStatement = hotStatement<
  ProofRow & { served: boolean; pending_count: number; newest_sequence: number }
>(sql`
WITH served AS (
  UPDATE ${devices} SET fence = ${placeholder('fence')}::int8, served_at = ${momentOf(placeholder('nowMs'))}
  WHERE ${ofDevice} AND fence <= ${placeholder('fence')}::int8 AND key_version = ${placeholder('keyVersion')}::int8
    AND identity_key IS NOT NULL
  RETURNING ${PROOF_COLUMNS}, true AS served
),
proof AS (
  SELECT * FROM served
  UNION ALL
  SELECT ${PROOF_COLUMNS}, false FROM ${devices} WHERE ${ofDevice} AND NOT EXISTS (SELECT 1 FROM served)
)
SELECT p.*, q.pending_count, q.newest_sequence
FROM proof p
CROSS JOIN LATERAL (
  SELECT count(*)::int4 AS pending_count, coalesce(max(m.sequence), 0) AS newest_sequence
  FROM ${messages} m
  WHERE m.user_id = ${placeholder('userId')} AND m.device_id = ${placeholder('deviceId')} AND m.pending
    AND (m.kind = ${BOUNCE} OR (m.identity_version = p.identity_version AND m.expires_at > ${momentOf(placeholder('nowMs'))}))
) q`);

// ── Reading ─────────────────────────────────────────────────────────────────────────────────────────────

/** A device, and what is on its page: lists of one length, by commas where they hold text; null where nothing is. */
interface PageRow extends ProofRow {
  ord: number;
  oldest_sequence: number | null;
  next_due_at_ms: number | null;
  /** Rows found before the bytes were counted. */
  found: number | null;
  sequences: number[] | null;
  ids: string | null;
  kinds: number[] | null;
  message_ids: string | null;
  /** As `addressKey` writes them. */
  peers: string | null;
  types: number[] | null;
  /** Base64; empty for a bounce. */
  contents: string | null;
  /** Empty for a message. */
  bounce_reasons: string | null;
  stamps: number[] | null;
  /** 1 or 0. */
  expired: number[] | null;
  stored_at_ms: number[] | null;
}

function bindRead(requests: readonly ReadRequest[]): Record<string, unknown> {
  return {
    ords: numberArray(requests.map((_, ord) => ord)),
    userIds: textArray(requests.map(({ reader }) => reader.device.userId)),
    deviceIds: numberArray(requests.map(({ reader }) => reader.device.deviceId)),
    fences: numberArray(requests.map(({ reader }) => reader.fence)),
    inFlights: textArray(requests.map(({ page }) => numberArray([...page.inFlight].sort((a, b) => a - b)))),
    envelopesMaxs: numberArray(requests.map(({ page }) => page.envelopesMax)),
    bytesMaxs: numberArray(requests.map(({ page }) => page.bytesMax)),
    nowMss: numberArray(requests.map(({ page }) => page.nowMs)),
  };
}

/** @returns null for a device that is unknown */
function toPages(requests: readonly ReadRequest[], rows: readonly PageRow[]): (Page | null)[] {
  const pages: (Page | null)[] = requests.map(() => null);
  for (const row of rows) pages[row.ord] = toPage(requests[row.ord]!.page.envelopesMax, row);
  return pages;
}

function toPage(envelopesMax: number, row: PageRow): Page {
  const envelopes: QueuedEnvelope[] = [];
  const unreadable: { sequence: number; reason: BounceReason }[] = [];
  if (row.sequences !== null) {
    const [ids, messageIds] = [row.ids!.split(','), row.message_ids!.split(',')];
    const [peers, contents] = [row.peers!.split(','), row.contents!.split(',')];
    const bounceReasons = row.bounce_reasons!.split(',');
    row.sequences.forEach((sequence, nth) => {
      const isMessage = row.kinds![nth] === ENVELOPE_KIND.message;
      const reason = isMessage
        ? unreadableReason({ stamp: row.stamps![nth]!, isExpired: row.expired![nth] === 1 }, row)
        : null;
      if (reason !== null) {
        unreadable.push({ sequence, reason });
        return;
      }
      const peer = addressOfKey(peers[nth]!);
      envelopes.push({
        sequence,
        id: ids[nth]!,
        messageId: messageIds[nth]!,
        storedAtMs: row.stored_at_ms![nth]!,
        body: isMessage
          ? { kind: 'message', sender: peer, type: row.types![nth]!, content: contents[nth]! }
          : { kind: 'bounce', recipient: peer, reason: bounceReasons[nth] as BounceReason },
      });
    });
    // Lists are made in the order of what they are made of, which PostgreSQL does not promise.
    envelopes.sort((one, other) => one.sequence - other.sequence);
  }
  const found = row.found ?? 0;
  return {
    proof: toProof(row),
    envelopes,
    unreadable,
    oldestSequence: row.oldest_sequence,
    nextDueAtMs: row.next_due_at_ms,
    more: found === envelopesMax || found > envelopes.length + unreadable.length,
  };
}

function unreadableReason(
  message: { stamp: number; isExpired: boolean },
  proof: ProofRow,
): BounceReason | null {
  if (!proof.has_keys) return 'RECIPIENT_KEYS_RESET';
  if (message.stamp !== proof.identity_version) return 'RECIPIENT_IDENTITY_CHANGED';
  return message.isExpired ? 'EXPIRED' : null;
}

/** One row for each reader: a row for each envelope would say ten times in each what is said of the device. */
const readStatement = hotStatement<PageRow>(sql`
WITH asked AS MATERIALIZED (
  SELECT a.ord, a.user_id, a.device_id, a.fence, a.in_flight::int8[] AS in_flight, a.envelopes_max, a.bytes_max,
         to_timestamp(a.now_ms / 1000) AS now
  FROM unnest(
    ${placeholder('ords')}::int4[], ${placeholder('userIds')}::text[], ${placeholder('deviceIds')}::int2[],
    ${placeholder('fences')}::int8[], ${placeholder('inFlights')}::text[], ${placeholder('envelopesMaxs')}::int4[],
    ${placeholder('bytesMaxs')}::int8[], ${placeholder('nowMss')}::float8[]
  ) AS a (ord, user_id, device_id, fence, in_flight, envelopes_max, bytes_max, now_ms)
)
SELECT a.ord, d.*, s.*
FROM asked a
CROSS JOIN LATERAL (
  SELECT ${PROOF_COLUMNS}, (
      SELECT o.sequence FROM ${messages} o
      WHERE o.user_id = v.user_id AND o.device_id = v.device_id AND o.pending
      ORDER BY o.user_id, o.device_id, o.sequence LIMIT 1
    ) AS oldest_sequence, (
      SELECT ${msOf('min(o.due_at)')} FROM ${messages} o
      WHERE o.user_id = v.user_id AND o.device_id = v.device_id AND o.due_at > a.now
    ) AS next_due_at_ms
  FROM ${devices} v
  WHERE v.user_id = a.user_id AND v.device_id = a.device_id
  LIMIT 1
) d
CROSS JOIN LATERAL (
  SELECT max(p.found) AS found, array_agg(p.sequence) AS sequences, string_agg(p.id::text, ',') AS ids,
         array_agg(p.kind::int4) AS kinds, string_agg(p.message_id::text, ',') AS message_ids,
         string_agg(p.peer_user_id || '.' || p.peer_device_id, ',') AS peers,
         array_agg(coalesce(p.type, 0)::int4) AS types,
         string_agg(coalesce(${base64('p.content')}, ''), ',') AS contents,
         string_agg(coalesce(p.bounce_reason, ''), ',') AS bounce_reasons, array_agg(p.identity_version) AS stamps,
         array_agg((p.expires_at <= a.now)::int4) AS expired,
         array_agg((date_part('epoch', p.stored_at) * 1000)::int8) AS stored_at_ms
  FROM (
    SELECT f.*, row_number() OVER (ORDER BY f.sequence) AS nth, (count(*) OVER ())::int4 AS found,
           sum(coalesce(octet_length(f.content), 0)) OVER (ORDER BY f.sequence) AS bytes
    FROM (
      SELECT m.* FROM ${messages} m
      WHERE d.fence = a.fence AND m.user_id = a.user_id AND m.device_id = a.device_id AND m.pending
        -- What is gone still stands in the index: it has been walked over once.
        AND m.sequence >= d.oldest_sequence
        -- A search by halves, where an array would be compared with as a whole.
        AND a.in_flight[width_bucket(m.sequence, a.in_flight)] IS DISTINCT FROM m.sequence
        AND ${isDue(sql.raw('a.now'))}
      ORDER BY m.user_id, m.device_id, m.sequence
      LIMIT a.envelopes_max
    ) f
  ) p
  WHERE p.nth = 1 OR p.bytes <= a.bytes_max
) s`);

const revokedStatement = hotStatement<{ user_id: string; device_id: number }>(sql`
SELECT user_id, device_id FROM ${devices}
WHERE revoked_at IS NOT NULL AND revoked_at >= ${momentOf(placeholder('sinceMs'))}
ORDER BY revoked_at DESC
LIMIT ${placeholder('limit')}::int4`);

const lookStatement = hotStatement<{ user_id: string; device_id: number }>(sql`
SELECT a.user_id, a.device_id
FROM unnest(
  ${placeholder('userIds')}::text[], ${placeholder('deviceIds')}::int2[], ${placeholder('fences')}::int8[],
  ${placeholder('keyVersions')}::int8[], ${placeholder('noticeVersions')}::int8[],
  ${placeholder('inFlightCounts')}::int4[]
) AS a (user_id, device_id, fence, key_version, notice_version, in_flight)
LEFT JOIN LATERAL (
  SELECT v.fence, v.key_version, v.low_notice_version FROM ${devices} v
  WHERE v.user_id = a.user_id AND v.device_id = a.device_id LIMIT 1
) d ON true
-- Of a restored backup the row may be gone, or its fence older than the reader's.
WHERE d.fence IS NULL OR d.fence <> a.fence OR d.key_version <> a.key_version OR d.low_notice_version > a.notice_version OR a.in_flight < (
  SELECT count(*) FROM (
    SELECT 1 FROM ${messages} m
    WHERE m.user_id = a.user_id AND m.device_id = a.device_id AND m.pending
      AND ${isDue(momentOf(placeholder('nowMs')))}
    LIMIT a.in_flight + 1
  ) due)`);

// ── Ends: acknowledged, put off, bounced ────────────────────────────────────────────────────────────────

const isServed = sql`EXISTS (SELECT 1 FROM ${devices} WHERE ${ofDevice} AND fence = ${placeholder('fence')}::int8)`;

function bindAcknowledge(requests: readonly AcknowledgeRequest[]): Record<string, unknown> {
  return {
    ords: numberArray(requests.map((_, ord) => ord)),
    userIds: textArray(requests.map(({ reader }) => reader.device.userId)),
    deviceIds: numberArray(requests.map(({ reader }) => reader.device.deviceId)),
    fences: numberArray(requests.map(({ reader }) => reader.fence)),
    sequences: textArray(requests.map(({ sequences }) => numberArray(sequences))),
  };
}

/**
 * Who holds a row is bouncing it, or acknowledging it too: the row is left to him. Nobody waits, so that nobody waits in
 * a circle; a message whose bounce does not come about is offered again.
 */
const acknowledgeStatement = hotStatement<{ ord: number; deleted: number }>(sql`
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
  DELETE FROM ${messages} WHERE ctid = ANY (ARRAY(SELECT row_place FROM processed))
)
-- One that is acknowledged twice at once was deleted once.
SELECT ord, count(*)::int4 AS deleted FROM (SELECT min(ord) AS ord FROM processed GROUP BY row_place) first GROUP BY ord`);

/** An interval by how often it has failed before; the last one repeats. */
function delayOf(countColumn: string, delaysMs: readonly number[]): SQL {
  const seconds = delaysMs.map((delay) => delay / 1000).join(', ');
  return sql.raw(
    `make_interval(secs => (ARRAY[${seconds}]::float8[])[least(${countColumn} + 1, ${delaysMs.length})])`,
  );
}

/** Probes the index for each of a list's rows; a join by hash alone would read the whole queue. */
const ofListed = sql`m.user_id = ${placeholder('userId')} AND m.device_id = ${placeholder('deviceId')}
  AND m.sequence = ANY (${placeholder('sequences')}::int8[])`;

const isLastOffer = sql`(f.undecryptable AND m.undecryptable_count + 1 >= ${sql.raw(String(UNDECRYPTABLE_OFFERS))})`;

const putOffStatement = hotStatement<{ pending: boolean; due_at_ms: number | null }>(sql`
WITH failed AS MATERIALIZED (
  SELECT * FROM unnest(${placeholder('sequences')}::int8[], ${placeholder('undecryptable')}::bool[])
    AS f (sequence, undecryptable)
),
dropped AS (
  -- A bounce that nobody can read is nobody's loss: it is never bounced itself.
  DELETE FROM ${messages} m USING failed f
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
FROM failed f
WHERE ${ofListed} AND m.sequence = f.sequence AND m.pending AND ${isServed} AND NOT (m.kind = ${BOUNCE} AND ${isLastOffer})
RETURNING m.pending, ${msOf('m.due_at')} AS due_at_ms`);

const bounceStatement = hotStatement<never>(sql`
UPDATE ${messages} m SET pending = false, bounce_reason = b.reason, content = NULL, due_at = NULL
FROM unnest(${placeholder('sequences')}::int8[], ${placeholder('reasons')}::text[]) AS b (sequence, reason)
WHERE ${ofListed} AND m.sequence = b.sequence AND m.pending AND m.kind = ${MESSAGE}`);

interface BouncedRow {
  user_id: string;
  device_id: number;
  sequence: number;
  peer_user_id: string;
  peer_device_id: number;
  message_id: string;
  bounce_reason: BounceReason;
}

/** The receipt makes the copy happen once, however often a crash between the two steps makes it be tried. */
const copyBounceStatement = hotStatement<never>(sql`
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

const removeBouncedStatement = hotStatement<{ sequence: number }>(sql`
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

/** Rows of one user that a statement of a bounce's way home takes: it holds them until it is on disk. */
const SETTLED_AT_ONCE = 64;

/** The rows of each key, in groups of at most `SETTLED_AT_ONCE`. */
function fewOfOne<Row>(rows: readonly Row[], keyOf: (row: Row) => string): [key: string, rows: Row[]][] {
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

// ── Retention ───────────────────────────────────────────────────────────────────────────────────────────

/** Expired rows among which a batch looks for bounces, for each row that it may take. */
const EXPIRED_LOOKED_AT = 4;

/**
 * Rows of `table` that are found first and locked when all of them are read, at most `limit`: what comes from the disk
 * keeps nobody waiting. `stillSo` is looked at once more when they are held.
 */
function held(table: PgTable, rows: { found: SQL; stillSo: SQL; limit: number }): SQL {
  return sql`
    ctid = ANY (ARRAY(
      SELECT ctid FROM ${table}
      WHERE ctid = ANY (ARRAY(${rows.found})) AND ${rows.stillSo}
      LIMIT ${rows.limit} FOR UPDATE SKIP LOCKED))`;
}

/** What was stored beside a wipe bears the older stamp. */
function staleStatement(of: DeviceAddress | null, { nowMs, limit }: { nowMs: number; limit: number }): SQL {
  const wiped =
    of === null
      ? sql`wiped_at > ${momentOf(nowMs - STALE_WINDOW_MS)}`
      : sql`user_id = ${of.userId} AND device_id = ${of.deviceId}`;
  const found = sql`
    SELECT m.ctid
    FROM (SELECT user_id, device_id, identity_version FROM ${devices} WHERE ${wiped}) d
    CROSS JOIN LATERAL (
      SELECT s.ctid FROM ${messages} s
      WHERE s.user_id = d.user_id AND s.device_id = d.device_id AND s.pending AND s.kind = ${MESSAGE}
        AND s.identity_version < d.identity_version
      LIMIT ${limit}
    ) m
    LIMIT ${limit}`;
  return sql`
    UPDATE ${messages} s SET pending = false, content = NULL, due_at = NULL, bounce_reason = (
      SELECT CASE WHEN d.identity_key IS NULL THEN 'RECIPIENT_KEYS_RESET' ELSE 'RECIPIENT_IDENTITY_CHANGED' END
      FROM ${devices} d WHERE d.user_id = s.user_id AND d.device_id = s.device_id)
    WHERE ${held(messages, { found, stillSo: sql`pending`, limit })}`;
}

function sweepStatements(cut: { nowMs: number; forgetBeforeMs: number; limit: number }): SQL[] {
  const { limit } = cut;
  const expired = sql`expires_at <= ${momentOf(cut.nowMs)}`;
  const isWaiting = sql`${expired} AND pending AND kind = ${MESSAGE}`;
  const isUnfinished = sql`finished_at IS NULL AND waiting_at <= ${momentOf(cut.forgetBeforeMs)}`;
  return [
    sql`
    UPDATE ${messages} SET pending = false, bounce_reason = 'EXPIRED', content = NULL, due_at = NULL
    WHERE ${held(messages, {
      found: sql`SELECT ctid FROM ${messages} WHERE ${isWaiting} ORDER BY expires_at LIMIT ${limit}`,
      stillSo: isWaiting,
      limit,
    })}`,
    sql`
    DELETE FROM ${messages}
    WHERE ${held(messages, {
      // Of the first that expired: behind a backlog of messages, all of it would be walked over by each batch.
      found: sql`SELECT ctid FROM ${messages} WHERE ${expired} ORDER BY expires_at LIMIT ${EXPIRED_LOOKED_AT * limit}`,
      stillSo: sql`${expired} AND kind = ${BOUNCE}`,
      limit,
    })}`,
    // A message id is forgotten a day after the sweep first finds it finished: nobody counted the days before.
    sql`
    DELETE FROM ${messageReceipts}
    WHERE ctid = ANY (ARRAY(
      SELECT ctid FROM ${messageReceipts}
      WHERE finished_at <= ${momentOf(cut.forgetBeforeMs)} ORDER BY finished_at LIMIT ${limit}))`,
    // Each is looked at a day after it was stored or last found waiting, so that a run reads no queue of old ones again.
    sql`
    UPDATE ${messageReceipts} r SET waiting_at = ${momentOf(cut.nowMs)}, finished_at = CASE
      -- A scalar: EXISTS could be planned as one scan of all messages.
      WHEN (SELECT 1 FROM ${messages} m
            WHERE m.user_id = r.user_id AND m.device_id = r.device_id AND m.sequence = r.sequence
            LIMIT 1) IS NULL
      THEN ${momentOf(cut.nowMs)} END
    WHERE ${held(messageReceipts, {
      found: sql`SELECT ctid FROM ${messageReceipts} WHERE ${isUnfinished} ORDER BY waiting_at LIMIT ${limit}`,
      stillSo: isUnfinished,
      limit,
    })}`,
  ];
}
