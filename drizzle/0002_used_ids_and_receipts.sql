DROP INDEX "message_receipts_stored";--> statement-breakpoint
ALTER TABLE "message_receipts" ADD COLUMN "waiting_at" timestamp with time zone DEFAULT now() NOT NULL;--> statement-breakpoint
ALTER TABLE "used_prekey_ids" ADD COLUMN "unseen_count" integer DEFAULT 0 NOT NULL;--> statement-breakpoint
CREATE INDEX "message_receipts_waiting" ON "message_receipts" USING btree ("waiting_at") WHERE "message_receipts"."finished_at" IS NULL;