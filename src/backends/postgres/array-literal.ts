/** PostgreSQL array literals. Arrays travel as text with a cast in the statement: the driver then needs no type look-up. */

/** For `int2[]`, `int4[]`, `int8[]`. */
export function numberArray(values: readonly (number | null)[]): string {
  return `{${values.map((value) => value ?? 'NULL').join(',')}}`;
}

/** For `uuid[]`: nothing in it is to be escaped. */
export function plainArray(values: readonly string[]): string {
  return values.length === 0 ? '{}' : `{"${values.join('","')}"}`;
}

/** For any `text[]`. */
export function textArray(values: readonly (string | null)[]): string {
  return `{${values.map((value) => (value === null ? 'NULL' : quoted(value))).join(',')}}`;
}

const SPECIAL = /[\\"]/;

function quoted(value: string): string {
  // Most values have nothing to escape, and a look is cheaper than a replacement.
  return `"${SPECIAL.test(value) ? value.replace(/[\\"]/g, '\\$&') : value}"`;
}

/** For `bytea[]`. */
export function byteaArray(values: readonly (Uint8Array | null)[]): string {
  return `{${values.map((bytes) => (bytes === null ? 'NULL' : `"\\\\x${hex(bytes)}"`)).join(',')}}`;
}

/** For `string_to_array(…, ',', '')`, each to be decoded; what is empty is null there. */
export function base64List(values: readonly (Uint8Array | null)[]): string {
  return values.map((bytes) => (bytes === null ? '' : base64(bytes))).join(',');
}

function base64(bytes: Uint8Array): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString('base64');
}

function hex(bytes: Uint8Array): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString('hex');
}
