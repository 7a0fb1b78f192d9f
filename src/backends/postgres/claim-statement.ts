/**
 * The claim: one statement for a whole batch of bundle requests. This file is the place where "at most once" is decided.
 *
 * How it is exact. Every change of a device's keys, pools and claims holds the lock of the device's row and raises its
 * `revision`. The statement reads the revision in its snapshot, then locks the row at its place, which gives place and
 * revision as they stand, or nothing. Where both are the same, the snapshot's view of the pool and of earlier claims is
 * the present state, and nobody can change it before this statement commits. Where they differ, or another holds the row,
 * nothing is claimed of that device and the request comes back as `again`; a transaction that locks first, waiting, and
 * then runs this very statement serves it. So one held device never keeps the rest of a batch.
 *
 * How it stays fast. Rows are locked in sorted order, so that two batches can't deadlock. Tables are reached only
 * through LATERAL … LIMIT (an index probe per row, whatever the statistics say) or by `ctid`: no plan can turn into a
 * scan. Measured beside it: one statement that ranks and deletes without lock told 33 of 40 claimers "none" while keys
 * were there; SKIP LOCKED has to look again to avoid the same.
 */
import { type SQL, sql } from 'drizzle-orm';
import { base64 } from './base64.ts';
import { hotStatement } from './database.ts';
import { devices, oneTimePreKeys, PRE_KEY_KIND, prekeyClaims, signedPreKeys } from './schema.ts';

export interface ClaimRow {
  ord: number;
  device_id: number;
  /** `again`: the device is being changed, or was between snapshot and lock, and nothing was claimed. */
  outcome: 'claimed' | 'repeated' | 'again';
  registration_id: number;
  identity_version: number;
  /** In hexadecimal digits. */
  identity_canonical: string;
  signed_prekey_id: number;
  pq_last_resort_prekey_id: number | null;
  ec_key_id: number | null;
  /** In base64, as are all keys and signatures: the form in which they are passed on. */
  ec_public_key: string | null;
  pq_key_id: number | null;
  pq_public_key: string | null;
  pq_signature: string | null;
  is_target_spared: boolean;
  ran_low: boolean;
}

/** The public parts of the bundle, where they were asked for and there are any. */
export interface ToldParts {
  identity_key: string | null;
  identity_key_ed25519: string | null;
  signed_public_key: string | null;
  signed_signature: string | null;
  last_resort_public_key: string | null;
  last_resort_signature: string | null;
}

/** How the statement names its values: a placeholder where it is prepared, the value itself inside a transaction. */
type ValueOf = (name: keyof ClaimValues) => unknown;

/** Arrays are array literals, one element per request; `ords` numbers the requests. */
export interface ClaimValues {
  ords: string;
  userIds: string;
  firstDeviceIds: string;
  lastDeviceIds: string;
  exceptDeviceIds: string;
  claimerUserIds: string;
  claimerDeviceIds: string;
  claimIds: string;
  /** Requests that are to spend no key: they are answered and remembered all the same. */
  sparedTargets: string;
  /** Requests that are to be told the public parts of their device's bundle too; for the statement that tells them. */
  wantedParts?: string;
  lowThreshold: number;
  nowMs: number;
}

/** Whether the key that a request gets is the last one, or the first that leaves fewer than the threshold. */
function ranLow(value: ValueOf, keyId: string, available: string): SQL {
  const left = sql.raw(`${available} - w.nth`);
  return sql`(${sql.raw(keyId)} IS NOT NULL AND (${left} = 0 OR ${left} = ${value('lowThreshold')}::int4 - 1))`;
}

/** The unclaimed keys of the device of a request `w`, oldest first. */
function unclaimed(kind: number, columns: string, condition: string): SQL {
  return sql`
    SELECT ${sql.raw(columns)} FROM ${oneTimePreKeys} k
    WHERE ${sql.raw(condition)} AND k.user_id = w.user_id AND k.device_id = w.device_id AND k.kind = ${sql.raw(String(kind))}
    ORDER BY k.user_id, k.device_id, k.kind, k.sequence`;
}

/** Where the keys lie that the requests of one device get, where they are several: a walk for each would be of all before it. */
function placesOf(kind: number): SQL {
  return sql`CASE WHEN w.spending > 1 THEN ARRAY(${unclaimed(kind, 'k.ctid', 'true')} LIMIT w.spending) END`;
}

const KEY_COLUMNS = 'k.ctid AS row_place, k.key_id, k.public_key, k.signature';

/** The key that a request `w` gets. */
function keyOf(kind: number, { available, places }: { available: string; places: string }): SQL {
  return sql`
    (${unclaimed(kind, KEY_COLUMNS, `NOT w.spares AND w.spending = 1 AND ${available} > 0`)} LIMIT 1)
    UNION ALL
    SELECT ${sql.raw(KEY_COLUMNS)} FROM ${oneTimePreKeys} k
    WHERE NOT w.spares AND w.spending > 1 AND k.ctid = (${sql.raw(places)})[w.nth]`;
}

/** The signed key of the answer `x`. */
function signedKey(kind: number, keyId: string): SQL {
  return sql`
    SELECT k.public_key, k.signature FROM ${signedPreKeys} k
    WHERE x.wants_parts AND k.user_id = x.user_id AND k.device_id = x.device_id AND k.kind = ${sql.raw(String(kind))}
      AND k.key_id = ${sql.raw(keyId)}
    LIMIT 1`;
}

/** What the statement has besides where it tells the public parts too: nothing of it costs those who know them. */
function publicParts(value: ValueOf) {
  return {
    argument: sql`, ${value('wantedParts')}::bool[]`,
    wants: sql`, wants_parts`,
    ofAsked: sql`, a.wants_parts`,
    ofWanted: sql`, w.wants_parts`,
    columns: sql`, ${base64('i.identity_key')} AS identity_key, ${base64('i.identity_key_ed25519')} AS identity_key_ed25519,
       ${base64('s.public_key')} AS signed_public_key, ${base64('s.signature')} AS signed_signature,
       ${base64('r.public_key')} AS last_resort_public_key, ${base64('r.signature')} AS last_resort_signature`,
    joins: sql`
LEFT JOIN LATERAL (
  SELECT v.identity_key, v.identity_key_ed25519 FROM ${devices} v
  WHERE x.wants_parts AND v.ctid = x.row_place
  LIMIT 1
) i ON true
LEFT JOIN LATERAL (${signedKey(PRE_KEY_KIND.ec, 'x.signed_prekey_id')}) s ON true
LEFT JOIN LATERAL (${signedKey(PRE_KEY_KIND.pq, 'x.pq_last_resort_prekey_id')}) r ON true`,
  };
}

const NO_PARTS = {
  argument: sql``,
  wants: sql``,
  ofAsked: sql``,
  ofWanted: sql``,
  columns: sql``,
  joins: sql``,
};

export function claimSql(value: ValueOf, { tellsParts }: { tellsParts: boolean }): SQL {
  const parts = tellsParts ? publicParts(value) : NO_PARTS;
  return sql`
-- Each request with each device that it asks for, as the snapshot has them, and what it was answered before.
WITH wanted AS MATERIALIZED (
  SELECT a.ord, a.user_id, d.device_id, a.claimer_user_id, a.claimer_device_id, a.claim_id, d.row_place, d.revision,
         d.identity_canonical, c.registration_id, c.identity_version, c.signed_prekey_id, c.pq_last_resort_prekey_id,
         c.ec_key_id, c.ec_public_key, c.pq_key_id, c.pq_public_key, c.pq_signature,
         c.claim_id IS NULL AS is_new${parts.ofAsked}, coalesce(c.is_target_spared, a.spares) AS spares,
         -- Keys go to the first of a device's requests: those that spend none come last.
         (row_number() OVER of_device)::int4 AS nth,
         (count(*) FILTER (WHERE c.claim_id IS NULL AND NOT a.spares) OVER of_device)::int4 AS spending
  FROM unnest(
    ${value('ords')}::int4[], ${value('userIds')}::text[], ${value('firstDeviceIds')}::int2[],
    ${value('lastDeviceIds')}::int2[], ${value('exceptDeviceIds')}::int2[],
    ${value('claimerUserIds')}::text[], ${value('claimerDeviceIds')}::int2[],
    ${value('claimIds')}::uuid[], ${value('sparedTargets')}::bool[]${parts.argument}
  ) AS a (ord, user_id, first_device_id, last_device_id, except_device_id, claimer_user_id, claimer_device_id, claim_id,
          spares${parts.wants})
  CROSS JOIN LATERAL (
    SELECT v.ctid AS row_place, v.user_id, v.device_id, v.revision, v.identity_version, v.identity_canonical
    FROM ${devices} v
    WHERE v.user_id = a.user_id AND v.device_id BETWEEN a.first_device_id AND a.last_device_id
      AND v.device_id <> a.except_device_id AND v.identity_key IS NOT NULL AND v.signed_prekey_id IS NOT NULL
    ORDER BY v.user_id, v.device_id
    LIMIT 127
  ) d
  LEFT JOIN LATERAL (
    SELECT p.*
    FROM ${prekeyClaims} p
    WHERE p.user_id = a.user_id AND p.device_id = d.device_id AND p.claimer_user_id = a.claimer_user_id
      AND p.claimer_device_id = a.claimer_device_id AND p.claim_id = a.claim_id
      AND p.identity_version = d.identity_version
    LIMIT 1
  ) c ON true
  WINDOW of_device AS (
    PARTITION BY d.user_id, d.device_id ORDER BY c.claim_id IS NOT NULL, a.spares, a.ord
    ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING
  )
  ORDER BY d.user_id, d.device_id
),
-- Each device once: all its requests are claimed for, or none.
locked AS MATERIALIZED (
  SELECT l.*, ${placesOf(PRE_KEY_KIND.ec)} AS ec_places, ${placesOf(PRE_KEY_KIND.pq)} AS pq_places
  FROM wanted w
  CROSS JOIN LATERAL (
    SELECT v.ctid AS row_place, v.registration_id, v.identity_version, v.signed_prekey_id, v.pq_last_resort_prekey_id,
           v.ec_available, v.pq_available, v.revision
    FROM ${devices} v
    WHERE v.ctid = w.row_place
    LIMIT 1
    FOR NO KEY UPDATE SKIP LOCKED
  ) l
  -- Some versions of PostgreSQL lock a row that has moved on, and give it as it stands at its new place.
  WHERE w.is_new AND w.nth = 1 AND l.revision = w.revision AND l.row_place = w.row_place
),
answers AS MATERIALIZED (
  SELECT w.ord, w.user_id, w.device_id, w.claimer_user_id, w.claimer_device_id, w.claim_id, w.row_place,
         w.identity_canonical, w.is_new, w.spares${parts.ofWanted}, l.row_place IS NOT NULL AS is_claimed,
         coalesce(w.registration_id, l.registration_id) AS registration_id,
         coalesce(w.identity_version, l.identity_version) AS identity_version,
         coalesce(w.signed_prekey_id, l.signed_prekey_id) AS signed_prekey_id,
         -- Where a request was answered before, there is no row of its own to take from.
         coalesce(w.pq_last_resort_prekey_id, l.pq_last_resort_prekey_id) AS pq_last_resort_prekey_id,
         coalesce(w.ec_key_id, ec.key_id) AS ec_key_id, coalesce(w.ec_public_key, ec.public_key) AS ec_public_key,
         coalesce(w.pq_key_id, pq.key_id) AS pq_key_id, coalesce(w.pq_public_key, pq.public_key) AS pq_public_key,
         coalesce(w.pq_signature, pq.signature) AS pq_signature, ec.row_place AS ec_place, pq.row_place AS pq_place,
         ${ranLow(value, 'ec.key_id', 'l.ec_available')} OR ${ranLow(value, 'pq.key_id', 'l.pq_available')} AS ran_low
  FROM wanted w
  LEFT JOIN locked l ON w.is_new AND l.row_place = w.row_place
  LEFT JOIN LATERAL (
    ${keyOf(PRE_KEY_KIND.ec, { available: 'l.ec_available', places: 'l.ec_places' })}
  ) ec ON true
  LEFT JOIN LATERAL (
    ${keyOf(PRE_KEY_KIND.pq, { available: 'l.pq_available', places: 'l.pq_places' })}
  ) pq ON true
),
taken AS (
  DELETE FROM ${oneTimePreKeys}
  WHERE ctid = ANY (ARRAY(SELECT ec_place FROM answers UNION ALL SELECT pq_place FROM answers))
),
counted AS (
  UPDATE ${devices} d SET
    revision = d.revision + 1,
    count_version = d.count_version + (s.ec_spent + s.pq_spent > 0)::int4,
    ec_available = d.ec_available - s.ec_spent,
    pq_available = d.pq_available - s.pq_spent,
    ec_claimed = d.ec_claimed + s.ec_spent,
    pq_claimed = d.pq_claimed + s.pq_spent,
    low_notice_version = CASE WHEN s.ran_low THEN d.count_version + 1 ELSE d.low_notice_version END
  FROM (
    SELECT row_place, count(ec_place)::int4 AS ec_spent, count(pq_place)::int4 AS pq_spent, bool_or(ran_low) AS ran_low
    FROM answers WHERE is_claimed GROUP BY row_place
  ) s
  -- The rows are reached by the list; the join only tells which of them is whose.
  WHERE d.ctid = ANY (ARRAY(SELECT row_place FROM answers WHERE is_claimed)) AND d.ctid = s.row_place
),
claimed AS (
  INSERT INTO ${prekeyClaims} (
    user_id, device_id, claimer_user_id, claimer_device_id, claim_id, identity_version, registration_id,
    signed_prekey_id, pq_last_resort_prekey_id, ec_key_id, ec_public_key, pq_key_id, pq_public_key, pq_signature,
    is_target_spared, claimed_at)
  SELECT user_id, device_id, claimer_user_id, claimer_device_id, claim_id, identity_version, registration_id,
         signed_prekey_id, pq_last_resort_prekey_id, ec_key_id, ec_public_key, pq_key_id, pq_public_key, pq_signature,
         spares, to_timestamp(${value('nowMs')}::float8 / 1000)
  FROM answers WHERE is_claimed
)
SELECT ord, device_id, CASE WHEN is_claimed THEN 'claimed' WHEN is_new THEN 'again' ELSE 'repeated' END AS outcome,
       registration_id, identity_version, encode(identity_canonical, 'hex') AS identity_canonical, signed_prekey_id,
       pq_last_resort_prekey_id, ec_key_id, ${base64('ec_public_key')} AS ec_public_key, pq_key_id,
       ${base64('pq_public_key')} AS pq_public_key, ${base64('pq_signature')} AS pq_signature,
       spares AS is_target_spared, ran_low${parts.columns}
FROM answers x${parts.joins}`;
}

export const claimStatement = hotStatement<ClaimRow>(claimSql(sql.placeholder, { tellsParts: false }));
export const claimTellingPartsStatement = hotStatement<ClaimRow & ToldParts>(
  claimSql(sql.placeholder, { tellsParts: true }),
);
