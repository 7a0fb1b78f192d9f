/** What retention looks for and drops in PostgreSQL: old claims, signed prekeys replaced long ago, idle devices. */
import { type SQL, sql } from 'drizzle-orm';
import type { KeyStore, PreKeyKind } from '../../ports/key-store.ts';
import type { DeviceAddress } from '../../protocol/ids.ts';
import { type Database, select } from './database.ts';
import { devices, ENVELOPE_KIND, messages, PRE_KEY_KIND, prekeyClaims, signedPreKeys } from './schema.ts';
import { momentOf } from './time-sql.ts';
import { foldClaims, foldReplacedSignedPreKeys } from './used-ids.ts';

export function createKeyRetention(database: Database): Pick<KeyStore, 'sweep' | 'findIdle'> {
  return {
    async sweep({ claimedBeforeMs, replacedBeforeMs, limit }) {
      const due = await database.run(
        async (db) =>
          await select<{ user_id: string; device_id: number; has_replaced: boolean }>(
            db,
            sql`
            SELECT user_id, device_id, bool_or(is_replaced) AS has_replaced FROM (
              (SELECT user_id, device_id, false AS is_replaced FROM ${prekeyClaims}
               WHERE claimed_at < ${momentOf(claimedBeforeMs)} ORDER BY claimed_at LIMIT ${limit})
              UNION ALL
              (SELECT user_id, device_id, true FROM ${signedPreKeys}
               WHERE replaced_at < ${momentOf(replacedBeforeMs)} ORDER BY replaced_at LIMIT ${limit})
            ) old GROUP BY user_id, device_id ORDER BY user_id, device_id`,
          ),
      );
      const replaced = sql`replaced_at < ${momentOf(replacedBeforeMs)}`;

      async function sweepDevice(device: DeviceAddress, hasReplaced: boolean): Promise<number> {
        const { userId, deviceId } = device;
        const old = sql`claimed_at < ${momentOf(claimedBeforeMs)}`;
        // What lies on the disk is fetched while nobody waits for the device.
        await database.run(
          async (db) =>
            await db.execute(sql`
              SELECT count(claimed_at) FROM (
                SELECT claimed_at FROM ${prekeyClaims}
                WHERE user_id = ${userId} AND device_id = ${deviceId} AND ${old} LIMIT ${limit}) c`),
        );
        return await database.upkeep(async (tx) => {
          const [locked] = await select<{ identity_canonical: Uint8Array | null }>(
            tx,
            sql`SELECT identity_canonical FROM ${devices}
                WHERE user_id = ${userId} AND device_id = ${deviceId} FOR NO KEY UPDATE`,
          );
          // Claims and signed prekeys are of the present identity alone; without one there are none.
          if (locked?.identity_canonical == null) return 0;
          const canonicalKey = locked.identity_canonical;
          let count = await foldClaims(tx, device, canonicalKey, old, limit);
          // A record that names a dropped key is no answer any more: such go first, and the key with the last of them.
          // Each was claimed before the key was replaced.
          if (count < limit && hasReplaced) {
            const naming = sql`claimed_at < ${momentOf(replacedBeforeMs)} AND ${namesOne(replaced)}`;
            count += await foldClaims(tx, device, canonicalKey, naming, limit - count);
            if (count < limit) count += await foldReplacedSignedPreKeys(tx, device, canonicalKey, replaced);
          }
          if (count > 0) {
            await tx.execute(sql`
              UPDATE ${devices} SET revision = revision + 1 WHERE user_id = ${userId} AND device_id = ${deviceId}`);
          }
          return count;
        });
      }

      let removed = 0;
      for (let at = 0; at < due.length; at += SWEPT_AT_ONCE) {
        const counts = await Promise.all(
          due
            .slice(at, at + SWEPT_AT_ONCE)
            .map((row) => sweepDevice({ userId: row.user_id, deviceId: row.device_id }, row.has_replaced)),
        );
        removed += counts.reduce((sum, count) => sum + count, 0);
      }
      return removed;
    },

    async findIdle({ idleBeforeMs, after, limit }) {
      const rows = await database.run(
        async (db) =>
          await select<{ user_id: string; device_id: number; is_idle: boolean | null }>(
            db,
            sql`
            SELECT user_id, device_id, CASE
                WHEN identity_key IS NOT NULL THEN ${lastUsedAt} < ${momentOf(idleBeforeMs)}
                -- A scalar: EXISTS could be planned as one scan of all messages.
                ELSE (
                  SELECT true FROM ${messages} m
                  WHERE m.user_id = ${devices}.user_id AND m.device_id = ${devices}.device_id
                    AND m.pending AND m.kind = ${sql.raw(String(ENVELOPE_KIND.message))} LIMIT 1)
              END AS is_idle
            FROM ${devices}
            WHERE (user_id, device_id) > (${after?.userId ?? ''}, ${after?.deviceId ?? 0}::int2)
            ORDER BY user_id, device_id LIMIT ${limit}`,
          ),
      );
      const found = rows.map((row) => ({ userId: row.user_id, deviceId: row.device_id }));
      return {
        idle: found.filter((_, index) => rows[index]!.is_idle === true),
        last: found.length < limit ? null : found.at(-1)!,
      };
    },
  };
}

/** Devices that a sweep has in hand at once: the other connections are left to those who wait for an answer. */
const SWEPT_AT_ONCE = 2;

/** What counts as use of a device; null, which is never long ago, where nothing is known. */
export const lastUsedAt = sql`greatest(served_at, updated_at, restored_at)`;

/** Whether a claim record names a signed or last-resort prekey of which `which` holds. */
function namesOne(which: SQL): SQL {
  const named = (kind: PreKeyKind, idColumn: string): SQL => sql`EXISTS (
  SELECT 1 FROM ${signedPreKeys} s
  WHERE s.user_id = ${prekeyClaims}.user_id AND s.device_id = ${prekeyClaims}.device_id
    AND s.kind = ${sql.raw(String(PRE_KEY_KIND[kind]))} AND s.key_id = ${prekeyClaims}.${sql.raw(idColumn)} AND s.${which})`;
  return sql`(${named('ec', 'signed_prekey_id')} OR ${named('pq', 'pq_last_resort_prekey_id')})`;
}
