/** One device's key set inside a transaction: how its row is read and locked, and every change of what it holds. */
import { createHash } from 'node:crypto';
import { sql } from 'drizzle-orm';
import { together } from '../../lib/together.ts';
import type { DeviceKeys, KeySetTransaction, PreKeyKind, SignedPreKey } from '../../ports/key-store.ts';
import type { DeviceAddress } from '../../protocol/ids.ts';
import { WITHDRAW_IDENTITIES_MAX, WITHDRAW_UNSEEN_MAX } from '../../protocol/limits.ts';
import { base64List, numberArray } from './array-literal.ts';
import { type HotStatement, planAsHot, prepared, type Transaction } from './database.ts';
import { toKeys } from './key-reader.ts';
import {
  activateStatement,
  activeKeysStatement,
  addDeviceStatement,
  addSignedPreKeyStatement,
  addToPoolStatement,
  bindSave,
  lockStatement,
  pooledStatement,
  retireStatement,
  saveStatement,
  signedPreKeyStatement,
  unseenStatement,
  usedSignedPreKeyStatement,
  usedStatement,
  withdrawAllStatement,
  withdrawStatement,
} from './key-set-statements.ts';
import { devices, messages, oneTimePreKeys, PRE_KEY_KIND, signedPreKeys, usedPreKeyIds } from './schema.ts';
import { momentOf } from './time-sql.ts';
import { foldClaims, foldReplacedSignedPreKeys, markUsed } from './used-ids.ts';

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
      const rows = await run(usedStatement[kind], { canonicalKey, keyIds: numberArray(keyIds) });
      return new Set(rows.map((row) => row.id));
    },

    async pooled(kind, keyIds) {
      return new Map((await pooledAmong(kind, keyIds)).map((row) => [row.key_id, row.public_key]));
    },

    async addToPool(kind, keys) {
      if (keys.length === 0) return;
      await run(addToPoolStatement, {
        kind: PRE_KEY_KIND[kind],
        keyIds: numberArray(keys.map((key) => key.keyId)),
        publicKeys: base64List(keys.map((key) => key.publicKey)),
        signatures: base64List(keys.map((key) => key.signature)),
      });
    },

    async withdraw(kind, canonicalKey, keyIds) {
      const ofKind = { kind: PRE_KEY_KIND[kind], canonicalKey };
      const unseen = keyIds === 'all' ? [] : await neverSeen(kind, canonicalKey, keyIds);
      if (unseen.length > 0) {
        const [kept] = await run(unseenStatement, ofKind);
        const { unseen_count: unseenCount, known, others } = kept!;
        const isPresent =
          current.identity !== null && Buffer.compare(current.identity.canonicalKey, canonicalKey) === 0;
        if (unseenCount + unseen.length > WITHDRAW_UNSEEN_MAX) return null;
        if (!isPresent && !known && others >= WITHDRAW_IDENTITIES_MAX) return null;
      }
      const removed =
        keyIds === 'all'
          ? await run(withdrawAllStatement, ofKind)
          : await run(withdrawStatement, { ...ofKind, keyIds: numberArray(keyIds) });
      const gone = [...removed.map((row) => row.key_id), ...unseen];
      await markUsed(tx, device, canonicalKey, gone, {
        kind: PRE_KEY_KIND[kind],
        signed: false,
        unseenCount: unseen.length,
      });
      return removed.length;
    },

    async signedPreKeyIdState(kind, canonicalKey, keyId) {
      const asked = { kind: PRE_KEY_KIND[kind], canonicalKey, keyId };
      const [[stored], [used]] = await together([
        run(signedPreKeyStatement, asked),
        run(usedSignedPreKeyStatement, asked),
      ]);
      if (stored?.is_active) return { state: 'active', publicKey: stored.public_key };
      if (stored !== undefined || used?.retired) return { state: 'retired' };
      if (used?.wiped) {
        return {
          state: 'wiped',
          matches: (publicKey) => keyDigest(kind, publicKey).equals(used.wiped_key_digest!),
        };
      }
      return { state: 'free' };
    },

    async activateSignedPreKey(kind, key, nowMs) {
      const ofKind = { kind: PRE_KEY_KIND[kind] };
      await together([
        run(retireStatement, { ...ofKind, nowMs }),
        run(addSignedPreKeyStatement, { ...ofKind, ...key }),
        run(activateStatement[kind], { keyId: key.keyId }),
      ]);
    },

    async wipe(reason, nowMs, { leavesMessages } = { leavesMessages: false }) {
      if (current.identity !== null) {
        const { canonicalKey } = current.identity;
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
      await run(saveStatement, bindSave(update, ranLow));
    },
  };

  async function run<Row>(
    statement: HotStatement<Row>,
    values: Readonly<Record<string, unknown>>,
  ): Promise<Row[]> {
    return await prepared(tx, statement, { ...device, ...values });
  }

  async function pooledAmong(kind: PreKeyKind, keyIds: readonly number[]) {
    if (keyIds.length === 0) return [];
    return await run(pooledStatement, { kind: PRE_KEY_KIND[kind], keyIds: numberArray(keyIds) });
  }

  /** Those of `keyIds` that neither wait nor were ever used. */
  async function neverSeen(
    kind: PreKeyKind,
    canonicalKey: Uint8Array,
    keyIds: readonly number[],
  ): Promise<number[]> {
    if (keyIds.length === 0) return [];
    const [used, pooled] = await together([
      run(usedStatement[kind], { canonicalKey, keyIds: numberArray(keyIds) }),
      pooledAmong(kind, keyIds),
    ]);
    const unseen = new Set(keyIds);
    for (const { id } of used) unseen.delete(id);
    for (const { key_id } of pooled) unseen.delete(key_id);
    return [...unseen];
  }
}

/** Holds the device's row until the transaction ends, a new one where there is none. */
export async function lockKeys(tx: Transaction, device: DeviceAddress): Promise<DeviceKeys> {
  const [, found] = await together([planAsHot(tx), lockedKeys(tx, device)]);
  if (found !== null) return found;
  const [, added] = await together([prepared(tx, addDeviceStatement, { ...device }), lockedKeys(tx, device)]);
  return added!;
}

async function lockedKeys(tx: Transaction, device: DeviceAddress): Promise<DeviceKeys | null> {
  const [[row], active] = await together([
    prepared(tx, lockStatement, { ...device }),
    // By a statement of its own, that begins when the row is held: one that waited for it would show these as they were before.
    prepared(tx, activeKeysStatement, { ...device }),
  ]);
  if (row === undefined) return null;
  const activeOf = (kind: PreKeyKind): SignedPreKey | null => {
    const found = active.find((key) => key.kind === PRE_KEY_KIND[kind]);
    return found === undefined
      ? null
      : { keyId: found.key_id, publicKey: found.public_key, signature: found.signature };
  };
  return toKeys(row, { ec: activeOf('ec'), pq: activeOf('pq') });
}

/** Two encodings of one EC key are one key: the last 32 bytes are what counts. */
function keyDigest(kind: PreKeyKind, publicKey: Uint8Array): Buffer {
  return createHash('sha256')
    .update(kind === 'ec' ? publicKey.subarray(-32) : publicKey)
    .digest();
}
