/** Texts that have broken something somewhere, in the place of every text and of every name of every request. */
import { request as httpRequest } from 'node:http';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type RequestName, requestNames } from '../../src/protocol/events.ts';
import { httpRoutes } from '../../src/protocol/http-routes.ts';
import { FRAME_BYTES_MAX } from '../../src/protocol/limits.ts';
import type { Client } from '../support/gateway.ts';
import { type Path, placesOf, sampleOf, samples, withFieldAt, withValueAt } from './registry.ts';
import { attackerToken, startTarget, type Target } from './target.ts';

let target: Target;
let client: Client;

beforeAll(async () => {
  target = await startTarget();
  client = await target.gateway.connect({ userId: 'attacker-texts', deviceId: 1 });
});
afterAll(() => target?.stop());

const TEXTS: Record<string, string[]> = {
  SQL: [
    "'; DROP TABLE devices; --",
    "' OR '1'='1",
    "bystander' UNION SELECT * FROM secrets --",
    '"; DELETE FROM devices; --',
    '$1; SELECT pg_sleep(10); --',
    "\\'; SELECT pg_terminate_backend(pg_backend_pid()); --",
    '{bystander,attacker}',
    '(bystander,1)',
    '%_%',
    '\\x00',
  ],
  prototypes: ['__proto__', 'constructor', 'prototype', 'hasOwnProperty', 'toString', '__proto__.polluted'],
  'NUL and halves of pairs': [
    '\0',
    'a\0b',
    'bystander\0',
    '\ud800',
    '\udfff',
    'a\udc00b',
    '\ud800\ud800',
    '\ufeff',
    '\uffff',
  ],
  'other places': ['../../etc/passwd', '%00', '#{7*7}', '{{7*7}}', '`id`', '\r\nSet-Cookie: a=b', '<script>'],
};

const NAMES = [
  '__proto__',
  'constructor',
  'prototype',
  'toString',
  'hasOwnProperty',
  '',
  '\0',
  '\ud800',
  "'; --",
  '__defineGetter__',
];
const POLLUTION = { polluted: true, toString: null, deviceId: 1, userId: 'bystander' };

/** One request, with one thing wrong. */
interface Attempt {
  name: RequestName;
  input: unknown;
}

/** Resolves to the codes of the refusals; null stands for a success. */
async function codesOf(attempts: Attempt[]): Promise<(string | null)[]> {
  const codes: (string | null)[] = [];
  for (let start = 0; start < attempts.length; start += 50) {
    const replies = await Promise.all(
      attempts.slice(start, start + 50).map(({ name, input }) => client.ask(name, input as never)),
    );
    codes.push(...replies.map((reply) => (reply.ok ? null : reply.error.code)));
  }
  return codes;
}

const show = ({ name, input }: Attempt): string => `${name} ${JSON.stringify(input).slice(0, 300)}`;

/** Whatever happens, a refusal is one that the client can understand; a fault of the server is none. */
function unexpected(
  attempts: Attempt[],
  codes: (string | null)[],
  allowed: (attempt: Attempt) => (string | null)[],
): string[] {
  return attempts.flatMap((attempt, index) => {
    const code = codes[index] ?? null;
    return allowed(attempt).includes(code) ? [] : [`${code}: ${show(attempt)}`];
  });
}

describe('texts in the place of every text of every request by socket', () => {
  it.each(Object.entries(TEXTS))('%s harm nothing', async (kind, texts) => {
    const attempts = requestNames.flatMap((name) => {
      const sample = samples.get(name);
      return placesOf(sample).texts.flatMap((path) =>
        texts.map((text) => ({ name, input: withValueAt(sample, path, text) })),
      );
    });
    await target.attack(`${attempts.length} requests with ${kind}`, async () => {
      const codes = await codesOf(attempts);
      // A token or a validation is judged by what it opens, and `constructor` is a name like any other.
      const refused = [
        'BAD_REQUEST',
        'UNAUTHENTICATED',
        'KEYS_NOT_UPLOADED',
        'USER_NOT_FOUND',
        'SIGNATURE_INVALID',
      ];
      // A reason is free text.
      const isFree = ({ name }: Attempt): boolean => name === 'resetKeys';
      expect(
        unexpected(attempts, codes, (attempt) => (isFree(attempt) ? [...refused, null] : refused)),
      ).toEqual([]);
    });
  });

  it('objects that are like texts and lists, and are none, in the place of each, are refused', async () => {
    const odd = { toString: 1, valueOf: null };
    const likenesses = [{ length: odd }, { length: 1 }, { length: -1, 0: 'a' }, odd, { size: odd }];
    const attempts = requestNames.flatMap((name) => {
      const sample = samples.get(name);
      const { texts, objects, lists } = placesOf(sample);
      return [...texts, ...objects, ...lists].flatMap((path) =>
        likenesses.map((likeness) => ({ name, input: withValueAt(sample, path, likeness) })),
      );
    });
    await target.attack(`${attempts.length} requests with likenesses`, async () => {
      const codes = await codesOf(attempts);
      expect(unexpected(attempts, codes, () => ['BAD_REQUEST'])).toEqual([]);
    });
  });

  it('a hundred thousand made-up names in the place of each are refused before they are judged', async () => {
    const names = Object.fromEntries(Array.from({ length: 100_000 }, (_, index) => [`x${index}`, 0]));
    const attempts = requestNames.flatMap((name) => {
      const sample = samples.get(name);
      const { objects } = placesOf(sample);
      return objects.map((path) => ({ name, input: withValueAt(sample, path, names) }));
    });
    expect(attempts.length).toBeGreaterThan(requestNames.length);
    await target.attack(`${attempts.length} requests with 100,000 names each`, async () => {
      const codes: (string | null)[] = [];
      for (const attempt of attempts) codes.push(...(await codesOf([attempt])));
      expect(unexpected(attempts, codes, () => ['BAD_REQUEST'])).toEqual([]);
    });
  });

  it('a megabyte of binary data in the place of each, and of the whole, are refused and cost little', async () => {
    const binary = Buffer.alloc(FRAME_BYTES_MAX / 2);
    const attempts: Attempt[] = requestNames.flatMap((name) => {
      const sample = samples.get(name);
      const { texts, objects } = placesOf(sample);
      const places = [...texts, ...objects].slice(0, 3);
      return [binary, ...places.map((path) => withValueAt(sample, path, binary))].map((input) => ({
        name,
        input,
      }));
    });
    await target.attack(`${attempts.length} requests with attachments of 1 MiB`, async () => {
      const codes: (string | null)[] = [];
      for (const attempt of attempts) codes.push(...(await codesOf([attempt])));
      expect(unexpected(attempts, codes, () => ['BAD_REQUEST'])).toEqual([]);
    });
  });

  it('names of prototypes and worse, in every object, are refused', async () => {
    const attempts = requestNames.flatMap((name) => {
      const sample = samples.get(name);
      return placesOf(sample).objects.flatMap((path: Path) =>
        NAMES.map((field) => ({ name, input: withFieldAt(sample, path, field, POLLUTION) })),
      );
    });
    await target.attack(`${attempts.length} requests with one name more`, async () => {
      const codes = await codesOf(attempts);
      expect(unexpected(attempts, codes, () => ['BAD_REQUEST'])).toEqual([]);
    });
  });
});

/** Plain HTTP: an address as it is written, which `fetch` would tidy up. */
function ask(options: {
  method: string;
  path: string;
  token: string;
  headers?: Record<string, string>;
  body?: string;
}): Promise<{ status: number; text: string }> {
  const { hostname, port } = new URL(target.gateway.url);
  return new Promise((resolve, reject) => {
    const request = httpRequest({
      hostname,
      port,
      method: options.method,
      path: options.path,
      headers: {
        authorization: `Bearer ${options.token}`,
        ...(options.body === undefined ? {} : { 'content-type': 'application/json' }),
        ...options.headers,
      },
    });
    request.once('error', reject);
    request.once('response', (response) => {
      let text = '';
      response.on('data', (chunk) => {
        text += chunk;
      });
      response.once('end', () => resolve({ status: response.statusCode ?? 0, text }));
    });
    request.end(options.body);
  });
}

describe('texts in every place of every HTTP request', () => {
  it('harm nothing: each is refused by an error object', async () => {
    const token = await attackerToken('texts-http');
    const texts = Object.values(TEXTS).flat();
    const bodies = Object.values(httpRoutes).flatMap((route) => {
      if (!('body' in route)) return [];
      const sample = sampleOf(route.body);
      const { texts: places, objects } = placesOf(sample);
      return [
        ...places.flatMap((path) => texts.map((text) => withValueAt(sample, path, text))),
        ...objects.flatMap((path) => NAMES.map((name) => withFieldAt(sample, path, name, POLLUTION))),
      ].map((body) => ({ method: 'POST', path: route.path, token, body: JSON.stringify(body) }));
    });
    const addresses = texts.flatMap((text) => {
      const written = encodeURIComponent(Buffer.from(text).toString());
      return [
        { method: 'GET', path: `/api/keys/${written}`, token },
        { method: 'GET', path: `/api/keys/bystander?deviceId=${written}`, token },
        { method: 'GET', path: `/api/keys/bystander?${written}=1`, token },
        { method: 'GET', path: `/api/keys/stats?${written}=1`, token },
        ...(/^[\x20-\x7e]*$/.test(text)
          ? [{ method: 'GET', path: '/api/keys/bystander', token, headers: { 'idempotency-key': text } }]
          : []),
      ];
    });
    await target.attack(`${bodies.length + addresses.length} HTTP requests`, async () => {
      const wrong: string[] = [];
      const all = [...bodies, ...addresses];
      for (let start = 0; start < all.length; start += 20) {
        const batch = all.slice(start, start + 20);
        const answers = await Promise.all(batch.map(ask));
        for (const [index, { status, text }] of answers.entries()) {
          const isRefused = status >= 400 && status < 500 && JSON.parse(text).success === false;
          if (!isRefused)
            wrong.push(`${status}: ${JSON.stringify(batch[index]).slice(0, 300)} ${text.slice(0, 200)}`);
        }
      }
      expect(wrong).toEqual([]);
    });
  });
});
