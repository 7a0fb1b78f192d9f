/** Messages, bounces and message ids that have had their time: found, and ended in batches that keep nobody waiting. */
import { type SQL, sql } from 'drizzle-orm';
import type { PgTable } from 'drizzle-orm/pg-core';
import type { DeviceAddress } from '../../protocol/ids.ts';
import { BOUNCE, MESSAGE } from './message-sql.ts';
import { devices, messageReceipts, messages } from './schema.ts';
import { momentOf } from './time-sql.ts';

/** A statement that stored under an old stamp ends within this time of the wipe. */
const STALE_WINDOW_MS = 3_600_000;
/** Expired rows among which a batch looks for bounces, for each row that it may take. */
const EXPIRED_LOOKED_AT = 4;

/** One statement for each kind of row, each of at most `limit` rows; none of them needs another to succeed. */
export function sweepStatements(cut: { nowMs: number; forgetBeforeMs: number; limit: number }): SQL[] {
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

/** What was stored beside a wipe bears the older stamp. */
export function staleStatement(
  of: DeviceAddress | null,
  { nowMs, limit }: { nowMs: number; limit: number },
): SQL {
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
