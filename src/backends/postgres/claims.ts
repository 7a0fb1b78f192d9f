/**
 * From the port's claim to the claim statement and back: requests are sorted into rounds, devices that are being changed
 * are waited for, and rows become bundles.
 */
import { sql } from 'drizzle-orm';
import type { ClaimedBundle, ClaimRequest, ClaimResult, KeyStore } from '../../ports/key-store.ts';
import { GatewayError } from '../../protocol/errors.ts';
import { addressKey, type DeviceAddress } from '../../protocol/ids.ts';
import { DEVICE_ID_MAX } from '../../protocol/limits.ts';
import { numberArray, plainArray, textArray } from './array-literal.ts';
import {
  type ClaimRow,
  type ClaimValues,
  claimSql,
  claimStatement,
  claimTellingPartsStatement,
  type ToldParts,
} from './claim-statement.ts';
import { type Database, select } from './database.ts';
import { createPublicParts, type PublicParts, type PublicPartsId } from './public-parts.ts';
import { devices } from './schema.ts';

export function createClaims(database: Database): Pick<KeyStore, 'claim'> {
  const publicParts = createPublicParts(database);

  return {
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
  };

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
}

interface ClaimHow {
  nowMs: number;
  lowThreshold: number;
  waits: boolean;
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

/** A device that comes to be between lock and claim, and is changed at once, is waited for anew; so often. */
const CLAIM_WAITS_MAX = 5;

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

/** The requests of which a device was being changed, in order. */
function unansweredOf(rows: readonly ClaimRow[]): number[] {
  const again = rows.filter((row) => row.outcome === 'again').map((row) => row.ord);
  return [...new Set(again)].sort((a, b) => a - b);
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
