/** The socket door as an AsyncAPI 3 document, made from the registry. */
import { errorObject } from '../protocol/errors.ts';
import { inputIsOptional, pushes, type RequestName, requestNames, requests } from '../protocol/events.ts';
import { createJsonSchemas, type JsonObject, type WireSchema } from '../protocol/json-schema.ts';

const SCHEMES = {
  token: {
    type: 'userPassword',
    description:
      'the token in `auth: { token }` of the handshake; its claims sub and device_id say who calls',
  },
};

/** @param version of this package */
export function asyncApi(version: string): JsonObject {
  const schemas = createJsonSchemas('draft-07');
  const error = schemas.of(errorObject);
  const messages: JsonObject = {};
  const operations: JsonObject = {};
  const message = (name: string, text: { title: string; summary: string }, payload: JsonObject): void => {
    messages[name] = { name, ...text, payload };
  };
  const ofChannel = (name: string) => ({ $ref: `#/channels/gateway/messages/${name}` });
  const operation = (
    name: string,
    action: 'send' | 'receive',
    summary: string,
    answer: string | null,
  ): void => {
    operations[name] = {
      action,
      channel: { $ref: '#/channels/gateway' },
      summary,
      messages: [ofChannel(name)],
      ...(answer === null
        ? {}
        : { reply: { channel: { $ref: '#/channels/gateway' }, messages: [ofChannel(answer)] } }),
    };
  };

  for (const name of requestNames) {
    const { meaning, input, data } = requests[name];
    const answer = `${name}Reply`;
    message(name, { title: name, summary: inputNote(name, meaning) }, schemas.of(input));
    message(
      answer,
      { title: `answer to ${name}`, summary: 'the acknowledgement' },
      replyOf(schemas.of(data), error),
    );
    operation(name, 'receive', meaning, answer);
  }
  for (const [name, push] of Object.entries(pushes)) {
    const acknowledgement: WireSchema | null = 'acknowledgement' in push ? push.acknowledgement : null;
    const answer = acknowledgement === null ? null : `${name}Acknowledgement`;
    message(name, { title: name, summary: push.meaning }, schemas.of(push.payload));
    if (answer !== null && acknowledgement !== null) {
      message(
        answer,
        { title: `acknowledgement of ${name}`, summary: 'what became of each envelope' },
        schemas.of(acknowledgement),
      );
    }
    operation(name, 'send', push.meaning, answer);
  }

  const names = Object.keys(messages);
  return {
    asyncapi: '3.0.0',
    info: {
      title: 'Keygate, socket door',
      version,
      description:
        'Socket.IO 4 over WebSocket alone. A message is an event of its name; an answer is its acknowledgement. A refused handshake comes as connect_error, whose data is an Error.',
      license: { name: 'MIT' },
    },
    defaultContentType: 'application/json',
    servers: {
      gateway: {
        host: 'localhost:3000',
        protocol: 'ws',
        pathname: '/socket.io/',
        security: [{ $ref: '#/components/securitySchemes/token' }],
      },
    },
    channels: {
      gateway: {
        address: '/',
        description: 'the one namespace of Socket.IO',
        messages: Object.fromEntries(names.map((name) => [name, { $ref: `#/components/messages/${name}` }])),
      },
    },
    operations,
    components: { messages, schemas: schemas.components(), securitySchemes: SCHEMES },
  };
}

function inputNote(name: RequestName, meaning: string): string {
  return inputIsOptional(name) ? `${meaning} The input may be left out.` : meaning;
}

function replyOf(data: JsonObject, error: JsonObject): JsonObject {
  return {
    oneOf: [
      {
        type: 'object',
        properties: { ok: { type: 'boolean', const: true }, data },
        required: ['ok', 'data'],
      },
      {
        type: 'object',
        properties: { ok: { type: 'boolean', const: false }, error },
        required: ['ok', 'error'],
      },
    ],
  };
}
