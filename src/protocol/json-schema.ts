/** The registry's schemas as JSON Schema, for documents that other tools read. */
import { z } from 'zod';

/** A schema of the wire, for rooms that have no business with the library behind it. */
export type WireSchema = z.ZodType;

/** JSON, as a document holds it. */
export type JsonObject = { [name: string]: unknown };

export interface JsonSchemas {
  /** What may be written on the wire; shared parts are references to `#/components/schemas/…`. */
  of(schema: WireSchema): JsonObject;
  /** Every shared part that was referred to so far, by its name. */
  components(): JsonObject;
}

/**
 * @param dialect `draft-2020-12` is OpenAPI 3.1's own, `draft-07` what AsyncAPI 3 builds on
 */
export function createJsonSchemas(dialect: 'draft-2020-12' | 'draft-07'): JsonSchemas {
  const shared: JsonObject = {};

  return {
    of(schema) {
      // What goes in: a transform's outcome never travels, and a receiver of data must put up with newer fields.
      const {
        $schema: _dialect,
        $defs = {},
        definitions = $defs,
        ...root
      } = z.toJSONSchema(schema, { target: dialect, io: 'input', override: withoutNoise }) as JsonObject & {
        $defs?: JsonObject;
        definitions?: JsonObject;
      };
      for (const [name, part] of Object.entries(definitions)) shared[name] = relocated(part);
      return relocated(root) as JsonObject;
    },

    components: () => shared,
  };
}

/** What says nothing to a reader: the bounds of every double, and the pattern of a format that has a name. */
function withoutNoise({ jsonSchema }: { jsonSchema: JsonObject }): void {
  if (jsonSchema.minimum === Number.MIN_SAFE_INTEGER) delete jsonSchema.minimum;
  if (jsonSchema.maximum === Number.MAX_SAFE_INTEGER) delete jsonSchema.maximum;
  if (jsonSchema.format === 'date-time') delete jsonSchema.pattern;
}

/** References into a schema's own definitions become references into the document's components. */
function relocated(part: unknown): unknown {
  if (Array.isArray(part)) return part.map(relocated);
  if (typeof part !== 'object' || part === null) return part;
  return Object.fromEntries(
    Object.entries(part)
      // The name of a shared part stands where it is kept.
      .filter(([name, value]) => !(name === 'id' && typeof value === 'string') && name !== '$id')
      .map(([name, value]) => [
        name,
        name === '$ref' && typeof value === 'string'
          ? value.replace(/^#\/(\$defs|definitions)\//, '#/components/schemas/')
          : relocated(value),
      ]),
  );
}
