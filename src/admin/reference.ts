/** The reference as the second listener serves it: one page to read, and the two documents behind it. */
import type { AdminPage } from './health.ts';
import { openApi } from './reference-http.ts';
import { PAGE_POLICY, referencePage, type VariableReference } from './reference-page.ts';
import { asyncApi } from './reference-sockets.ts';

/** Nothing of them changes while the process lives. */
export function referencePages(parts: {
  version: string;
  variables: readonly VariableReference[];
}): AdminPage[] {
  const sockets = asyncApi(parts.version);
  const http = openApi(parts.version);
  const json = 'application/json';
  const page = referencePage({ sockets, http, variables: parts.variables });
  return [
    {
      path: '/reference',
      headers: { 'content-type': 'text/html; charset=utf-8', 'content-security-policy': PAGE_POLICY },
      body: () => page,
    },
    {
      path: '/reference/asyncapi.json',
      headers: { 'content-type': json },
      body: () => JSON.stringify(sockets),
    },
    { path: '/reference/openapi.json', headers: { 'content-type': json }, body: () => JSON.stringify(http) },
  ];
}
