/** Payloads as the inspector may show them: by the protocol's allow-list, with digests that only this installation makes. */
import { createHmac } from 'node:crypto';
import { errorObject } from '../protocol/errors.ts';
import { type PushName, pushes, type Reply, type RequestName, requests } from '../protocol/events.ts';
import { fieldNamesOf, type RedactedValue, redacted } from '../protocol/redact.ts';

export interface Redactor {
  /** `input` of a request that was found well-formed. */
  input(name: RequestName, input: unknown): RedactedValue;
  reply(name: RequestName, reply: Reply<RequestName>): RedactedValue;
  payload(name: PushName, payload: unknown): RedactedValue;
  acknowledgement(name: PushName, acknowledgement: unknown): RedactedValue;
}

/** Hexadecimal digits: enough to tell the keys of a screen apart, too few to search for a key by. */
const DIGEST_LENGTH = 10;

const fieldNames = new Set(Object.values(requests).flatMap(({ input }) => [...fieldNamesOf(input)]));

/** @param key shared by every node, so that equal keys and ciphertexts have equal digests wherever they are seen */
export function createRedactor(key: Uint8Array): Redactor {
  const redaction = {
    digested(base64: string) {
      const bytes = Buffer.from(base64, 'base64');
      return {
        bytes: bytes.length,
        digest: createHmac('sha256', key).update(bytes).digest('hex').slice(0, DIGEST_LENGTH),
      };
    },
    isFieldName: (name: string) => fieldNames.has(name),
  };
  return {
    input: (name, input) => redacted(requests[name].input, input, redaction),

    reply: (name, reply) =>
      reply.ok
        ? redacted(requests[name].data, reply.data, redaction)
        : redacted(errorObject, reply.error, redaction),

    payload: (name, payload) => redacted(pushes[name].payload, payload, redaction),

    acknowledgement(name, acknowledgement) {
      const push = pushes[name];
      return 'acknowledgement' in push ? redacted(push.acknowledgement, acknowledgement, redaction) : null;
    },
  };
}
