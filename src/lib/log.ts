/** What a room may ask of the log. Fields are ids, counts and sizes; never keys, ciphertext or tokens. */
export interface Log {
  debug(fields: LogFields, message: string): void;
  info(fields: LogFields, message: string): void;
  warn(fields: LogFields, message: string): void;
  error(fields: LogFields, message: string): void;
}

export type LogFields = Record<string, string | number | boolean | null | undefined | Error>;

export const silentLog: Log = { debug() {}, info() {}, warn() {}, error() {} };
