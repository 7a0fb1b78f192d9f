/** Strict standard base64: padded, no white space, no stray bits after the last byte. */
import { z } from 'zod';
import { shown } from './redact.ts';

const PADDED = /^[A-Za-z0-9+/]*={0,2}$/;
/** The last characters before one `=`, and before two: the bits that stand for no byte are 0. */
const LAST_OF_TWO_BYTES = 'AEIMQUYcgkosw048';
const LAST_OF_ONE_BYTE = 'AQgw';

/** Bytes that strict base64 stands for. */
export function decodedLength(base64: string): number {
  const padding = base64.endsWith('==') ? 2 : base64.endsWith('=') ? 1 : 0;
  return (base64.length / 4) * 3 - padding;
}

/** Whether `text` is the one strict encoding of some bytes. */
export function isStrictBase64(text: string): boolean {
  const { length } = text;
  if (length % 4 !== 0 || !PADDED.test(text)) return false;
  if (!text.endsWith('=')) return true;
  return text.endsWith('==')
    ? LAST_OF_ONE_BYTE.includes(text.charAt(length - 3))
    : LAST_OF_TWO_BYTES.includes(text.charAt(length - 2));
}

/** Base64 of exactly `byteLength` bytes; with `prefix`, the first decoded byte is it. */
export function base64Of(byteLength: number, prefix?: number) {
  const encodedLength = Math.ceil(byteLength / 3) * 4;
  return shown('digest', z.string())
    .refine(
      (text) => text.length === encodedLength && isStrictBase64(text) && decodedLength(text) === byteLength,
      {
        error: `must be base64 of ${byteLength} bytes`,
        abort: true,
      },
    )
    .refine((text) => prefix === undefined || firstByte(text) === prefix, {
      error: `must start with the byte 0x${(prefix ?? 0).toString(16).padStart(2, '0')}`,
    });
}

const ALPHABET = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/';

/** The first byte that non-empty strict base64 stands for. */
export function firstByte(base64: string): number {
  return (ALPHABET.indexOf(base64.charAt(0)) << 2) | (ALPHABET.indexOf(base64.charAt(1)) >> 4);
}
