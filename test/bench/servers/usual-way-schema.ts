/** The tables of the usual way, which pgbench's flagged table is made like. */
import { bigint, boolean, integer, pgTable, primaryKey, smallint, text } from 'drizzle-orm/pg-core';

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

export const CREATE_USUAL_TABLES = `
  CREATE TABLE usual_devices (
    user_id text, device_id int2, registration_id int4 NOT NULL, identity_key text NOT NULL,
    signed_prekey_id int4 NOT NULL, signed_prekey text NOT NULL, signature text NOT NULL,
    PRIMARY KEY (user_id, device_id));
  CREATE TABLE usual_prekeys (
    sequence int8 GENERATED ALWAYS AS IDENTITY PRIMARY KEY, user_id text NOT NULL, device_id int2 NOT NULL,
    key_id int4 NOT NULL, public_key text NOT NULL, claimed bool NOT NULL DEFAULT false);
  CREATE INDEX usual_prekeys_unclaimed ON usual_prekeys (user_id, device_id, sequence) WHERE NOT claimed`;
