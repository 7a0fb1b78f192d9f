/** What is set on every connection to PostgreSQL, whatever its server, database or role has. */

/** One query, from getting a connection to the last row. The server gives up a little earlier, so that it answers why. */
export const QUERY_TIMEOUT_MS = 10_000;
const STATEMENT_TIMEOUT_MS = 8_000;
/** No transaction of ours waits for anything but its next statement: one that does belongs to a frozen process, and holds rows. */
const IDLE_IN_TRANSACTION_MS = 3_000;

/** How the hot statements' connections plan. */
export const HOT_PLAN_SETTINGS = {
  // A hot statement reaches every table by an index, whatever the statistics say that day, so it is planned
  // once: a plan made while a table was empty must be right when it is full.
  plan_cache_mode: 'force_generic_plan',
  enable_seqscan: 'off',
  // Rows gathered in a statement are joined by hash: their number is never known when it is planned. A table
  // is reached through LATERAL, which these settings leave no other way than an index probe per row.
  enable_nestloop: 'off',
  enable_mergejoin: 'off',
  // What changes several rows of a queue locks them in the index's order, which a bitmap would lose.
  enable_bitmapscan: 'off',
  jit: 'off',
} as const;

/** A connection that was ended while it idled costs the request that finds it so. */
export const NEVER_IDLE = { idle_session_timeout: '0' } as const;

/** Of what takes as long as it has to. */
export const NEVER_LATE = { statement_timeout: '0' } as const;

interface Setting {
  /** What connections set. A text: the driver leaves out the number 0. */
  value: string;
  /** Whether what somebody else has set, in PostgreSQL's own unit, will do. */
  suits(setting: string): boolean;
}

const exactly = (value: string): Setting => ({ value, suits: (setting) => setting === value });
const atMost = (ms: number): Setting => ({
  value: String(ms),
  suits: (setting) => Number(setting) > 0 && Number(setting) <= QUERY_TIMEOUT_MS,
});

/** Of a time-out that must not come before our own. */
const never = (value: string): Setting => ({
  value,
  suits: (setting) => Number(setting) === 0 || Number(setting) >= QUERY_TIMEOUT_MS,
});

/** What the gateway depends on, whatever the server, the database or the role has. */
export const SETTINGS: Readonly<Record<string, Setting>> = {
  // What is acknowledged is on disk.
  synchronous_commit: { value: 'on', suits: (setting) => setting !== 'off' },
  // A statement sees what was committed before it began, also where one before it in the transaction waited for a lock.
  default_transaction_isolation: exactly('read committed'),
  // The forms that the driver reads, and a time's milliseconds whole.
  bytea_output: exactly('hex'),
  datestyle: { value: 'ISO', suits: (setting) => setting.startsWith('ISO') },
  extra_float_digits: { value: '1', suits: (setting) => Number(setting) >= 1 },
  statement_timeout: atMost(STATEMENT_TIMEOUT_MS),
  // Who waited for that long has the sessions ended that stand still; who gave up earlier would not.
  lock_timeout: never('0'),
  idle_in_transaction_session_timeout: atMost(IDLE_IN_TRANSACTION_MS),
  idle_session_timeout: never(NEVER_IDLE.idle_session_timeout),
};

/** What can't be set by a connection, which fails where PostgreSQL does not know it: this one came with 17. */
export const SETTINGS_LOOKED_AT: Readonly<Record<string, Setting>> = { transaction_timeout: never('0') };
