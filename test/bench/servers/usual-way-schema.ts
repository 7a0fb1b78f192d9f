/** The tables of the usual way, which pgbench's flagged table is made like. */
import {
  bigint,
  boolean,
  integer,
  pgTable,
  primaryKey,
  smallint,
  text,
  timestamp,
  uuid,
} from 'drizzle-orm/pg-core';

export const usualDevices = pgTable(
  'usual_devices',
  {
    userId: text('user_id').notNull(),
    deviceId: smallint('device_id').notNull(),
    registrationId: integer('registration_id').notNull(),
    identityKey: text('identity_key').notNull(),
    signedPreKeyId: integer('signed_prekey_id').notNull(),
    signedPreKey: text('signed_prekey').notNull(),
    signature: text('signature').notNull(),
  },
  (table) => [primaryKey({ columns: [table.userId, table.deviceId] })],
);

export const usualPreKeys = pgTable('usual_prekeys', {
  sequence: bigint('sequence', { mode: 'number' }).generatedAlwaysAsIdentity().primaryKey(),
  userId: text('user_id').notNull(),
  deviceId: smallint('device_id').notNull(),
  keyId: integer('key_id').notNull(),
  publicKey: text('public_key').notNull(),
  claimed: boolean('claimed').notNull().default(false),
});

export const usualMessages = pgTable('usual_messages', {
  id: uuid('id').primaryKey(),
  messageId: uuid('message_id').notNull(),
  senderUserId: text('sender_user_id').notNull(),
  senderDeviceId: smallint('sender_device_id').notNull(),
  recipientUserId: text('recipient_user_id').notNull(),
  recipientDeviceId: smallint('recipient_device_id').notNull(),
  type: smallint('type').notNull(),
  content: text('content').notNull(),
  storedAt: timestamp('stored_at', { withTimezone: true, mode: 'date' }).notNull().defaultNow(),
});

export const CREATE_USUAL_TABLES = `
  CREATE TABLE usual_devices (
    user_id text, device_id int2, registration_id int4 NOT NULL, identity_key text NOT NULL,
    signed_prekey_id int4 NOT NULL, signed_prekey text NOT NULL, signature text NOT NULL,
    PRIMARY KEY (user_id, device_id));
  CREATE TABLE usual_prekeys (
    sequence int8 GENERATED ALWAYS AS IDENTITY PRIMARY KEY, user_id text NOT NULL, device_id int2 NOT NULL,
    key_id int4 NOT NULL, public_key text NOT NULL, claimed bool NOT NULL DEFAULT false);
  CREATE INDEX usual_prekeys_unclaimed ON usual_prekeys (user_id, device_id, sequence) WHERE NOT claimed;
  CREATE TABLE usual_messages (
    id uuid PRIMARY KEY, message_id uuid NOT NULL, sender_user_id text NOT NULL, sender_device_id int2 NOT NULL,
    recipient_user_id text NOT NULL, recipient_device_id int2 NOT NULL, type int2 NOT NULL, content text NOT NULL,
    stored_at timestamptz NOT NULL DEFAULT now());
  CREATE INDEX usual_messages_queue ON usual_messages (recipient_user_id, recipient_device_id, stored_at)`;
