/** The routes of the HTTP door: what the client wrote becomes a request of the registry, and its reply an answer. */
import { randomUUID } from 'node:crypto';
import type { FastifyRequest } from 'fastify';
import type { ErrorObject, Issue } from '../protocol/errors.ts';
import type { RequestName } from '../protocol/events.ts';
import { httpRoutes } from '../protocol/http-routes.ts';
import type { DeviceBundle } from '../protocol/keys.ts';
import { DEVICE_ID_MAX, ISSUES_MAX } from '../protocol/limits.ts';
import { badRequest, type Dispatch } from '../requests/dispatch.ts';
import type { RequestContext } from '../requests/handlers.ts';

export type RouteName = keyof typeof httpRoutes & RequestName;

type Answer = { ok: true; data: Record<string, unknown> } | { ok: false; error: ErrorObject };

/** One entry per route: what the HTTP client wrote becomes a request of the registry, and its reply an answer. */
export function createAnswers(
  dispatch: Dispatch,
): Record<RouteName, (request: FastifyRequest, context: RequestContext) => Promise<Answer>> {
  return {
    async uploadKeys(request, context) {
      refuseOthers(request.query, []);
      const { shape } = httpRoutes.uploadKeys.body;
      const { keyBundle } = fieldsOf(request.body, Object.keys(shape), []);
      const { identityPubKey: identityKey, ...rest } = fieldsOf(
        keyBundle,
        Object.keys(shape.keyBundle.shape),
        ['keyBundle'],
      );
      const reply = await dispatch('uploadKeys', { ...rest, identityKey }, context);
      return asWritten(reply, ([field, ...deeper]) =>
        field === undefined
          ? ['keyBundle']
          : ['keyBundle', field === 'identityKey' ? 'identityPubKey' : field, ...deeper],
      );
    },

    async requestBundle(request, context) {
      const { deviceId: wanted } = refuseOthers(request.query, ['deviceId']);
      const { userId } = request.params as { userId: string };
      const claimId = request.headers['idempotency-key'] ?? randomUUID();
      let deviceId = wanted === undefined ? null : deviceIdOf(wanted);
      if (deviceId === null) {
        const listed = await dispatch('listDevices', { userId }, { ...context, isArrivalCharged: false });
        if (!listed.ok) return listed;
        deviceId = Math.min(...listed.data.devices.map((listedDevice) => listedDevice.deviceId));
      }
      const reply = await dispatch('requestBundle', { claimId, userId, deviceId }, context);
      if (reply.ok) return { ok: true, data: { keyBundle: keyBundleOf(reply.data.devices[0]!) } };
      return asWritten(reply, ([field, ...deeper]) =>
        field === 'claimId' ? ['Idempotency-Key'] : field === undefined ? [] : [field, ...deeper],
      );
    },

    async checkPreKeys(request, context) {
      refuseOthers(request.query, []);
      return await dispatch('checkPreKeys', {}, context);
    },

    async addPreKeys(request, context) {
      refuseOthers(request.query, []);
      const { preKeys } = fieldsOf(request.body, Object.keys(httpRoutes.addPreKeys.body.shape), []);
      if (preKeys === undefined) throw badRequest([{ path: ['preKeys'], message: 'must be a list' }]);
      const reply = await dispatch('addPreKeys', { oneTimePreKeys: preKeys }, context);
      return asWritten(reply, ([field, ...deeper]) => (field === undefined ? [] : ['preKeys', ...deeper]));
    },

    async keyStats(request, context) {
      refuseOthers(request.query, []);
      return await dispatch('keyStats', {}, context);
    },

    async keyStatus(request, context) {
      refuseOthers(request.query, []);
      return await dispatch('keyStatus', {}, context);
    },

    async validateKeys(request, context) {
      refuseOthers(request.query, []);
      return await dispatch('validateKeys', request.body, context);
    },
  };
}

function keyBundleOf(bundle: DeviceBundle) {
  const { identityKey, oneTimePreKey, oneTimePreKeyAbsent: _, ...rest } = bundle;
  return {
    ...rest,
    identityPubKey: identityKey,
    oneTimePreKeys: oneTimePreKey === null ? [] : [oneTimePreKey],
  };
}

/** @throws GatewayError BAD_REQUEST */
function deviceIdOf(text: unknown): number {
  if (typeof text === 'string' && /^[1-9]\d{0,2}$/.test(text) && Number(text) <= DEVICE_ID_MAX) {
    return Number(text);
  }
  throw badRequest([{ path: ['deviceId'], message: `must be a whole number from 1 to ${DEVICE_ID_MAX}` }]);
}

/** @throws GatewayError BAD_REQUEST for a query parameter that the route doesn't have */
function refuseOthers(query: unknown, names: readonly string[]): Record<string, unknown> {
  return fieldsOf(query, names, []);
}

/** @throws GatewayError BAD_REQUEST unless `value` is an object of no other fields than `names` */
function fieldsOf(value: unknown, names: readonly string[], path: Issue['path']): Record<string, unknown> {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw badRequest([{ path, message: 'must be an object' }]);
  }
  const others = Object.keys(value).filter((name) => !names.includes(name));
  if (others.length === 0) return value as Record<string, unknown>;
  throw badRequest(
    others.slice(0, ISSUES_MAX).map((name) => ({
      path: [...path, name.slice(0, NAME_LENGTH_MAX)],
      message: 'is not a field of this request',
    })),
  );
}

/** What a client sent comes back in no greater length than a name has. */
const NAME_LENGTH_MAX = 120;

/** Faults are named as the HTTP client wrote its fields, not as the registry calls them. */
function asWritten(reply: Answer, written: (path: Issue['path']) => Issue['path']): Answer {
  if (reply.ok || reply.error.details === undefined || !('issues' in reply.error.details)) return reply;
  const issues = reply.error.details.issues.map(({ path, message }) => ({ path: written(path), message }));
  const message = reply.error.code === 'BAD_REQUEST' ? badRequest(issues).message : reply.error.message;
  return { ok: false, error: { ...reply.error, message, details: { issues } } };
}
