/** Walks the registry's schemas: a valid input of each request, and every place in it where a text or a name stands. */
import { randomUUID } from 'node:crypto';
import type { z } from 'zod';
import { content } from '../../src/protocol/envelope.ts';
import { type RequestName, requestNames, requests } from '../../src/protocol/events.ts';
import { userId, uuid } from '../../src/protocol/ids.ts';
import { ecPublicKey, ed25519PublicKey, pqPublicKey, signature } from '../../src/protocol/keys.ts';
import { KeyMaker } from '../support/key-maker.ts';

export type Path = (string | number)[];

const keys = new KeyMaker();
const signedPreKey = keys.signed(7);
const pqPreKey = keys.pq(7);

/** What the forms of the wire look like; a schema that is none of these is told from its own definition. */
const TEXTS: readonly (readonly [schema: unknown, sample: () => string])[] = [
  [userId, () => 'bystander'],
  [uuid, () => randomUUID()],
  [ecPublicKey, () => signedPreKey.publicKey],
  [pqPublicKey, () => pqPreKey.publicKey],
  [ed25519PublicKey, () => Buffer.alloc(32, 7).toString('base64')],
  [signature, () => signedPreKey.signature],
  [content, () => Buffer.from('ciphertext').toString('base64')],
];

interface Definition {
  type: string;
  shape?: Record<string, z.ZodType>;
  element?: z.ZodType;
  innerType?: z.ZodType;
  in?: z.ZodType;
  entries?: Record<string, string>;
}

/** A value that the schema takes, with every optional field. @throws Error for a kind of schema that it doesn't know */
export function sampleOf(schema: z.ZodType): unknown {
  const [, text] = TEXTS.find(([known]) => known === schema) ?? [];
  if (text !== undefined) return text();
  const definition = schema._zod.def as unknown as Definition;
  switch (definition.type) {
    case 'object':
      return Object.fromEntries(
        Object.entries(definition.shape!).map(([name, field]) => [name, sampleOf(field)]),
      );
    case 'array':
      return [sampleOf(definition.element!)];
    case 'optional':
    case 'nullable':
      return sampleOf(definition.innerType!);
    case 'pipe':
      return sampleOf(definition.in!);
    case 'enum':
      return Object.values(definition.entries!)[0];
    case 'string':
      return 'text';
    case 'number':
      return 1;
    case 'boolean':
      return true;
    default:
      throw new Error(`no sample of ${definition.type}`);
  }
}

export const samples: ReadonlyMap<RequestName, unknown> = new Map(
  requestNames.map((name) => [name, sampleOf(requests[name].input)]),
);

/** Where texts, objects and lists stand, from the outside in. */
export function placesOf(value: unknown, path: Path = []): { texts: Path[]; objects: Path[]; lists: Path[] } {
  const isList = Array.isArray(value);
  const isObject = !isList && typeof value === 'object' && value !== null;
  const inner = !isList && !isObject ? [] : Object.entries(value as object);
  const within = inner.map(([name, one]) => placesOf(one, [...path, isList ? Number(name) : name]));
  return {
    texts: [...(typeof value === 'string' ? [path] : []), ...within.flatMap(({ texts }) => texts)],
    objects: [...(isObject ? [path] : []), ...within.flatMap(({ objects }) => objects)],
    lists: [...(isList ? [path] : []), ...within.flatMap(({ lists }) => lists)],
  };
}

/** A copy in which another value stands at the path. */
export function withValueAt(value: unknown, path: Path, replacement: unknown): unknown {
  const [first, ...rest] = path;
  if (first === undefined) return replacement;
  const copy = (Array.isArray(value) ? [...value] : { ...(value as object) }) as Record<
    string | number,
    unknown
  >;
  copy[first] = withValueAt(copy[first], rest, replacement);
  return copy;
}

/** A copy in which the object at the path has one more field, by whatever name, as JSON has it. */
export function withFieldAt(value: unknown, path: Path, name: string, field: unknown): unknown {
  let at = value as Record<string | number, unknown>;
  for (const step of path) at = at[step] as Record<string | number, unknown>;
  const copy = JSON.parse(JSON.stringify(at)) as object;
  // An assignment to `__proto__` would set the prototype instead.
  Object.defineProperty(copy, name, { value: field, enumerable: true, configurable: true, writable: true });
  return path.length === 0 ? copy : withValueAt(value, path, copy);
}
