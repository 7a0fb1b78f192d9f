/** The generated documents are what they claim to be, by the validators of those who define them. */
import { Parser } from '@asyncapi/parser';
import { Validator } from '@seriousme/openapi-schema-validator';
import { describe, expect, it } from 'vitest';
import { openApi } from '../../src/admin/reference-http.ts';
import { asyncApi } from '../../src/admin/reference-sockets.ts';
import { pushes, requestNames } from '../../src/protocol/events.ts';
import { httpRoutes } from '../../src/protocol/http-routes.ts';

describe('the AsyncAPI document', () => {
  it('is valid, and holds every request and every push', async () => {
    const { document, diagnostics } = await new Parser().parse(JSON.stringify(asyncApi('1.2.3')));
    expect(diagnostics.filter(({ severity }) => severity <= 1)).toEqual([]);
    const operations = document!.operations().all();
    expect(
      operations
        .filter((one) => one.isReceive())
        .map((one) => one.id())
        .sort(),
    ).toEqual([...requestNames].sort());
    expect(
      operations
        .filter((one) => one.isSend())
        .map((one) => one.id())
        .sort(),
    ).toEqual(Object.keys(pushes).sort());
    // Each request is answered, and of the pushes only messages are.
    expect(operations.filter((one) => one.reply() !== undefined)).toHaveLength(requestNames.length + 1);
  });

  it('is refused by its validator where it is wrong', async () => {
    const wrong = asyncApi('1.2.3') as { operations: Record<string, { action: string }> };
    wrong.operations.uploadKeys!.action = 'emit';
    const { diagnostics } = await new Parser().parse(JSON.stringify(wrong));
    expect(diagnostics.filter(({ severity }) => severity === 0)).not.toEqual([]);
  });
});

describe('the OpenAPI document', () => {
  it('is valid, and holds every route', async () => {
    const validator = new Validator();
    const document = openApi('1.2.3');
    expect(await validator.validate(structuredClone(document))).toMatchObject({ valid: true });
    expect(validator.version).toBe('3.1');
    // Every reference leads somewhere.
    expect(() => validator.resolveRefs()).not.toThrow();
    const operations = Object.values(
      document.paths as Record<string, Record<string, { operationId: string }>>,
    )
      .flatMap((path) => Object.values(path))
      .map(({ operationId }) => operationId);
    expect(operations.sort()).toEqual(Object.keys(httpRoutes).sort());
  });

  it('is refused by its validator where it is wrong', async () => {
    const wrong = openApi('1.2.3') as { info: { title?: string } };
    delete wrong.info.title;
    expect(await new Validator().validate(wrong)).toMatchObject({ valid: false });
  });
});
