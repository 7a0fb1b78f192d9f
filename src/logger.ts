/** The log of the running process: JSON lines on stderr, so that stdout stays for what a command answers. */
import { pino } from 'pino';
import type { Log } from './lib/log.ts';

export const LOG_LEVELS = ['debug', 'info', 'warn', 'error', 'silent'] as const;
export type LogLevel = (typeof LOG_LEVELS)[number];

/** What can't be written now is written with a later line; more than this is not kept. */
const UNWRITTEN_BYTES_MAX = 1024 * 1024;

/**
 * Written at once, so that the line that says why the process ends is there. Where nothing can be written, on a full disk
 * or into a pipe that nobody reads, the process goes on all the same: whoever is served is worth more than the log.
 */
export function createLogger(level: LogLevel): Log {
  const destination = pino.destination({
    dest: process.stderr.fd,
    sync: true,
    maxLength: UNWRITTEN_BYTES_MAX,
    // To try again at once would hold up everything else. Its types don't know the option.
    ...{ retryEAGAIN: () => false },
  });
  destination.on('error', () => {});
  return pino(
    {
      level,
      base: { pid: process.pid },
      timestamp: pino.stdTimeFunctions.isoTime,
      formatters: { level: (label) => ({ level: label }), log: withPlainErrors },
    },
    destination,
  );
}

function withPlainErrors(fields: Record<string, unknown>): Record<string, unknown> {
  return Object.fromEntries(
    Object.entries(fields).map(([name, value]) => [name, value instanceof Error ? plainError(value) : value]),
  );
}

interface PlainError {
  type: string;
  message: string;
  code?: string;
  at: string[];
  cause?: PlainError;
}

const CAUSES_MAX = 4;
/** Drizzle writes the parameters of a failed statement into the message: keys and ciphertext. */
const PARAMETERS = /\nparams:[\s\S]*$/;

/**
 * Only what is known to be harmless. Drivers hang rows, statements and parameters on their errors as further
 * properties, and a stack repeats the message.
 */
function plainError(error: Error, depth = 1): PlainError {
  const code = 'code' in error ? error.code : undefined;
  return {
    type: error.name,
    message: error.message.replace(PARAMETERS, ''),
    ...(typeof code === 'string' ? { code } : {}),
    at: (error.stack ?? '').split('\n').flatMap((line) => /^\s+at (.+)$/.exec(line)?.[1] ?? []),
    ...(error.cause instanceof Error && depth < CAUSES_MAX
      ? { cause: plainError(error.cause, depth + 1) }
      : {}),
  };
}
