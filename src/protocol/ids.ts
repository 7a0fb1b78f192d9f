/** Who is who on the wire: users, devices, key ids and the ids that make a request repeatable. */
import { z } from 'zod';
import { DEVICE_ID_MAX, KEY_ID_MAX, REGISTRATION_ID_MAX, USER_ID_LENGTH_MAX, VERSION_MAX } from './limits.ts';
import { shown } from './redact.ts';

/** Path segments of the HTTP door that a user id would shadow. */
export const RESERVED_USER_IDS: ReadonlySet<string> = new Set([
  'stats',
  'check-prekeys',
  'add-prekeys',
  'upload',
]);

export const userId = shown('plain', z.string())
  .max(USER_ID_LENGTH_MAX)
  .regex(
    /^[A-Za-z0-9][A-Za-z0-9_.:@-]*$/,
    'must start with a letter or digit and hold only A–Z a–z 0–9 _ . : @ -',
  )
  .refine((id) => !RESERVED_USER_IDS.has(id), 'is reserved')
  .meta({ id: 'UserId', description: 'the claim sub of the user’s tokens' });

export const deviceId = z
  .int()
  .min(1)
  .max(DEVICE_ID_MAX)
  .meta({ id: 'DeviceId', description: 'the claim device_id of the device’s tokens' });

/** Chosen by the client, never renumbered by the server. */
export const keyId = z
  .int()
  .min(0)
  .max(KEY_ID_MAX)
  .meta({ id: 'KeyId', description: 'chosen by the client, never renumbered by the server' });

export const registrationId = z.int().min(0).max(REGISTRATION_ID_MAX).meta({
  id: 'RegistrationId',
  description: 'tells one installation of a device from the next',
});

/** `keyVersion` and `countVersion`: 0 for a device that never uploaded; rises, outlives reset and deletion. */
export const version = z
  .int()
  .min(0)
  .max(VERSION_MAX)
  .meta({ id: 'Version', description: 'counts changes of one device; it never falls' });

/** `claimId`, `messageId`: made by the caller, so that a repeated request is recognised. */
export const uuid = shown('uuid', z.string())
  .regex(/^[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}$/, 'must be a UUID')
  .transform((id) => id.toLowerCase())
  .meta({
    id: 'Uuid',
    description:
      'made by the caller, so that a repeated request is recognised; given back in small letters, whatever its case',
  });

export const time = shown('plain', z.iso.datetime()).meta({ id: 'Time', description: 'ISO 8601, UTC' });

/** One device of one user: the unit that owns keys, a queue and at most one served socket. */
export const deviceAddress = z
  .strictObject({ userId, deviceId })
  .meta({ id: 'DeviceAddress', description: 'one device of one user' });
export type DeviceAddress = z.infer<typeof deviceAddress>;

/** `alice.1`: for maps, locks and logs. Two devices never share it, since a device id holds no dot. */
export function addressKey(device: DeviceAddress): string {
  return `${device.userId}.${device.deviceId}`;
}

/** The inverse of {@link addressKey}. */
export function addressOfKey(key: string): DeviceAddress {
  const dot = key.lastIndexOf('.');
  return { userId: key.slice(0, dot), deviceId: Number(key.slice(dot + 1)) };
}
