/**
 * What the contract promises of a user's devices to those who write to them, as a machine that carries out one request
 * after another: who is here, under which registration id, and which envelopes are accepted. It shares nothing with the
 * server.
 */

/** Device ids to registration ids, in rising order: the devices that have keys. */
export type Devices = readonly (readonly [deviceId: number, registrationId: number])[];

export type UserRequest =
  | { name: 'uploadKeys'; deviceId: number; registrationId: number }
  | { name: 'resetKeys'; deviceId: number }
  | { name: 'listDevices' }
  /** One device's part of the bundles of all: each is of its own moment, that of its claim. */
  | { name: 'bundleOf'; deviceId: number }
  /** Each message is sent once. */
  | { name: 'sendMessages'; envelopes: Devices; sendAnyway: boolean };

export type UserAnswer =
  | { outcome: 'done' }
  | { outcome: 'devices'; devices: Devices }
  /** `mismatch` is told of a refusal, and of what was sent anyway. */
  | { outcome: 'sent' | 'mismatched'; accepted: readonly number[]; mismatch: Mismatch }
  | { outcome: 'refused'; code: string };

export interface Mismatch {
  missing: readonly number[];
  extra: readonly number[];
  stale: readonly number[];
}

export const NOBODY: Devices = [];

/** Carries out one request. */
export function step(devices: Devices, request: UserRequest): { devices: Devices; answer: UserAnswer } {
  switch (request.name) {
    case 'uploadKeys':
    case 'resetKeys': {
      const others = devices.filter(([deviceId]) => deviceId !== request.deviceId);
      const own = request.name === 'uploadKeys' ? [[request.deviceId, request.registrationId] as const] : [];
      const after = [...others, ...own].sort(([one], [other]) => one - other);
      return { devices: after, answer: { outcome: 'done' } };
    }
    case 'listDevices':
      return { devices, answer: devices.length === 0 ? unknown : { outcome: 'devices', devices } };
    case 'bundleOf': {
      const own = devices.filter(([deviceId]) => deviceId === request.deviceId);
      return { devices, answer: { outcome: 'devices', devices: own } };
    }
    case 'sendMessages':
      return { devices, answer: sent(devices, request) };
  }
}

const unknown: UserAnswer = { outcome: 'refused', code: 'USER_NOT_FOUND' };

function sent(devices: Devices, request: Extract<UserRequest, { name: 'sendMessages' }>): UserAnswer {
  if (devices.length === 0) return unknown;
  const registered = new Map(devices);
  const addressed = new Map(request.envelopes);
  const ids = (list: Devices): number[] => list.map(([deviceId]) => deviceId);
  const mismatch = {
    missing: ids(devices.filter(([deviceId]) => !addressed.has(deviceId))),
    extra: ids(request.envelopes.filter(([deviceId]) => !registered.has(deviceId))),
    stale: ids(request.envelopes.filter(([deviceId, id]) => (registered.get(deviceId) ?? id) !== id)),
  };
  const matches = ids(request.envelopes.filter(([deviceId, id]) => registered.get(deviceId) === id));
  const isMismatched = mismatch.missing.length + mismatch.extra.length + mismatch.stale.length > 0;
  return isMismatched && !request.sendAnyway
    ? { outcome: 'mismatched', accepted: [], mismatch }
    : { outcome: 'sent', accepted: matches, mismatch };
}
