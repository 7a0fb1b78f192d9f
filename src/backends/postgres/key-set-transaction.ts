/** One device's key set inside a transaction: how its row is read and locked, and every change of what it holds. */
import { createHash } from 'node:crypto';
import { and, eq, isNull, type SQL, sql } from 'drizzle-orm';
import type { DeviceKeys, KeySetTransaction, PreKeyKind } from '../../ports/key-store.ts';
import type { DeviceAddress } from '../../protocol/ids.ts';
import { WITHDRAW_IDENTITIES_MAX, WITHDRAW_UNSEEN_MAX } from '../../protocol/limits.ts';
import { byteaArray, numberArray } from './array-literal.ts';
import { select, type Transaction } from './database.ts';
import { KEYS_COLUMNS, type KeysRow, toKeys } from './key-reader.ts';
import { devices, messages, oneTimePreKeys, PRE_KEY_KIND, signedPreKeys, usedPreKeyIds } from './schema.ts';
import { momentOf } from './time-sql.ts';
import { foldClaims, foldReplacedSignedPreKeys, markUsed, usedAmong } from './used-ids.ts';

/** @param current what `lockKeys` told in `tx` */
export function createKeySetTransaction(
  tx: Transaction,
  device: DeviceAddress,
  current: DeviceKeys,
): KeySetTransaction {
  const { userId, deviceId } = device;
  const ofDevice = sql`user_id = ${userId} AND device_id = ${deviceId}`;

  return {
    current,

    async usedIds(kind, canonicalKey, keyIds) {
      if (keyIds.length === 0) return new Set();
      const rows = await select<{ id: number }>(tx, usedIdsAmong(kind, canonicalKey, keyIds));
      return new Set(rows.map((row) => row.id));
    },

    async pooled(kind, keyIds) {
      if (keyIds.length === 0) return new Map();
      const rows = await select<{ key_id: number; public_key: Uint8Array }>(
        tx,
        sql`SELECT key_id, public_key FROM ${oneTimePreKeys}
            WHERE ${ofDevice} AND kind = ${PRE_KEY_KIND[kind]} AND key_id = ANY (${numberArray(keyIds)}::int8[])`,
      );
      return new Map(rows.map((row) => [row.key_id, row.public_key]));
    },

    async addToPool(kind, keys) {
      if (keys.length === 0) return;
      // One statement in the order of the list, so that the identity column numbers the keys in it.
      await tx.execute(sql`
        INSERT INTO ${oneTimePreKeys} (user_id, device_id, kind, key_id, public_key, signature)
        SELECT ${userId}, ${deviceId}::int2, ${PRE_KEY_KIND[kind]}::int2, k.key_id, k.public_key, k.signature
        FROM unnest(
          ${numberArray(keys.map((key) => key.keyId))}::int8[],
          ${byteaArray(keys.map((key) => key.publicKey))}::bytea[],
          ${byteaArray(keys.map((key) => key.signature))}::bytea[]
        ) WITH ORDINALITY AS k (key_id, public_key, signature, nth)
        ORDER BY k.nth`);
    },

    async withdraw(kind, canonicalKey, keyIds) {
      const unseen = keyIds === 'all' ? [] : await neverSeen(kind, canonicalKey, keyIds);
      if (unseen.length > 0) {
        const [kept] = await select<{ unseen_count: number; known: boolean; others: number }>(
          tx,
          sql`SELECT coalesce(sum(unseen_count) FILTER (
                       WHERE identity_canonical = ${canonicalKey} AND kind = ${PRE_KEY_KIND[kind]}), 0)::int4 AS unseen_count,
                     coalesce(bool_or(identity_canonical = ${canonicalKey}), false) AS known,
                     count(DISTINCT identity_canonical)::int4 AS others
              FROM ${usedPreKeyIds} WHERE ${ofDevice}`,
        );
        const { unseen_count: unseenCount, known, others } = kept!;
        const isPresent =
          current.identity !== null && Buffer.compare(current.identity.canonicalKey, canonicalKey) === 0;
        if (unseenCount + unseen.length > WITHDRAW_UNSEEN_MAX) return null;
        if (!isPresent && !known && others >= WITHDRAW_IDENTITIES_MAX) return null;
      }
      const chosen = keyIds === 'all' ? sql`` : sql`AND key_id = ANY (${numberArray(keyIds)}::int8[])`;
      const removed = await select<{ key_id: number }>(
        tx,
        sql`DELETE FROM ${oneTimePreKeys} WHERE ${ofDevice} AND kind = ${PRE_KEY_KIND[kind]} ${chosen}
            RETURNING key_id`,
      );
      const gone = [...removed.map((row) => row.key_id), ...unseen];
      await markUsed(tx, device, sql`${canonicalKey}`, PRE_KEY_KIND[kind], false, gone, unseen.length);
      return removed.length;
    },

    async signedPreKeyIdState(kind, canonicalKey, keyId) {
      const [stored] = await tx
        .select({ publicKey: signedPreKeys.publicKey, replacedAt: signedPreKeys.replacedAt })
        .from(signedPreKeys)
        .where(
          and(
            eq(signedPreKeys.userId, userId),
            eq(signedPreKeys.deviceId, deviceId),
            eq(signedPreKeys.kind, PRE_KEY_KIND[kind]),
            eq(signedPreKeys.keyId, keyId),
          ),
        );
      if (stored !== undefined) {
        return stored.replacedAt === null
          ? { state: 'active', publicKey: stored.publicKey }
          : { state: 'retired' };
      }
      const [used] = await select<{ retired: boolean; wiped: boolean; wiped_key_digest: Uint8Array | null }>(
        tx,
        sql`SELECT ids @> ${keyId}::int8 AS retired, coalesce(wiped_key_id = ${keyId}::int8, false) AS wiped,
                   wiped_key_digest
            FROM ${usedPreKeyIds}
            WHERE ${ofDevice} AND identity_canonical = ${canonicalKey} AND kind = ${PRE_KEY_KIND[kind]} AND signed`,
      );
      if (used?.retired) return { state: 'retired' };
      if (used?.wiped) {
        return {
          state: 'wiped',
          matches: (publicKey) => keyDigest(kind, publicKey).equals(used.wiped_key_digest!),
        };
      }
      return { state: 'free' };
    },

    async activateSignedPreKey(kind, key, nowMs) {
      await retire(kind, nowMs);
      await tx.insert(signedPreKeys).values({ userId, deviceId, kind: PRE_KEY_KIND[kind], ...key });
      await tx
        .update(devices)
        .set(kind === 'ec' ? { signedPreKeyId: key.keyId } : { pqLastResortPreKeyId: key.keyId })
        .where(ofDevice);
    },

    async wipe(reason, nowMs, { leavesMessages } = { leavesMessages: false }) {
      if (current.identity !== null) {
        const canonicalKey = sql`${current.identity.canonicalKey}`;
        await foldClaims(tx, device, canonicalKey, sql`true`, null);
        await foldReplacedSignedPreKeys(tx, device, canonicalKey, sql`replaced_at IS NOT NULL`);
        for (const kind of ['ec', 'pq'] as const) {
          const active = current.signedPreKeys[kind];
          if (active === null) continue;
          await tx.execute(sql`
            INSERT INTO ${usedPreKeyIds} AS u
              (user_id, device_id, identity_canonical, kind, signed, ids, wiped_key_id, wiped_key_digest)
            VALUES (${userId}, ${deviceId}, ${canonicalKey}, ${PRE_KEY_KIND[kind]}, true, '{}',
                    ${active.keyId}, ${keyDigest(kind, active.publicKey)})
            ON CONFLICT (user_id, device_id, identity_canonical, kind, signed) DO UPDATE
            SET wiped_key_id = excluded.wiped_key_id, wiped_key_digest = excluded.wiped_key_digest,
              -- One that was wiped before has been replaced by this one.
              ids = u.ids + CASE WHEN u.wiped_key_id <> excluded.wiped_key_id
                THEN int8multirange(int8range(u.wiped_key_id, u.wiped_key_id, '[]')) ELSE '{}' END`);
        }
      }
      await tx.execute(sql`DELETE FROM ${signedPreKeys} WHERE ${ofDevice}`);
      await tx.execute(sql`DELETE FROM ${oneTimePreKeys} WHERE ${ofDevice}`);
      await tx
        .update(devices)
        .set({ signedPreKeyId: null, pqLastResortPreKeyId: null, wipedAt: new Date(nowMs) })
        .where(ofDevice);
      if (leavesMessages) return;
      // In the order in which every statement locks a queue's rows.
      await tx.execute(sql`
        SELECT count(*) FROM (
          SELECT 1 FROM ${messages} WHERE ${ofDevice} AND pending AND bounce_reason IS NULL
          ORDER BY user_id, device_id, sequence FOR NO KEY UPDATE) locked`);
      // What commits beside this bears the old stamp and is bounced when it is read or swept.
      await tx.execute(sql`
        UPDATE ${messages} SET pending = false, bounce_reason = ${reason}, content = NULL, due_at = NULL
        WHERE ${ofDevice} AND pending AND bounce_reason IS NULL`);
    },

    async revoke(atMs) {
      await tx.execute(sql`
        UPDATE ${devices} SET revoked_at = greatest(revoked_at, ${momentOf(atMs)}) WHERE ${ofDevice}`);
    },

    async save(update, { ranLow } = { ranLow: false }) {
      await tx
        .update(devices)
        .set({
          registrationId: update.registrationId,
          identityKey: update.identity?.identityKey ?? null,
          identityCanonical: update.identity?.canonicalKey ?? null,
          identityKeyEd25519: update.identity?.identityKeyEd25519 ?? null,
          signedPreKeyExpiresAt:
            update.signedPreKeyExpiresAtMs === null ? null : new Date(update.signedPreKeyExpiresAtMs),
          ecAvailable: update.availableCounts.ec,
          pqAvailable: update.availableCounts.pq,
          ecClaimed: update.claimedCounts.ec,
          pqClaimed: update.claimedCounts.pq,
          offersPq: update.offersPq || update.availableCounts.pq + update.claimedCounts.pq > 0,
          keyVersion: update.keyVersion,
          countVersion: update.countVersion,
          identityVersion: update.identityVersion,
          updatedAt: update.updatedAtMs === null ? null : new Date(update.updatedAtMs),
          restoredAt: update.restoredAtMs === null ? null : new Date(update.restoredAtMs),
          revision: sql`${devices.revision} + 1`,
          ...(ranLow ? { lowNoticeVersion: update.countVersion } : {}),
        })
        .where(ofDevice);
    },
  };

  function usedIdsAmong(kind: PreKeyKind, canonicalKey: Uint8Array, keyIds: readonly number[]): SQL {
    return usedAmong(
      { ...device, canonicalKey: sql`${canonicalKey}` },
      kind,
      sql`${numberArray(keyIds)}::int8[]`,
    );
  }

  /** Those of `keyIds` that neither wait nor were ever used. */
  async function neverSeen(
    kind: PreKeyKind,
    canonicalKey: Uint8Array,
    keyIds: readonly number[],
  ): Promise<number[]> {
    if (keyIds.length === 0) return [];
    const seen = await select<{ id: number }>(
      tx,
      sql`${usedIdsAmong(kind, canonicalKey, keyIds)}
          UNION ALL
          SELECT key_id AS id FROM ${oneTimePreKeys}
          WHERE ${ofDevice} AND kind = ${PRE_KEY_KIND[kind]} AND key_id = ANY (${numberArray(keyIds)}::int8[])`,
    );
    const unseen = new Set(keyIds);
    for (const { id } of seen) unseen.delete(id);
    return [...unseen];
  }

  async function retire(kind: PreKeyKind, nowMs: number): Promise<void> {
    await tx
      .update(signedPreKeys)
      .set({ replacedAt: new Date(nowMs) })
      .where(
        and(
          eq(signedPreKeys.userId, userId),
          eq(signedPreKeys.deviceId, deviceId),
          eq(signedPreKeys.kind, PRE_KEY_KIND[kind]),
          sql`${signedPreKeys.replacedAt} IS NULL`,
        ),
      );
  }
}

/** Holds the device's row until the transaction ends. @returns null where there is none */
export async function lockKeys(
  tx: Transaction,
  { userId, deviceId }: DeviceAddress,
): Promise<DeviceKeys | null> {
  const ofDevice = sql`user_id = ${userId} AND device_id = ${deviceId}`;
  const [row] = await select<KeysRow>(
    tx,
    sql`SELECT ${KEYS_COLUMNS} FROM ${devices} WHERE ${ofDevice} FOR NO KEY UPDATE`,
  );
  if (row === undefined) return null;
  // By a statement of its own: that which waited for the row would show the others as they were before.
  const active =
    row.signed_prekey_id === null
      ? []
      : await tx
          .select()
          .from(signedPreKeys)
          .where(
            and(
              eq(signedPreKeys.userId, userId),
              eq(signedPreKeys.deviceId, deviceId),
              isNull(signedPreKeys.replacedAt),
            ),
          );
  const activeOf = (kind: PreKeyKind) => active.find((key) => key.kind === PRE_KEY_KIND[kind]) ?? null;
  return toKeys(row, { ec: activeOf('ec'), pq: activeOf('pq') });
}

/** Two encodings of one EC key are one key: the last 32 bytes are what counts. */
function keyDigest(kind: PreKeyKind, publicKey: Uint8Array): Buffer {
  return createHash('sha256')
    .update(kind === 'ec' ? publicKey.subarray(-32) : publicKey)
    .digest();
}
