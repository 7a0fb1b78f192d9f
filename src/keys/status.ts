/** What a device may ask of its own key set, and anybody of a user's devices. */
import type { DeviceKeys, KeyStore } from '../ports/key-store.ts';
import { GatewayError } from '../protocol/errors.ts';
import type { RequestData } from '../protocol/events.ts';
import type { DeviceAddress } from '../protocol/ids.ts';
import { base64Of } from './decode.ts';

/** What stands for a device that never uploaded. */
export const NO_KEYS: DeviceKeys = {
  registrationId: null,
  identity: null,
  signedPreKeys: { ec: null, pq: null },
  signedPreKeyExpiresAtMs: null,
  availableCounts: { ec: 0, pq: 0 },
  claimedCounts: { ec: 0, pq: 0 },
  offersPq: false,
  keyVersion: 0,
  countVersion: 0,
  identityVersion: 0,
  updatedAtMs: null,
  servedAtMs: null,
  fence: 0,
  revokedAtMs: null,
  restoredAtMs: null,
};

export async function keyStatus(store: KeyStore, device: DeviceAddress): Promise<RequestData<'keyStatus'>> {
  const keys = (await store.read(device)) ?? NO_KEYS;
  return {
    identityKey: keys.identity && base64Of(keys.identity.identityKey),
    signedPreKeyId: keys.signedPreKeys.ec?.keyId ?? null,
    pqLastResortPreKeyId: keys.signedPreKeys.pq?.keyId ?? null,
    preKeyCount: keys.availableCounts.ec,
    pqPreKeyCount: keys.availableCounts.pq,
    keyVersion: keys.keyVersion,
    countVersion: keys.countVersion,
    signedPreKeyExpiresAt: isoOrNull(keys.signedPreKeyExpiresAtMs),
  };
}

/** Elliptic-curve one-time prekeys under the present identity. */
export async function keyStats(store: KeyStore, device: DeviceAddress): Promise<RequestData<'keyStats'>> {
  const keys = (await store.read(device)) ?? NO_KEYS;
  return {
    totalPreKeys: keys.availableCounts.ec + keys.claimedCounts.ec,
    availablePreKeys: keys.availableCounts.ec,
    consumedPreKeys: keys.claimedCounts.ec,
    lastUpdated: isoOrNull(keys.updatedAtMs),
  };
}

export async function checkPreKeys(
  store: KeyStore,
  device: DeviceAddress,
  threshold: number,
): Promise<RequestData<'checkPreKeys'>> {
  const keys = (await store.read(device)) ?? NO_KEYS;
  return {
    // A device that never offered one-time PQ prekeys lives on its last-resort prekey and lacks nothing.
    needsMorePreKeys:
      keys.availableCounts.ec < threshold || (keys.offersPq && keys.availableCounts.pq < threshold),
    availableCount: keys.availableCounts.ec,
    pqAvailableCount: keys.availableCounts.pq,
    threshold,
    countVersion: keys.countVersion,
  };
}

/** @throws GatewayError USER_NOT_FOUND where no device of the user has keys */
export async function listDevices(store: KeyStore, userId: string): Promise<RequestData<'listDevices'>> {
  const devices = await store.devicesOf(userId);
  if (devices.length === 0) throw new GatewayError('USER_NOT_FOUND');
  return { devices };
}

function isoOrNull(ms: number | null): string | null {
  return ms === null ? null : new Date(ms).toISOString();
}
