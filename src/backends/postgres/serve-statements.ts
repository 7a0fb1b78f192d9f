/** How a connection becomes the one that is served: many by one statement that waits for nobody, or one by one that waits. */
import { type SQL, sql } from 'drizzle-orm';
import type { Reader } from '../../ports/message-store.ts';
import { numberArray, textArray } from './array-literal.ts';
import { hotStatement } from './database.ts';
import { BOUNCE } from './message-sql.ts';
import { PROOF_COLUMNS, type ProofRow } from './reader-statements.ts';
import { devices, messages } from './schema.ts';
import { momentOf } from './time-sql.ts';

const { placeholder } = sql;

export interface ServeRequest {
  reader: Reader;
  keyVersion: number;
  nowMs: number;
}

/** Of a device whose row another holds. */
export interface HeldRow {
  key_version: null;
}

export interface ServedRow extends ProofRow {
  pending_count: number;
  newest_sequence: number;
}

/** How much waits for the device `f`, and up to where. */
function waiting(now: SQL): SQL {
  return sql`
    SELECT count(*)::int4 AS pending_count, coalesce(max(m.sequence), 0) AS newest_sequence
    FROM ${messages} m
    WHERE m.user_id = f.user_id AND m.device_id = f.device_id AND m.pending
      AND (m.kind = ${BOUNCE} OR (m.identity_version = f.identity_version AND m.expires_at > ${now}))`;
}

/**
 * Gives no row where the device is not to be served, and one without a key version where it is being changed or claimed
 * from, or was since the statement began. What waits is counted before any row is locked.
 */
export const serveManyStatement = hotStatement<{ ord: number } & (ServedRow | HeldRow)>(sql`
WITH found AS MATERIALIZED (
  SELECT f.*, q.*
  FROM (
    SELECT a.ord, a.fence, to_timestamp(a.now_ms / 1000) AS now, d.*
    FROM unnest(
      ${placeholder('ords')}::int4[], ${placeholder('userIds')}::text[], ${placeholder('deviceIds')}::int2[],
      ${placeholder('fences')}::int8[], ${placeholder('keyVersions')}::int8[], ${placeholder('nowMss')}::float8[]
    ) AS a (ord, user_id, device_id, fence, key_version, now_ms)
    CROSS JOIN LATERAL (
      SELECT v.ctid AS row_place, v.user_id, v.device_id, v.identity_version FROM ${devices} v
      WHERE v.user_id = a.user_id AND v.device_id = a.device_id AND v.fence <= a.fence AND v.key_version = a.key_version
        AND v.identity_key IS NOT NULL
      LIMIT 1
    ) d
  ) f
  CROSS JOIN LATERAL (${waiting(sql.raw('f.now'))}) q
),
locked AS MATERIALIZED (
  SELECT f.ord, l.row_place
  FROM found f
  CROSS JOIN LATERAL (
    SELECT v.ctid AS row_place FROM ${devices} v WHERE v.ctid = f.row_place LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED
  ) l
),
served AS (
  UPDATE ${devices} d SET fence = f.new_fence, served_at = f.now
  FROM (SELECT ord, row_place, fence AS new_fence, now FROM found) f
  -- The rows are reached by the list; the join tells which of them is whose, and leaves out what has moved on.
  WHERE d.ctid = ANY (ARRAY(SELECT row_place FROM locked)) AND d.ctid = f.row_place
  RETURNING f.ord AS served_ord, ${PROOF_COLUMNS}
)
SELECT f.ord, f.pending_count, f.newest_sequence, s.*
FROM found f LEFT JOIN served s ON s.served_ord = f.ord`);

export function bindServeMany(requests: readonly ServeRequest[]): Record<string, unknown> {
  return {
    ords: numberArray(requests.map((_, ord) => ord)),
    userIds: textArray(requests.map(({ reader }) => reader.device.userId)),
    deviceIds: numberArray(requests.map(({ reader }) => reader.device.deviceId)),
    fences: numberArray(requests.map(({ reader }) => reader.fence)),
    keyVersions: numberArray(requests.map(({ keyVersion }) => keyVersion)),
    nowMss: numberArray(requests.map(({ nowMs }) => nowMs)),
  };
}

/** Waits for the row. Gives none where the device is not to be served; the columns are those of the row as it was locked. */
export function serveStatement({ reader, keyVersion, nowMs }: ServeRequest): SQL {
  const { device, fence } = reader;
  return sql`
WITH served AS (
  UPDATE ${devices} SET fence = ${fence}, served_at = ${momentOf(nowMs)}
  WHERE user_id = ${device.userId} AND device_id = ${device.deviceId} AND fence <= ${fence}
    AND key_version = ${keyVersion} AND identity_key IS NOT NULL
  RETURNING user_id, device_id, ${PROOF_COLUMNS}
)
SELECT f.*, q.pending_count, q.newest_sequence
FROM served f
CROSS JOIN LATERAL (${waiting(momentOf(nowMs))}) q`;
}
