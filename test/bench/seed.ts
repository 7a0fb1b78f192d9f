/**
 * Devices and keys by SQL: thousands of devices in a second, where uploads would take minutes of verification. The keys
 * are real ones of libsignal, used again and again, since nobody compares one device's with another's.
 */
import { randomBytes } from 'node:crypto';
import type postgres from 'postgres';
import { byteaArray, numberArray, textArray } from '../../src/backends/postgres/array-literal.ts';
import { systemClock } from '../../src/lib/clock.ts';
import type { RequestInput } from '../../src/protocol/events.ts';
import { signToken } from '../../src/requests/authenticate.ts';
import { type FullUpload, SignalDevice } from '../support/libsignal-device.ts';

export interface DeviceToken {
  userId: string;
  token: string;
}

export interface KeyPool {
  uploads: FullUpload[];
}

const IDENTITIES = 16;
const ONE_TIME_KEYS = 100;
const TOKEN_TTL_MS = 24 * 3_600_000;

export function makeKeyPool(): KeyPool {
  const uploads = Array.from({ length: IDENTITIES }, (_, index) =>
    new SignalDevice({ userId: `key-pool-${index}`, deviceId: 1 }).uploadInput({
      oneTimePreKeys: ONE_TIME_KEYS,
      pqOneTimePreKeys: ONE_TIME_KEYS,
    }),
  );
  return { uploads };
}

export function userIds(prefix: string, count: number): string[] {
  return Array.from({ length: count }, (_, index) => `${prefix}-${index}`);
}

/** Tokens for devices 1 to `devicesEach` of each user, user by user. */
export async function tokensFor(
  users: readonly string[],
  secret: string,
  { devicesEach = 1 } = {},
): Promise<DeviceToken[]> {
  const devices = users.flatMap((userId) =>
    Array.from({ length: devicesEach }, (_, index) => ({ userId, deviceId: index + 1 })),
  );
  return await Promise.all(
    devices.map(async (device) => ({
      userId: device.userId,
      token: await signToken({
        secret: new TextEncoder().encode(secret),
        device,
        ttlMs: TOKEN_TTL_MS,
        clock: systemClock,
      }),
    })),
  );
}

/** Gives devices 1 to `devicesEach` of each user an identity, a signed prekey and an empty pool of one-time prekeys. */
export async function seedDevices(
  sql: postgres.Sql,
  pool: KeyPool,
  users: readonly string[],
  { devicesEach = 1 } = {},
): Promise<void> {
  const { uploads } = pool;
  // Device after device, each takes the next upload of the pool.
  const uploadNumber = sql`1 + ((u.nth - 1) * ${devicesEach}::int8 + e.device_id - 1) % ${uploads.length}::int8`;
  const identityKeys = uploads.map((upload) => bytes(upload.identityKey));
  await sql`
    INSERT INTO devices (user_id, device_id, registration_id, identity_key, identity_canonical, signed_prekey_id,
                         signed_prekey_expires_at, key_version, identity_version, updated_at)
    SELECT u.user_id, e.device_id, i.registration_id, i.identity_key, i.canonical, i.signed_prekey_id,
           now() + interval '30 days', 1, 1, now()
    FROM unnest(${textArray(users)}::text[]) WITH ORDINALITY AS u (user_id, nth)
    CROSS JOIN generate_series(1, ${devicesEach}::int4) AS e (device_id)
    JOIN unnest(${numberArray(uploads.map((upload) => upload.registrationId))}::int4[], ${byteaArray(identityKeys)}::bytea[],
                ${byteaArray(identityKeys.map((key) => key.subarray(1)))}::bytea[],
                ${numberArray(uploads.map((upload) => upload.signedPreKey.keyId))}::int8[])
      WITH ORDINALITY AS i (registration_id, identity_key, canonical, signed_prekey_id, nth)
      ON i.nth = ${uploadNumber}`;
  await sql`
    INSERT INTO signed_prekeys (user_id, device_id, kind, key_id, public_key, signature)
    SELECT u.user_id, e.device_id, 0, s.key_id, s.public_key, s.signature
    FROM unnest(${textArray(users)}::text[]) WITH ORDINALITY AS u (user_id, nth)
    CROSS JOIN generate_series(1, ${devicesEach}::int4) AS e (device_id)
    JOIN unnest(${numberArray(uploads.map((upload) => upload.signedPreKey.keyId))}::int8[],
                ${byteaArray(uploads.map((upload) => bytes(upload.signedPreKey.publicKey)))}::bytea[],
                ${byteaArray(uploads.map((upload) => bytes(upload.signedPreKey.signature)))}::bytea[])
      WITH ORDINALITY AS s (key_id, public_key, signature, nth)
      ON s.nth = ${uploadNumber}`;
}

/** Empties the ledger and all pools, and fills those of each of these users' devices with `perDevice` unclaimed EC prekeys. */
export async function refillPools(
  sql: postgres.Sql,
  pool: KeyPool,
  users: readonly string[],
  perDevice: number,
): Promise<void> {
  await sql`TRUNCATE one_time_prekeys`;
  await sql`
    UPDATE devices SET ec_available = 0, pq_available = 0, ec_claimed = 0, pq_claimed = 0,
                       revision = revision + 1, count_version = count_version + 1
    WHERE ec_available <> 0 OR ec_claimed <> 0`;
  await topUpPools(sql, pool, users, perDevice);
}

/** Gives each of these users a PQ last-resort prekey, and `perDevice` one-time ones in place of those that it had. */
export async function refillPqPools(
  sql: postgres.Sql,
  pool: KeyPool,
  users: readonly string[],
  perDevice: number,
): Promise<void> {
  const lastResorts = pool.uploads.map((upload) => upload.pqLastResortPreKey);
  const keys = pool.uploads.flatMap((upload) => upload.pqOneTimePreKeys);
  await sql`
    INSERT INTO signed_prekeys (user_id, device_id, kind, key_id, public_key, signature)
    SELECT u.user_id, 1, 1, r.key_id, r.public_key, r.signature
    FROM unnest(${textArray(users)}::text[]) WITH ORDINALITY AS u (user_id, nth)
    JOIN unnest(${numberArray(lastResorts.map((key) => key.keyId))}::int8[],
                ${byteaArray(lastResorts.map((key) => bytes(key.publicKey)))}::bytea[],
                ${byteaArray(lastResorts.map((key) => bytes(key.signature)))}::bytea[])
      WITH ORDINALITY AS r (key_id, public_key, signature, nth)
      ON r.nth = 1 + (u.nth - 1) % ${lastResorts.length}
    ON CONFLICT DO NOTHING`;
  await sql`DELETE FROM one_time_prekeys WHERE kind = 1`;
  await sql`
    INSERT INTO one_time_prekeys (user_id, device_id, kind, key_id, public_key, signature)
    SELECT u.user_id, 1, 1, d.pq_claimed + n, k.public_key, k.signature
    FROM unnest(${textArray(users)}::text[]) WITH ORDINALITY AS u (user_id, nth)
    JOIN devices d ON d.user_id = u.user_id AND d.device_id = 1
    CROSS JOIN generate_series(1, ${perDevice}::int8) AS n
    JOIN unnest(${byteaArray(keys.map((key) => bytes(key.publicKey)))}::bytea[],
                ${byteaArray(keys.map((key) => bytes(key.signature)))}::bytea[])
      WITH ORDINALITY AS k (public_key, signature, nth) ON k.nth = 1 + (u.nth * 7 + n) % ${keys.length}
    ORDER BY u.nth, n`;
  await sql`
    UPDATE devices d SET pq_available = ${perDevice}, offers_pq = true, pq_last_resort_prekey_id = s.key_id,
                         key_version = key_version + 1, revision = revision + 1, count_version = count_version + 1
    FROM signed_prekeys s
    WHERE s.user_id = d.user_id AND s.device_id = d.device_id AND s.kind = 1 AND s.replaced_at IS NULL`;
  await sql`VACUUM (ANALYZE) devices, signed_prekeys, one_time_prekeys`;
}

/** Empties the ledger, and adds to the pools of each of these users' devices what was claimed: new keys under new ids. */
export async function topUpPools(
  sql: postgres.Sql,
  pool: KeyPool,
  users: readonly string[],
  perDevice: number,
): Promise<void> {
  const publicKeys = oneTimePublicKeys(pool);
  await sql`TRUNCATE prekey_claims`;
  // Device by device, as uploads would have stored them.
  await sql`
    INSERT INTO one_time_prekeys (user_id, device_id, kind, key_id, public_key)
    SELECT d.user_id, d.device_id, 0, d.ec_claimed + d.ec_available + n, k.public_key
    FROM unnest(${textArray(users)}::text[]) WITH ORDINALITY AS u (user_id, nth)
    JOIN devices d ON d.user_id = u.user_id
    CROSS JOIN LATERAL generate_series(1, ${perDevice}::int8 - d.ec_available) AS n
    JOIN unnest(${byteaArray(publicKeys)}::bytea[]) WITH ORDINALITY AS k (public_key, nth)
      ON k.nth = 1 + (u.nth * 7 + n) % ${publicKeys.length}
    ORDER BY u.nth, d.device_id, n`;
  await sql`
    UPDATE devices SET ec_available = ${perDevice}, revision = revision + 1, count_version = count_version + 1
    WHERE user_id = ANY (${textArray(users)}::text[]) AND ec_available <> ${perDevice}`;
  await sql`VACUUM (ANALYZE) devices, one_time_prekeys, prekey_claims`;
}

/** Gives device 1 of each user `perDevice` waiting messages, and takes away whatever waited before. */
export async function refillQueues(
  sql: postgres.Sql,
  options: { users: readonly string[]; perDevice: number; contentBytes: number },
): Promise<void> {
  await sql`TRUNCATE messages, message_receipts`;
  await sql`
    INSERT INTO messages (user_id, device_id, sequence, id, kind, peer_user_id, peer_device_id, message_id, type,
                          content, identity_version, stored_at, expires_at)
    SELECT u.user_id, 1, nextval('message_sequence'), gen_random_uuid(), 0, 'sender-1000', 1, gen_random_uuid(), 2,
           ${randomBytes(options.contentBytes)}::bytea, 1, now(), now() + interval '30 days'
    FROM unnest(${textArray(options.users)}::text[]) WITH ORDINALITY AS u (user_id, nth)
    CROSS JOIN generate_series(1, ${options.perDevice}::int4) AS n
    ORDER BY u.nth, n`;
  await sql`VACUUM (ANALYZE) messages, message_receipts, devices`;
}

export function oneTimePublicKeys(pool: KeyPool): Buffer[] {
  return pool.uploads.flatMap((upload) => upload.oneTimePreKeys.map((key) => bytes(key.publicKey)));
}

/** The upload that device number `index` of a seeded list stands for. */
export function uploadOf(pool: KeyPool, index: number): FullUpload {
  return pool.uploads[index % pool.uploads.length]!;
}

/** What device number `index` says to have its gate opened. */
export function validateInput(pool: KeyPool, index: number): RequestInput<'validateKeys'> {
  const upload = uploadOf(pool, index);
  return {
    localIdentityKey: upload.identityKey,
    localSignedPreKeyId: upload.signedPreKey.keyId,
    localSignedPreKeyPublicKey: upload.signedPreKey.publicKey,
    localRegistrationId: upload.registrationId,
  };
}

function bytes(base64: string): Buffer {
  return Buffer.from(base64, 'base64');
}
