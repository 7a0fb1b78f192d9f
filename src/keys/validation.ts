/**
 * The proof that client and server agreed on a key set: opaque to the client, good on every node, bound to the device,
 * the key version and the keys themselves.
 */
import { createHash, createHmac, timingSafeEqual } from 'node:crypto';
import type { Clock } from '../lib/clock.ts';
import type { DeviceKeys, KeyStore } from '../ports/key-store.ts';
import type { DeviceAddress } from '../protocol/ids.ts';
import { VALIDATION_LIFETIME_MS } from '../protocol/limits.ts';

/** What is sealed. Only a node that holds the shared secret can have written it: its shape needs no check. */
interface Sealed extends DeviceAddress {
  keyVersion: number;
  keysDigest: string;
  expiresAtMs: number;
}

export interface ValidationProofs {
  issue(device: DeviceAddress, keys: DeviceKeys): Promise<string>;
  /** @returns what the proof says; null where it is forged, another device's, or older than ten minutes */
  open(device: DeviceAddress, proof: string): Promise<{ keyVersion: number; keysDigest: string } | null>;
}

export function createValidationProofs(parts: { store: KeyStore; clock: Clock }): ValidationProofs {
  let secret: Promise<Uint8Array> | null = null;

  async function seal(payload: string): Promise<Buffer> {
    secret ??= parts.store.sharedSecret('validation').catch((error: unknown) => {
      // An outage must not be remembered.
      secret = null;
      throw error;
    });
    return createHmac('sha256', await secret)
      .update(payload)
      .digest();
  }

  return {
    async issue(device, keys) {
      const payload = Buffer.from(
        JSON.stringify({
          ...device,
          keyVersion: keys.keyVersion,
          keysDigest: digestOfKeys(keys),
          expiresAtMs: parts.clock.nowMs() + VALIDATION_LIFETIME_MS,
        } satisfies Sealed),
      ).toString('base64url');
      return `${payload}.${(await seal(payload)).toString('base64url')}`;
    },

    async open(device, proof) {
      const [payload = '', mac = '', ...rest] = proof.split('.');
      const given = Buffer.from(mac, 'base64url');
      const expected = await seal(payload);
      if (rest.length > 0 || given.length !== expected.length || !timingSafeEqual(given, expected))
        return null;
      const said = JSON.parse(Buffer.from(payload, 'base64url').toString()) as Sealed;
      if (said.userId !== device.userId || said.deviceId !== device.deviceId) return null;
      if (said.expiresAtMs <= parts.clock.nowMs()) return null;
      return { keyVersion: said.keyVersion, keysDigest: said.keysDigest };
    },
  };
}

/** Stands for everything that a validation compared; the versions alone could repeat after a restored backup. */
export function digestOfKeys(keys: DeviceKeys): string {
  const hash = createHash('sha256');
  const add = (part: Uint8Array | string | number | null | undefined): void => {
    const bytes = typeof part === 'number' ? String(part) : (part ?? '');
    // The length in front keeps neighbouring parts apart.
    hash.update(`${bytes.length}:`).update(bytes);
  };
  add(keys.registrationId);
  add(keys.identity?.identityKey);
  add(keys.identity?.identityKeyEd25519);
  for (const key of [keys.signedPreKeys.ec, keys.signedPreKeys.pq]) {
    add(key?.keyId);
    add(key?.publicKey);
  }
  return hash.digest('base64url');
}
