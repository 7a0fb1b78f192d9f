/**
 * What the contract promises of one device's keys, as a machine that carries out one request after another. It is
 * written from the contract alone and shares nothing with the server; public keys are known by name.
 */

export type Kind = 'ec' | 'pq';

/** A public key. Where it is a signed one, `identity` signed it. */
export interface Key {
  keyId: number;
  /** No other public key has it. */
  name: string;
  identity: string;
}

export type KeyRequest =
  | {
      name: 'uploadKeys';
      identity: string;
      registrationId: number;
      signedPreKey: Key;
      lastResort: Key | null;
      oneTime: Readonly<Record<Kind, readonly Key[]>>;
      replaceIdentity: boolean;
      ifKeyVersion: number | null;
    }
  | { name: 'addPreKeys'; oneTime: Readonly<Record<Kind, readonly Key[]>> }
  | { name: 'withdrawPreKeys'; ids: Readonly<Record<Kind, readonly number[]>> }
  | {
      name: 'rotateSignedPreKey';
      signedPreKey: Key | null;
      lastResort: Key | null;
      ifKeyVersion: number | null;
    }
  | { name: 'resetKeys'; ifKeyVersion: number | null }
  | { name: 'keyStatus' }
  | { name: 'keyStats' }
  | { name: 'checkPreKeys' }
  | {
      name: 'validateKeys';
      identity: string;
      signedPreKeyId: number;
      signedPreKeyName: string | null;
      registrationId: number | null;
      lastResortId: number | null;
      /** Null where only the number of the elliptic-curve ones is told. */
      ids: Readonly<Record<Kind, readonly number[]>> | null;
      lastKeyVersion: number;
      lastCountVersion: number;
    }
  /** `ofAll`: of every device of the user, of which there is this one. */
  | { name: 'requestBundle'; claimer: string; claimId: string; ofAll: boolean }
  | { name: 'listDevices' };

export type Refusal =
  | 'IDENTITY_MISMATCH'
  | 'KEYS_OUT_OF_SYNC'
  | 'PREKEY_CONFLICT'
  | 'BAD_REQUEST'
  | 'KEYS_NOT_UPLOADED'
  | 'SIGNATURE_INVALID'
  | 'USER_NOT_FOUND';

export type Data = Readonly<Record<string, unknown>>;

/** What was answered. What the contract says nothing of is not in `data`. */
export type KeyAnswer = { ok: true; data: Data } | { ok: false; code: string };

/**
 * Where several refusals apply, the contract leaves open which is told. A field that is `undefined` is left open too, but
 * for `countVersion`, which must rise as the state says.
 */
export type Expected = { ok: true; data: Data } | { ok: false; codes: readonly Refusal[] };

interface SignedIds {
  retired: readonly number[];
  /** What stood when the keys were wiped. It is neither stored nor retired: it may come back, as the same key only. */
  wiped: Key | null;
}

export interface KeyState {
  identity: string | null;
  registrationId: number | null;
  signed: Readonly<Record<Kind, Key | null>>;
  /** Unclaimed one-time prekeys, oldest upload first. */
  pools: Readonly<Record<Kind, readonly Key[]>>;
  /** Handed out since this key set began: the contract does not say whether a reset makes them forgotten. */
  handedOut: Readonly<Record<Kind, readonly number[]>>;
  /**
   * What each (claimer, claimId) was answered under this key set. The contract keeps answers until the identity is
   * replaced; after a reset there is nothing left to answer with, and the same identity begins anew.
   */
  claims: Readonly<Record<string, Data>>;
  /** Ids handed out or withdrawn, ever, in rising order; by identity and kind. */
  used: Readonly<Record<string, readonly number[]>>;
  signedIds: Readonly<Record<string, SignedIds>>;
  /** Each change raises it by one. The contract says no more than that it rises, but every change answers it. */
  keyVersion: number;
  /**
   * It rises with every change of the pools, the contract does not say by how much: where it was not told since, `value`
   * is the least that it can be. `isClaims`: it was last raised by claims, and not told since; the server may carry out
   * several claims as one change, and nobody can have seen it between them.
   */
  countVersion: { value: number; isTold: boolean; isClaims: boolean };
}

export interface KeyModelLimits {
  poolMax: number;
  lowThreshold: number;
}

export const NO_KEYS: KeyState = {
  identity: null,
  registrationId: null,
  signed: { ec: null, pq: null },
  pools: { ec: [], pq: [] },
  handedOut: { ec: [], pq: [] },
  claims: {},
  used: {},
  signedIds: {},
  keyVersion: 0,
  countVersion: { value: 0, isTold: true, isClaims: false },
};

/** Carries out one request. */
export function step(
  state: KeyState,
  request: KeyRequest,
  limits: KeyModelLimits,
): { state: KeyState; answer: Expected } {
  switch (request.name) {
    case 'uploadKeys':
      return upload(state, request, limits);
    case 'addPreKeys':
      return add(state, request, limits);
    case 'withdrawPreKeys':
      return withdraw(state, request);
    case 'rotateSignedPreKey':
      return rotate(state, request);
    case 'resetKeys':
      return reset(state, request);
    case 'keyStatus':
      return told(state, {
        identityKey: state.identity,
        signedPreKeyId: state.signed.ec?.keyId ?? null,
        pqLastResortPreKeyId: state.signed.pq?.keyId ?? null,
        preKeyCount: state.pools.ec.length,
        pqPreKeyCount: state.pools.pq.length,
        keyVersion: state.keyVersion,
        countVersion: undefined,
        // The time itself is the server's clock's.
        expires: state.signed.ec !== null,
      });
    case 'keyStats':
      return told(state, {
        totalPreKeys: state.pools.ec.length + state.handedOut.ec.length,
        availablePreKeys: state.pools.ec.length,
        consumedPreKeys: state.handedOut.ec.length,
      });
    case 'checkPreKeys':
      return told(state, { needsMorePreKeys: needsMore(state, limits), ...counts(state) });
    case 'validateKeys':
      return validate(state, request);
    case 'requestBundle':
      return claim(state, request);
    case 'listDevices':
      return state.identity === null
        ? refused(state, ['USER_NOT_FOUND'])
        : told(state, { registrationId: state.registrationId });
  }
}

/**
 * @param answer null where none came: then nothing contradicts
 * @returns the state after it; null where the request can't have been answered so in this state
 */
export function explain(
  state: KeyState,
  request: KeyRequest,
  answer: KeyAnswer | null,
  limits: KeyModelLimits,
): KeyState | null {
  const outcome = step(state, request, limits);
  const { answer: expected } = outcome;
  if (answer === null) return outcome.state;
  if (!expected.ok) {
    return !answer.ok && (expected.codes as readonly string[]).includes(answer.code) ? outcome.state : null;
  }
  if (!answer.ok) return null;
  for (const [field, value] of Object.entries(expected.data)) {
    if (value !== undefined && !isSame(value, answer.data[field])) return null;
  }
  if (!('countVersion' in expected.data)) return outcome.state;
  const { countVersion } = answer.data;
  if (typeof countVersion !== 'number') return null;
  const { value, isTold } = outcome.state.countVersion;
  if (isTold ? countVersion !== value : countVersion < value) return null;
  return { ...outcome.state, countVersion: { value: countVersion, isTold: true, isClaims: false } };
}

/** The same for two states that nothing can tell apart. */
export function fingerprint(state: KeyState): string {
  return JSON.stringify({
    ...state,
    claims: sortedByName(state.claims),
    used: sortedByName(state.used),
    signedIds: sortedByName(state.signedIds),
  });
}

type RequestNamed<Name extends KeyRequest['name']> = Extract<KeyRequest, { name: Name }>;
type Outcome = ReturnType<typeof step>;

function upload(state: KeyState, request: RequestNamed<'uploadKeys'>, limits: KeyModelLimits): Outcome {
  const { identity, registrationId, signedPreKey, lastResort, oneTime, ifKeyVersion } = request;
  const isStored = state.identity === identity;
  const before = isStored || state.identity === null ? state : wiped(state);
  const places = [
    placeOf(before, 'ec', identity, signedPreKey),
    lastResort === null ? 'stands' : placeOf(before, 'pq', identity, lastResort),
  ];
  const changes =
    !isStored || registrationId !== state.registrationId || places.some((place) => place !== 'stands');
  const refusals: Refusal[] = [];
  if (state.identity !== null && !isStored && !request.replaceIdentity) refusals.push('IDENTITY_MISMATCH');
  if (changes && isLate(state, ifKeyVersion)) refusals.push('KEYS_OUT_OF_SYNC');
  if (places.includes('conflict')) refusals.push('PREKEY_CONFLICT');
  if (oneTime.pq.length > 0 && lastResort === null && before.signed.pq === null) refusals.push('BAD_REQUEST');
  if (refusals.length > 0) return refused(state, refusals);

  let after: KeyState = { ...before, identity, registrationId };
  after = activated(after, 'ec', signedPreKey);
  if (lastResort !== null) after = activated(after, 'pq', lastResort);
  if (changes) after = { ...after, keyVersion: state.keyVersion + 1 };
  return pooled(after, oneTime, limits);
}

function add(state: KeyState, { oneTime }: RequestNamed<'addPreKeys'>, limits: KeyModelLimits): Outcome {
  if (state.identity === null) return refused(state, ['KEYS_NOT_UPLOADED']);
  const refusals: Refusal[] = [];
  if (oneTime.pq.some((key) => key.identity !== state.identity)) refusals.push('SIGNATURE_INVALID');
  if (oneTime.pq.length > 0 && state.signed.pq === null) refusals.push('BAD_REQUEST');
  return refusals.length > 0 ? refused(state, refusals) : pooled(state, oneTime, limits);
}

function withdraw(state: KeyState, { ids }: RequestNamed<'withdrawPreKeys'>): Outcome {
  // Without an identity there is nothing that they could be ids of.
  if (state.identity === null) return told(state, { withdrawnCount: 0, ...counts(state) });
  const isNamed = (kind: Kind) => (key: Key) => ids[kind].includes(key.keyId);
  const withdrawnCount =
    state.pools.ec.filter(isNamed('ec')).length + state.pools.pq.filter(isNamed('pq')).length;
  let after: KeyState = {
    ...state,
    pools: {
      ec: state.pools.ec.filter((key) => !isNamed('ec')(key)),
      pq: state.pools.pq.filter((key) => !isNamed('pq')(key)),
    },
  };
  after = withUsed(withUsed(after, 'ec', ids.ec), 'pq', ids.pq);
  if (withdrawnCount > 0) after = counted(after);
  return told(after, { withdrawnCount, ...counts(after) });
}

function rotate(state: KeyState, request: RequestNamed<'rotateSignedPreKey'>): Outcome {
  const { identity } = state;
  if (identity === null) return refused(state, ['KEYS_NOT_UPLOADED']);
  const { signedPreKey, lastResort } = request;
  const refusals: Refusal[] = [];
  if ([signedPreKey, lastResort].some((key) => key !== null && key.identity !== identity)) {
    refusals.push('SIGNATURE_INVALID');
  }
  const places = [
    signedPreKey === null ? 'stands' : placeOf(state, 'ec', identity, signedPreKey),
    lastResort === null ? 'stands' : placeOf(state, 'pq', identity, lastResort),
  ];
  const changes = places.some((place) => place !== 'stands');
  if (changes && isLate(state, request.ifKeyVersion)) refusals.push('KEYS_OUT_OF_SYNC');
  if (places.includes('conflict')) refusals.push('PREKEY_CONFLICT');
  if (refusals.length > 0) return refused(state, refusals);
  let after = state;
  if (signedPreKey !== null) after = activated(after, 'ec', signedPreKey);
  if (lastResort !== null) after = activated(after, 'pq', lastResort);
  if (changes) after = { ...after, keyVersion: after.keyVersion + 1 };
  return told(after, { keyVersion: after.keyVersion });
}

function reset(state: KeyState, { ifKeyVersion }: RequestNamed<'resetKeys'>): Outcome {
  if (state.identity === null) return told(state, { keyVersion: state.keyVersion });
  if (isLate(state, ifKeyVersion)) return refused(state, ['KEYS_OUT_OF_SYNC']);
  const after = { ...wiped(state), keyVersion: state.keyVersion + 1 };
  return told(after, { keyVersion: after.keyVersion });
}

function validate(state: KeyState, request: RequestNamed<'validateKeys'>): Outcome {
  const { identity, ids } = request;
  const isStored = state.identity === identity;
  const missing: string[] = [];
  const isRegistered = request.registrationId === null || request.registrationId === state.registrationId;
  if (!isStored || !isRegistered) missing.push('identity');
  const isSigned =
    state.signed.ec?.keyId === request.signedPreKeyId &&
    (request.signedPreKeyName === null || request.signedPreKeyName === state.signed.ec.name);
  if (!isSigned) missing.push('signedPreKey');
  if (request.lastResortId !== null && request.lastResortId !== state.signed.pq?.keyId) {
    missing.push('pqLastResortPreKey');
  }
  // Nothing is restored here: whoever is told of it was answered from older keys than it had been told of before.
  const { value, isTold } = state.countVersion;
  if (state.keyVersion < request.lastKeyVersion || (isTold && value < request.lastCountVersion)) {
    missing.push('rolledBack');
  }
  const after = isTold
    ? state
    : { ...state, countVersion: { ...state.countVersion, value: Math.max(value, request.lastCountVersion) } };
  return told(after, {
    keysValid: missing.length === 0,
    missingKeys: missing.sort(),
    ...compared(state, 'ec', request),
    ...(ids === null
      ? { pqPreKeyIdsToDelete: [], pqPreKeyIdsToUpload: [], pqPreKeyIdsNotHeld: [] }
      : compared(state, 'pq', request)),
    rotationDue: false,
    keyVersion: state.keyVersion,
    countVersion: undefined,
    isProven: missing.length === 0,
  });
}

/** Lists in rising order: the contract leaves it open. */
function compared(state: KeyState, kind: Kind, { identity, ids }: RequestNamed<'validateKeys'>): Data {
  const isStored = state.identity === identity;
  const [toDelete, toUpload, notHeld] =
    kind === 'ec'
      ? ['preKeyIdsToDelete', 'preKeyIdsToUpload', 'preKeyIdsNotHeld']
      : ['pqPreKeyIdsToDelete', 'pqPreKeyIdsToUpload', 'pqPreKeyIdsNotHeld'];
  if (ids === null) {
    const handedOut = isStored ? sorted(state.handedOut[kind]) : [];
    return { [toDelete!]: handedOut, [toUpload!]: [], [notHeld!]: [] };
  }
  const offered = isStored ? state.pools[kind].map((key) => key.keyId) : [];
  const used = state.used[`${identity} ${kind}`] ?? [];
  return {
    // The contract speaks of those handed out; one that was withdrawn must not be offered again either.
    [toDelete!]: sorted(ids[kind].filter((id) => used.includes(id))),
    [toUpload!]: sorted(ids[kind].filter((id) => !used.includes(id) && !offered.includes(id))),
    [notHeld!]: sorted(offered.filter((id) => !ids[kind].includes(id))),
  };
}

function claim(state: KeyState, { claimer, claimId }: RequestNamed<'requestBundle'>): Outcome {
  if (state.identity === null) return refused(state, ['USER_NOT_FOUND']);
  const record = `${claimer} ${claimId}`;
  const before = state.claims[record];
  if (before !== undefined) return told(state, before);
  const [ec = null, ...ecLeft] = state.pools.ec;
  const [pq = null, ...pqLeft] = state.pools.pq;
  const bundle = {
    registrationId: state.registrationId,
    identityKey: state.identity,
    signedPreKey: state.signed.ec!.name,
    oneTimePreKey: ec?.name ?? null,
    oneTimePreKeyAbsent: ec === null ? 'noneLeft' : null,
    pqPreKey: (pq ?? state.signed.pq)?.name ?? null,
    isLastResort: pq === null && state.signed.pq !== null,
  };
  let after: KeyState = {
    ...state,
    pools: { ec: ecLeft, pq: pqLeft },
    claims: { ...state.claims, [record]: bundle },
  };
  if (ec !== null) after = withHandedOut(after, 'ec', ec.keyId);
  if (pq !== null) after = withHandedOut(after, 'pq', pq.keyId);
  if ((ec !== null || pq !== null) && !state.countVersion.isClaims) {
    const { countVersion } = counted(after);
    after = { ...after, countVersion: { ...countVersion, isClaims: true } };
  }
  return told(after, bundle);
}

/** One bad key never sinks the batch. */
function pooled(
  state: KeyState,
  oneTime: Readonly<Record<Kind, readonly Key[]>>,
  { poolMax }: KeyModelLimits,
): Outcome {
  let after = state;
  const verdicts = { ec: verdictOf('ec'), pq: verdictOf('pq') };
  if (verdicts.ec.stored + verdicts.pq.stored > 0) after = counted(after);
  return told(after, {
    keyVersion: after.keyVersion,
    oneTimePreKeys: verdicts.ec,
    pqOneTimePreKeys: verdicts.pq,
    ...counts(after),
  });

  function verdictOf(kind: Kind) {
    const verdict = { stored: 0, unchanged: 0, conflicts: [] as { keyId: number; reason: string }[] };
    for (const key of oneTime[kind]) {
      const pool = after.pools[kind];
      const { keyId } = key;
      const same = pool.find((one) => one.keyId === keyId);
      if (after.used[`${after.identity} ${kind}`]?.includes(keyId)) {
        verdict.conflicts.push({ keyId, reason: 'alreadyClaimed' });
      } else if (same?.name === key.name) verdict.unchanged += 1;
      else if (same !== undefined) verdict.conflicts.push({ keyId, reason: 'idTaken' });
      else if (pool.length >= poolMax) verdict.conflicts.push({ keyId, reason: 'poolFull' });
      else {
        verdict.stored += 1;
        after = { ...after, pools: { ...after.pools, [kind]: [...pool, key] } };
      }
    }
    return verdict;
  }
}

/** Nothing is left but the versions and the ids that were used. */
function wiped(state: KeyState): KeyState {
  let { signedIds } = state;
  for (const kind of ['ec', 'pq'] as const) {
    const active = state.signed[kind];
    if (active === null) continue;
    const name = `${state.identity} ${kind}`;
    const { retired, wiped: earlier } = signedIds[name] ?? { retired: [], wiped: null };
    const isReplaced = earlier !== null && earlier.keyId !== active.keyId;
    signedIds = {
      ...signedIds,
      [name]: { retired: isReplaced ? withId(retired, earlier.keyId) : retired, wiped: active },
    };
  }
  return {
    ...NO_KEYS,
    used: state.used,
    signedIds,
    keyVersion: state.keyVersion,
    // Where the pools were empty already, the contract leaves open whether it rises.
    countVersion: {
      value: state.countVersion.value + Math.sign(state.pools.ec.length + state.pools.pq.length),
      ...{ isTold: false, isClaims: false },
    },
  };
}

function placeOf(state: KeyState, kind: Kind, identity: string, key: Key): 'stands' | 'new' | 'conflict' {
  const active = state.signed[kind];
  if (active?.keyId === key.keyId) return active.name === key.name ? 'stands' : 'conflict';
  const ids = state.signedIds[`${identity} ${kind}`];
  if (ids?.retired.includes(key.keyId)) return 'conflict';
  if (ids?.wiped?.keyId === key.keyId) return ids.wiped.name === key.name ? 'new' : 'conflict';
  return 'new';
}

/** Makes `key` the active one; the one before it is retired. */
function activated(state: KeyState, kind: Kind, key: Key): KeyState {
  const active = state.signed[kind];
  if (active?.keyId === key.keyId) return state;
  const name = `${state.identity} ${kind}`;
  const { retired, wiped: earlier } = state.signedIds[name] ?? { retired: [], wiped: null };
  return {
    ...state,
    signed: { ...state.signed, [kind]: key },
    signedIds:
      active === null
        ? state.signedIds
        : { ...state.signedIds, [name]: { retired: withId(retired, active.keyId), wiped: earlier } },
  };
}

function withHandedOut(state: KeyState, kind: Kind, keyId: number): KeyState {
  const handedOut = { ...state.handedOut, [kind]: withId(state.handedOut[kind], keyId) };
  return withUsed({ ...state, handedOut }, kind, [keyId]);
}

function withUsed(state: KeyState, kind: Kind, keyIds: readonly number[]): KeyState {
  if (keyIds.length === 0) return state;
  const name = `${state.identity} ${kind}`;
  return { ...state, used: { ...state.used, [name]: keyIds.reduce(withId, state.used[name] ?? []) } };
}

function withId(list: readonly number[], keyId: number): readonly number[] {
  return list.includes(keyId) ? list : sorted([...list, keyId]);
}

function counted(state: KeyState): KeyState {
  const { value } = state.countVersion;
  return { ...state, countVersion: { value: value + 1, isTold: false, isClaims: false } };
}

function isLate(state: KeyState, ifKeyVersion: number | null): boolean {
  return ifKeyVersion !== null && ifKeyVersion < state.keyVersion;
}

/** Where only the PQ pool is low the contract leaves it open. */
function needsMore({ pools }: KeyState, { lowThreshold }: KeyModelLimits): boolean | undefined {
  if (pools.ec.length < lowThreshold) return true;
  return pools.pq.length < lowThreshold ? undefined : false;
}

function counts({ pools }: KeyState): Data {
  return {
    availableCount: pools.ec.length,
    pqAvailableCount: pools.pq.length,
    countVersion: undefined,
  };
}

function told(state: KeyState, data: Data): Outcome {
  return { state, answer: { ok: true, data } };
}

function refused(state: KeyState, codes: readonly Refusal[]): Outcome {
  return { state, answer: { ok: false, codes } };
}

function isSame(one: unknown, other: unknown): boolean {
  return JSON.stringify(one) === JSON.stringify(other);
}

function sorted(list: readonly number[]): readonly number[] {
  return [...list].sort((a, b) => a - b);
}

function sortedByName<Value>(record: Readonly<Record<string, Value>>): [string, Value][] {
  return Object.entries(record).sort(([a], [b]) => (a < b ? -1 : 1));
}
