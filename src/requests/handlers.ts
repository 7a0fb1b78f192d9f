/** One line per request: which rule answers it, and who is told of what it changed. */

import type { Bounces } from '../delivery/bounce.ts';
import { isRevoked, type TokenAge } from '../delivery/revocation.ts';
import { type SendParts, sendMessages } from '../delivery/send.ts';
import type { Session } from '../delivery/session.ts';
import type { BundleClaims } from '../keys/claim-bundle.ts';
import type { DrainAlarm } from '../keys/drain-alarm.ts';
import { changedBy, type KeyChange } from '../keys/key-set.ts';
import { resetKeys } from '../keys/reset.ts';
import { rotateSignedPreKey } from '../keys/rotate.ts';
import { checkPreKeys, keyStats, keyStatus, listDevices } from '../keys/status.ts';
import { addPreKeys, type UploadParts, uploadKeys } from '../keys/upload.ts';
import { openValidation, type ValidateParts, validateKeys } from '../keys/validate.ts';
import { withdrawPreKeys } from '../keys/withdraw.ts';
import type { Log } from '../lib/log.ts';
import type { Bus } from '../ports/bus.ts';
import type { DeviceKeys } from '../ports/key-store.ts';
import { GatewayError } from '../protocol/errors.ts';
import type { ParsedInput, RequestData, RequestName } from '../protocol/events.ts';
import { addressKey, type DeviceAddress } from '../protocol/ids.ts';
import { type Authenticator, type Caller, type KeysFound, refuseRevoked } from './authenticate.ts';
import type { Door } from './observe.ts';

/** Who asks, and over what. */
export interface RequestContext {
  door: Door;
  device: DeviceAddress;
  /** That of the token; a socket goes on under newer ones. */
  tokenAge(): TokenAge;
  /** Null where the request came by HTTP. */
  connection: Connection | null;
  /** Whether the answer has a way left: false from when the end of the connection that it came by was seen. */
  isAwaited(): boolean;
  /** How the keys stood when it came, where no connection's number tells what comes late. */
  found?: KeysFound | null;
  /** Whether it was charged for before it was read. */
  isArrivalCharged?: boolean;
  /** Too many bundles of its target were asked for lately: this one is to spend no one-time prekey. */
  isTargetSpared?: boolean;
}

/** What a request may do to the socket that it came by. */
export interface Connection {
  session: Session;
  /** Goes on under a newer token. */
  extend(caller: Caller): void;
}

export type Handlers = {
  [Name in RequestName]: (context: RequestContext, input: ParsedInput<Name>) => Promise<RequestData<Name>>;
};

export interface HandlersParts extends UploadParts, ValidateParts, SendParts {
  claims: BundleClaims;
  drainAlarm: DrainAlarm;
  bounces: Bounces;
  bus: Bus;
  authenticator: Pick<Authenticator, 'authenticate'>;
  log: Log;
  lowThreshold: number;
}

export function createHandlers(parts: HandlersParts): Handlers {
  const { store, messages, claims, drainAlarm, bounces, bus, authenticator, log, lowThreshold } = parts;

  /** Tells every node that the device's keys changed, and brings home what can't be decrypted any more. */
  function announced<Data>(device: DeviceAddress, change: KeyChange<Data>): Data {
    if (change.keysChanged || change.ranLow) bus.poke([device]);
    if (change.wiped) {
      void bounces.settle(device).catch((error: Error) => {
        log.warn({ device: addressKey(device), error }, 'bounces wait for the next sweep');
      });
    }
    return change.data;
  }

  /** What a request that changes keys works with. */
  function on({ connection, isAwaited, tokenAge }: RequestContext): HandlersParts {
    const fence = connection?.session.fence ?? null;
    const refuse = ({ fence: newest, revokedAtMs }: DeviceKeys): void => {
      // Nobody could learn what became of it, and its client may have asked for something else since.
      if (!isAwaited()) throw new GatewayError('UNAVAILABLE', 'the connection has ended');
      // A gateway that had stood still carries out a late request when a newer connection has long been served, or has
      // changed what the late one would undo.
      if (fence !== null && newest > fence) {
        throw new GatewayError('UNAVAILABLE', 'a newer connection of this device took over');
      }
      if (isRevoked(tokenAge(), revokedAtMs)) throw new GatewayError('FORBIDDEN', 'the device was revoked');
      // An open gate was served under this number. To write it again would blot out what tells of the restore.
      if (fence !== null && newest < fence && connection?.session.gate().name === 'open') {
        throw new GatewayError(
          'UNAVAILABLE',
          'the server was restored from a backup; compare the keys with it',
        );
      }
    };
    // Not while it is being refused: the look ends the socket, or closes its gate, and the answer goes out before.
    const onRefused = (): void => connection?.session.look();
    return { ...parts, store: changedBy({ fence, refuse, onRefused }, store) };
  }

  return {
    async uploadKeys(context, input) {
      const ifKeyVersion = input.ifKeyVersion ?? context.found?.keyVersion;
      const asked = { ...input, ...(ifKeyVersion !== undefined && { ifKeyVersion }) };
      return announced(
        context.device,
        await carried(context.connection, () => uploadKeys(on(context), context.device, asked)),
      );
    },

    async addPreKeys(context, input) {
      const ifIdentityVersion = context.found?.identityVersion;
      const asked = { ...input, ...(ifIdentityVersion !== undefined && { ifIdentityVersion }) };
      return announced(context.device, await addPreKeys(on(context), context.device, asked));
    },

    withdrawPreKeys: async (context, input) =>
      announced(context.device, await withdrawPreKeys(on(context), context.device, input)),

    rotateSignedPreKey: async (context, input) =>
      announced(
        context.device,
        await carried(context.connection, () => rotateSignedPreKey(on(context), context.device, input)),
      ),

    resetKeys: async (context, input) =>
      announced(
        context.device,
        await carried(context.connection, () => resetKeys(on(context), context.device, input)),
      ),

    keyStatus: async ({ device }) => keyStatus(store, device),

    keyStats: async ({ device }) => keyStats(store, device),

    checkPreKeys: async ({ device }) => checkPreKeys(store, device, lowThreshold),

    async validateKeys(context, input) {
      const { data, changed } = await validateKeys(on(context), context.device, input);
      const session = context.connection?.session;
      if (data.keysValid) session?.validated(data.keyVersion);
      // Before the look that would take it for a rotation.
      if (data.missingKeys.includes('rolledBack')) session?.foundRestored(data.keyVersion);
      if (changed) bus.poke([context.device]);
      return data;
    },

    async requestBundle({ device, isTargetSpared = false }, input) {
      const data = await claims.claim(device, input, { isTargetSpared });
      for (const { deviceId } of data.devices) drainAlarm.noteClaim({ userId: data.userId, deviceId });
      return data;
    },

    listDevices: async (_, input) => listDevices(store, input.userId),

    async sendMessages(context, input) {
      if (!(await ofSocket(context).session.hasKeys())) throw new GatewayError('KEYS_NOT_UPLOADED');
      return await sendMessages(parts, context.device, input);
    },

    async clientReady(context, { validation }) {
      const { session } = ofSocket(context);
      const brought =
        validation === undefined
          ? null
          : await openValidation(parts, context.device, validation, () => session.validatedVersion());
      return await session.ready(brought);
    },

    async refreshToken(context, { token }) {
      const connection = ofSocket(context);
      const caller = await authenticator.authenticate(token);
      if (addressKey(caller.device) !== addressKey(context.device)) {
        throw new GatewayError('FORBIDDEN', 'the token is of another device');
      }
      await refuseRevoked(messages, caller);
      connection.extend(caller);
      return { expiresAt: new Date(caller.expiresAtMs).toISOString() };
    },
  };
}

/** A socket's own rotation carries its open gate along; its session knows of its own reset at once. */
async function carried<Data extends { keyVersion: number }>(
  connection: Connection | null,
  change: () => Promise<KeyChange<Data>>,
): Promise<KeyChange<Data>> {
  return connection === null ? await change() : await connection.session.change(change);
}

/** @throws GatewayError BAD_REQUEST where the request came by a door without a socket */
function ofSocket(context: RequestContext): Connection {
  if (context.connection === null) throw new GatewayError('BAD_REQUEST', 'this request needs a socket');
  return context.connection;
}
