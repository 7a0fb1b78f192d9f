/**
 * The one schema, the same for the embedded and a remote PostgreSQL. Every row belongs to one user id, and every
 * key begins with it, so that a distributed PostgreSQL can shard on it.
 */
import { sql } from 'drizzle-orm';
import {
  bigint,
  boolean,
  customType,
  index,
  integer,
  pgSequence,
  pgTable,
  primaryKey,
  smallint,
  text,
  timestamp,
  uniqueIndex,
  uuid,
} from 'drizzle-orm/pg-core';

/**
 * Text of an index, in the order of its bytes whatever the database's own: an order of letters takes a third more of
 * PostgreSQL's time, and a newer system library that sorts otherwise would leave rows that the index no longer finds.
 */
const indexedText = customType<{ data: string }>({ dataType: () => 'text COLLATE "C"' });
const bytea = customType<{ data: Uint8Array; driverData: Uint8Array }>({ dataType: () => 'bytea' });
/** A set of ids that costs one range for each run of neighbours. */
const int8multirange = customType<{ data: string }>({ dataType: () => 'int8multirange' });
const moment = (name: string) => timestamp(name, { withTimezone: true, mode: 'date' });
const bigNumber = (name: string) => bigint(name, { mode: 'number' });

/** Values of every `kind` column of prekeys. */
export const PRE_KEY_KIND = { ec: 0, pq: 1 } as const;
/** Values of every `kind` column of envelopes. */
export const ENVELOPE_KIND = { message: 0, bounce: 1 } as const;

/** One row per device, for good: versions outlive reset and deletion. Its lock guards everything of the device's keys. */
export const devices = pgTable(
  'devices',
  {
    userId: indexedText('user_id').notNull(),
    deviceId: smallint('device_id').notNull(),
    registrationId: integer('registration_id'),
    identityKey: bytea('identity_key'),
    identityCanonical: bytea('identity_canonical'),
    identityKeyEd25519: bytea('identity_key_ed25519'),
    /** The active signed prekeys' ids, so that a claim reads one row. */
    signedPreKeyId: bigNumber('signed_prekey_id'),
    pqLastResortPreKeyId: bigNumber('pq_last_resort_prekey_id'),
    signedPreKeyExpiresAt: moment('signed_prekey_expires_at'),
    keyVersion: bigNumber('key_version').notNull().default(0),
    countVersion: bigNumber('count_version').notNull().default(0),
    identityVersion: bigNumber('identity_version').notNull().default(0),
    /** Rises with every change of keys, pools or claims: tells a claim whether its snapshot is current. */
    revision: bigNumber('revision').notNull().default(0),
    lowNoticeVersion: bigNumber('low_notice_version').notNull().default(0),
    ecAvailable: integer('ec_available').notNull().default(0),
    pqAvailable: integer('pq_available').notNull().default(0),
    ecClaimed: bigNumber('ec_claimed').notNull().default(0),
    pqClaimed: bigNumber('pq_claimed').notNull().default(0),
    /** One-time PQ prekeys were offered under the present identity, wherever they are now. */
    offersPq: boolean('offers_pq').notNull().default(false),
    /** The number of the newest connection that was served or asked for a change of keys; older ones read, delete and change nothing. */
    fence: bigNumber('fence').notNull().default(0),
    updatedAt: moment('updated_at'),
    /** When a gate was opened last, or was last found open; null where none ever was. */
    servedAt: moment('served_at'),
    wipedAt: moment('wiped_at'),
    /** Tokens issued until then speak for the device no more. */
    revokedAt: moment('revoked_at'),
    /** When a backup was restored, until the client has compared its keys: what it holds may have been handed out. */
    restoredAt: moment('restored_at'),
  },
  (table) => [
    primaryKey({ columns: [table.userId, table.deviceId] }),
    index('devices_wiped').on(table.wipedAt).where(sql`${table.wipedAt} IS NOT NULL`),
    index('devices_revoked').on(table.revokedAt).where(sql`${table.revokedAt} IS NOT NULL`),
  ],
);

/** Signed prekeys (ec) and last-resort prekeys (pq): one active per kind, the replaced ones readable for a while. */
export const signedPreKeys = pgTable(
  'signed_prekeys',
  {
    userId: indexedText('user_id').notNull(),
    deviceId: smallint('device_id').notNull(),
    kind: smallint('kind').notNull(),
    keyId: bigNumber('key_id').notNull(),
    publicKey: bytea('public_key').notNull(),
    signature: bytea('signature').notNull(),
    replacedAt: moment('replaced_at'),
  },
  (table) => [
    primaryKey({ columns: [table.userId, table.deviceId, table.kind, table.keyId] }),
    uniqueIndex('signed_prekeys_one_active')
      .on(table.userId, table.deviceId, table.kind)
      .where(sql`${table.replacedAt} IS NULL`),
    index('signed_prekeys_replaced').on(table.replacedAt).where(sql`${table.replacedAt} IS NOT NULL`),
  ],
);

/** The slim pool: what waits to be claimed, oldest upload first. A claimed key's row moves to `prekey_claims`. */
export const oneTimePreKeys = pgTable(
  'one_time_prekeys',
  {
    userId: indexedText('user_id').notNull(),
    deviceId: smallint('device_id').notNull(),
    kind: smallint('kind').notNull(),
    /** The order of upload; never a timestamp, which two keys could share. */
    sequence: bigNumber('sequence').notNull().generatedAlwaysAsIdentity(),
    keyId: bigNumber('key_id').notNull(),
    publicKey: bytea('public_key').notNull(),
    signature: bytea('signature'),
  },
  (table) => [
    primaryKey({ columns: [table.userId, table.deviceId, table.kind, table.sequence] }),
    uniqueIndex('one_time_prekeys_id').on(table.userId, table.deviceId, table.kind, table.keyId),
  ],
);

/** Who was given what, under the device's present identity: a claim's first answer, and the ids that are used up. */
export const prekeyClaims = pgTable(
  'prekey_claims',
  {
    userId: indexedText('user_id').notNull(),
    deviceId: smallint('device_id').notNull(),
    claimerUserId: indexedText('claimer_user_id').notNull(),
    claimerDeviceId: smallint('claimer_device_id').notNull(),
    claimId: uuid('claim_id').notNull(),
    identityVersion: bigNumber('identity_version').notNull(),
    registrationId: integer('registration_id').notNull(),
    signedPreKeyId: bigNumber('signed_prekey_id').notNull(),
    pqLastResortPreKeyId: bigNumber('pq_last_resort_prekey_id'),
    ecKeyId: bigNumber('ec_key_id'),
    ecPublicKey: bytea('ec_public_key'),
    pqKeyId: bigNumber('pq_key_id'),
    pqPublicKey: bytea('pq_public_key'),
    pqSignature: bytea('pq_signature'),
    /** It was to spend nothing: what its repetitions are told. */
    isTargetSpared: boolean('is_target_spared').notNull().default(false),
    claimedAt: moment('claimed_at').notNull(),
  },
  (table) => [
    primaryKey({
      columns: [table.userId, table.deviceId, table.claimerUserId, table.claimerDeviceId, table.claimId],
    }),
    uniqueIndex('prekey_claims_ec_id')
      .on(table.userId, table.deviceId, table.ecKeyId)
      .where(sql`${table.ecKeyId} IS NOT NULL`),
    uniqueIndex('prekey_claims_pq_id')
      .on(table.userId, table.deviceId, table.pqKeyId)
      .where(sql`${table.pqKeyId} IS NOT NULL`),
    index('prekey_claims_claimed').on(table.claimedAt),
  ],
);

/** Ids that may never be offered again under an identity key; outlives reset and deletion. */
export const usedPreKeyIds = pgTable(
  'used_prekey_ids',
  {
    userId: indexedText('user_id').notNull(),
    deviceId: smallint('device_id').notNull(),
    identityCanonical: bytea('identity_canonical').notNull(),
    kind: smallint('kind').notNull(),
    /** Signed prekeys have ids of their own. */
    signed: boolean('signed').notNull(),
    ids: int8multirange('ids').notNull(),
    /** How many of them were withdrawn without ever having been in the pool. */
    unseenCount: integer('unseen_count').notNull().default(0),
    /** The signed prekey that was active when the key set was wiped: it may come back under its id, as itself only. */
    wipedKeyId: bigNumber('wiped_key_id'),
    wipedKeyDigest: bytea('wiped_key_digest'),
  },
  (table) => [
    primaryKey({
      columns: [table.userId, table.deviceId, table.identityCanonical, table.kind, table.signed],
    }),
  ],
);

/** Orders every device's queue; assigned in the statement that stores, so not in the order of commits. */
export const messageSequence = pgSequence('message_sequence');
/** Numbers connections: rises over restarts of everything but PostgreSQL itself. */
export const connectionFence = pgSequence('connection_fence');

/** Queued envelopes. `pending` is false for a message that is on its way back to its sender. */
export const messages = pgTable(
  'messages',
  {
    userId: indexedText('user_id').notNull(),
    deviceId: smallint('device_id').notNull(),
    sequence: bigNumber('sequence').notNull(),
    id: uuid('id').notNull(),
    kind: smallint('kind').notNull(),
    /** The sender of a message; the recipient that a bounce tells of. */
    peerUserId: text('peer_user_id').notNull(),
    peerDeviceId: smallint('peer_device_id').notNull(),
    messageId: uuid('message_id').notNull(),
    type: smallint('type'),
    content: bytea('content'),
    bounceReason: text('bounce_reason'),
    pending: boolean('pending').notNull().default(true),
    /** The recipient's identity version when it was stored: of an older one nobody holds the keys. */
    identityVersion: bigNumber('identity_version').notNull(),
    undecryptableCount: smallint('undecryptable_count').notNull().default(0),
    temporaryCount: smallint('temporary_count').notNull().default(0),
    dueAt: moment('due_at'),
    storedAt: moment('stored_at').notNull(),
    expiresAt: moment('expires_at').notNull(),
  },
  (table) => [
    primaryKey({ columns: [table.userId, table.deviceId, table.sequence] }),
    index('messages_put_off')
      .on(table.userId, table.deviceId, table.dueAt)
      .where(sql`${table.dueAt} IS NOT NULL`),
    index('messages_bounced').on(table.userId, table.deviceId).where(sql`NOT ${table.pending}`),
    index('messages_expiry').on(table.expiresAt),
  ],
);

/** Remembers what was stored, so that a repeated message or bounce is stored once, also after it was processed. */
export const messageReceipts = pgTable(
  'message_receipts',
  {
    userId: indexedText('user_id').notNull(),
    deviceId: smallint('device_id').notNull(),
    kind: smallint('kind').notNull(),
    peerUserId: indexedText('peer_user_id').notNull(),
    peerDeviceId: smallint('peer_device_id').notNull(),
    messageId: uuid('message_id').notNull(),
    sequence: bigNumber('sequence').notNull(),
    storedAt: moment('stored_at').notNull(),
    /** When the sweep last found the message waiting, at first when it was stored: it looks again a day later. */
    waitingAt: moment('waiting_at').notNull().defaultNow(),
    /** When the sweep first saw that the message was finished. */
    finishedAt: moment('finished_at'),
  },
  (table) => [
    primaryKey({
      columns: [
        table.userId,
        table.deviceId,
        table.kind,
        table.peerUserId,
        table.peerDeviceId,
        table.messageId,
      ],
    }),
    index('message_receipts_waiting').on(table.waitingAt).where(sql`${table.finishedAt} IS NULL`),
    index('message_receipts_finished').on(table.finishedAt).where(sql`${table.finishedAt} IS NOT NULL`),
  ],
);

/** Secrets that every node must share, each made once. */
export const sharedSecrets = pgTable('shared_secrets', {
  name: indexedText('name').primaryKey(),
  value: bytea('value').notNull(),
});
