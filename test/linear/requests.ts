/** Random requests on one device's keys: a function of the chance that is passed in and of what was answered before. */
import type { Random } from '../fault/random.ts';
import type { Key, KeyAnswer, KeyRequest, Kind } from './key-model.ts';
import { IDENTITIES, type KeyRing } from './key-ring.ts';

/** What the clients of a device were told so far, and what they mean to be the device's identity. */
export interface Hindsight {
  identity: string;
  keyVersion: number;
  countVersion: number;
}

export const NOTHING_SEEN: Hindsight = { identity: IDENTITIES[0], keyVersion: 0, countVersion: 0 };

/** One-time prekeys of one kind in one request: few, so that requests meet over them. */
const KEYS_MAX = 3;
const REGISTRATION_IDS = [1, 2] as const;

/** A whole key set of the identity at hand. */
export function randomUpload(random: Random, ring: KeyRing, seen: Hindsight): KeyRequest {
  if (random.happens(0.25)) seen.identity = random.pick(IDENTITIES);
  const { identity } = seen;
  const lastResort = random.happens(0.7) ? signedKey(random, ring, 'pq', identity) : null;
  return {
    name: 'uploadKeys',
    identity,
    registrationId: random.happens(0.85) ? REGISTRATION_IDS[0] : REGISTRATION_IDS[1],
    signedPreKey: signedKey(random, ring, 'ec', identity),
    lastResort,
    oneTime: {
      ec: oneTimeKeys(random, ring, 'ec', identity),
      pq: random.happens(lastResort === null ? 0.15 : 0.6) ? oneTimeKeys(random, ring, 'pq', identity) : [],
    },
    replaceIdentity: random.happens(0.7),
    ifKeyVersion: ifKeyVersion(random, seen),
  };
}

/** What a device may ask of its own keys, each as often as it says. */
const OWN_REQUESTS = Object.entries({
  ...{ uploadKeys: 3, addPreKeys: 6, withdrawPreKeys: 3, rotateSignedPreKey: 5, resetKeys: 2 },
  ...{ keyStatus: 2, keyStats: 1, checkPreKeys: 2, validateKeys: 3 },
} as const).flatMap(([name, times]) => Array<keyof typeof OWN>(times).fill(name as keyof typeof OWN));

const OWN = {
  uploadKeys: randomUpload,
  addPreKeys: (random, ring, { identity }) => ({
    name: 'addPreKeys',
    oneTime: {
      ec: oneTimeKeys(random, ring, 'ec', identity),
      pq: random.happens(0.3) ? oneTimeKeys(random, ring, 'pq', identity) : [],
    },
  }),
  withdrawPreKeys: (random, ring) => ({
    name: 'withdrawPreKeys',
    ids: { ec: someIds(random, ring, 'ec', 0.25), pq: someIds(random, ring, 'pq', 0.2) },
  }),
  rotateSignedPreKey(random, ring, seen) {
    const which = random.pick(['ec', 'pq', 'both']);
    return {
      name: 'rotateSignedPreKey',
      signedPreKey: which === 'pq' ? null : anySignedKey(random, ring, 'ec', seen.identity),
      lastResort: which === 'ec' ? null : anySignedKey(random, ring, 'pq', seen.identity),
      ifKeyVersion: ifKeyVersion(random, seen),
    };
  },
  resetKeys: (random, _, seen) => ({ name: 'resetKeys', ifKeyVersion: ifKeyVersion(random, seen) }),
  keyStatus: () => ({ name: 'keyStatus' }),
  keyStats: () => ({ name: 'keyStats' }),
  checkPreKeys: () => ({ name: 'checkPreKeys' }),
  validateKeys: randomValidation,
} as const satisfies Partial<
  Record<KeyRequest['name'], (random: Random, ring: KeyRing, seen: Hindsight) => KeyRequest>
>;

/** Anything that a device may ask of its own keys. */
export function randomOwnRequest(random: Random, ring: KeyRing, seen: Hindsight): KeyRequest {
  return OWN[random.pick(OWN_REQUESTS)](random, ring, seen);
}

/** @param claimIds few of them, so that claims are repeated */
export function randomClaim(random: Random, claimer: string, claimIds: readonly string[]): KeyRequest {
  if (random.happens(0.06)) return { name: 'listDevices' };
  return { name: 'requestBundle', claimer, claimId: random.pick(claimIds), ofAll: random.happens(0.2) };
}

/** What is there when all is done: every counter and used id shows, and what the pools begin with. */
export function closingRequests(ring: KeyRing, seen: Hindsight, claimer: string): KeyRequest[] {
  const claims = [0, 1].map((nth): KeyRequest => {
    const claimId = `00000000-0000-4000-8000-00000000000${nth}`;
    return { name: 'requestBundle', claimer, claimId, ofAll: false };
  });
  const ids = { ec: idsOf(ring, 'ec'), pq: idsOf(ring, 'pq') };
  return [{ name: 'keyStatus' }, validationOf(ring, seen, ids), ...claims];
}

/** Takes in what an answer tells. */
export function learn(seen: Hindsight, answer: KeyAnswer | null): void {
  if (answer?.ok !== true) return;
  const { keyVersion, countVersion } = answer.data;
  if (typeof keyVersion === 'number') seen.keyVersion = Math.max(seen.keyVersion, keyVersion);
  if (typeof countVersion === 'number') seen.countVersion = Math.max(seen.countVersion, countVersion);
}

function randomValidation(random: Random, ring: KeyRing, seen: Hindsight): KeyRequest {
  const signed = signedKey(random, ring, 'ec', seen.identity);
  const ids = { ec: someIds(random, ring, 'ec', 0.5), pq: someIds(random, ring, 'pq', 0.5) };
  return {
    ...validationOf(ring, seen, random.happens(0.8) ? ids : null),
    signedPreKeyId: signed.keyId,
    signedPreKeyName: random.happens(0.3) ? signed.name : null,
    registrationId: random.happens(0.3) ? random.pick(REGISTRATION_IDS) : null,
    lastResortId: random.happens(0.2) ? signedKey(random, ring, 'pq', seen.identity).keyId : null,
  };
}

function validationOf(
  ring: KeyRing,
  seen: Hindsight,
  ids: Record<Kind, number[]> | null,
): Extract<KeyRequest, { name: 'validateKeys' }> {
  return {
    name: 'validateKeys',
    identity: seen.identity,
    signedPreKeyId: ring.signed.ec[0]!.keyId,
    ...{ signedPreKeyName: null, registrationId: null, lastResortId: null },
    ids,
    lastKeyVersion: seen.keyVersion,
    lastCountVersion: seen.countVersion,
  };
}

/** Mostly the first one: an upload that changes it often shows little else. */
function signedKey(random: Random, ring: KeyRing, kind: Kind, identity: string): Key {
  if (random.happens(0.5)) return ring.signed[kind].find((key) => key.identity === identity)!;
  return anySignedKey(random, ring, kind, identity);
}

function anySignedKey(random: Random, ring: KeyRing, kind: Kind, identity: string): Key {
  return random.pick(ring.signed[kind].filter((key) => key.identity === identity));
}

/** Each id once, in an order of its own. */
function oneTimeKeys(random: Random, ring: KeyRing, kind: Kind, identity: string): Key[] {
  const chosen = new Map<number, Key>();
  const keys = ring.oneTime[kind].filter((key) => key.identity === identity);
  const count = random.below(KEYS_MAX + 1);
  while (chosen.size < count) {
    const { keyId } = random.pick(keys);
    const [usual, other] = keys.filter((key) => key.keyId === keyId);
    if (!chosen.has(keyId)) chosen.set(keyId, random.happens(0.85) ? usual! : other!);
  }
  return [...chosen.values()];
}

function someIds(random: Random, ring: KeyRing, kind: Kind, likelihood: number): number[] {
  return idsOf(ring, kind).filter(() => random.happens(likelihood));
}

function idsOf(ring: KeyRing, kind: Kind): number[] {
  return [...new Set(ring.oneTime[kind].map((key) => key.keyId))];
}

function ifKeyVersion(random: Random, seen: Hindsight): number | null {
  if (random.happens(0.7)) return null;
  return random.happens(0.75) ? seen.keyVersion : Math.max(0, seen.keyVersion - 1);
}
