/** The HTTP door as an OpenAPI 3.1 document, made from the registry. */
import { ERRORS, type ErrorCode, errorObject } from '../protocol/errors.ts';
import { requests } from '../protocol/events.ts';
import { httpRoutes } from '../protocol/http-routes.ts';
import { userId } from '../protocol/ids.ts';
import {
  createJsonSchemas,
  type JsonObject,
  type JsonSchemas,
  type WireSchema,
} from '../protocol/json-schema.ts';

interface Route {
  method: 'GET' | 'POST';
  path: string;
  body?: WireSchema;
  query?: { shape: Record<string, WireSchema> };
  idempotencyKey?: WireSchema;
  answer: WireSchema;
}

type RouteName = keyof typeof httpRoutes;

/** @param version of this package */
export function openApi(version: string): JsonObject {
  const schemas = createJsonSchemas('draft-2020-12');
  const error = schemas.of(errorObject);
  const paths: Record<string, JsonObject> = {};
  for (const name of Object.keys(httpRoutes) as RouteName[]) {
    const route: Route = httpRoutes[name];
    const path = route.path.replace(/:(\w+)/g, '{$1}');
    paths[path] = { ...paths[path], [route.method.toLowerCase()]: operationOf(name, route, schemas) };
  }
  return {
    openapi: '3.1.0',
    info: {
      title: 'Keygate, HTTP door',
      version,
      description:
        'For what has no socket: the same requests under the same limits. HEAD is refused, since a claim must not happen by a look.',
      license: { name: 'MIT', identifier: 'MIT' },
    },
    servers: [{ url: 'http://localhost:3000' }],
    security: [{ token: [] }],
    paths,
    components: {
      schemas: schemas.components(),
      responses: Object.fromEntries(
        [...codesByStatus()].map(([status, codes]) => [`Refused${status}`, refusalOf(codes, error)]),
      ),
      securitySchemes: {
        token: {
          type: 'http',
          scheme: 'bearer',
          bearerFormat: 'JWT',
          description: 'its claims sub and device_id say who calls',
        },
      },
    },
  };
}

function operationOf(name: RouteName, route: Route, schemas: JsonSchemas): JsonObject {
  const parameters = [
    ...(route.path.includes(':userId')
      ? [{ name: 'userId', in: 'path', required: true, schema: schemas.of(userId) }]
      : []),
    ...Object.entries(route.query?.shape ?? {}).map(([parameter, schema]) => ({
      name: parameter,
      in: 'query',
      required: false,
      schema: schemas.of(schema),
    })),
    ...(route.idempotencyKey === undefined
      ? []
      : [
          {
            name: 'Idempotency-Key',
            in: 'header',
            required: false,
            description: 'the claimId: with the same one, the same answer; without it every call claims',
            schema: schemas.of(route.idempotencyKey),
          },
        ]),
  ];
  const answer = schemas.of(route.answer) as { properties: JsonObject; required?: string[] };
  return {
    operationId: name,
    summary: requests[name].meaning,
    ...(parameters.length === 0 ? {} : { parameters }),
    ...(route.body === undefined
      ? {}
      : { requestBody: { required: true, content: json(schemas.of(route.body)) } }),
    responses: {
      200: {
        description: 'success',
        content: json({
          ...answer,
          properties: { success: { type: 'boolean', const: true }, ...answer.properties },
          required: ['success', ...(answer.required ?? [])],
        }),
      },
      ...Object.fromEntries(
        [...codesByStatus().keys()].map((status) => [
          status,
          { $ref: `#/components/responses/Refused${status}` },
        ]),
      ),
    },
  };
}

function refusalOf(codes: readonly ErrorCode[], error: JsonObject): JsonObject {
  return {
    description: codes.map((code) => `${code}: ${ERRORS[code].meaning}`).join('; '),
    content: json({
      type: 'object',
      properties: { success: { type: 'boolean', const: false }, error },
      required: ['success', 'error'],
    }),
  };
}

function codesByStatus(): Map<number, ErrorCode[]> {
  const byStatus = new Map<number, ErrorCode[]>();
  for (const code of Object.keys(ERRORS) as ErrorCode[]) {
    const { httpStatus } = ERRORS[code];
    byStatus.set(httpStatus, [...(byStatus.get(httpStatus) ?? []), code]);
  }
  return byStatus;
}

function json(schema: JsonObject): JsonObject {
  return { 'application/json': { schema } };
}
