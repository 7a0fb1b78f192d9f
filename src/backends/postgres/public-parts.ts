/**
 * The parts of a bundle that are the same for every claimer. They are cached by what never changes: under one identity
 * version a signed prekey id stands for the same bytes for ever, so no entry can grow stale. The identity key itself is in
 * it because a restored backup gives out the same numbers again.
 */
import { sql } from 'drizzle-orm';
import { createRecent } from '../../lib/recent.ts';
import type { ClaimedBundle, SignedWireKey } from '../../ports/key-store.ts';
import { addressKey, type DeviceAddress } from '../../protocol/ids.ts';
import { numberArray, textArray } from './array-literal.ts';
import { base64 } from './base64.ts';
import { type Database, hotStatement } from './database.ts';
import { devices, PRE_KEY_KIND, signedPreKeys } from './schema.ts';

export interface PublicPartsId {
  userId: string;
  deviceId: number;
  identityVersion: number;
  /** In hexadecimal digits. */
  canonicalKey: string;
  signedPreKeyId: number;
  pqLastResortPreKeyId: number | null;
}

export interface PublicParts {
  identity: ClaimedBundle['identity'];
  signedPreKey: SignedWireKey;
  pqLastResortPreKey: (SignedWireKey & { lastResort: true }) | null;
}

interface Entry {
  id: PublicPartsId;
  parts: PublicParts;
}

/** Devices in one generation of the cache, of which there are two. Each takes some 3 KB with a last-resort prekey. */
const GENERATION_MAX = 5_000;

export interface PublicPartsCache {
  /** Whether something is known of the device, if only of an earlier key set. */
  knows(device: DeviceAddress): boolean;
  learn(id: PublicPartsId, parts: PublicParts): void;
  /** @returns the parts in the order of `ids`, asked for where they are not known; null where the key set was wiped meanwhile */
  read(ids: readonly PublicPartsId[]): Promise<(PublicParts | null)[]>;
}

export function createPublicParts(database: Database): PublicPartsCache {
  const entries = createRecent<Entry>(GENERATION_MAX);

  /** @returns null where nothing is known, or only what another key set had */
  function cached(id: PublicPartsId): PublicParts | null {
    const entry = entries.get(addressKey(id));
    return entry !== undefined && isSame(entry.id, id) ? entry.parts : null;
  }

  return {
    knows: (device) => entries.get(addressKey(device)) !== undefined,

    learn(id, parts) {
      entries.set(addressKey(id), { id, parts });
    },

    async read(ids) {
      const parts = ids.map(cached);
      const missing = new Map<string, { id: PublicPartsId; indexes: number[] }>();
      ids.forEach((id, index) => {
        if (parts[index] !== null) return;
        const key = `${addressKey(id)}/${id.identityVersion}/${id.signedPreKeyId}/${id.pqLastResortPreKeyId}`;
        const known = missing.get(key);
        if (known === undefined) missing.set(key, { id, indexes: [index] });
        else known.indexes.push(index);
      });
      if (missing.size > 0) {
        const asked = [...missing.values()];
        const rows = await database.hot(publicPartsStatement, bind(asked.map(({ id }) => id)));
        for (const row of rows) {
          const { id, indexes } = asked[row.ord]!;
          const found = toParts(row);
          for (const index of indexes) parts[index] = found;
          entries.set(addressKey(id), { id, parts: found });
        }
      }
      return parts;
    },
  };
}

function isSame(a: PublicPartsId, b: PublicPartsId): boolean {
  return (
    a.identityVersion === b.identityVersion &&
    a.signedPreKeyId === b.signedPreKeyId &&
    a.pqLastResortPreKeyId === b.pqLastResortPreKeyId &&
    a.canonicalKey === b.canonicalKey
  );
}

interface PublicPartsRow {
  ord: number;
  identity_key: string;
  identity_key_ed25519: string | null;
  signed_key_id: number;
  signed_public_key: string;
  signed_signature: string;
  pq_key_id: number | null;
  pq_public_key: string | null;
  pq_signature: string | null;
}

const publicPartsStatement = hotStatement<PublicPartsRow>(sql`
SELECT (a.nth - 1)::int4 AS ord, ${base64('d.identity_key')} AS identity_key,
       ${base64('d.identity_key_ed25519')} AS identity_key_ed25519, s.key_id AS signed_key_id,
       ${base64('s.public_key')} AS signed_public_key, ${base64('s.signature')} AS signed_signature,
       p.key_id AS pq_key_id, ${base64('p.public_key')} AS pq_public_key, ${base64('p.signature')} AS pq_signature
FROM unnest(
  ${sql.placeholder('userIds')}::text[], ${sql.placeholder('deviceIds')}::int2[],
  ${sql.placeholder('identityVersions')}::int8[], ${sql.placeholder('signedPreKeyIds')}::int8[],
  ${sql.placeholder('pqLastResortPreKeyIds')}::int8[]
) WITH ORDINALITY AS a (user_id, device_id, identity_version, signed_id, pq_id, nth)
CROSS JOIN LATERAL (
  SELECT v.identity_key, v.identity_key_ed25519 FROM ${devices} v
  WHERE v.user_id = a.user_id AND v.device_id = a.device_id AND v.identity_version = a.identity_version
    AND v.identity_key IS NOT NULL
  LIMIT 1
) d
CROSS JOIN LATERAL (
  SELECT k.key_id, k.public_key, k.signature FROM ${signedPreKeys} k
  WHERE k.user_id = a.user_id AND k.device_id = a.device_id AND k.kind = ${sql.raw(String(PRE_KEY_KIND.ec))}
    AND k.key_id = a.signed_id
  LIMIT 1
) s
LEFT JOIN LATERAL (
  SELECT k.key_id, k.public_key, k.signature FROM ${signedPreKeys} k
  WHERE k.user_id = a.user_id AND k.device_id = a.device_id AND k.kind = ${sql.raw(String(PRE_KEY_KIND.pq))}
    AND k.key_id = a.pq_id
  LIMIT 1
) p ON true`);

function bind(ids: readonly PublicPartsId[]): Record<string, string> {
  return {
    userIds: textArray(ids.map((id) => id.userId)),
    deviceIds: numberArray(ids.map((id) => id.deviceId)),
    identityVersions: numberArray(ids.map((id) => id.identityVersion)),
    signedPreKeyIds: numberArray(ids.map((id) => id.signedPreKeyId)),
    pqLastResortPreKeyIds: numberArray(ids.map((id) => id.pqLastResortPreKeyId)),
  };
}

function toParts(row: PublicPartsRow): PublicParts {
  return {
    identity: { identityKey: row.identity_key, identityKeyEd25519: row.identity_key_ed25519 },
    signedPreKey: {
      keyId: row.signed_key_id,
      publicKey: row.signed_public_key,
      signature: row.signed_signature,
    },
    pqLastResortPreKey:
      row.pq_key_id === null
        ? null
        : {
            keyId: row.pq_key_id,
            publicKey: row.pq_public_key!,
            signature: row.pq_signature!,
            lastResort: true,
          },
  };
}
