/** What goes wrong with PostgreSQL, told apart by its codes: the store is away, or a statement is wrong. */
import { reasonOf } from '../../lib/reason.ts';
import { GatewayError } from '../../protocol/errors.ts';
import { HOT_PLAN_SETTINGS, SETTINGS } from './settings.ts';

const RETRY_AFTER_MS = 1_000;

/** @param cause what the store, or the way to it, said */
export function unavailable(cause: unknown): GatewayError {
  return new GatewayError('UNAVAILABLE', 'the store can’t be reached; nothing is lost, try again', {
    retryAfterMs: RETRY_AFTER_MS,
    cause,
  });
}

/** What becomes of connections, and of settings at connecting, in words that are of use to whoever runs the gateway. */
export function explained(error: unknown): unknown {
  const ofConnection = OF_CONNECTIONS.get(codeOf(error) ?? '');
  if (ofConnection !== undefined) return new Error(ofConnection, { cause: error });
  // It came with 14.
  if (codeOf(error) === UNKNOWN_PARAMETER && reasonOf(error).includes('idle_session_timeout')) {
    return new Error('PostgreSQL is older than 14, the first that will do', { cause: error });
  }
  if (codeOf(error) !== PROTOCOL_VIOLATED || !reasonOf(error).includes('startup parameter')) return error;
  const isOurs = Object.keys({ ...SETTINGS, ...HOT_PLAN_SETTINGS }).some((name) =>
    reasonOf(error).includes(name),
  );
  const advice = isOurs
    ? 'add ?prepare=false to it'
    : 'take the parameter out of it, and give it to the role';
  return new Error(`${SETTINGS_KEPT_OUT} (${reasonOf(error)}): ${advice}`, { cause: error });
}

export const SETTINGS_KEPT_OUT =
  'what a connection sets does not reach PostgreSQL: a pooler answers at DATABASE_URL';

const PROTOCOL_VIOLATED = '08P01';
const UNKNOWN_PARAMETER = '42704';
export const IN_FAILED_TRANSACTION = '25P02';
export const TOO_MANY_CONNECTIONS = '53300';
export const STATEMENT_TIMED_OUT = '57014';
export const READ_ONLY_TRANSACTION = '25006';
/** The driver itself says its code and the address; of a connection that was reset there is none. */
const OF_CONNECTIONS: ReadonlyMap<string, string> = new Map([
  ['CONNECTION_CLOSED', 'PostgreSQL, or what lies before it, ended the connection'],
  ['ECONNRESET', 'PostgreSQL, or what lies before it, ended the connection'],
  ['EPIPE', 'PostgreSQL, or what lies before it, ended the connection'],
  ['CONNECTION_ENDED', 'the connection to PostgreSQL was given up'],
  ['CONNECTION_DESTROYED', 'the connection to PostgreSQL was given up'],
  ['CONNECT_TIMEOUT', 'PostgreSQL did not take a connection in time'],
]);
const OUTAGE_CODES = new Set([
  ...OF_CONNECTIONS.keys(),
  STATEMENT_TIMED_OUT,
  // A standby, or made so.
  READ_ONLY_TRANSACTION,
  // The database takes no connections.
  '55000',
  // A transaction took longer than its role may.
  '25P04',
  // Deadlock; serialization; lock not available.
  '40P01',
  '40001',
  '55P03',
]);
/**
 * Classes: connection exception, refused login, no such database, insufficient resources (disk full, too many
 * connections), operator intervention, system error.
 */
const OUTAGE_CLASSES = ['08', '28', '3D', '53', '57', '58'];

/** What Node calls faults of the system, as `ECONNREFUSED`, and of TLS: a certificate that ran out, or is another's. */
const OF_THE_WAY =
  /^(E(?!RR_)[A-Z0-9_]+|ERR_(TLS|SSL)_\w+|(CERT|CRL|UNABLE_TO|ERROR_IN)_\w+|\w*SELF_SIGNED_CERT\w*|INVALID_(CA|PURPOSE)|PATH_LENGTH_EXCEEDED|HOSTNAME_MISMATCH)$/;

/** Whether `error` says that the store is away rather than that the statement is wrong. */
export function isOutage(error: unknown): boolean {
  const code = codeOf(error);
  if (code === null) return false;
  if (OUTAGE_CODES.has(code) || OF_THE_WAY.test(code)) return true;
  return code.length === 5 && OUTAGE_CLASSES.includes(code.slice(0, 2));
}

/** What the driver or the server named the failure; Drizzle wraps it. */
export function codeOf(error: unknown): string | null {
  for (let at: unknown = error; at instanceof Error; at = at.cause) {
    const code = (at as { code?: unknown }).code;
    if (typeof code === 'string') return code;
  }
  return null;
}

/**
 * Whether an uncaught exception is the driver's known fault: it writes to a connection that is gone from a timer, where
 * no caller can catch it (porsager/postgres 1154, 1208). The process may go on after `recycle`.
 */
export function isDriverWriteFault(error: unknown): boolean {
  return (
    error instanceof TypeError &&
    /null/.test(error.message) &&
    /postgres[\\/](?:src|cjs[\\/]src)[\\/]connection\.js/.test(error.stack ?? '')
  );
}
