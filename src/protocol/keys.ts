/** Keys on the wire: public halves only, base64, given back byte for byte as uploaded. */
import { z } from 'zod';
import { base64Of, decodedLength, firstByte, isStrictBase64 } from './base64.ts';
import { keyId, registrationId } from './ids.ts';
import { UPLOAD_PRE_KEYS_MAX } from './limits.ts';
import { shown } from './redact.ts';

const EC_KEY_PREFIX = 0x05;
export const KYBER_1024_PREFIX = 0x08;
/** 0x08 and the 1568 bytes of an ML-KEM-1024 public key. */
export const KYBER_1024_KEY_BYTES = 1569;
const SIGNATURE_BYTES = 64;

/** 33 bytes `0x05 ‖ u`, or the raw 32 bytes of u. Both are 44 characters long. */
export const ecPublicKey = shown('digest', z.string())
  .refine(
    (text) => {
      if (text.length !== 44 || !isStrictBase64(text)) return false;
      const bytes = decodedLength(text);
      return bytes === 32 || (bytes === 33 && firstByte(text) === EC_KEY_PREFIX);
    },
    { error: 'must be base64 of 33 bytes that start with 0x05, or of 32 bytes' },
  )
  .meta({
    id: 'EcPublicKey',
    description: 'base64 of 33 bytes, 0x05 and u, or of the 32 bytes of u; given back as uploaded',
    contentEncoding: 'base64',
    minLength: 44,
    maxLength: 44,
  });
export const pqPublicKey = base64Of(KYBER_1024_KEY_BYTES, KYBER_1024_PREFIX).meta({
  id: 'PqPublicKey',
  description: `base64 of ${KYBER_1024_KEY_BYTES} bytes: 0x08 and the ML-KEM-1024 public key`,
  contentEncoding: 'base64',
});
export const ed25519PublicKey = base64Of(32).meta({
  id: 'Ed25519PublicKey',
  description: 'base64 of 32 bytes',
  contentEncoding: 'base64',
});
/** Over the decoded bytes of `publicKey`, exactly as uploaded. */
export const signature = base64Of(SIGNATURE_BYTES).meta({
  id: 'Signature',
  description: `base64 of ${SIGNATURE_BYTES} bytes, over the decoded bytes of publicKey`,
  contentEncoding: 'base64',
});

export const signedPreKey = z
  .strictObject({ keyId, publicKey: ecPublicKey, signature })
  .meta({ id: 'SignedPreKey' });
export const pqPreKey = z.strictObject({ keyId, publicKey: pqPublicKey, signature }).meta({ id: 'PqPreKey' });
export const oneTimePreKey = z.strictObject({ keyId, publicKey: ecPublicKey }).meta({ id: 'OneTimePreKey' });

/** One upload's one-time prekeys, in the order in which they are to be handed out. */
export const oneTimePreKeys = listWithoutRepeats(
  oneTimePreKey,
  UPLOAD_PRE_KEYS_MAX,
  (key) => key.keyId,
  'keyId',
);
export const pqOneTimePreKeys = listWithoutRepeats(
  pqPreKey,
  UPLOAD_PRE_KEYS_MAX,
  (key) => key.keyId,
  'keyId',
);

/** A whole key set; every request that stores keys is made of its parts. */
export const keySet = z.strictObject({
  registrationId,
  identityKey: ecPublicKey,
  identityKeyEd25519: ed25519PublicKey.optional(),
  signedPreKey,
  pqLastResortPreKey: pqPreKey.optional(),
  oneTimePreKeys: oneTimePreKeys.optional(),
  pqOneTimePreKeys: pqOneTimePreKeys.optional(),
});

/** What became of each one-time prekey of an upload: a bad one never sinks the batch. */
export const verdict = z
  .object({
    stored: z.int(),
    unchanged: z.int(),
    conflicts: z.array(
      z.object({
        keyId,
        reason: z.enum(['idTaken', 'alreadyClaimed', 'poolFull']).meta({
          description:
            'idTaken: stored with another key; alreadyClaimed: handed out or withdrawn; poolFull: no room',
        }),
      }),
    ),
  })
  .meta({ id: 'Verdict', description: 'what became of each one-time prekey of an upload' });
export type Verdict = z.infer<typeof verdict>;

/** Kinds of signed keys, as SIGNATURE_INVALID names them. */
export const signedKeyKind = z.enum(['identityKey', 'signedPreKey', 'pqLastResortPreKey', 'pqOneTimePreKey']);

/** What one claimer gets of one device. */
export const deviceBundle = z
  .object({
    deviceId: z.int(),
    registrationId,
    identityKey: ecPublicKey,
    identityKeyEd25519: ed25519PublicKey.optional(),
    signedPreKey,
    oneTimePreKey: oneTimePreKey.nullable(),
    oneTimePreKeyAbsent: z
      .enum(['noneLeft', 'limited'])
      .optional()
      .meta({ description: 'why oneTimePreKey is null' }),
    pqPreKey: z.object({ ...pqPreKey.shape, lastResort: z.boolean() }).nullable(),
  })
  .meta({ id: 'DeviceBundle', description: 'what one claimer gets of one device' });
export type DeviceBundle = z.infer<typeof deviceBundle>;

/** JSON of bundles, as `JSON.stringify` has it: user ids and base64 hold nothing that is to be escaped. */
export function bundlesJson({
  userId,
  devices,
}: {
  userId: string;
  devices: readonly DeviceBundle[];
}): string {
  return `{"userId":"${userId}","devices":[${devices.map(bundleJson).join(',')}]}`;
}

function bundleJson(bundle: DeviceBundle): string {
  const { identityKeyEd25519: ed25519, signedPreKey: signed, oneTimePreKey: oneTime, pqPreKey: pq } = bundle;
  return (
    `{"deviceId":${bundle.deviceId},"registrationId":${bundle.registrationId},"identityKey":"${bundle.identityKey}",` +
    (ed25519 === undefined ? '' : `"identityKeyEd25519":"${ed25519}",`) +
    `"signedPreKey":{"keyId":${signed.keyId},"publicKey":"${signed.publicKey}","signature":"${signed.signature}"},` +
    (oneTime === null
      ? `"oneTimePreKey":null,"oneTimePreKeyAbsent":"${bundle.oneTimePreKeyAbsent}",`
      : `"oneTimePreKey":{"keyId":${oneTime.keyId},"publicKey":"${oneTime.publicKey}"},`) +
    (pq === null
      ? '"pqPreKey":null}'
      : `"pqPreKey":{"keyId":${pq.keyId},"publicKey":"${pq.publicKey}","signature":"${pq.signature}","lastResort":${pq.lastResort}}}`)
  );
}

/** A bounded list in which no two items have the same id; the fault is reported at the repeated item. */
export function listWithoutRepeats<Item extends z.ZodType>(
  item: Item,
  lengthMax: number,
  idOf: (value: z.output<Item>) => unknown,
  idName?: string,
) {
  return z
    .array(item)
    .max(lengthMax)
    .superRefine((list, context) => {
      // As most lists of envelopes are.
      if (list.length < 2) return;
      const seen = new Set<unknown>();
      list.forEach((value, index) => {
        const id = idOf(value);
        if (seen.has(id)) {
          context.addIssue({
            code: 'custom',
            path: idName === undefined ? [index] : [index, idName],
            message: 'stands in the list twice',
          });
        }
        seen.add(id);
      });
    });
}
