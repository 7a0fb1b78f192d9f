/** The log of the running process: JSON lines on stderr, so that stdout stays for what a command answers. */
import { pino } from 'pino';
import type { Log } from './lib/log.ts';

export const LOG_LEVELS = ['debug', 'info', 'warn', 'error', 'silent'] as const;
export type LogLevel = (typeof LOG_LEVELS)[number];

/** Written at once: the line that says why the process ends is never lost. */
export function createLogger(level: LogLevel): Log {
  return pino(
    {
      level,
      base: { pid: process.pid },
      timestamp: pino.stdTimeFunctions.isoTime,
      formatters: { level: (label) => ({ level: label }), log: withPlainErrors },
    },
    pino.destination({ dest: process.stderr.fd, sync: true }),
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
