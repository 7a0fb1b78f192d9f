/** Small bounds, so that pools run low and full in short histories: for the model, and for the gateways that it is held against. */
import type { KeyModelLimits } from './key-model.ts';

export const KEY_LIMITS: KeyModelLimits = { poolMax: 5, lowThreshold: 3 };

export const KEY_LIMITS_ENVIRONMENT: Readonly<Record<string, string>> = {
  PREKEY_POOL_MAX: String(KEY_LIMITS.poolMax),
  PREKEY_LOW_THRESHOLD: String(KEY_LIMITS.lowThreshold),
};
