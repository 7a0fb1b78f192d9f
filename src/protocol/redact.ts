/**
 * What of the wire an inspector may show. The schemas hold an allow-list: a string is shown, or stands as a digest, only
 * where its schema says so; of every other string nothing is shown but its length. Numbers, booleans and members of
 * enums can hold no secret and are shown.
 */
import { z } from 'zod';

/**
 * `plain`: as it is. `digest`: base64 of a key, a signature or ciphertext. `uuid`: as it is where it is a UUID.
 * `fieldName`: as it is where some request has a field of that name.
 */
export type ShownAs = 'plain' | 'digest' | 'uuid' | 'fieldName';

const allowList = z.registry<{ shownAs: ShownAs }>();

/** Puts `schema`, and what is derived from it, on the allow-list. */
export function shown<Schema extends z.ZodType>(shownAs: ShownAs, schema: Schema): Schema {
  allowList.add(schema, { shownAs });
  return schema;
}

/**
 * A payload after redaction: JSON in which a string that may not be shown is a {@link Digested} or a {@link Withheld},
 * and a long list ends with a {@link More}.
 */
export type RedactedValue =
  | null
  | boolean
  | number
  | string
  | Digested
  | Withheld
  | More
  | RedactedValue[]
  | { [field: string]: RedactedValue };
export const redactedValue: z.ZodType<RedactedValue> = z.json() as unknown as z.ZodType<RedactedValue>;

/** Key material and ciphertext: equal ones have equal digests, on every node of one installation. */
export const digested = z.strictObject({ bytes: z.int(), digest: z.string() });
export type Digested = z.infer<typeof digested>;
/** Tokens, validations and free text: how long it was, and nothing else. */
export const withheld = z.strictObject({ withheld: z.string(), length: z.int() });
export type Withheld = z.infer<typeof withheld>;
/** Stands for the items of a list that were left out. */
export const more = z.strictObject({ more: z.int() });
export type More = z.infer<typeof more>;

export interface Redaction {
  /** The length and a short keyed hash of what the base64 text stands for. */
  digested(base64: string): Digested;
  /** Whether some request has a field of this name. */
  isFieldName(name: string): boolean;
}

const LIST_ITEMS_MAX = 8;
const UUID = /^[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}$/i;

/** The part of `value` that may be shown. Fields that `schema` does not know are left out. */
export function redacted(schema: z.ZodType, value: unknown, redaction: Redaction): RedactedValue {
  if (value === null || value === undefined) return null;
  if (typeof value === 'string') return redactedText(schema, value, redaction);
  const { def } = schema._zod as unknown as { def: Definition };
  switch (def.type) {
    case 'object': {
      if (typeof value !== 'object') return withheldValue(value);
      const fields: { [field: string]: RedactedValue } = {};
      for (const name in def.shape) {
        const field = (value as Record<string, unknown>)[name];
        if (field !== undefined) fields[name] = redacted(def.shape[name]!, field, redaction);
      }
      return fields;
    }
    case 'array': {
      if (!Array.isArray(value)) return withheldValue(value);
      const items = value.slice(0, LIST_ITEMS_MAX).map((item) => redacted(def.element, item, redaction));
      if (value.length > LIST_ITEMS_MAX) items.push({ more: value.length - LIST_ITEMS_MAX });
      return items;
    }
    case 'union': {
      const option = def.options.find((one) => one.safeParse(value).success);
      return option === undefined ? withheldValue(value) : redacted(option, value, redaction);
    }
    case 'optional':
    case 'nullable':
      return redacted(def.innerType, value, redaction);
    case 'number':
      return typeof value === 'number' ? value : withheldValue(value);
    case 'boolean':
      return typeof value === 'boolean' ? value : withheldValue(value);
    default:
      return withheldValue(value);
  }
}

/** Every name of a field of `schema`, however deep. */
export function fieldNamesOf(schema: z.ZodType, into: Set<string> = new Set()): Set<string> {
  const { def } = schema._zod as unknown as { def: Definition };
  switch (def.type) {
    case 'object':
      for (const name in def.shape) {
        into.add(name);
        fieldNamesOf(def.shape[name]!, into);
      }
      break;
    case 'array':
      fieldNamesOf(def.element, into);
      break;
    case 'optional':
    case 'nullable':
      fieldNamesOf(def.innerType, into);
      break;
  }
  return into;
}

/** What the wire's schemas are made of; everything else is a string in some form, or is not shown. */
type Definition =
  | { type: 'object'; shape: Record<string, z.ZodType> }
  | { type: 'array'; element: z.ZodType }
  | { type: 'union'; options: z.ZodType[] }
  | { type: 'optional' | 'nullable'; innerType: z.ZodType }
  | { type: 'pipe'; in: z.ZodType }
  | { type: 'enum'; entries: Record<string, string> }
  | { type: 'literal'; values: unknown[] }
  | { type: 'number' }
  | { type: 'boolean' };

function redactedText(schema: z.ZodType, text: string, redaction: Redaction): RedactedValue {
  const { def } = schema._zod as unknown as { def: Definition };
  if (def.type === 'optional' || def.type === 'nullable') {
    return redactedText(def.innerType, text, redaction);
  }
  if (def.type === 'pipe') return redactedText(def.in, text, redaction);
  if (def.type === 'union') {
    const option = def.options.find((one) => one.safeParse(text).success);
    return option === undefined ? withheldValue(text) : redactedText(option, text, redaction);
  }
  if (def.type === 'enum') {
    return Object.values(def.entries).includes(text) ? text : withheldValue(text);
  }
  if (def.type === 'literal') return def.values.includes(text) ? text : withheldValue(text);
  switch (allowList.get(schema)?.shownAs) {
    case 'plain':
      return text;
    case 'digest':
      return redaction.digested(text);
    case 'uuid':
      return UUID.test(text) ? text : withheldValue(text);
    case 'fieldName':
      return redaction.isFieldName(text) ? text : withheldValue(text);
    default:
      return withheldValue(text);
  }
}

function withheldValue(value: unknown): Withheld {
  return { withheld: typeof value, length: typeof value === 'string' ? value.length : 0 };
}
