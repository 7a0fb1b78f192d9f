/** PostgreSQL array literals. Arrays travel as text with a cast in the statement: the driver then needs no type look-up. */

/** For `int2[]`, `int4[]`, `int8[]`. */
export function numberArray(values: readonly (number | null)[]): string {
  return `{${values.map((value) => value ?? 'NULL').join(',')}}`;
}

/** For `text[]` and `uuid[]`. */
export function textArray(values: readonly string[]): string {
  return `{${values.map((value) => `"${value.replace(/[\\"]/g, '\\$&')}"`).join(',')}}`;
}

/** For `bytea[]`. */
export function byteaArray(values: readonly (Uint8Array | null)[]): string {
  return `{${values.map((bytes) => (bytes === null ? 'NULL' : `"\\\\x${hex(bytes)}"`)).join(',')}}`;
}

/** For `text[]` that the statement decodes: two thirds of what hexadecimal digits would take. */
export function base64Array(values: readonly Uint8Array[]): string {
  return `{${values
    .map((bytes) => `"${Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString('base64')}"`)
    .join(',')}}`;
}

function hex(bytes: Uint8Array): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString('hex');
}
