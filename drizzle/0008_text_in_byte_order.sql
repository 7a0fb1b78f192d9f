-- Indexed text is compared by its bytes, whatever order of letters the database has. Its indexes are built again, once.
ALTER TABLE "devices" ALTER COLUMN "user_id" SET DATA TYPE text COLLATE "C";--> statement-breakpoint
ALTER TABLE "signed_prekeys" ALTER COLUMN "user_id" SET DATA TYPE text COLLATE "C";--> statement-breakpoint
ALTER TABLE "one_time_prekeys" ALTER COLUMN "user_id" SET DATA TYPE text COLLATE "C";--> statement-breakpoint
ALTER TABLE "prekey_claims" ALTER COLUMN "user_id" SET DATA TYPE text COLLATE "C", ALTER COLUMN "claimer_user_id" SET DATA TYPE text COLLATE "C";--> statement-breakpoint
ALTER TABLE "used_prekey_ids" ALTER COLUMN "user_id" SET DATA TYPE text COLLATE "C";--> statement-breakpoint
ALTER TABLE "messages" ALTER COLUMN "user_id" SET DATA TYPE text COLLATE "C", ALTER COLUMN "peer_user_id" SET DATA TYPE text COLLATE "C";--> statement-breakpoint
ALTER TABLE "message_receipts" ALTER COLUMN "user_id" SET DATA TYPE text COLLATE "C", ALTER COLUMN "peer_user_id" SET DATA TYPE text COLLATE "C";--> statement-breakpoint
ALTER TABLE "shared_secrets" ALTER COLUMN "name" SET DATA TYPE text COLLATE "C";
