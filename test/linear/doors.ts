/** The model's requests on their way through a real door, and the answers back in the model's words. */
import type { RequestData, RequestInput, RequestName } from '../../src/protocol/events.ts';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import type { DeviceBundle, Verdict } from '../../src/protocol/keys.ts';
import type { Client } from '../support/gateway.ts';
import type { Data, Key, KeyAnswer, KeyRequest } from './key-model.ts';
import type { KeyRing } from './key-ring.ts';

export interface Door {
  /** @returns null where the answer was lost with the connection */
  ask(request: KeyRequest): Promise<KeyAnswer | null>;
}

/** @param target the device whose keys are asked for */
export function socketDoor(client: Client, target: DeviceAddress, ring: KeyRing): Door {
  return {
    async ask(request) {
      const input = inputOf(request, target, ring);
      const reply = await client.ask(request.name, input as never).catch(() => null);
      if (reply === null) return null;
      if (!reply.ok) return { ok: false, code: reply.error.code };
      return { ok: true, data: dataOf(request.name, reply.data as RequestData<RequestName>, ring) };
    },
  };
}

export function httpDoor(url: string, token: string, target: DeviceAddress, ring: KeyRing): Door {
  return {
    async ask(request) {
      const { method = 'GET', path, body, headers } = routeOf(request, target, ring);
      const response = await fetch(`${url}${path}`, {
        method,
        headers: {
          authorization: `Bearer ${token}`,
          ...(body === undefined ? {} : { 'content-type': 'application/json' }),
          ...headers,
        },
        ...(body === undefined ? {} : { body: JSON.stringify(body) }),
      });
      const { success, ...answer } = (await response.json()) as Record<string, unknown> & {
        error: { code: string };
      };
      if (success !== true) return { ok: false, code: answer.error.code };
      const data = request.name === 'requestBundle' ? bundlesOf(answer.keyBundle as KeyBundle) : answer;
      return { ok: true, data: dataOf(request.name, data as RequestData<RequestName>, ring) };
    },
  };
}

/** What the HTTP door has a route for. */
export function isForHttp(request: KeyRequest): boolean {
  switch (request.name) {
    case 'withdrawPreKeys':
    case 'rotateSignedPreKey':
    case 'resetKeys':
    case 'listDevices':
      return false;
    case 'addPreKeys':
      return request.oneTime.pq.length === 0;
    case 'requestBundle':
      return !request.ofAll;
    default:
      return true;
  }
}

function inputOf(request: KeyRequest, target: DeviceAddress, ring: KeyRing): RequestInput<RequestName> {
  const signed = (key: Key) => ring.wire(key);
  const unsigned = (key: Key) => ({ keyId: key.keyId, publicKey: ring.wire(key).publicKey });
  switch (request.name) {
    case 'uploadKeys':
      return {
        registrationId: request.registrationId,
        identityKey: ring.identityKey(request.identity),
        signedPreKey: signed(request.signedPreKey),
        ...(request.lastResort === null ? {} : { pqLastResortPreKey: signed(request.lastResort) }),
        oneTimePreKeys: request.oneTime.ec.map(unsigned),
        pqOneTimePreKeys: request.oneTime.pq.map(signed),
        ...(request.replaceIdentity ? { replaceIdentity: true } : {}),
        ...ifKeyVersion(request),
      };
    case 'addPreKeys':
      return {
        oneTimePreKeys: request.oneTime.ec.map(unsigned),
        pqOneTimePreKeys: request.oneTime.pq.map(signed),
      };
    case 'withdrawPreKeys':
      return { preKeyIds: [...request.ids.ec], pqPreKeyIds: [...request.ids.pq] };
    case 'rotateSignedPreKey':
      return {
        ...(request.signedPreKey === null ? {} : { signedPreKey: signed(request.signedPreKey) }),
        ...(request.lastResort === null ? {} : { pqLastResortPreKey: signed(request.lastResort) }),
        ...ifKeyVersion(request),
      };
    case 'resetKeys':
      return ifKeyVersion(request);
    case 'keyStatus':
    case 'keyStats':
    case 'checkPreKeys':
      return {};
    case 'validateKeys':
      return validationOf(request, ring);
    case 'requestBundle':
      return {
        claimId: request.claimId,
        userId: target.userId,
        ...(request.ofAll ? {} : { deviceId: target.deviceId }),
      };
    case 'listDevices':
      return { userId: target.userId };
  }
}

function validationOf(
  request: Extract<KeyRequest, { name: 'validateKeys' }>,
  ring: KeyRing,
): RequestInput<'validateKeys'> {
  const { signedPreKeyName, registrationId, lastResortId, ids } = request;
  const signedPreKey = ring.signed.ec.find((key) => key.name === signedPreKeyName);
  return {
    localIdentityKey: ring.identityKey(request.identity),
    localSignedPreKeyId: request.signedPreKeyId,
    ...(signedPreKey === undefined ? {} : { localSignedPreKeyPublicKey: ring.wire(signedPreKey).publicKey }),
    ...(registrationId === null ? {} : { localRegistrationId: registrationId }),
    ...(lastResortId === null ? {} : { localPqLastResortPreKeyId: lastResortId }),
    ...(ids === null
      ? { localPreKeyCount: 3 }
      : { localPreKeyIds: [...ids.ec], localPqPreKeyIds: [...ids.pq] }),
    lastKeyVersion: request.lastKeyVersion,
    lastCountVersion: request.lastCountVersion,
  };
}

interface Route {
  method?: string;
  path: string;
  body?: unknown;
  headers?: Record<string, string>;
}

function routeOf(request: KeyRequest, target: DeviceAddress, ring: KeyRing): Route {
  switch (request.name) {
    case 'uploadKeys': {
      const { identityKey, ...rest } = inputOf(request, target, ring) as RequestInput<'uploadKeys'>;
      return {
        ...{ method: 'POST', path: '/api/keys/upload' },
        body: { keyBundle: { ...rest, identityPubKey: identityKey } },
      };
    }
    case 'addPreKeys': {
      const { oneTimePreKeys } = inputOf(request, target, ring) as RequestInput<'addPreKeys'>;
      return { method: 'POST', path: '/api/keys/add-prekeys', body: { preKeys: oneTimePreKeys } };
    }
    case 'keyStatus':
      return { path: '/signal/status/minimal' };
    case 'keyStats':
      return { path: '/api/keys/stats' };
    case 'checkPreKeys':
      return { path: '/api/keys/check-prekeys' };
    case 'validateKeys':
      return { method: 'POST', path: '/signal/validate-and-sync', body: validationOf(request, ring) };
    case 'requestBundle':
      return {
        path: `/api/keys/${target.userId}?deviceId=${target.deviceId}`,
        headers: { 'idempotency-key': request.claimId },
      };
    default:
      throw new Error(`${request.name} has no route`);
  }
}

function ifKeyVersion({ ifKeyVersion }: { ifKeyVersion: number | null }) {
  return ifKeyVersion === null ? {} : { ifKeyVersion };
}

type KeyBundle = Omit<DeviceBundle, 'identityKey' | 'oneTimePreKey'> & {
  identityPubKey: string;
  oneTimePreKeys: NonNullable<DeviceBundle['oneTimePreKey']>[];
};

/** This door does not say why a one-time prekey is absent. */
function bundlesOf({ identityPubKey, oneTimePreKeys, ...rest }: KeyBundle): { devices: DeviceBundle[] } {
  const [oneTimePreKey = null] = oneTimePreKeys;
  const absence = oneTimePreKey === null ? { oneTimePreKeyAbsent: 'noneLeft' as const } : {};
  return { devices: [{ ...rest, identityKey: identityPubKey, oneTimePreKey, ...absence }] };
}

/** Only what the model speaks of; lists whose order the contract leaves open in rising order. */
function dataOf(name: KeyRequest['name'], answered: RequestData<RequestName>, ring: KeyRing): Data {
  switch (name) {
    case 'uploadKeys':
    case 'addPreKeys': {
      const data = answered as RequestData<'uploadKeys'>;
      return {
        keyVersion: data.keyVersion,
        oneTimePreKeys: verdictOf(data.oneTimePreKeys),
        pqOneTimePreKeys: verdictOf(data.pqOneTimePreKeys),
        ...countsOf(data),
      };
    }
    case 'withdrawPreKeys': {
      const data = answered as RequestData<'withdrawPreKeys'>;
      return { withdrawnCount: data.withdrawnCount, ...countsOf(data) };
    }
    case 'rotateSignedPreKey':
    case 'resetKeys':
      return { keyVersion: (answered as RequestData<'resetKeys'>).keyVersion };
    case 'keyStatus': {
      const { identityKey, signedPreKeyExpiresAt, ...data } = answered as RequestData<'keyStatus'>;
      return {
        ...data,
        identityKey: identityKey === null ? null : ring.identityOf(identityKey),
        expires: signedPreKeyExpiresAt !== null,
      };
    }
    case 'keyStats': {
      const { totalPreKeys, availablePreKeys, consumedPreKeys } = answered as RequestData<'keyStats'>;
      return { totalPreKeys, availablePreKeys, consumedPreKeys };
    }
    case 'checkPreKeys': {
      const data = answered as RequestData<'checkPreKeys'>;
      return { needsMorePreKeys: data.needsMorePreKeys, ...countsOf(data) };
    }
    case 'validateKeys': {
      const { reason: _, validation, ...data } = answered as RequestData<'validateKeys'>;
      return Object.fromEntries(
        Object.entries({ ...data, isProven: validation !== undefined }).map(([field, value]) => [
          field,
          Array.isArray(value) ? [...value].sort(rising) : value,
        ]),
      );
    }
    case 'requestBundle': {
      const [bundle, ...others] = (answered as RequestData<'requestBundle'>).devices;
      if (bundle === undefined || others.length > 0) return { devices: others.length };
      const { oneTimePreKey, pqPreKey } = bundle;
      return {
        registrationId: bundle.registrationId,
        identityKey: ring.identityOf(bundle.identityKey),
        signedPreKey: ring.nameOf(bundle.signedPreKey),
        oneTimePreKey: oneTimePreKey && ring.nameOf(oneTimePreKey),
        oneTimePreKeyAbsent: bundle.oneTimePreKeyAbsent ?? null,
        pqPreKey: pqPreKey && ring.nameOf(pqPreKey),
        isLastResort: pqPreKey?.lastResort ?? false,
      };
    }
    case 'listDevices': {
      const { devices } = answered as RequestData<'listDevices'>;
      return { registrationId: devices.length === 1 ? devices[0]!.registrationId : devices };
    }
  }
}

function verdictOf({ stored, unchanged, conflicts }: Verdict): Verdict {
  return { stored, unchanged, conflicts: conflicts.map(({ keyId, reason }) => ({ keyId, reason })) };
}

function countsOf(data: { availableCount: number; pqAvailableCount: number; countVersion: number }): Data {
  const { availableCount, pqAvailableCount, countVersion } = data;
  return { availableCount, pqAvailableCount, countVersion };
}

function rising(one: string | number, other: string | number): number {
  return one < other ? -1 : one > other ? 1 : 0;
}
