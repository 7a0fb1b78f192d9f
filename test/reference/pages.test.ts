/** The reference as a running gateway serves it, held against what the gateway really does. */
import { afterAll, beforeAll, expect, it } from 'vitest';
import { environment } from '../../src/config/environment.ts';
import { ERRORS } from '../../src/protocol/errors.ts';
import { pushes, requestNames } from '../../src/protocol/events.ts';
import { httpRoutes } from '../../src/protocol/http-routes.ts';
import { enrol, startGateway, type TestGateway } from '../support/gateway.ts';

const alice = { userId: 'alice', deviceId: 1 };
let gateway: TestGateway;
beforeAll(async () => {
  gateway = await startGateway();
});
afterAll(() => gateway.stop());

const read = (path: string): Promise<Response> => fetch(`${gateway.adminUrl}${path}`);

it('is a page that names every request, push, error, route and variable, and loads nothing', async () => {
  const answer = await read('/reference');
  expect(answer.headers.get('content-type')).toBe('text/html; charset=utf-8');
  expect(answer.headers.get('content-security-policy')).toMatch(/^default-src 'none'; style-src 'sha256-/);
  const page = await answer.text();
  const names = [
    ...requestNames,
    ...Object.keys(pushes),
    ...Object.keys(ERRORS),
    ...Object.keys(environment.shape),
    ...Object.values(httpRoutes).map(({ method, path }) => `${method} ${path.replace(/:(\w+)/, '{$1}')}`),
  ];
  for (const name of names) expect(page, name).toContain(`<code>${name}</code>`);
  expect(page).not.toMatch(/<script|<link|<img|https?:\/\//);
  // Every link leads to something on the page, or to a document.
  const ids = new Set([...page.matchAll(/ id="([^"]+)"/g)].map(([, id]) => `#${id}`));
  for (const [, target] of page.matchAll(/href="([^"]+)"/g)) {
    if (target!.startsWith('/')) expect((await read(target!)).status).toBe(200);
    else expect(ids, target).toContain(target);
  }
});

it('tells what the HTTP door really answers', async () => {
  const { device } = await enrol(gateway, alice);
  const bob = await enrol(gateway, { userId: 'bob', deviceId: 1 });
  bob.client.close();
  const { identityKey: identityPubKey, ...keys } = device.uploadInput({
    oneTimePreKeys: 2,
    pqOneTimePreKeys: 0,
  });
  const bodies: Partial<Record<keyof typeof httpRoutes, unknown>> = {
    uploadKeys: { keyBundle: { ...keys, identityPubKey } },
    addPreKeys: { preKeys: [] },
    validateKeys: device.validateInput(),
  };
  for (const name of Object.keys(httpRoutes) as (keyof typeof httpRoutes)[]) {
    const { method, path, answer } = httpRoutes[name];
    const response = await fetch(`${gateway.url}${path.replace(':userId', 'bob')}`, {
      method,
      headers: {
        authorization: `Bearer ${await gateway.token(alice)}`,
        ...(bodies[name] === undefined ? {} : { 'content-type': 'application/json' }),
      },
      ...(bodies[name] === undefined ? {} : { body: JSON.stringify(bodies[name]) }),
    });
    const { success, ...rest } = (await response.json()) as Record<string, unknown>;
    expect({ name, success, rest }).toMatchObject({ name, success: true });
    // Strict: a field that the document does not know is a fault of the document.
    expect(answer.strict().parse(rest), name).toEqual(rest);
  }
});

it('answers nothing else, and nobody who does more than read', async () => {
  expect((await read('/referenc')).status).toBe(404);
  expect((await fetch(`${gateway.adminUrl}/reference`, { method: 'POST' })).status).toBe(405);
});
