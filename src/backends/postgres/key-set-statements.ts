/** The statements of a change of keys, prepared: most changes fill a pool up, and so one comes with every few dozen claims. */
import { sql } from 'drizzle-orm';
import type { DeviceKeysUpdate, PreKeyKind } from '../../ports/key-store.ts';
import { hotStatement } from './database.ts';
import { ofDevice } from './device-sql.ts';
import { KEYS_COLUMNS, type KeysRow } from './key-reader.ts';
import { devices, oneTimePreKeys, signedPreKeys, usedPreKeyIds } from './schema.ts';
import { momentOf } from './time-sql.ts';
import { usedAmong } from './used-ids.ts';

const { placeholder } = sql;

const ofKind = sql`${ofDevice} AND kind = ${placeholder('kind')}`;
const listed = sql`key_id = ANY (${placeholder('keyIds')}::int8[])`;

/** Not an array literal, which PostgreSQL reads letter by letter: of a hundred PQ prekeys for 3 ms. */
const listOfTexts = (name: string) => sql`string_to_array(${placeholder(name)}::text, ',', '')`;

export const addDeviceStatement = hotStatement(sql`
INSERT INTO ${devices} (user_id, device_id) VALUES (${placeholder('userId')}, ${placeholder('deviceId')})
ON CONFLICT DO NOTHING`);

export const lockStatement = hotStatement<KeysRow>(
  sql`SELECT ${KEYS_COLUMNS} FROM ${devices} WHERE ${ofDevice} FOR NO KEY UPDATE`,
);

export const activeKeysStatement = hotStatement<{
  kind: number;
  key_id: number;
  public_key: Uint8Array;
  signature: Uint8Array;
}>(sql`
SELECT kind, key_id, public_key, signature FROM ${signedPreKeys} WHERE ${ofDevice} AND replaced_at IS NULL`);

export const fenceStatement = hotStatement(
  sql`UPDATE ${devices} SET fence = ${placeholder('fence')} WHERE ${ofDevice}`,
);

const usedStatementOf = (kind: PreKeyKind) =>
  hotStatement<{ id: number }>(
    usedAmong(
      {
        userId: sql`${placeholder('userId')}`,
        deviceId: sql`${placeholder('deviceId')}`,
        canonicalKey: sql`${placeholder('canonicalKey')}`,
      },
      kind,
      sql`${placeholder('keyIds')}::int8[]`,
    ),
  );

export const usedStatement = { ec: usedStatementOf('ec'), pq: usedStatementOf('pq') };

export const pooledStatement = hotStatement<{ key_id: number; public_key: Uint8Array }>(
  sql`SELECT key_id, public_key FROM ${oneTimePreKeys} WHERE ${ofKind} AND ${listed}`,
);

/** One statement in the order of the list, so that the identity column numbers the keys in it. */
export const addToPoolStatement = hotStatement(sql`
INSERT INTO ${oneTimePreKeys} (user_id, device_id, kind, key_id, public_key, signature)
SELECT ${placeholder('userId')}, ${placeholder('deviceId')}::int2, ${placeholder('kind')}::int2, k.key_id,
       decode(k.public_key, 'base64'), decode(k.signature, 'base64')
FROM unnest(
  ${placeholder('keyIds')}::int8[], ${listOfTexts('publicKeys')}, ${listOfTexts('signatures')}
) WITH ORDINALITY AS k (key_id, public_key, signature, nth)
ORDER BY k.nth`);

/** What is kept of ids that were withdrawn without ever having been in the pool. */
export const unseenStatement = hotStatement<{ unseen_count: number; known: boolean; others: number }>(sql`
SELECT coalesce(sum(unseen_count) FILTER (
         WHERE identity_canonical = ${placeholder('canonicalKey')} AND kind = ${placeholder('kind')}), 0)::int4
         AS unseen_count,
       coalesce(bool_or(identity_canonical = ${placeholder('canonicalKey')}), false) AS known,
       count(DISTINCT identity_canonical)::int4 AS others
FROM ${usedPreKeyIds} WHERE ${ofDevice}`);

export const withdrawStatement = hotStatement<{ key_id: number }>(
  sql`DELETE FROM ${oneTimePreKeys} WHERE ${ofKind} AND ${listed} RETURNING key_id`,
);

export const withdrawAllStatement = hotStatement<{ key_id: number }>(
  sql`DELETE FROM ${oneTimePreKeys} WHERE ${ofKind} RETURNING key_id`,
);

export const signedPreKeyStatement = hotStatement<{ public_key: Uint8Array; is_active: boolean }>(sql`
SELECT public_key, replaced_at IS NULL AS is_active FROM ${signedPreKeys}
WHERE ${ofKind} AND key_id = ${placeholder('keyId')}`);

export const usedSignedPreKeyStatement = hotStatement<{
  retired: boolean;
  wiped: boolean;
  wiped_key_digest: Uint8Array | null;
}>(sql`
SELECT ids @> ${placeholder('keyId')}::int8 AS retired, coalesce(wiped_key_id = ${placeholder('keyId')}::int8, false) AS wiped,
       wiped_key_digest
FROM ${usedPreKeyIds} WHERE ${ofKind} AND identity_canonical = ${placeholder('canonicalKey')} AND signed`);

export const retireStatement = hotStatement(sql`
UPDATE ${signedPreKeys} SET replaced_at = ${momentOf(placeholder('nowMs'))} WHERE ${ofKind} AND replaced_at IS NULL`);

export const addSignedPreKeyStatement = hotStatement(sql`
INSERT INTO ${signedPreKeys} (user_id, device_id, kind, key_id, public_key, signature)
VALUES (${placeholder('userId')}, ${placeholder('deviceId')}, ${placeholder('kind')}, ${placeholder('keyId')},
        ${placeholder('publicKey')}, ${placeholder('signature')})`);

const activateStatementOf = (column: string) =>
  hotStatement(sql`UPDATE ${devices} SET ${sql.raw(column)} = ${placeholder('keyId')} WHERE ${ofDevice}`);

export const activateStatement = {
  ec: activateStatementOf('signed_prekey_id'),
  pq: activateStatementOf('pq_last_resort_prekey_id'),
};

export const saveStatement = hotStatement(sql`
UPDATE ${devices} SET
  registration_id = ${placeholder('registrationId')}::int4,
  identity_key = ${placeholder('identityKey')}::bytea,
  identity_canonical = ${placeholder('canonicalKey')}::bytea,
  identity_key_ed25519 = ${placeholder('identityKeyEd25519')}::bytea,
  signed_prekey_expires_at = ${momentOf(placeholder('signedPreKeyExpiresAtMs'))},
  ec_available = ${placeholder('ecAvailable')},
  pq_available = ${placeholder('pqAvailable')},
  ec_claimed = ${placeholder('ecClaimed')},
  pq_claimed = ${placeholder('pqClaimed')},
  offers_pq = ${placeholder('offersPq')},
  key_version = ${placeholder('keyVersion')},
  count_version = ${placeholder('countVersion')}::int8,
  identity_version = ${placeholder('identityVersion')},
  updated_at = ${momentOf(placeholder('updatedAtMs'))},
  restored_at = ${momentOf(placeholder('restoredAtMs'))},
  revision = revision + 1,
  low_notice_version = CASE WHEN ${placeholder('ranLow')} THEN ${placeholder('countVersion')}::int8 ELSE low_notice_version END
WHERE ${ofDevice}`);

export function bindSave(update: DeviceKeysUpdate, ranLow: boolean): Record<string, unknown> {
  const { identity, availableCounts, claimedCounts, offersPq, ...rest } = update;
  return {
    ...rest,
    identityKey: identity?.identityKey ?? null,
    canonicalKey: identity?.canonicalKey ?? null,
    identityKeyEd25519: identity?.identityKeyEd25519 ?? null,
    ecAvailable: availableCounts.ec,
    pqAvailable: availableCounts.pq,
    ecClaimed: claimedCounts.ec,
    pqClaimed: claimedCounts.pq,
    offersPq: offersPq || availableCounts.pq + claimedCounts.pq > 0,
    ranLow,
  };
}
