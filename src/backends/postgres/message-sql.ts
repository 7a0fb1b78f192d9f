/** What several statements about queues say alike. */
import { type SQL, sql } from 'drizzle-orm';
import { ENVELOPE_KIND } from './schema.ts';

/** The kinds of envelope, as literals. */
export const MESSAGE = sql.raw(String(ENVELOPE_KIND.message));
export const BOUNCE = sql.raw(String(ENVELOPE_KIND.bounce));

/** No envelope is put off for longer. */
export const PUT_OFF_MAX_MS = 120_000;
const PUT_OFF_MAX = sql.raw(`interval '${PUT_OFF_MAX_MS / 1000} seconds'`);

/**
 * Whether a message may be offered now. One that is due later than anything is ever put off was put off by a clock that
 * has been set back since.
 */
export function isDue(now: SQL): SQL {
  return sql`(m.due_at IS NULL OR m.due_at <= ${now} OR m.due_at > ${now} + ${PUT_OFF_MAX})`;
}
