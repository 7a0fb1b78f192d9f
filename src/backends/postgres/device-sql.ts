/** What statements about keys and about queues say alike. */
import { sql } from 'drizzle-orm';

/** The rows of the one device that a statement's values name. */
export const ofDevice = sql`user_id = ${sql.placeholder('userId')} AND device_id = ${sql.placeholder('deviceId')}`;
