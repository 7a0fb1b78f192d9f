-- Indexed text is compared by its bytes, whatever order of letters the database has. Its indexes are built again, once.
ALTER TABLE "devices" ALTER COLUMN "user_id" SET DATA TYPE text COLLATE "C";--> statement-breakpoint
ALTER TABLE "signed_prekeys" ALTER COLUMN "user_id" SET DATA TYPE text COLLATE "C";--> statement-breakpoint
ALTER TABLE "one_time_prekeys" ALTER COLUMN "user_id" SET DATA TYPE text COLLATE "C";--> statement-breakpoint
ALTER TABLE "prekey_claims" ALTER COLUMN "user_id" SET DATA TYPE text COLLATE "C", ALTER COLUMN "claimer_user_id" SET DATA TYPE text COLLATE "C";--> statement-breakpoint
ALTER TABLE "used_prekey_ids" ALTER COLUMN "user_id" SET DATA TYPE text COLLATE "C";--> statement-breakpoint
ALTER TABLE "messages" ALTER COLUMN "user_id" SET DATA TYPE text COLLATE "C";--> statement-breakpoint
ALTER TABLE "message_receipts" ALTER COLUMN "user_id" SET DATA TYPE text COLLATE "C", ALTER COLUMN "peer_user_id" SET DATA TYPE text COLLATE "C";--> statement-breakpoint
ALTER TABLE "shared_secrets" ALTER COLUMN "name" SET DATA TYPE text COLLATE "C";--> statement-breakpoint
-- To PostgreSQL a collation is part of what a prepared statement gives back: those of running gateways would fail, and their driver
-- would then mix up the results on that connection. So the connections end here; new ones wait for the tables until this is committed.
DO $$
BEGIN
  PERFORM pg_terminate_backend(pid) FROM pg_stat_activity
  WHERE datname = current_database() AND application_name = 'keygate' AND pid <> pg_backend_pid();
EXCEPTION WHEN insufficient_privilege THEN
  RAISE EXCEPTION 'gateways are running whose connections this role may not end: stop them first';
END $$;
