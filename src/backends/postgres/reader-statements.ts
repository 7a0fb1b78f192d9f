/**
 * What is asked about connected devices: the number of a connection, a proof, a page, and who needs a look or was revoked.
 * What is proven of a device and what is read of its queue come from one statement.
 */
import { type SQL, sql } from 'drizzle-orm';
import type { DeviceProof, MessageStore, Page, QueuedEnvelope, Reader } from '../../ports/message-store.ts';
import type { BounceReason } from '../../protocol/envelope.ts';
import { addressOfKey } from '../../protocol/ids.ts';
import { numberArray, textArray } from './array-literal.ts';
import { base64 } from './base64.ts';
import { hotStatement } from './database.ts';
import { ofDevice } from './device-sql.ts';
import { isDue } from './message-sql.ts';
import { devices, ENVELOPE_KIND, messages } from './schema.ts';
import { momentOf, msOf } from './time-sql.ts';

const { placeholder } = sql;

export interface ProofRow {
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
export const PROOF_COLUMNS = sql.raw(
  `key_version, identity_version, identity_key IS NOT NULL AS has_keys, fence, ec_available, pq_available,
   offers_pq OR pq_available + pq_claimed > 0 AS offers_pq, count_version, low_notice_version, ${REVOKED_AT_MS}`,
);

// ── Reading ─────────────────────────────────────────────────────────────────────────────────────────────

export interface ReadRequest {
  reader: Reader;
  page: Parameters<MessageStore['read']>[1];
}

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

/** One row for each reader: a row for each envelope would say ten times in each what is said of the device. */
export const readStatement = hotStatement<PageRow>(sql`
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

export function bindRead(requests: readonly ReadRequest[]): Record<string, unknown> {
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
export function toPages(requests: readonly ReadRequest[], rows: readonly PageRow[]): (Page | null)[] {
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

// ── Connecting and proofs ───────────────────────────────────────────────────────────────────────────────

export const connectStatement = hotStatement<{
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

export const proveStatement = hotStatement<ProofRow>(
  sql`SELECT ${PROOF_COLUMNS} FROM ${devices} WHERE ${ofDevice}`,
);

export function toProof(row: ProofRow): DeviceProof {
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

// ── Looking after those who are connected ───────────────────────────────────────────────────────────────

/** Of those who are asked about, the ones that need a look. */
export const lookStatement = hotStatement<{ user_id: string; device_id: number }>(sql`
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

/** Half of the shortest time after which a device may count as idle. */
const SERVED_NOTED_MS = 12 * 3_600_000;

export function noteServedStatement(readers: readonly Reader[], nowMs: number): SQL {
  // A row that another holds is being changed or claimed from: it is noted the next time.
  return sql`
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
      ) d))`;
}

export const revokedStatement = hotStatement<{ user_id: string; device_id: number }>(sql`
SELECT user_id, device_id FROM ${devices}
WHERE revoked_at IS NOT NULL AND revoked_at >= ${momentOf(placeholder('sinceMs'))}
ORDER BY revoked_at DESC
LIMIT ${placeholder('limit')}::int4`);
