-- A claim rewrites its device's row: room on the page keeps that free of index writes.
ALTER TABLE "devices" SET (fillfactor = 70);--> statement-breakpoint
-- Queues and pools are emptied from the front as fast as they fill: dead rows there are what a claim and a drain walk over.
ALTER TABLE "devices" SET (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0);--> statement-breakpoint
ALTER TABLE "one_time_prekeys" SET (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);--> statement-breakpoint
ALTER TABLE "messages" SET (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);--> statement-breakpoint
-- Keys and ciphertext don't compress; trying costs time on every write.
ALTER TABLE "messages" ALTER COLUMN "content" SET STORAGE EXTERNAL;--> statement-breakpoint
ALTER TABLE "one_time_prekeys" ALTER COLUMN "public_key" SET STORAGE EXTERNAL;--> statement-breakpoint
ALTER TABLE "signed_prekeys" ALTER COLUMN "public_key" SET STORAGE EXTERNAL;--> statement-breakpoint
ALTER TABLE "prekey_claims" ALTER COLUMN "pq_public_key" SET STORAGE EXTERNAL;
