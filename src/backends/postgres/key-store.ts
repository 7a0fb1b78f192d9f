/** Key sets, pools and claims in PostgreSQL. */
import { createHash, randomBytes } from 'node:crypto';
import { and, eq, type SQL, sql } from 'drizzle-orm';
import type { PostgresJsDatabase } from 'drizzle-orm/postgres-js';
import type {
  ClaimedBundle,
  ClaimRequest,
  ClaimResult,
  DeviceKeys,
  KeySetTransaction,
  KeyStore,
  PreKeyKind,
} from '../../ports/key-store.ts';
import { GatewayError } from '../../protocol/errors.ts';
import { addressKey, type DeviceAddress } from '../../protocol/ids.ts';
import { DEVICE_ID_MAX, WITHDRAW_IDENTITIES_MAX, WITHDRAW_UNSEEN_MAX } from '../../protocol/limits.ts';
import { byteaArray, numberArray, plainArray, textArray } from './array-literal.ts';
import {
  type ClaimRow,
  type ClaimValues,
  claimSql,
  claimStatement,
  claimTellingPartsStatement,
  type ToldParts,
} from './claim-statement.ts';
import { type Database, hotStatement, type Transaction } from './database.ts';
import { createPublicParts, type PublicParts, type PublicPartsId } from './public-parts.ts';
import {
  devices,
  ENVELOPE_KIND,
  messages,
  oneTimePreKeys,
  PRE_KEY_KIND,
  prekeyClaims,
  sharedSecrets,
  signedPreKeys,
  usedPreKeyIds,
} from './schema.ts';
import { momentOf } from './time-sql.ts';

type Queryable = PostgresJsDatabase | Transaction;

export function createKeyStore(database: Database): KeyStore {
  const publicParts = createPublicParts(database);
  /** The last change of each device that is being changed by this process. */
  const changes = new Map<string, Promise<unknown>>();

  /** Runs one after the other what is of one device, so that changes that wait for its row hold one connection in all. */
  async function inTurn<Result>(device: DeviceAddress, action: () => Promise<Result>): Promise<Result> {
    const key = addressKey(device);
    const turn = (changes.get(key) ?? Promise.resolve()).then(action, action);
    changes.set(key, turn);
    try {
      return await turn;
    } finally {
      if (changes.get(key) === turn) changes.delete(key);
    }
  }

  async function toBundles(
    requests: readonly ClaimRequest[],
    rows: readonly (ClaimRow & Partial<ToldParts>)[],
  ): Promise<ClaimedBundle[][]> {
    const ids = rows.map((row) => {
      const id: PublicPartsId = {
        userId: requests[row.ord]!.userId,
        deviceId: row.device_id,
        identityVersion: row.identity_version,
        canonicalKey: row.identity_canonical,
        signedPreKeyId: row.signed_prekey_id,
        pqLastResortPreKeyId: row.pq_last_resort_prekey_id,
      };
      const told = partsOf(row);
      if (told !== null) publicParts.learn(id, told);
      return id;
    });
    const parts = await publicParts.read(ids);
    const bundles: ClaimedBundle[][] = requests.map(() => []);
    rows.forEach((row, index) => {
      const known = parts[index];
      // Wiped since it was claimed: there is no key set to answer with, and what was spent went with it.
      if (known == null) return;
      bundles[row.ord]!.push({
        deviceId: row.device_id,
        registrationId: row.registration_id,
        identity: known.identity,
        signedPreKey: known.signedPreKey,
        oneTimePreKey:
          row.ec_key_id === null ? null : { keyId: row.ec_key_id, publicKey: row.ec_public_key! },
        pqPreKey:
          row.pq_key_id === null
            ? known.pqLastResortPreKey
            : {
                keyId: row.pq_key_id,
                publicKey: row.pq_public_key!,
                signature: row.pq_signature!,
                lastResort: false,
              },
        isTargetSpared: row.is_target_spared,
      });
    });
    for (const list of bundles) if (list.length > 1) list.sort((a, b) => a.deviceId - b.deviceId);
    return bundles;
  }

  async function claimRound(requests: readonly ClaimRequest[], how: ClaimHow): Promise<ClaimResult> {
    const wantsParts = requests.map(
      ({ userId, deviceId }) => deviceId !== null && !publicParts.knows({ userId, deviceId }),
    );
    const values = { ...claimValues(requests, how), wantedParts: `{${wantsParts.join(',')}}` };
    const rows: (ClaimRow & Partial<ToldParts>)[] = await (wantsParts.includes(true)
      ? database.hot(claimTellingPartsStatement, values)
      : database.hot(claimStatement, values));
    const ranLow = devicesThatRanLow(requests, rows);
    let again = unansweredOf(rows);
    let unanswered = new Set(again);
    let settled = rows.filter((row) => !unanswered.has(row.ord));
    for (let waits = 0; again.length > 0 && how.waits; waits++) {
      if (waits === CLAIM_WAITS_MAX) throw tooBusy();
      // What the statement before did claim for these requests comes back as their first answer.
      const asked = again;
      const retried = asked.map((ord) => requests[ord]!);
      const lockedRows = (await claimUnderLock(database, retried, how)).map((row) => ({
        ...row,
        ord: asked[row.ord]!,
      }));
      for (const [key, device] of devicesThatRanLow(requests, lockedRows)) ranLow.set(key, device);
      again = unansweredOf(lockedRows);
      unanswered = new Set(again);
      settled = settled.concat(lockedRows.filter((row) => !unanswered.has(row.ord)));
    }
    const bundles = await toBundles(requests, settled);
    return {
      bundles: bundles.map((list, ord) => (unanswered.has(ord) ? null : list)),
      ranLow: [...ranLow.values()],
    };
  }

  return {
    async read(device) {
      return await database.run(async (db) => await readKeys(db, device, false));
    },

    async change(device, action, { isUpkeep } = { isUpkeep: false }) {
      return await inTurn(device, () =>
        database[isUpkeep ? 'upkeep' : 'transaction'](async (tx) => {
          let current = await readKeys(tx, device, true);
          if (current === null) {
            await tx.insert(devices).values(device).onConflictDoNothing();
            current = await readKeys(tx, device, true);
          }
          return await action(createKeySetTransaction(tx, device, current!));
        }),
      );
    },

    async devicesOf(userId) {
      const rows = await database.hot(devicesOfStatement, { userId });
      return rows.map((row) => ({ deviceId: row.device_id, registrationId: row.registration_id }));
    },

    async claim(requests, how) {
      const bundles: (ClaimedBundle[] | null)[] = requests.map(() => []);
      const ranLow = new Map<string, DeviceAddress>();
      for (const round of roundsOf(requests)) {
        const result = await claimRound(
          round.map((ord) => requests[ord]!),
          how,
        );
        round.forEach((ord, index) => {
          bundles[ord] = result.bundles[index]!;
        });
        for (const device of result.ranLow) ranLow.set(addressKey(device), device);
      }
      return { bundles, ranLow: [...ranLow.values()] };
    },

    async compareIds(device, kind, localIds) {
      const canonicalKey = sql`(
        SELECT identity_canonical FROM ${devices}
        WHERE user_id = ${device.userId} AND device_id = ${device.deviceId})`;
      const rows = await database.run(
        async (db) =>
          await select<{ key_id: number; fate: 'used' | 'unknown' | 'notListed' }>(
            db,
            sql`
            WITH local AS (SELECT DISTINCT id FROM unnest(${numberArray(localIds)}::int8[]) AS l (id)),
            pooled AS (
              SELECT key_id FROM ${oneTimePreKeys}
              WHERE user_id = ${device.userId} AND device_id = ${device.deviceId} AND kind = ${PRE_KEY_KIND[kind]})
            SELECT l.id AS key_id, CASE WHEN u.id IS NULL THEN 'unknown' ELSE 'used' END AS fate
            FROM local l LEFT JOIN (${usedAmong(device, kind, canonicalKey, localIds)}) u ON u.id = l.id
            WHERE NOT EXISTS (SELECT 1 FROM pooled p WHERE p.key_id = l.id)
            UNION ALL
            SELECT p.key_id, 'notListed' FROM pooled p WHERE NOT EXISTS (SELECT 1 FROM local l WHERE l.id = p.key_id)
            ORDER BY 1`,
          ),
      );
      const idsOf = (fate: string) => rows.filter((row) => row.fate === fate).map((row) => row.key_id);
      return { used: idsOf('used'), unknown: idsOf('unknown'), notListed: idsOf('notListed') };
    },

    async claimedIdsSince(device, kind, sinceMs, limit) {
      const column = kind === 'ec' ? prekeyClaims.ecKeyId : prekeyClaims.pqKeyId;
      const rows = await database.run(
        async (db) =>
          await db
            .select({ keyId: column })
            .from(prekeyClaims)
            .where(
              and(
                eq(prekeyClaims.userId, device.userId),
                eq(prekeyClaims.deviceId, device.deviceId),
                sql`${column} IS NOT NULL`,
                sql`${prekeyClaims.claimedAt} >= ${momentOf(sinceMs)}`,
              ),
            )
            .orderBy(sql`${prekeyClaims.claimedAt} DESC`)
            .limit(limit),
      );
      return rows.map((row) => row.keyId!);
    },

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
          const canonicalKey = sql`${locked.identity_canonical}`;
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

    async sharedSecret(name) {
      return await database.run(async (db) => {
        await db
          .insert(sharedSecrets)
          .values({ name, value: randomBytes(32) })
          .onConflictDoNothing();
        const [row] = await db.select().from(sharedSecrets).where(eq(sharedSecrets.name, name));
        return row!.value;
      });
    },
  };
}

const devicesOfStatement = hotStatement<{ device_id: number; registration_id: number }>(sql`
  SELECT device_id, registration_id FROM ${devices}
  WHERE user_id = ${sql.placeholder('userId')} AND identity_key IS NOT NULL
  ORDER BY user_id, device_id LIMIT ${sql.raw(String(DEVICE_ID_MAX))}`);

/** What counts as use of a device; null, which is never long ago, where nothing is known. */
export const lastUsedAt = sql`greatest(served_at, updated_at, restored_at)`;

/** Devices that a sweep has in hand at once: the other connections are left to those who wait for an answer. */
const SWEPT_AT_ONCE = 2;

/** What the claim tells of a bundle's public parts; null where it was not asked, or they are gone. */
function partsOf(row: ClaimRow & Partial<ToldParts>): PublicParts | null {
  if (row.identity_key == null || row.signed_public_key == null) return null;
  const lastResortId = row.pq_last_resort_prekey_id;
  if (lastResortId !== null && row.last_resort_public_key == null) return null;
  return {
    identity: { identityKey: row.identity_key, identityKeyEd25519: row.identity_key_ed25519 ?? null },
    signedPreKey: {
      keyId: row.signed_prekey_id,
      publicKey: row.signed_public_key,
      signature: row.signed_signature!,
    },
    pqLastResortPreKey:
      lastResortId === null
        ? null
        : {
            keyId: lastResortId,
            publicKey: row.last_resort_public_key!,
            signature: row.last_resort_signature!,
            lastResort: true,
          },
  };
}

interface ClaimHow {
  nowMs: number;
  lowThreshold: number;
  waits: boolean;
}

function claimValues(
  requests: readonly ClaimRequest[],
  { nowMs, lowThreshold }: Omit<ClaimHow, 'waits'>,
): ClaimValues {
  return {
    ords: numberArray(requests.map((_, ord) => ord)),
    userIds: textArray(requests.map((request) => request.userId)),
    firstDeviceIds: numberArray(requests.map((request) => request.deviceId ?? 1)),
    lastDeviceIds: numberArray(requests.map((request) => request.deviceId ?? DEVICE_ID_MAX)),
    exceptDeviceIds: numberArray(
      requests.map(({ deviceId, userId, claimer }) =>
        deviceId === null && userId === claimer.userId ? claimer.deviceId : 0,
      ),
    ),
    claimerUserIds: textArray(requests.map((request) => request.claimer.userId)),
    claimerDeviceIds: numberArray(requests.map((request) => request.claimer.deviceId)),
    claimIds: plainArray(requests.map((request) => request.claimId)),
    sparedTargets: `{${requests.map((request) => request.isTargetSpared === true).join(',')}}`,
    lowThreshold,
    nowMs,
  };
}

/**
 * Sorts requests into statements, each in the order given. Two of one claimId that share a device can't be in one:
 * both would find no first answer. Mostly there is a single round.
 */
function roundsOf(requests: readonly ClaimRequest[]): number[][] {
  const claimIds = new Set(requests.map((request) => request.claimId));
  if (claimIds.size === requests.length) return [requests.map((_, ord) => ord)];
  const rounds: number[][] = [];
  const nextRounds = new Map<string, { ofAll: number; ofAny: number; ofDevices: Map<number, number> }>();
  requests.forEach(({ claimer, claimId, userId, deviceId }, ord) => {
    const key = `${addressKey(claimer)}/${claimId}/${userId}`;
    const next = nextRounds.get(key) ?? { ofAll: 0, ofAny: 0, ofDevices: new Map<number, number>() };
    nextRounds.set(key, next);
    const round = deviceId === null ? next.ofAny : Math.max(next.ofAll, next.ofDevices.get(deviceId) ?? 0);
    if (deviceId === null) next.ofAll = round + 1;
    else next.ofDevices.set(deviceId, round + 1);
    next.ofAny = Math.max(next.ofAny, round + 1);
    rounds[round] ??= [];
    rounds[round].push(ord);
  });
  return rounds;
}

/** A device that comes to be between lock and claim, and is changed at once, is waited for anew; so often. */
const CLAIM_WAITS_MAX = 5;

/** The requests of which a device was being changed, in order. */
function unansweredOf(rows: readonly ClaimRow[]): number[] {
  const again = rows.filter((row) => row.outcome === 'again').map((row) => row.ord);
  return [...new Set(again)].sort((a, b) => a - b);
}

function tooBusy(): GatewayError {
  return new GatewayError('UNAVAILABLE', 'the devices’ keys keep changing; try again', {
    retryAfterMs: 1_000,
  });
}

/** Locks the devices' rows in sorted order first, so that the claim's snapshot is sure to be current. */
async function claimUnderLock(
  database: Database,
  requests: readonly ClaimRequest[],
  how: ClaimHow,
): Promise<ClaimRow[]> {
  const values = claimValues(requests, how);
  return await database.transaction(async (tx) => {
    await tx.execute(sql`
      SELECT 1 FROM ${devices} d
      WHERE d.user_id = ANY (${values.userIds}::text[]) AND EXISTS (
        SELECT 1
        FROM unnest(${values.userIds}::text[], ${values.firstDeviceIds}::int2[], ${values.lastDeviceIds}::int2[])
          AS a (user_id, first_device_id, last_device_id)
        WHERE a.user_id = d.user_id AND d.device_id BETWEEN a.first_device_id AND a.last_device_id)
      ORDER BY d.user_id, d.device_id
      FOR NO KEY UPDATE`);
    return await select<ClaimRow>(
      tx,
      claimSql((name) => values[name], { tellsParts: false }),
    );
  });
}

function devicesThatRanLow(
  requests: readonly ClaimRequest[],
  rows: readonly ClaimRow[],
): Map<string, DeviceAddress> {
  const found = new Map<string, DeviceAddress>();
  for (const row of rows) {
    if (!row.ran_low) continue;
    const device = { userId: requests[row.ord]!.userId, deviceId: row.device_id };
    found.set(addressKey(device), device);
  }
  return found;
}

/** Raw SQL with the rows' type said once, where the statement is. */
async function select<Row>(db: Queryable, statement: SQL): Promise<Row[]> {
  return (await db.execute(statement)) as unknown as Row[];
}

async function readKeys(db: Queryable, device: DeviceAddress, lock: boolean): Promise<DeviceKeys | null> {
  const query = db
    .select()
    .from(devices)
    .where(and(eq(devices.userId, device.userId), eq(devices.deviceId, device.deviceId)));
  const [row] = lock ? await query.for('no key update') : await query;
  if (row === undefined) return null;
  const active =
    row.signedPreKeyId === null
      ? []
      : await db
          .select()
          .from(signedPreKeys)
          .where(
            and(
              eq(signedPreKeys.userId, device.userId),
              eq(signedPreKeys.deviceId, device.deviceId),
              sql`${signedPreKeys.replacedAt} IS NULL`,
            ),
          );
  const activeOf = (kind: PreKeyKind) => active.find((key) => key.kind === PRE_KEY_KIND[kind]) ?? null;
  return {
    registrationId: row.registrationId,
    identity:
      row.identityKey === null
        ? null
        : {
            identityKey: row.identityKey,
            canonicalKey: row.identityCanonical!,
            identityKeyEd25519: row.identityKeyEd25519,
          },
    signedPreKeys: { ec: activeOf('ec'), pq: activeOf('pq') },
    signedPreKeyExpiresAtMs: row.signedPreKeyExpiresAt?.getTime() ?? null,
    availableCounts: { ec: row.ecAvailable, pq: row.pqAvailable },
    claimedCounts: { ec: row.ecClaimed, pq: row.pqClaimed },
    offersPq: row.offersPq || row.pqAvailable + row.pqClaimed > 0,
    keyVersion: row.keyVersion,
    countVersion: row.countVersion,
    identityVersion: row.identityVersion,
    updatedAtMs: row.updatedAt?.getTime() ?? null,
    servedAtMs: row.servedAt?.getTime() ?? null,
    servedFence: row.fence,
    revokedAtMs: row.revokedAt?.getTime() ?? null,
    restoredAtMs: row.restoredAt?.getTime() ?? null,
  };
}

function createKeySetTransaction(
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
      const rows = await select<{ id: number }>(tx, usedAmong(device, kind, sql`${canonicalKey}`, keyIds));
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
          SELECT 1 FROM ${messages} WHERE ${ofDevice} AND pending
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

  /** Those of `keyIds` that neither wait nor were ever used. */
  async function neverSeen(
    kind: PreKeyKind,
    canonicalKey: Uint8Array,
    keyIds: readonly number[],
  ): Promise<number[]> {
    if (keyIds.length === 0) return [];
    const seen = await select<{ id: number }>(
      tx,
      sql`${usedAmong(device, kind, sql`${canonicalKey}`, keyIds)}
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

/** Two encodings of one EC key are one key: the last 32 bytes are what counts. */
function keyDigest(kind: PreKeyKind, publicKey: Uint8Array): Buffer {
  return createHash('sha256')
    .update(kind === 'ec' ? publicKey.subarray(-32) : publicKey)
    .digest();
}

/**
 * Those of `keyIds` that were handed out or withdrawn under an identity, as rows `(id)`. One intersection reads the
 * used ids once, however many there are; a look for each id would unpack them all each time.
 */
function usedAmong(
  device: DeviceAddress,
  kind: PreKeyKind,
  canonicalKey: SQL,
  keyIds: readonly number[],
): SQL {
  const column = sql.raw(kind === 'ec' ? 'ec_key_id' : 'pq_key_id');
  return sql`
    SELECT c.${column} AS id FROM ${prekeyClaims} c
    WHERE c.user_id = ${device.userId} AND c.device_id = ${device.deviceId}
      AND c.${column} = ANY (${numberArray(keyIds)}::int8[])
    UNION
    SELECT generate_series(lower(r.run), upper(r.run) - 1) AS id
    FROM ${usedPreKeyIds} u
    CROSS JOIN LATERAL unnest(u.ids * (
      SELECT coalesce(range_agg(int8range(l.id, l.id, '[]')), '{}')
      FROM unnest(${numberArray(keyIds)}::int8[]) AS l (id)
    )) AS r (run)
    WHERE u.user_id = ${device.userId} AND u.device_id = ${device.deviceId}
      AND u.identity_canonical = ${canonicalKey} AND u.kind = ${PRE_KEY_KIND[kind]} AND NOT u.signed`;
}

async function markUsed(
  tx: Transaction,
  device: DeviceAddress,
  canonicalKey: SQL,
  kind: number,
  signed: boolean,
  keyIds: readonly number[],
  unseenCount = 0,
): Promise<void> {
  if (keyIds.length === 0) return;
  await tx.execute(sql`
    INSERT INTO ${usedPreKeyIds} AS u (user_id, device_id, identity_canonical, kind, signed, ids, unseen_count)
    SELECT ${device.userId}, ${device.deviceId}::int2, ${canonicalKey}, ${kind}::int2, ${signed}::bool,
           range_agg(int8range(l.id, l.id, '[]')), ${unseenCount}::int4
    FROM unnest(${numberArray(keyIds)}::int8[]) AS l (id)
    ON CONFLICT (user_id, device_id, identity_canonical, kind, signed) DO UPDATE
    SET ids = u.ids + excluded.ids, unseen_count = u.unseen_count + excluded.unseen_count`);
}

/** Turns claim records into used ids. @returns how many, at most `limit` where there is one */
async function foldClaims(
  tx: Transaction,
  device: DeviceAddress,
  canonicalKey: SQL,
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
  await markUsed(tx, device, canonicalKey, PRE_KEY_KIND.ec, false, ids('ec_key_id'));
  await markUsed(tx, device, canonicalKey, PRE_KEY_KIND.pq, false, ids('pq_key_id'));
  return folded.length;
}

/** Whether a claim record names a signed or last-resort prekey of which `which` holds. */
function namesOne(which: SQL): SQL {
  const named = (kind: PreKeyKind, idColumn: string): SQL => sql`EXISTS (
  SELECT 1 FROM ${signedPreKeys} s
  WHERE s.user_id = ${prekeyClaims}.user_id AND s.device_id = ${prekeyClaims}.device_id
    AND s.kind = ${sql.raw(String(PRE_KEY_KIND[kind]))} AND s.key_id = ${prekeyClaims}.${sql.raw(idColumn)} AND s.${which})`;
  return sql`(${named('ec', 'signed_prekey_id')} OR ${named('pq', 'pq_last_resort_prekey_id')})`;
}

async function foldReplacedSignedPreKeys(
  tx: Transaction,
  device: DeviceAddress,
  canonicalKey: SQL,
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
    await markUsed(tx, device, canonicalKey, kind, true, ids);
  }
  return folded.length;
}
