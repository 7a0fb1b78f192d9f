/** The forms that values of the environment have; a fault is told in words that follow the variable's name. */
import { z } from 'zod';
import { PUBLIC_KEY_ALGORITHMS, type PublicKeyAlgorithm } from '../requests/authenticate.ts';

export function optional<Schema extends z.ZodType>(schema: Schema) {
  return schema.nullable().default(null);
}

export function wholeNumber({ min, max, byDefault }: { min: number; max: number; byDefault: number }) {
  return z
    .string()
    .refine(
      (text) => /^\d{1,9}$/.test(text) && Number(text) >= min && Number(text) <= max,
      `must be a whole number from ${min} to ${max}`,
    )
    .transform(Number)
    .default(byDefault);
}

export function secret() {
  // A line break at the end comes with reading a file, and makes another secret than the issuer has.
  return z.string().refine((text) => text.trim() === text, 'begins or ends with white space');
}

export function hostName() {
  return z.string().regex(/^[A-Za-z0-9.:%_-]+$/, 'must be a host name or an address, without a port');
}

/** Turns what `read` throws into an issue of the variable. */
export function orIssue<Value>(read: (text: string) => Value) {
  return (text: string, context: z.RefinementCtx<string>): Value => {
    try {
      return read(text);
    } catch (error) {
      context.addIssue({ code: 'custom', message: error instanceof Error ? error.message : String(error) });
      return z.NEVER;
    }
  };
}

export function listOf(text: string): string[] {
  return text
    .split(',')
    .map((item) => item.trim())
    .filter((item) => item !== '');
}

export function webAddress(text: string): URL {
  const url = URL.canParse(text) ? new URL(text) : null;
  if (url === null || !/^https?:$/.test(url.protocol)) {
    throw new Error('must be an address that begins with https:// or http://');
  }
  return url;
}

export function algorithms(text: string): PublicKeyAlgorithm[] {
  const known: readonly string[] = PUBLIC_KEY_ALGORITHMS;
  const names = listOf(text);
  if (names.length === 0 || names.some((name) => !known.includes(name))) {
    throw new Error(`must list some of ${known.join(', ')}`);
  }
  return names as PublicKeyAlgorithm[];
}

/** Compared byte for byte with what browsers send, so only their own spelling is of use. */
export function origin(text: string): string {
  if (text === '*') throw new Error('must name each origin; * is not accepted');
  const url = URL.canParse(text) ? new URL(text) : null;
  const isWeb = url !== null && /^https?:$/.test(url.protocol);
  if (isWeb && url.origin !== text) throw new Error(`must be written as browsers do: ${url.origin}`);
  if (!isWeb && !/^[a-z][a-z0-9+.-]*:\/\/[a-z0-9.-]+$/.test(text)) {
    throw new Error('must list origins such as https://chat.example.org, separated by commas');
  }
  return text;
}

export function isLoopback(host: string): boolean {
  return host === 'localhost' || host === '::1' || host === '[::1]' || /^127(\.\d+){3}$/.test(host);
}
