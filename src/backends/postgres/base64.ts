/** Bytes as base64, made where they lie: as `bytea` they would come in hexadecimal digits, and be decoded to be encoded. */
import { type SQL, sql } from 'drizzle-orm';

/** @param column of type `bytea` */
export function base64(column: string): SQL {
  // PostgreSQL breaks it into lines.
  return sql.raw(`replace(encode(${column}, 'base64'), E'\\n', '')`);
}
