/** The HTTP door's own shapes: the registry's, under the names that its first clients use. */
import { z } from 'zod';
import { requests } from './events.ts';
import { keyId, uuid } from './ids.ts';
import { ecPublicKey, keySet, oneTimePreKey, oneTimePreKeys, pqPreKey, signedPreKey } from './keys.ts';

const { identityKey, ...restOfKeySet } = requests.uploadKeys.input.shape;

export const httpRoutes = {
  uploadKeys: {
    method: 'POST',
    path: '/api/keys/upload',
    body: z.strictObject({ keyBundle: z.strictObject({ ...restOfKeySet, identityPubKey: identityKey }) }),
  },
  requestBundle: {
    method: 'GET',
    path: '/api/keys/:userId',
    /** Header `Idempotency-Key`; without it every call claims. */
    idempotencyKey: uuid.optional(),
    answer: z.object({
      keyBundle: z.object({
        deviceId: z.int(),
        registrationId: z.int(),
        identityPubKey: ecPublicKey,
        identityKeyEd25519: keySet.shape.identityKeyEd25519,
        signedPreKey,
        oneTimePreKeys: z.array(oneTimePreKey).max(1),
        pqPreKey: z.object({ ...pqPreKey.shape, lastResort: z.boolean() }).nullable(),
      }),
    }),
  },
  checkPreKeys: { method: 'GET', path: '/api/keys/check-prekeys' },
  addPreKeys: {
    method: 'POST',
    path: '/api/keys/add-prekeys',
    body: z.strictObject({ preKeys: oneTimePreKeys }),
  },
  keyStats: { method: 'GET', path: '/api/keys/stats' },
  keyStatus: {
    method: 'GET',
    path: '/signal/status/minimal',
    answer: z.object({ identityKey: ecPublicKey.nullable(), signedPreKeyId: keyId.nullable() }),
  },
  validateKeys: { method: 'POST', path: '/signal/validate-and-sync', body: requests.validateKeys.input },
} as const;
