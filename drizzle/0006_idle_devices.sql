-- Devices that are there already count as used now: when they were served last was not noted, and none may lose its keys for that.
ALTER TABLE "devices" ADD COLUMN "served_at" timestamp with time zone DEFAULT now();--> statement-breakpoint
ALTER TABLE "devices" ALTER COLUMN "served_at" DROP DEFAULT;
