/**
 * What is asked about key sets: how they stand, and how their clients' views compare. Whoever asks at once is answered by one
 * statement, as every device is after an outage.
 */
import { type SQL, sql } from 'drizzle-orm';
import { steadyClock } from '../../lib/clock.ts';
import { createGatherer, type Line } from '../../lib/gather.ts';
import { together } from '../../lib/together.ts';
import type { ClientView, ComparedIds, DeviceKeys, KeyStore, PreKeyKind } from '../../ports/key-store.ts';
import { GatewayError } from '../../protocol/errors.ts';
import type { DeviceAddress } from '../../protocol/ids.ts';
import { byteaArray, numberArray, textArray } from './array-literal.ts';
import { type Database, hotStatement, planAsHot, prepared } from './database.ts';
import { createDeviceTurns } from './device-turns.ts';
import { devices, oneTimePreKeys, PRE_KEY_KIND, prekeyClaims, signedPreKeys } from './schema.ts';
import { msOf } from './time-sql.ts';
import { usedAmong } from './used-ids.ts';

const { placeholder } = sql;

/** A device's row, as far as it tells of keys. */
export interface KeysRow {
  registration_id: number | null;
  identity_key: Uint8Array | null;
  identity_canonical: Uint8Array | null;
  identity_key_ed25519: Uint8Array | null;
  signed_prekey_id: number | null;
  pq_last_resort_prekey_id: number | null;
  signed_prekey_expires_at_ms: number | null;
  ec_available: number;
  pq_available: number;
  ec_claimed: number;
  pq_claimed: number;
  offers_pq: boolean;
  key_version: number;
  count_version: number;
  identity_version: number;
  updated_at_ms: number | null;
  served_at_ms: number | null;
  fence: number;
  revoked_at_ms: number | null;
  restored_at_ms: number | null;
}

const MOMENTS = ['signed_prekey_expires_at', 'updated_at', 'served_at', 'revoked_at', 'restored_at'];

/** Of a `KeysRow`. */
export const KEYS_COLUMNS: SQL = sql`
  registration_id, identity_key, identity_canonical, identity_key_ed25519, signed_prekey_id, pq_last_resort_prekey_id,
  ec_available, pq_available, ec_claimed, pq_claimed, offers_pq OR pq_available + pq_claimed > 0 AS offers_pq,
  key_version, count_version, identity_version, fence,
  ${sql.join(
    MOMENTS.map((name) => sql`${msOf(name)} AS ${sql.raw(name)}_ms`),
    sql`, `,
  )}`;

/** Signed prekeys that are active. */
export type ActiveKeys = DeviceKeys['signedPreKeys'];

export function toKeys(row: KeysRow, signedPreKeys: ActiveKeys): DeviceKeys {
  return {
    registrationId: row.registration_id,
    identity:
      row.identity_key === null
        ? null
        : {
            identityKey: row.identity_key,
            canonicalKey: row.identity_canonical!,
            identityKeyEd25519: row.identity_key_ed25519,
          },
    signedPreKeys,
    signedPreKeyExpiresAtMs: wholeMs(row.signed_prekey_expires_at_ms),
    availableCounts: { ec: row.ec_available, pq: row.pq_available },
    claimedCounts: { ec: row.ec_claimed, pq: row.pq_claimed },
    offersPq: row.offers_pq,
    keyVersion: row.key_version,
    countVersion: row.count_version,
    identityVersion: row.identity_version,
    updatedAtMs: wholeMs(row.updated_at_ms),
    servedAtMs: wholeMs(row.served_at_ms),
    fence: row.fence,
    revokedAtMs: wholeMs(row.revoked_at_ms),
    restoredAtMs: wholeMs(row.restored_at_ms),
  };
}

/** PostgreSQL's own moments have microseconds. */
function wholeMs(ms: number | null): number | null {
  return ms === null ? null : Math.floor(ms);
}

interface ReadRow extends KeysRow {
  ord: number;
  ec_public_key: Uint8Array | null;
  ec_signature: Uint8Array | null;
  pq_public_key: Uint8Array | null;
  pq_signature: Uint8Array | null;
}

interface ComparedRow extends ReadRow {
  /** Of the ids that were listed, those that are not pooled; null where there are none. */
  ec_unpooled: number[] | null;
  pq_unpooled: number[] | null;
  /** Of those, the ones that were handed out or withdrawn. */
  ec_used: number[] | null;
  pq_used: number[] | null;
  ec_not_listed: number[] | null;
  pq_not_listed: number[] | null;
  handed_out: number[] | null;
}

/** The active signed prekey of the device `d`, that the request `a` asks about. */
function activeKey(kind: PreKeyKind, keyId: string): SQL {
  return sql`
    SELECT k.public_key, k.signature FROM ${signedPreKeys} k
    WHERE k.user_id = a.user_id AND k.device_id = a.device_id AND k.kind = ${sql.raw(String(PRE_KEY_KIND[kind]))}
      AND k.key_id = d.${sql.raw(keyId)}
    LIMIT 1`;
}

/** Where the listed ids, of which none is there twice, and the pooled ones differ; under another identity than the client's nothing is pooled. */
function differences(kind: PreKeyKind): SQL {
  const ids = sql.raw(`a.${kind}_ids`);
  return sql`
    SELECT array_agg(l.id) FILTER (WHERE p.key_id IS NULL) AS unpooled,
           array_agg(p.key_id) FILTER (WHERE l.id IS NULL) AS not_listed
    FROM unnest(${ids}) AS l (id)
    FULL JOIN (
      SELECT k.key_id FROM ${oneTimePreKeys} k
      WHERE ${ids} IS NOT NULL AND d.identity_canonical = a.identity
        AND k.user_id = a.user_id AND k.device_id = a.device_id AND k.kind = ${sql.raw(String(PRE_KEY_KIND[kind]))}
    ) p ON p.key_id = l.id`;
}

function usedUnpooled(kind: PreKeyKind): SQL {
  const unpooled = sql.raw(`${kind}.unpooled`);
  const of = { userId: sql`a.user_id`, deviceId: sql`a.device_id`, canonicalKey: sql`a.identity` };
  return sql`CASE WHEN ${unpooled} IS NOT NULL THEN ARRAY(${usedAmong(of, kind, unpooled)}) END`;
}

const KEYS_OF_ASKED = {
  columns: sql`a.ord, d.*, s.public_key AS ec_public_key, s.signature AS ec_signature, r.public_key AS pq_public_key,
       r.signature AS pq_signature`,
  joins: sql`
CROSS JOIN LATERAL (
  SELECT ${KEYS_COLUMNS} FROM ${devices} v WHERE v.user_id = a.user_id AND v.device_id = a.device_id LIMIT 1
) d
LEFT JOIN LATERAL (${activeKey('ec', 'signed_prekey_id')}) s ON true
LEFT JOIN LATERAL (${activeKey('pq', 'pq_last_resort_prekey_id')}) r ON true`,
};

const readStatement = hotStatement<ReadRow>(sql`
SELECT ${KEYS_OF_ASKED.columns}
FROM unnest(${placeholder('ords')}::int4[], ${placeholder('userIds')}::text[], ${placeholder('deviceIds')}::int2[])
  AS a (ord, user_id, device_id)${KEYS_OF_ASKED.joins}`);

export const compareStatement = hotStatement<ComparedRow>(sql`
WITH asked AS MATERIALIZED (
  SELECT a.ord, a.user_id, a.device_id, a.identity, a.ec_ids::int8[] AS ec_ids, a.pq_ids::int8[] AS pq_ids,
         to_timestamp(a.since_ms / 1000) AS since, a.handed_out_max
  FROM unnest(
    ${placeholder('ords')}::int4[], ${placeholder('userIds')}::text[], ${placeholder('deviceIds')}::int2[],
    ${placeholder('identities')}::bytea[], ${placeholder('ecIds')}::text[], ${placeholder('pqIds')}::text[],
    ${placeholder('sinceMss')}::float8[], ${placeholder('handedOutMaxs')}::int4[]
  ) AS a (ord, user_id, device_id, identity, ec_ids, pq_ids, since_ms, handed_out_max)
)
SELECT ${KEYS_OF_ASKED.columns}, ec.unpooled AS ec_unpooled, ec.not_listed AS ec_not_listed,
       ${usedUnpooled('ec')} AS ec_used, pq.unpooled AS pq_unpooled, pq.not_listed AS pq_not_listed,
       ${usedUnpooled('pq')} AS pq_used,
       CASE WHEN a.since IS NOT NULL THEN ARRAY(
         -- OFFSET keeps the time out of the probe: by its index all devices' claims would be walked.
         SELECT o.ec_key_id FROM (
           SELECT c.ec_key_id, c.claimed_at FROM ${prekeyClaims} c
           WHERE c.user_id = a.user_id AND c.device_id = a.device_id AND c.ec_key_id IS NOT NULL
           OFFSET 0
         ) o
         WHERE o.claimed_at >= a.since ORDER BY o.claimed_at DESC LIMIT a.handed_out_max
       ) END AS handed_out
FROM asked a${KEYS_OF_ASKED.joins}
CROSS JOIN LATERAL (${differences('ec')}) ec
CROSS JOIN LATERAL (${differences('pq')}) pq`);

interface Comparison {
  device: DeviceAddress;
  view: ClientView;
}

type Compared = Awaited<ReturnType<KeyStore['compare']>>;

const BATCH_MAX = 64;
/** Ids that one statement's comparisons list or may be told. */
const BATCH_IDS_MAX = 16_384;
/** Ids that were handed out: of most devices there are fewer, and few clients ask. */
const HANDED_OUT_WEIGHT = 1_000;
const LINE: Line = { refusal: () => new GatewayError('UNAVAILABLE', undefined, { retryAfterMs: 1_000 }) };

export function createKeyReader(database: Database): Pick<KeyStore, 'read' | 'compare'> {
  const reads = createGatherer<DeviceAddress, DeviceKeys | null>({
    batchMax: BATCH_MAX,
    lingersBy: steadyClock,
    line: LINE,
    async run(asked) {
      const rows = await database.hot(readStatement, bindDevices(asked));
      const keys: (DeviceKeys | null)[] = asked.map(() => null);
      for (const row of rows) keys[row.ord] = toKeys(row, activeOf(row));
      return keys;
    },
  });
  const comparisons = createGatherer<Comparison, Compared>({
    batchMax: BATCH_MAX,
    weight: { of: idsOf, max: BATCH_IDS_MAX },
    lingersBy: steadyClock,
    line: LINE,
    async run(asked) {
      // Beside the hot statements: of a device with a long past it takes a while, and what is sent behind it waits.
      const [, rows] = await database.transaction((tx) =>
        together([planAsHot(tx), prepared(tx, compareStatement, bindComparisons(asked))]),
      );
      const compared = asked.map(({ view }) => toCompared(view, null));
      for (const row of rows) compared[row.ord] = toCompared(asked[row.ord]!.view, row);
      return compared;
    },
  });
  const inTurn = createDeviceTurns();

  return {
    read: (device) => reads.submit(device),
    compare: (device, view) => inTurn(device, () => comparisons.submit({ device, view })),
  };
}

function idsOf({ view: { ids, handedOut } }: Comparison): number {
  return (ids.ec?.length ?? 0) + (ids.pq?.length ?? 0) + (handedOut === null ? 0 : HANDED_OUT_WEIGHT);
}

function bindDevices(asked: readonly DeviceAddress[]): Record<string, unknown> {
  return {
    ords: numberArray(asked.map((_, ord) => ord)),
    userIds: textArray(asked.map((device) => device.userId)),
    deviceIds: numberArray(asked.map((device) => device.deviceId)),
  };
}

function bindComparisons(asked: readonly Comparison[]): Record<string, unknown> {
  const idsOfKind = (kind: PreKeyKind) =>
    textArray(asked.map(({ view }) => view.ids[kind] && numberArray(view.ids[kind])));
  return {
    ...bindDevices(asked.map(({ device }) => device)),
    identities: byteaArray(asked.map(({ view }) => view.identity)),
    ecIds: idsOfKind('ec'),
    pqIds: idsOfKind('pq'),
    sinceMss: numberArray(asked.map(({ view }) => view.handedOut?.sinceMs ?? null)),
    handedOutMaxs: numberArray(asked.map(({ view }) => view.handedOut?.limit ?? null)),
  };
}

/** @param row null for a device that never uploaded, of which nothing is pooled and nothing was used */
function toCompared(view: ClientView, row: ComparedRow | null): Compared {
  const compared = (kind: PreKeyKind): ComparedIds => {
    const unpooled = row === null ? (view.ids[kind] ?? []) : (row[`${kind}_unpooled`] ?? []);
    const used = new Set(row?.[`${kind}_used`]);
    return {
      used: ascending([...used]),
      unknown: ascending(unpooled.filter((id) => !used.has(id))),
      notListed: ascending(row?.[`${kind}_not_listed`] ?? []),
    };
  };
  return {
    keys: row === null ? null : toKeys(row, activeOf(row)),
    ids: { ec: compared('ec'), pq: compared('pq') },
    handedOut: row?.handed_out ?? [],
  };
}

function activeOf(row: ReadRow): ActiveKeys {
  const of = (kind: PreKeyKind, keyId: number | null) => {
    const publicKey = row[`${kind}_public_key`];
    const signature = row[`${kind}_signature`];
    return keyId === null || publicKey === null || signature === null
      ? null
      : { keyId, publicKey, signature };
  };
  return { ec: of('ec', row.signed_prekey_id), pq: of('pq', row.pq_last_resort_prekey_id) };
}

function ascending(ids: readonly number[]): number[] {
  return [...ids].sort((a, b) => a - b);
}
