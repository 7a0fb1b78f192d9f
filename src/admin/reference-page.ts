/** The reference as one page to read: made of the two documents, without a script and without anything from elsewhere. */
import { createHash } from 'node:crypto';
import { ERRORS } from '../protocol/errors.ts';
import type { JsonObject } from '../protocol/json-schema.ts';

/** A variable of the configuration; both texts are Markdown. */
export interface VariableReference {
  name: string;
  byDefault: string;
  meaning: string;
}

const STYLE = `
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 20%, transparent) }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 3rem; border-bottom: 1px solid var(--line) }
h3 { margin: 2rem 0 0 } h3 code { font-size: 1.1em }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line) }
th { font-weight: 600 } td:first-child { white-space: nowrap }
nav { columns: 4 10rem } nav a { display: block } code { font-size: .95em }
.optional { opacity: .7 } a { color: inherit }`;

/** What the page may load: its own style, and nothing else. */
export const PAGE_POLICY = `default-src 'none'; style-src 'sha256-${createHash('sha256').update(STYLE).digest('base64')}'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'`;

interface Schema {
  $ref?: string;
  type?: string | string[];
  const?: unknown;
  enum?: unknown[];
  description?: string;
  properties?: Record<string, Schema>;
  required?: string[];
  items?: Schema;
  oneOf?: Schema[];
  anyOf?: Schema[];
  minimum?: number;
  maximum?: number;
  minLength?: number;
  maxLength?: number;
  minItems?: number;
  maxItems?: number;
  format?: string;
}

interface Operation {
  action: string;
  summary: string;
  messages: { $ref: string }[];
  reply?: { messages: { $ref: string }[] };
}

interface Message {
  summary: string;
  payload: Schema;
}

interface SocketDocument {
  info: { version: string; description: string };
  operations: Record<string, Operation>;
  components: { messages: Record<string, Message>; schemas: Record<string, Schema> };
}

interface HttpOperation {
  operationId: string;
  summary: string;
  parameters?: { name: string; in: string; description?: string; schema: Schema }[];
  requestBody?: { content: { 'application/json': { schema: Schema } } };
  responses: { 200: { content: { 'application/json': { schema: Schema } } } };
}

interface HttpDocument {
  info: { description: string };
  paths: Record<string, Record<string, HttpOperation>>;
}

/** @returns HTML */
export function referencePage(parts: {
  sockets: JsonObject;
  http: JsonObject;
  variables: readonly VariableReference[];
}): string {
  const sockets = parts.sockets as unknown as SocketDocument;
  const http = parts.http as unknown as HttpDocument;
  const operations = Object.entries(sockets.operations);
  const requests = operations.filter(([, { action }]) => action === 'receive');
  const pushes = operations.filter(([, { action }]) => action === 'send');
  const { messages, schemas } = sockets.components;
  const payload = ({ $ref }: { $ref: string }): Schema => messages[lastOf($ref)]!.payload;

  const request = ([
    name,
    {
      summary,
      messages: [input],
      reply,
    },
  ]: [string, Operation]): string => `
<h3 id="${text(name)}"><code>${text(name)}</code></h3>
<p>${text(summary)}</p>
${shape('input', payload(input!))}
${shape('data', dataOf(payload(reply!.messages[0]!)))}`;
  const push = ([
    name,
    {
      summary,
      messages: [input],
      reply,
    },
  ]: [string, Operation]): string => `
<h3 id="${text(name)}"><code>${text(name)}</code></h3>
<p>${text(summary)}</p>
${shape('payload', payload(input!))}
${reply === undefined ? '' : shape('acknowledgement', payload(reply.messages[0]!))}`;
  const route = ([path, methods]: [string, Record<string, HttpOperation>]): string =>
    Object.entries(methods)
      .map(
        ([method, { summary, parameters = [], requestBody, responses }]) => `
<h3><code>${text(method.toUpperCase())} ${text(path)}</code></h3>
<p>${text(summary)}</p>
${
  parameters.length === 0
    ? ''
    : table(
        ['parameter', 'type', ''],
        parameters.map((one) => [
          `<code>${text(one.name)}</code> <span class="optional">${text(one.in)}</span>`,
          typeOf(one.schema),
          text(one.description ?? ''),
        ]),
      )
}
${requestBody === undefined ? '' : shape('body', requestBody.content['application/json'].schema)}
${shape('answer', responses[200].content['application/json'].schema)}`,
      )
      .join('');
  const links = (entries: [string, unknown][]): string =>
    entries.map(([name]) => `<a href="#${text(name)}"><code>${text(name)}</code></a>`).join('');

  return `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Keygate reference</title><style>${STYLE}</style></head><body>
<h1>Keygate ${text(sockets.info.version)}</h1>
<p>The same as documents: <a href="/reference/asyncapi.json">AsyncAPI 3</a> of the socket door,
<a href="/reference/openapi.json">OpenAPI 3.1</a> of the HTTP door.</p>
<nav>${links(requests)}${links(pushes)}<a href="#http">HTTP</a><a href="#errors">errors</a><a href="#types">types</a><a href="#configuration">configuration</a></nav>
<h2>Requests, client to server</h2>
<p>${text(sockets.info.description)} Each is answered with <code>{ ok: true, data }</code> or <code>{ ok: false, error }</code>.</p>
${requests.map(request).join('')}
<h2>Pushes, server to client</h2>${pushes.map(push).join('')}
<h2 id="http">HTTP</h2><p>${text(http.info.description)}</p>
${Object.entries(http.paths).map(route).join('')}
<h2 id="errors">Errors</h2>
${table(
  ['code', 'HTTP', 'retry', 'meaning'],
  Object.entries(ERRORS).map(([code, { httpStatus, retryable, meaning }]) => [
    `<code>${text(code)}</code>`,
    String(httpStatus),
    retryable ? 'yes' : '',
    text(meaning),
  ]),
)}
<h2 id="types">Types</h2>
${Object.entries(schemas)
  .sort(([a], [b]) => a.localeCompare(b))
  .map(
    ([name, schema]) => `
<h3 id="${text(name)}"><code>${text(name)}</code></h3>
<p>${text(schema.description ?? '')}</p>${shape('', schema)}`,
  )
  .join('')}
<h2 id="configuration">Configuration</h2>
${table(
  ['variable', 'default', 'meaning'],
  parts.variables.map(({ name, byDefault, meaning }) => [
    `<code>${text(name)}</code>`,
    markdown(byDefault),
    markdown(meaning),
  ]),
)}
</body></html>
`;
}

/** A table of the fields of an object; any other type in one line. */
function shape(title: string, schema: Schema): string {
  const { properties } = schema;
  if (properties === undefined) return `<p>${text(title)} ${typeOf(schema)}</p>`;
  const fields = Object.entries(properties);
  if (fields.length === 0) return `<p>${text(title)}: nothing</p>`;
  const required = new Set(schema.required);
  return table(
    [title === '' ? 'field' : title, 'type', ''],
    fields.map(([name, field]) => [
      `<code>${text(name)}</code>${required.has(name) ? '' : ' <span class="optional">optional</span>'}`,
      typeOf(field),
      text(field.description ?? ''),
    ]),
  );
}

/** HTML of a type in one line. */
function typeOf(schema: Schema): string {
  const { $ref, enum: values, items, properties, oneOf, anyOf } = schema;
  if ($ref !== undefined) return `<a href="#${text(lastOf($ref))}">${text(lastOf($ref))}</a>`;
  if (schema.const !== undefined) return `<code>${text(JSON.stringify(schema.const))}</code>`;
  if (values !== undefined) return values.map((value) => `<code>${text(String(value))}</code>`).join(' or ');
  const choices = oneOf ?? anyOf;
  if (choices !== undefined) return choices.map(typeOf).join(' or ');
  if (items !== undefined) {
    const { minItems, maxItems } = schema;
    return `list${bounds(minItems, maxItems, '')} of ${typeOf(items)}`;
  }
  if (properties !== undefined) {
    const required = new Set(schema.required);
    const fields = Object.entries(properties).map(
      ([name, field]) => `${text(name)}${required.has(name) ? '' : '?'}: ${typeOf(field)}`,
    );
    return `{ ${fields.join(', ')} }`;
  }
  const type = text([schema.type ?? 'anything'].flat().join(' or '));
  if (schema.format !== undefined) return `${type}, ${text(schema.format)}`;
  const { minimum, maximum, minLength, maxLength } = schema;
  return `${type}${bounds(minimum, maximum, '')}${bounds(minLength, maxLength, ' characters')}`;
}

function bounds(min: number | undefined, max: number | undefined, unit: string): string {
  if (min === undefined && max === undefined) return '';
  if (min !== undefined && min === max) return ` of ${min}${unit}`;
  if (max === undefined) return ` from ${min}${unit}`;
  return min === undefined ? ` up to ${max}${unit}` : ` ${min} to ${max}${unit}`;
}

/** What a success holds, of a reply that is one of two. */
function dataOf(reply: Schema): Schema {
  return reply.oneOf![0]!.properties!.data!;
}

/** Cells are HTML. */
function table(head: readonly string[], rows: readonly (readonly string[])[]): string {
  const line = (cells: readonly string[], tag: string): string =>
    `<tr>${cells.map((cell) => `<${tag}>${cell}</${tag}>`).join('')}</tr>`;
  return `<table>${line(head.map(text), 'th')}${rows.map((row) => line(row, 'td')).join('')}</table>`;
}

/** The one thing of Markdown that the texts use. */
function markdown(source: string): string {
  return text(source).replace(/`([^`]*)`/g, '<code>$1</code>');
}

function text(plain: string): string {
  return plain
    .replaceAll('&', '&amp;')
    .replaceAll('<', '&lt;')
    .replaceAll('>', '&gt;')
    .replaceAll('"', '&quot;');
}

function lastOf(reference: string): string {
  return reference.slice(reference.lastIndexOf('/') + 1);
}
