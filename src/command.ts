/** What every command of the command line is made of. */

import type { ParseArgsConfig } from 'node:util';
import { reasonOf } from './lib/reason.ts';
import { GatewayError } from './protocol/errors.ts';
import { type DeviceAddress, deviceId, userId } from './protocol/ids.ts';
import { UsageError } from './usage-error.ts';

export type Options = NonNullable<ParseArgsConfig['options']>;
export type Values = Record<string, string | boolean | (string | boolean)[] | undefined>;

export interface Command {
  /** One line, for the list of commands. */
  summary: string;
  help: string;
  options: Options;
  /** @throws UsageError, ConfigError, or any Error whose message tells the operator what went wrong */
  run(values: Values, env: NodeJS.ProcessEnv): Promise<void>;
}

/** The answer was given, and it is no good news: the process ends with 1 and says nothing more. */
export class BadNewsError extends Error {}

/** What an operator needs to hear of a failure, in a line: clients are told to try again, and not why. */
export function faultOf(error: unknown): string {
  const isForClients = error instanceof GatewayError && error.cause !== undefined;
  return reasonOf(isForClients ? error.cause : error);
}

export const JSON_OPTION = { json: { type: 'boolean' } } as const satisfies Options;
export const DEVICE_OPTIONS = {
  user: { type: 'string' },
  device: { type: 'string' },
} as const satisfies Options;

/** @throws UsageError */
export function deviceOf(values: Values): DeviceAddress {
  const user = userId.safeParse(values.user);
  if (!user.success) {
    throw new UsageError(
      values.user === undefined ? '--user is missing' : `--user ${user.error.issues[0]?.message}`,
    );
  }
  const device = deviceId.safeParse(
    /^\d{1,3}$/.test(String(values.device)) ? Number(values.device) : Number.NaN,
  );
  if (!device.success) {
    throw new UsageError(
      values.device === undefined ? '--device is missing' : '--device must be a number from 1 to 127',
    );
  }
  return { userId: user.data, deviceId: device.data };
}

export function print(text: string): void {
  process.stdout.write(`${text}\n`);
}

/** One JSON document, for programs, or the lines for people. */
export function answer(values: Values, facts: object, lines: readonly string[]): void {
  print(values.json === true ? JSON.stringify(facts) : lines.join('\n'));
}

const BAR_LENGTH = 30;

/**
 * How far a long command is, on stderr, and only where a person looks at it.
 *
 * @param total what the whole amounts to; where it turns out to be more, the bar stays full
 */
export function progressBar(what: string, total: number): { advance(count: number): void; end(): void } {
  const { stderr } = process;
  let done = 0;
  let shown = '';
  const show = (): void => {
    const share = total === 0 ? 1 : Math.min(1, done / total);
    const filled = Math.round(share * BAR_LENGTH);
    const line = `${what} [${'#'.repeat(filled)}${'.'.repeat(BAR_LENGTH - filled)}] ${done} of ${total}`;
    if (line === shown) return;
    shown = line;
    stderr.write(`\r${line}`);
  };
  return {
    advance(count) {
      done += count;
      if (stderr.isTTY) show();
    },
    end() {
      if (stderr.isTTY && shown !== '') stderr.write('\n');
    },
  };
}
