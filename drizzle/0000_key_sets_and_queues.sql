CREATE SEQUENCE "public"."connection_fence" INCREMENT BY 1 MINVALUE 1 MAXVALUE 9223372036854775807 START WITH 1 CACHE 1;--> statement-breakpoint
CREATE SEQUENCE "public"."message_sequence" INCREMENT BY 1 MINVALUE 1 MAXVALUE 9223372036854775807 START WITH 1 CACHE 1;--> statement-breakpoint
CREATE TABLE "devices" (
	"user_id" text NOT NULL,
	"device_id" smallint NOT NULL,
	"registration_id" integer,
	"identity_key" "bytea",
	"identity_canonical" "bytea",
	"identity_key_ed25519" "bytea",
	"signed_prekey_id" bigint,
	"pq_last_resort_prekey_id" bigint,
	"signed_prekey_expires_at" timestamp with time zone,
	"key_version" bigint DEFAULT 0 NOT NULL,
	"count_version" bigint DEFAULT 0 NOT NULL,
	"identity_version" bigint DEFAULT 0 NOT NULL,
	"revision" bigint DEFAULT 0 NOT NULL,
	"low_notice_version" bigint DEFAULT 0 NOT NULL,
	"ec_available" integer DEFAULT 0 NOT NULL,
	"pq_available" integer DEFAULT 0 NOT NULL,
	"ec_claimed" bigint DEFAULT 0 NOT NULL,
	"pq_claimed" bigint DEFAULT 0 NOT NULL,
	"fence" bigint DEFAULT 0 NOT NULL,
	"updated_at" timestamp with time zone,
	"wiped_at" timestamp with time zone,
	CONSTRAINT "devices_user_id_device_id_pk" PRIMARY KEY("user_id","device_id")
);
--> statement-breakpoint
CREATE TABLE "message_receipts" (
	"user_id" text NOT NULL,
	"device_id" smallint NOT NULL,
	"kind" smallint NOT NULL,
	"peer_user_id" text NOT NULL,
	"peer_device_id" smallint NOT NULL,
	"message_id" uuid NOT NULL,
	"sequence" bigint NOT NULL,
	"stored_at" timestamp with time zone NOT NULL,
	"finished_at" timestamp with time zone,
	CONSTRAINT "message_receipts_user_id_device_id_kind_peer_user_id_peer_device_id_message_id_pk" PRIMARY KEY("user_id","device_id","kind","peer_user_id","peer_device_id","message_id")
);
--> statement-breakpoint
CREATE TABLE "messages" (
	"user_id" text NOT NULL,
	"device_id" smallint NOT NULL,
	"sequence" bigint NOT NULL,
	"id" uuid NOT NULL,
	"kind" smallint NOT NULL,
	"peer_user_id" text NOT NULL,
	"peer_device_id" smallint NOT NULL,
	"message_id" uuid NOT NULL,
	"type" smallint,
	"content" "bytea",
	"bounce_reason" text,
	"pending" boolean DEFAULT true NOT NULL,
	"identity_version" bigint NOT NULL,
	"undecryptable_count" smallint DEFAULT 0 NOT NULL,
	"temporary_count" smallint DEFAULT 0 NOT NULL,
	"due_at" timestamp with time zone,
	"stored_at" timestamp with time zone NOT NULL,
	"expires_at" timestamp with time zone NOT NULL,
	CONSTRAINT "messages_user_id_device_id_sequence_pk" PRIMARY KEY("user_id","device_id","sequence")
);
--> statement-breakpoint
CREATE TABLE "one_time_prekeys" (
	"user_id" text NOT NULL,
	"device_id" smallint NOT NULL,
	"kind" smallint NOT NULL,
	"sequence" bigint GENERATED ALWAYS AS IDENTITY (sequence name "one_time_prekeys_sequence_seq" INCREMENT BY 1 MINVALUE 1 MAXVALUE 9223372036854775807 START WITH 1 CACHE 1),
	"key_id" bigint NOT NULL,
	"public_key" "bytea" NOT NULL,
	"signature" "bytea",
	CONSTRAINT "one_time_prekeys_user_id_device_id_kind_sequence_pk" PRIMARY KEY("user_id","device_id","kind","sequence")
);
--> statement-breakpoint
CREATE TABLE "prekey_claims" (
	"user_id" text NOT NULL,
	"device_id" smallint NOT NULL,
	"claimer_user_id" text NOT NULL,
	"claimer_device_id" smallint NOT NULL,
	"claim_id" uuid NOT NULL,
	"identity_version" bigint NOT NULL,
	"registration_id" integer NOT NULL,
	"signed_prekey_id" bigint NOT NULL,
	"pq_last_resort_prekey_id" bigint,
	"ec_key_id" bigint,
	"ec_public_key" "bytea",
	"pq_key_id" bigint,
	"pq_public_key" "bytea",
	"pq_signature" "bytea",
	"claimed_at" timestamp with time zone NOT NULL,
	CONSTRAINT "prekey_claims_user_id_device_id_claimer_user_id_claimer_device_id_claim_id_pk" PRIMARY KEY("user_id","device_id","claimer_user_id","claimer_device_id","claim_id")
);
--> statement-breakpoint
CREATE TABLE "shared_secrets" (
	"name" text PRIMARY KEY NOT NULL,
	"value" "bytea" NOT NULL
);
--> statement-breakpoint
CREATE TABLE "signed_prekeys" (
	"user_id" text NOT NULL,
	"device_id" smallint NOT NULL,
	"kind" smallint NOT NULL,
	"key_id" bigint NOT NULL,
	"public_key" "bytea" NOT NULL,
	"signature" "bytea" NOT NULL,
	"replaced_at" timestamp with time zone,
	CONSTRAINT "signed_prekeys_user_id_device_id_kind_key_id_pk" PRIMARY KEY("user_id","device_id","kind","key_id")
);
--> statement-breakpoint
CREATE TABLE "used_prekey_ids" (
	"user_id" text NOT NULL,
	"device_id" smallint NOT NULL,
	"identity_canonical" "bytea" NOT NULL,
	"kind" smallint NOT NULL,
	"signed" boolean NOT NULL,
	"ids" "int8multirange" NOT NULL,
	"wiped_key_id" bigint,
	"wiped_key_digest" "bytea",
	CONSTRAINT "used_prekey_ids_user_id_device_id_identity_canonical_kind_signed_pk" PRIMARY KEY("user_id","device_id","identity_canonical","kind","signed")
);
--> statement-breakpoint
CREATE INDEX "devices_wiped" ON "devices" USING btree ("wiped_at") WHERE "devices"."wiped_at" IS NOT NULL;--> statement-breakpoint
CREATE INDEX "message_receipts_stored" ON "message_receipts" USING btree ("stored_at") WHERE "message_receipts"."finished_at" IS NULL;--> statement-breakpoint
CREATE INDEX "message_receipts_finished" ON "message_receipts" USING btree ("finished_at") WHERE "message_receipts"."finished_at" IS NOT NULL;--> statement-breakpoint
CREATE INDEX "messages_put_off" ON "messages" USING btree ("user_id","device_id","due_at") WHERE "messages"."due_at" IS NOT NULL;--> statement-breakpoint
CREATE INDEX "messages_bounced" ON "messages" USING btree ("user_id","device_id") WHERE NOT "messages"."pending";--> statement-breakpoint
CREATE INDEX "messages_expiry" ON "messages" USING btree ("expires_at");--> statement-breakpoint
CREATE UNIQUE INDEX "one_time_prekeys_id" ON "one_time_prekeys" USING btree ("user_id","device_id","kind","key_id");--> statement-breakpoint
CREATE UNIQUE INDEX "prekey_claims_ec_id" ON "prekey_claims" USING btree ("user_id","device_id","ec_key_id") WHERE "prekey_claims"."ec_key_id" IS NOT NULL;--> statement-breakpoint
CREATE UNIQUE INDEX "prekey_claims_pq_id" ON "prekey_claims" USING btree ("user_id","device_id","pq_key_id") WHERE "prekey_claims"."pq_key_id" IS NOT NULL;--> statement-breakpoint
CREATE INDEX "prekey_claims_claimed" ON "prekey_claims" USING btree ("claimed_at");--> statement-breakpoint
CREATE UNIQUE INDEX "signed_prekeys_one_active" ON "signed_prekeys" USING btree ("user_id","device_id","kind") WHERE "signed_prekeys"."replaced_at" IS NULL;--> statement-breakpoint
CREATE INDEX "signed_prekeys_replaced" ON "signed_prekeys" USING btree ("replaced_at") WHERE "signed_prekeys"."replaced_at" IS NOT NULL;