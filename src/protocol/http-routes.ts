/** The HTTP door's own shapes: the registry's, under the names that its first clients use. */
import { z } from 'zod';
import { requests } from './events.ts';
import { deviceId, uuid } from './ids.ts';
import { ecPublicKey, keySet, oneTimePreKey, oneTimePreKeys, pqPreKey, signedPreKey } from './keys.ts';

const { identityKey, ...restOfKeySet } = requests.uploadKeys.input.shape;

/** `answer` is what a success holds beside `success: true`. */
export const httpRoutes = {
  uploadKeys: {
    method: 'POST',
    path: '/api/keys/upload',
    body: z.strictObject({ keyBundle: z.strictObject({ ...restOfKeySet, identityPubKey: identityKey }) }),
    answer: requests.uploadKeys.data,
  },
  requestBundle: {
    method: 'GET',
    path: '/api/keys/:userId',
    /** Without it, the user's device with the lowest id. */
    query: z.strictObject({ deviceId: deviceId.optional() }),
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
  checkPreKeys: {
    method: 'GET',
    path: '/api/keys/check-prekeys',
    answer: requests.checkPreKeys.data,
  },
  addPreKeys: {
    method: 'POST',
    path: '/api/keys/add-prekeys',
    body: z.strictObject({ preKeys: oneTimePreKeys }),
    answer: requests.addPreKeys.data,
  },
  keyStats: { method: 'GET', path: '/api/keys/stats', answer: requests.keyStats.data },
  keyStatus: { method: 'GET', path: '/signal/status/minimal', answer: requests.keyStatus.data },
  validateKeys: {
    method: 'POST',
    path: '/signal/validate-and-sync',
    body: requests.validateKeys.input,
    answer: requests.validateKeys.data,
  },
} as const;
