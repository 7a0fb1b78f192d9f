/** The ids that can't be used again under an identity: claimed, withdrawn and replaced keys end as ranges of ids. */
import { type SQL, sql } from 'drizzle-orm';
import type { PreKeyKind } from '../../ports/key-store.ts';
import type { DeviceAddress } from '../../protocol/ids.ts';
import { numberArray } from './array-literal.ts';
import { hotStatement, prepared, select, type Transaction } from './database.ts';
import { devices, PRE_KEY_KIND, prekeyClaims, signedPreKeys, usedPreKeyIds } from './schema.ts';

const { placeholder } = sql;

/** Whose used ids, and under which identity. */
type UsedOf = Record<'userId' | 'deviceId' | 'canonicalKey', SQL>;

/**
 * Those of `keyIds`, of type `int8[]`, that were handed out or withdrawn under an identity, as rows `(id)`.
 * Claims are probed for each id, however many there are of the device; the used ids are read once, by an intersection,
 * since a look for each id would unpack them all each time.
 */
export function usedAmong({ userId, deviceId, canonicalKey }: UsedOf, kind: PreKeyKind, keyIds: SQL): SQL {
  const column = sql.raw(kind === 'ec' ? 'ec_key_id' : 'pq_key_id');
  // No UNION: PostgreSQL would make a table for the hundred thousand rows that it expects, each time.
  return sql`
    SELECT l.id FROM unnest(${keyIds}) AS l (id)
    CROSS JOIN LATERAL (
      SELECT 1 FROM ${prekeyClaims} c
      WHERE c.user_id = ${userId} AND c.device_id = ${deviceId} AND c.${column} = l.id
      LIMIT 1
    ) claimed
    -- Claims are of the present identity alone: under another one they say nothing.
    WHERE (SELECT v.identity_canonical = ${canonicalKey} FROM ${devices} v
           WHERE v.user_id = ${userId} AND v.device_id = ${deviceId})
    UNION ALL
    SELECT generate_series(lower(r.run), upper(r.run) - 1) AS id
    FROM ${usedPreKeyIds} u
    CROSS JOIN LATERAL unnest(u.ids * (
      SELECT coalesce(range_agg(int8range(l.id, l.id, '[]')), '{}') FROM unnest(${keyIds}) AS l (id)
    )) AS r (run)
    WHERE u.user_id = ${userId} AND u.device_id = ${deviceId}
      AND u.identity_canonical = ${canonicalKey} AND u.kind = ${sql.raw(String(PRE_KEY_KIND[kind]))} AND NOT u.signed`;
}

/** Turns claim records into used ids. @returns how many, at most `limit` where there is one */
export async function foldClaims(
  tx: Transaction,
  device: DeviceAddress,
  canonicalKey: Uint8Array,
  which: SQL,
  limit: number | null,
): Promise<number> {
  const folded = await select<{ ec_key_id: number | null; pq_key_id: number | null }>(
    tx,
    sql`
    DELETE FROM ${prekeyClaims}
    WHERE ctid = ANY (ARRAY(
      SELECT ctid FROM ${prekeyClaims}
      WHERE user_id = ${device.userId} AND device_id = ${device.deviceId} AND ${which}
      LIMIT ${limit === null ? sql`ALL` : limit}))
    RETURNING ec_key_id, pq_key_id`,
  );
  const ids = (column: 'ec_key_id' | 'pq_key_id') =>
    folded.map((row) => row[column]).filter((keyId) => keyId !== null);
  await markUsed(tx, device, canonicalKey, ids('ec_key_id'), { kind: PRE_KEY_KIND.ec, signed: false });
  await markUsed(tx, device, canonicalKey, ids('pq_key_id'), { kind: PRE_KEY_KIND.pq, signed: false });
  return folded.length;
}

/** Turns the signed and last-resort prekeys of which `which` holds into used ids. @returns how many */
export async function foldReplacedSignedPreKeys(
  tx: Transaction,
  device: DeviceAddress,
  canonicalKey: Uint8Array,
  which: SQL,
): Promise<number> {
  const folded = await select<{ kind: number; key_id: number }>(
    tx,
    sql`DELETE FROM ${signedPreKeys}
        WHERE user_id = ${device.userId} AND device_id = ${device.deviceId} AND ${which}
        RETURNING kind, key_id`,
  );
  for (const kind of Object.values(PRE_KEY_KIND)) {
    const ids = folded.filter((row) => row.kind === kind).map((row) => row.key_id);
    await markUsed(tx, device, canonicalKey, ids, { kind, signed: true });
  }
  return folded.length;
}

const markUsedStatement = hotStatement(sql`
INSERT INTO ${usedPreKeyIds} AS u (user_id, device_id, identity_canonical, kind, signed, ids, unseen_count)
SELECT ${placeholder('userId')}, ${placeholder('deviceId')}::int2, ${placeholder('canonicalKey')}::bytea,
       ${placeholder('kind')}::int2, ${placeholder('signed')}::bool, range_agg(int8range(l.id, l.id, '[]')),
       ${placeholder('unseenCount')}::int4
FROM unnest(${placeholder('keyIds')}::int8[]) AS l (id)
ON CONFLICT (user_id, device_id, identity_canonical, kind, signed) DO UPDATE
SET ids = u.ids + excluded.ids, unseen_count = u.unseen_count + excluded.unseen_count`);

/** Keeps ids as used. @param how.unseenCount how many of them neither waited nor were ever used, for `withdraw` to bound */
export async function markUsed(
  tx: Transaction,
  device: DeviceAddress,
  canonicalKey: Uint8Array,
  keyIds: readonly number[],
  how: { kind: number; signed: boolean; unseenCount?: number },
): Promise<void> {
  if (keyIds.length === 0) return;
  const values = { unseenCount: 0, ...how, canonicalKey, keyIds: numberArray(keyIds) };
  await prepared(tx, markUsedStatement, { ...device, ...values });
}
