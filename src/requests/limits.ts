/** What requests, connections and handshakes are charged, and what becomes of those that are beyond a limit. */
import type { Charge, LimitHit, RateLimiter } from '../ports/rate-limiter.ts';
import { decodedLength } from '../protocol/base64.ts';
import { GatewayError } from '../protocol/errors.ts';
import type { ParsedInput, RequestName } from '../protocol/events.ts';
import { addressKey, type DeviceAddress } from '../protocol/ids.ts';
import type { Observer } from './observe.ts';

const MINUTE_MS = 60_000;
const HOUR_MS = 60 * MINUTE_MS;

/** Every limit, with the time in which its points may be spent. */
export const LIMIT_WINDOWS_MS = {
  /** Requests of one name by one device. */
  requests: MINUTE_MS,
  /** Changes of a device's keys: each costs signatures to verify and a transaction. */
  uploads: MINUTE_MS,
  /** Bundles that one user asks of another. */
  bundlesPerPair: MINUTE_MS,
  /** Bundles that are asked of one user, again or anew; beyond it they go out without one-time prekeys. */
  bundlesPerTarget: HOUR_MS,
  /** Messages of one user to another. */
  messagesPerPair: MINUTE_MS,
  /** Bytes of ciphertext stored for one user. */
  bytesPerRecipient: HOUR_MS,
  connectsPerDevice: MINUTE_MS,
  connectsPerUser: MINUTE_MS,
  handshakesPerAddress: MINUTE_MS,
} as const satisfies Record<string, number>;

/** Requests that change keys. */
const CHANGES: ReadonlySet<RequestName> = new Set<RequestName>([
  'uploadKeys',
  'addPreKeys',
  'rotateSignedPreKey',
  'resetKeys',
  'withdrawPreKeys',
]);

/** Points per window. */
export type RateName = keyof typeof LIMIT_WINDOWS_MS;
/** Those that each node holds by itself are told here too: open connections, in all and of an address; frames of a socket. */
export type LimitName = RateName | 'connections' | 'connectionsPerAddress' | 'framesPerSocket';

export interface Limits {
  /**
   * Charges a request for what it costs whatever it asks, where that is known before it is read.
   *
   * @throws GatewayError RATE_LIMITED
   */
  chargeArrival(device: DeviceAddress, name: RequestName): Promise<void>;
  /**
   * Charges a request, before anything is done for it. Null stands for an input that can't be read.
   *
   * @param how.isArrivalCharged whether `chargeArrival` was called for it
   * @returns whether the target of a bundle is to be spared its one-time prekeys
   * @throws GatewayError RATE_LIMITED
   */
  chargeRequest<Name extends RequestName>(
    device: DeviceAddress,
    name: Name,
    input: ParsedInput<Name> | null,
    how?: { isArrivalCharged: boolean },
  ): Admission | Promise<Admission>;
  /** Charges the recipient for what was stored, which its sender's request was only judged by. */
  noteStored(recipientUserId: string, bytes: number): void;
  /** Charges a connection whose token is good. @throws GatewayError RATE_LIMITED */
  chargeConnection(device: DeviceAddress): Promise<void>;
  /** Charges a handshake, before its token is looked at. @throws GatewayError RATE_LIMITED */
  chargeHandshake(address: string): Promise<void>;
}

export interface Admission {
  isTargetSpared: boolean;
}

const FREE: Admission = { isTargetSpared: false };
const SPARED: Admission = { isTargetSpared: true };

export function createLimits(parts: { limiter: RateLimiter; observer: Observer }): Limits {
  const { limiter, observer } = parts;

  function judge(device: DeviceAddress | null, hits: readonly LimitHit[]): Admission {
    if (hits.length === 0) return FREE;
    let refusal: LimitHit | null = null;
    for (const hit of hits) {
      const limit = hit.limit as RateName;
      observer.limitHit({ limit, device });
      if (limit === 'bundlesPerTarget') continue;
      if (refusal === null || refusal.retryAfterMs < hit.retryAfterMs) refusal = hit;
    }
    if (refusal === null) return SPARED;
    throw new GatewayError('RATE_LIMITED', undefined, { retryAfterMs: refusal.retryAfterMs });
  }

  function charge(device: DeviceAddress | null, charges: readonly Charge[]): Admission | Promise<Admission> {
    const hits = limiter.charge(charges);
    return hits instanceof Promise ? hits.then((late) => judge(device, late)) : judge(device, hits);
  }

  return {
    async chargeArrival(device, name) {
      await charge(device, arrivalChargesOf(device, name));
    },

    chargeRequest(device, name, input, { isArrivalCharged } = { isArrivalCharged: false }) {
      const charges = isArrivalCharged ? [] : arrivalChargesOf(device, name);
      if (input !== null) addInputCharges(charges, device, name, input);
      return charge(device, charges);
    },

    noteStored(recipientUserId, bytes) {
      limiter.note(chargeOf('bytesPerRecipient', recipientUserId, '', bytes));
    },

    async chargeConnection(device) {
      await charge(device, [
        { limit: 'connectsPerDevice', key: addressKey(device), points: 1 },
        { limit: 'connectsPerUser', key: device.userId, points: 1 },
      ]);
    },

    async chargeHandshake(address) {
      await charge(null, [{ limit: 'handshakesPerAddress', key: address, points: 1 }]);
    },
  };
}

/** All of one shape: they are made for every request. */
function chargeOf(limit: RateName, key: string, subkey: string, points: number): Charge {
  return {
    limit,
    key,
    subkey,
    points,
    onlyTells: limit === 'bundlesPerTarget',
    onlyJudged: limit === 'bytesPerRecipient',
  };
}

function arrivalChargesOf(device: DeviceAddress, name: RequestName): Charge[] {
  const own = addressKey(device);
  const charges = [chargeOf('requests', own, name, 1)];
  if (CHANGES.has(name)) charges.push(chargeOf('uploads', own, '', 1));
  return charges;
}

function addInputCharges<Name extends RequestName>(
  charges: Charge[],
  { userId: asker }: DeviceAddress,
  name: Name,
  input: ParsedInput<Name>,
): void {
  const asked = name as RequestName;
  if (asked === 'requestBundle') {
    const { userId } = input as ParsedInput<'requestBundle'>;
    charges.push(chargeOf('bundlesPerPair', asker, userId, 1));
    charges.push(chargeOf('bundlesPerTarget', userId, '', 1));
  } else if (asked === 'sendMessages') {
    const { userId, envelopes } = input as ParsedInput<'sendMessages'>;
    let bytes = 0;
    for (const { content } of envelopes) bytes += decodedLength(content);
    charges.push(chargeOf('messagesPerPair', asker, userId, 1));
    charges.push(chargeOf('bytesPerRecipient', userId, '', bytes));
  }
}
