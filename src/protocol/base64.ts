/** Strict standard base64: padded, no white space, no stray bits after the last byte. */
import { z } from 'zod';
import { shown } from './redact.ts';

const STRICT_BASE64 = /^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/][AQgw]==|[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048]=)?$/;

/** Bytes that strict base64 stands for. */
export function decodedLength(base64: string): number {
  const padding = base64.endsWith('==') ? 2 : base64.endsWith('=') ? 1 : 0;
  return (base64.length / 4) * 3 - padding;
}

/** Whether `text` is the one strict encoding of some bytes. */
export function isStrictBase64(text: string): boolean {
  return text.length % 4 === 0 && STRICT_BASE64.test(text);
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
