/** README's generated tables: each stands between two comments, and is written by `npm run reference`. */
import { readFileSync } from 'node:fs';
import { configReference } from '../../src/config-reference.ts';
import { markdownTable } from '../../src/lib/markdown-table.ts';
import { ERRORS } from '../../src/protocol/errors.ts';
import { pushes, type RequestName, requestNames, requests } from '../../src/protocol/events.ts';
import { httpRoutes } from '../../src/protocol/http-routes.ts';

const TABLES: Readonly<Record<string, () => string>> = {
  chat: () => script('examples/chat.mjs'),
  app: () => script('examples/app.mjs'),
  requests: () =>
    markdownTable(
      ['request', 'what it does', 'also by HTTP'],
      requestNames.map((name) => [`\`${name}\``, requests[name].meaning, httpRouteOf(name)]),
    ),
  pushes: () =>
    markdownTable(
      ['push', 'what it says'],
      Object.entries(pushes).map(([name, { meaning }]) => [`\`${name}\``, meaning]),
    ),
  errors: () =>
    markdownTable(
      ['code', 'HTTP', 'try again', 'meaning'],
      Object.entries(ERRORS).map(([code, { httpStatus, retryable, meaning }]) => [
        `\`${code}\``,
        String(httpStatus),
        retryable ? 'yes' : '',
        meaning,
      ]),
    ),
  configuration: () =>
    markdownTable(
      ['variable', 'default', 'meaning'],
      configReference().map(({ name, byDefault, meaning }) => [`\`${name}\``, byDefault, meaning]),
    ),
};

function script(path: string): string {
  return `\n\`\`\`js\n${readFileSync(path, 'utf8')}\`\`\`\n`;
}

function httpRouteOf(name: RequestName): string {
  if (!Object.hasOwn(httpRoutes, name)) return '';
  const { method, path } = httpRoutes[name as keyof typeof httpRoutes];
  return `\`${method} ${path}\``;
}

/**
 * The text with every table as it should stand.
 *
 * @throws Error where a table has no place, so that none is left out in silence
 */
export function withTables(readme: string): string {
  let text = readme;
  for (const [name, table] of Object.entries(TABLES)) {
    const [begin, end] = [`<!-- table: ${name}, written by npm run reference -->`, `<!-- end of ${name} -->`];
    const from = text.indexOf(begin);
    const to = text.indexOf(end);
    if (from < 0 || to < from) throw new Error(`README has no place for the table ${name}`);
    text = `${text.slice(0, from + begin.length)}\n${table()}\n${text.slice(to)}`;
  }
  return text;
}
