/** The inspector's questions to PostgreSQL. No hot path: each is asked when a person looks. */
import { type SQL, sql } from 'drizzle-orm';
import type { InspectionStore, MessageTrace } from '../../ports/inspection.ts';
import type { BounceReason } from '../../protocol/envelope.ts';
import { addressKey } from '../../protocol/ids.ts';
import { numberArray, textArray } from './array-literal.ts';
import type { Database } from './database.ts';
import { devices, ENVELOPE_KIND, messageReceipts, messages, prekeyClaims } from './schema.ts';
import { msOf } from './time-sql.ts';

/** For what is asked again and again while a page is open. */
const SOON_MS = 500;

export function createInspectionStore(database: Database): InspectionStore {
  async function rowsOf<Row>(statement: SQL): Promise<Row[]> {
    return await database.run(async (db) => (await db.execute(statement)) as unknown as Row[]);
  }

  /** Null where it takes too long, or fails. */
  async function rowsSoon<Row>(statement: SQL): Promise<Row[] | null> {
    try {
      return await database.soon(SOON_MS, async (tx) => (await tx.execute(statement)) as unknown as Row[]);
    } catch {
      return null;
    }
  }

  return {
    async claimsOf({ userId, deviceId }, limit) {
      const rows = await rowsOf<ClaimRow>(sql`
        SELECT claimer_user_id, claimer_device_id, claim_id, ${msOf('claimed_at')} AS claimed_at_ms,
               signed_prekey_id::float8 AS signed_prekey_id, ec_key_id::float8 AS ec_key_id,
               pq_key_id::float8 AS pq_key_id, pq_last_resort_prekey_id::float8 AS pq_last_resort_prekey_id
        FROM ${prekeyClaims}
        WHERE user_id = ${userId} AND device_id = ${deviceId}
        ORDER BY claimed_at DESC, claim_id
        LIMIT ${limit}`);
      return rows.map((row) => ({
        claimer: { userId: row.claimer_user_id, deviceId: row.claimer_device_id },
        claimId: row.claim_id,
        claimedAtMs: row.claimed_at_ms,
        signedPreKeyId: row.signed_prekey_id,
        keyId: row.ec_key_id,
        pqKeyId: row.pq_key_id,
        pqLastResortPreKeyId: row.pq_last_resort_prekey_id,
      }));
    },

    async waitingOf({ userId, deviceId }, limit) {
      const rows = await rowsOf<WaitingRow>(sql`
        SELECT id, message_id, kind, peer_user_id, peer_device_id, coalesce(octet_length(content), 0) AS bytes,
               ${msOf('stored_at')} AS stored_at_ms, ${msOf('expires_at')} AS expires_at_ms, ${msOf('due_at')} AS due_at_ms,
               undecryptable_count, temporary_count, CASE WHEN NOT pending THEN bounce_reason END AS bounce_reason,
               (SELECT count(*)::float8 FROM ${messages} WHERE user_id = ${userId} AND device_id = ${deviceId}) AS total
        FROM ${messages}
        WHERE user_id = ${userId} AND device_id = ${deviceId}
        ORDER BY sequence
        LIMIT ${limit}`);
      return {
        count: rows[0]?.total ?? 0,
        first: rows.map((row) => ({
          envelopeId: row.id,
          messageId: row.message_id,
          kind: row.kind === ENVELOPE_KIND.message ? 'message' : 'bounce',
          peer: { userId: row.peer_user_id, deviceId: row.peer_device_id },
          bytes: row.bytes,
          storedAtMs: row.stored_at_ms,
          expiresAtMs: row.expires_at_ms,
          dueAtMs: row.due_at_ms,
          undecryptableCount: row.undecryptable_count,
          temporaryCount: row.temporary_count,
          bounceReason: row.bounce_reason,
        })),
      };
    },

    async trace(messageId, { userId, deviceId }) {
      const receipts = await rowsOf<ReceiptRow>(sql`
        SELECT r.device_id, r.peer_user_id, r.peer_device_id, ${msOf('r.stored_at')} AS stored_at_ms,
               m.pending, m.bounce_reason, m.due_at IS NOT NULL AS put_off
        FROM ${messageReceipts} r
        LEFT JOIN ${messages} m
          ON m.user_id = r.user_id AND m.device_id = r.device_id AND m.sequence = r.sequence
        WHERE r.user_id = ${userId} AND r.kind = ${ENVELOPE_KIND.message} AND r.message_id = ${messageId}::uuid
          ${deviceId === null ? sql`` : sql`AND r.device_id = ${deviceId}`}
        ORDER BY r.device_id
        LIMIT 127`);
      return await Promise.all(
        receipts.map(async (row): Promise<MessageTrace> => {
          const recipient = { userId, deviceId: row.device_id };
          const sender = { userId: row.peer_user_id, deviceId: row.peer_device_id };
          const trace = { recipient, sender, storedAtMs: row.stored_at_ms };
          if (row.pending === true)
            return { ...trace, state: row.put_off ? 'putOff' : 'waiting', reason: null };
          if (row.pending === false) return { ...trace, state: 'bounced', reason: row.bounce_reason };
          const bounce = await bounceOf(trace, messageId);
          return bounce === null
            ? { ...trace, state: 'delivered', reason: null }
            : { ...trace, state: 'bounced', reason: bounce.reason };
        }),
      );
    },

    async waitingCounts(addresses) {
      if (addresses.length === 0) return new Map();
      const rows = await rowsSoon<WaitingCountRow>(sql`
        SELECT d.user_id, d.device_id, waiting.count
        FROM unnest(
          ${textArray(addresses.map(({ userId }) => userId))}::text[],
          ${numberArray(addresses.map(({ deviceId }) => deviceId))}::int2[]
        ) AS d (user_id, device_id)
        CROSS JOIN LATERAL (
          SELECT count(*)::float8 AS count FROM ${messages} m
          WHERE m.user_id = d.user_id AND m.device_id = d.device_id
        ) waiting
        WHERE waiting.count > 0`);
      if (rows === null) return null;
      return new Map(
        rows.map((row) => [addressKey({ userId: row.user_id, deviceId: row.device_id }), row.count]),
      );
    },

    async lowDevices(threshold, limit) {
      const rows = await rowsSoon<LowRow>(sql`
        SELECT user_id, device_id, ec_available, pq_available
        FROM ${devices}
        WHERE identity_key IS NOT NULL
          AND (ec_available < ${threshold} OR ((offers_pq OR pq_available + pq_claimed > 0) AND pq_available < ${threshold}))
        ORDER BY ec_available, pq_available, user_id, device_id
        LIMIT ${limit}`);
      if (rows === null) return null;
      return rows.map((row) => ({
        device: { userId: row.user_id, deviceId: row.device_id },
        availableCount: row.ec_available,
        pqAvailableCount: row.pq_available,
      }));
    },
  };

  /** The bounce's copy in the sender's queue, or what is remembered of it. */
  async function bounceOf(
    { recipient, sender }: Pick<MessageTrace, 'recipient' | 'sender'>,
    messageId: string,
  ): Promise<{ reason: BounceReason | null } | null> {
    const [row] = await rowsOf<{ bounce_reason: BounceReason | null }>(sql`
      SELECT m.bounce_reason
      FROM ${messageReceipts} r
      LEFT JOIN ${messages} m
        ON m.user_id = r.user_id AND m.device_id = r.device_id AND m.sequence = r.sequence
      WHERE r.user_id = ${sender.userId} AND r.device_id = ${sender.deviceId} AND r.kind = ${ENVELOPE_KIND.bounce}
        AND r.peer_user_id = ${recipient.userId} AND r.peer_device_id = ${recipient.deviceId}
        AND r.message_id = ${messageId}::uuid`);
    return row === undefined ? null : { reason: row.bounce_reason };
  }
}

interface ClaimRow {
  claimer_user_id: string;
  claimer_device_id: number;
  claim_id: string;
  claimed_at_ms: number;
  signed_prekey_id: number;
  ec_key_id: number | null;
  pq_key_id: number | null;
  pq_last_resort_prekey_id: number | null;
}

interface WaitingRow {
  id: string;
  message_id: string;
  kind: number;
  peer_user_id: string;
  peer_device_id: number;
  bytes: number;
  stored_at_ms: number;
  expires_at_ms: number;
  due_at_ms: number | null;
  undecryptable_count: number;
  temporary_count: number;
  bounce_reason: BounceReason | null;
  total: number;
}

interface ReceiptRow {
  device_id: number;
  peer_user_id: string;
  peer_device_id: number;
  stored_at_ms: number;
  /** Null where the message itself is gone. */
  pending: boolean | null;
  bounce_reason: BounceReason | null;
  put_off: boolean;
}

interface WaitingCountRow {
  user_id: string;
  device_id: number;
  count: number;
}

interface LowRow {
  user_id: string;
  device_id: number;
  ec_available: number;
  pq_available: number;
}
