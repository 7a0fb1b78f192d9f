/**
 * The claim: one statement for a whole batch of bundle requests. This file is the place where "at most once" is decided.
 *
 * How it is exact. Every change of a device's keys, pools and claims holds the lock of the device's row and raises its
 * `revision`. The statement reads the revision in its snapshot, then locks the row at its place, which gives the revision
 * as it stands, and nothing where the row has moved on. Where both are the same, the snapshot's view of the pool and of earlier claims is the present state, and
 * nobody can change it before this statement commits. Where they differ, or another holds the row, nothing is claimed of
 * that device and the request comes back as `again`; a transaction that locks first, waiting, and then runs this very
 * statement serves it. So one held device never keeps the rest of a batch.
 *
 * How it stays fast. Rows are locked in sorted order, so that two batches can't deadlock. Tables are reached only
 * through LATERAL … LIMIT (an index probe per row, whatever the statistics say), by `ctid`, or through the arbiter
 * index of ON CONFLICT: no plan can turn into a scan. What is joined is numbered by `place` first, so that the joins
 * are of small numbers, by hash. Measured beside it: one statement that ranks and deletes without
 * lock told 33 of 40 claimers "none" while keys were there; SKIP LOCKED has to look again to avoid the same.
 */
import { type SQL, sql } from 'drizzle-orm';
import { hotStatement } from './database.ts';
import { devices, oneTimePreKeys, PRE_KEY_KIND, prekeyClaims } from './schema.ts';

export interface ClaimRow {
  ord: number;
  device_id: number;
  /** `again`: the device is being changed, or was between snapshot and lock, and nothing was claimed. */
  outcome: 'claimed' | 'repeated' | 'again';
  registration_id: number;
  identity_version: number;
  identity_canonical: Uint8Array;
  signed_prekey_id: number;
  pq_last_resort_prekey_id: number | null;
  ec_key_id: number | null;
  ec_public_key: Uint8Array | null;
  pq_key_id: number | null;
  pq_public_key: Uint8Array | null;
  pq_signature: Uint8Array | null;
  is_target_spared: boolean;
  ran_low: boolean;
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
  lowThreshold: number;
  nowMs: number;
}

/** Whether spending takes a pool below the threshold, or empties it. */
function ranLow(value: ValueOf, available: string, spent: string): SQL {
  const before = sql.raw(available);
  const after = sql.raw(`(${available} - ${spent})`);
  const threshold = sql`${value('lowThreshold')}::int4`;
  return sql`(${after} < ${before} AND (${after} = 0 OR (${before} >= ${threshold} AND ${after} < ${threshold})))`;
}

/** The oldest unclaimed keys of each device that needs some, each for the place of the request that gets it. */
function oldestUnclaimed(kind: number, availableColumn: string): SQL {
  return sql`(
  SELECT n.places[p.nth] AS place, p.ctid AS row_place, p.key_id, p.public_key, p.signature
  FROM needed n
  CROSS JOIN LATERAL (
    SELECT o.ctid, o.key_id, o.public_key, o.signature, row_number() OVER (ORDER BY o.sequence) AS nth
    FROM (
      SELECT k.ctid, k.key_id, k.public_key, k.signature, k.sequence
      FROM ${oneTimePreKeys} k
      WHERE k.user_id = n.user_id AND k.device_id = n.device_id AND k.kind = ${sql.raw(String(kind))}
      ORDER BY k.user_id, k.device_id, k.kind, k.sequence
      LIMIT n.amount
    ) o
  ) p
  WHERE n.${sql.raw(availableColumn)} > 0
)`;
}

export function claimSql(value: ValueOf): SQL {
  return sql`
WITH asked AS MATERIALIZED (
  SELECT * FROM unnest(
    ${value('ords')}::int4[], ${value('userIds')}::text[], ${value('firstDeviceIds')}::int2[],
    ${value('lastDeviceIds')}::int2[], ${value('exceptDeviceIds')}::int2[],
    ${value('claimerUserIds')}::text[], ${value('claimerDeviceIds')}::int2[],
    ${value('claimIds')}::uuid[], ${value('sparedTargets')}::bool[]
  ) AS a (ord, user_id, first_device_id, last_device_id, except_device_id, claimer_user_id, claimer_device_id, claim_id,
          spares)
),
-- Each request with each device that it asks for, as the snapshot has them, and what it was answered before.
wanted AS MATERIALIZED (
  SELECT row_number() OVER ()::int4 AS place, a.ord, a.user_id, d.device_id, a.claimer_user_id, a.claimer_device_id,
         a.claim_id, d.row_place, d.revision, d.identity_canonical, c.registration_id, c.identity_version, c.signed_prekey_id, c.pq_last_resort_prekey_id,
         c.ec_key_id, c.ec_public_key, c.pq_key_id, c.pq_public_key, c.pq_signature,
         coalesce(c.is_target_spared, a.spares) AS spares
  FROM asked a
  CROSS JOIN LATERAL (
    SELECT v.ctid AS row_place, v.device_id, v.revision, v.identity_version, v.identity_canonical
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
),
needed AS MATERIALIZED (
  SELECT l.*, w.places, w.amount,
         least(w.amount, l.ec_available) AS ec_spent, least(w.amount, l.pq_available) AS pq_spent
  FROM (
    SELECT user_id, device_id, row_place, revision, count(*) FILTER (WHERE NOT spares)::int4 AS amount,
           -- Keys go to the first places: those that spend none come last.
           array_agg(place ORDER BY spares, ord) AS places
    FROM wanted WHERE signed_prekey_id IS NULL
    GROUP BY user_id, device_id, row_place, revision
    ORDER BY user_id, device_id
  ) w
  CROSS JOIN LATERAL (
    SELECT v.user_id, v.device_id, v.registration_id, v.identity_version, v.identity_canonical, v.signed_prekey_id,
           v.pq_last_resort_prekey_id, v.ec_available, v.pq_available, v.revision
    FROM ${devices} v
    WHERE v.ctid = w.row_place
    LIMIT 1
    FOR NO KEY UPDATE SKIP LOCKED
  ) l
  WHERE l.revision = w.revision
),
ec AS MATERIALIZED ${oldestUnclaimed(PRE_KEY_KIND.ec, 'ec_available')},
pq AS MATERIALIZED ${oldestUnclaimed(PRE_KEY_KIND.pq, 'pq_available')},
taken AS (
  DELETE FROM ${oneTimePreKeys}
  WHERE ctid = ANY (ARRAY(SELECT row_place FROM ec UNION ALL SELECT row_place FROM pq))
),
counted AS (
  INSERT INTO ${devices} AS d (user_id, device_id, ec_available, pq_available)
  SELECT n.user_id, n.device_id, n.ec_spent, n.pq_spent
  FROM needed n
  ON CONFLICT (user_id, device_id) DO UPDATE SET
    revision = d.revision + 1,
    count_version = d.count_version + (excluded.ec_available + excluded.pq_available > 0)::int4,
    ec_available = d.ec_available - excluded.ec_available,
    pq_available = d.pq_available - excluded.pq_available,
    ec_claimed = d.ec_claimed + excluded.ec_available,
    pq_claimed = d.pq_claimed + excluded.pq_available,
    low_notice_version = CASE
      WHEN ${ranLow(value, 'd.ec_available', 'excluded.ec_available')}
        OR ${ranLow(value, 'd.pq_available', 'excluded.pq_available')}
      THEN d.count_version + 1 ELSE d.low_notice_version END
),
answers AS MATERIALIZED (
  SELECT w.place, w.ord, n.*, w.claimer_user_id, w.claimer_device_id, w.claim_id, ec.key_id AS ec_key_id,
         ec.public_key AS ec_public_key, pq.key_id AS pq_key_id, pq.public_key AS pq_public_key,
         pq.signature AS pq_signature, w.spares
  FROM (
    SELECT unnest(places) AS needed_place, user_id, device_id, registration_id, identity_version,
           identity_canonical, signed_prekey_id, pq_last_resort_prekey_id, ${ranLow(value, 'ec_available', 'ec_spent')}
             OR ${ranLow(value, 'pq_available', 'pq_spent')} AS ran_low
    FROM needed
  ) n
  JOIN wanted w ON w.place = n.needed_place
  LEFT JOIN ec ON ec.place = n.needed_place
  LEFT JOIN pq ON pq.place = n.needed_place
),
claimed AS (
  INSERT INTO ${prekeyClaims} (
    user_id, device_id, claimer_user_id, claimer_device_id, claim_id, identity_version, registration_id,
    signed_prekey_id, pq_last_resort_prekey_id, ec_key_id, ec_public_key, pq_key_id, pq_public_key, pq_signature,
    is_target_spared, claimed_at)
  SELECT user_id, device_id, claimer_user_id, claimer_device_id, claim_id, identity_version, registration_id,
         signed_prekey_id, pq_last_resort_prekey_id, ec_key_id, ec_public_key, pq_key_id, pq_public_key, pq_signature,
         spares, to_timestamp(${value('nowMs')}::float8 / 1000)
  FROM answers
)
SELECT ord, device_id, 'claimed' AS outcome, registration_id, identity_version, identity_canonical,
       signed_prekey_id, pq_last_resort_prekey_id, ec_key_id, ec_public_key, pq_key_id, pq_public_key, pq_signature,
       spares AS is_target_spared, ran_low
FROM answers
UNION ALL
SELECT w.ord, w.device_id, CASE WHEN w.signed_prekey_id IS NULL THEN 'again' ELSE 'repeated' END, w.registration_id,
       w.identity_version, w.identity_canonical, w.signed_prekey_id, w.pq_last_resort_prekey_id, w.ec_key_id, w.ec_public_key, w.pq_key_id,
       w.pq_public_key, w.pq_signature, w.spares, false
FROM wanted w
WHERE NOT EXISTS (SELECT 1 FROM answers a WHERE a.place = w.place)`;
}

export const claimStatement = hotStatement<ClaimRow>(claimSql(sql.placeholder));
