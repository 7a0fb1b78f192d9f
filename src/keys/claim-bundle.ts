/**
 * Bundles: each claims at most one one-time prekey of each kind, exactly once, however often it is asked again.
 * Requests gather into one statement while the last one is under way.
 */
import type { Clock } from '../lib/clock.ts';
import { createGatherer, type Gatherer, type Line } from '../lib/gather.ts';
import { createSlots, NoSlotError } from '../lib/slots.ts';
import type { ClaimedBundle, ClaimRequest, KeyStore } from '../ports/key-store.ts';
import type { DeviceLocks, HeldLocks } from '../ports/lock.ts';
import { GatewayError } from '../protocol/errors.ts';
import type { ParsedInput, RequestData } from '../protocol/events.ts';
import { addressKey, type DeviceAddress } from '../protocol/ids.ts';
import type { DeviceBundle } from '../protocol/keys.ts';

export interface BundleClaims {
  /**
   * @returns the bundle of the device, or of every device of the user but the caller, sorted by device id; the same
   *   for a repeated `claimId`
   * @param how.isTargetSpared whether to spend no one-time prekey; a repetition gets the first answer nevertheless
   * @throws GatewayError USER_NOT_FOUND, DEVICE_NOT_FOUND, UNAVAILABLE; nothing was spent then, or a repetition
   *   gets what was
   */
  claim(
    claimer: DeviceAddress,
    input: ParsedInput<'requestBundle'>,
    how?: { isTargetSpared: boolean },
  ): Promise<RequestData<'requestBundle'>>;
}

export interface BundleClaimsParts {
  store: KeyStore;
  locks: DeviceLocks;
  clock: Clock;
  lowThreshold: number;
  /** Told of devices of which a pool fell below the threshold, or to zero. */
  onRanLow(devices: readonly DeviceAddress[]): void;
}

/**
 * Requests in one statement. Several hundred gather only where so many come within a round trip, which takes longer the
 * further the store is away: then one batch after the other keeps up with them all the same.
 */
const BATCH_MAX = 512;
/** A request for all of a user's devices among them: a handful mostly, and never more than 127. */
const ALL_DEVICES_WEIGHT = 4;
const LINE: Line = { refusal: () => new GatewayError('UNAVAILABLE', undefined, { retryAfterMs: 1_000 }) };
/** Times that a request yields to the holder of its device's lock, a round trip each, before the row's lock alone decides. */
const YIELDS_MAX = 50;
/** Times that a request asks again for a device that is being changed, which mostly ends soon, before it waits for it. */
const RETRIES_MAX = 3;
/** Devices that are waited for at once, on a connection each. */
const WAITED_FOR_MAX = 4;
const WAITED_FOR_LATER_MAX = 1_000;
const LATER_WAIT_MAX_MS = 8_000;

interface Entry {
  request: ClaimRequest;
  /** What the request locks, and its `addressKey`. */
  target: DeviceAddress;
  targetKey: string;
  yields: number;
  retries: number;
}

/** The requests that wait for one device. */
interface WaitingLine {
  gatherer: Gatherer<ClaimRequest, ClaimedBundle[]>;
  length: number;
}

export function createBundleClaims(parts: BundleClaimsParts): BundleClaims {
  const { store, locks, clock, lowThreshold } = parts;
  /** The same request from many sockets at once is asked once. */
  const underWay = new Map<string, { request: ClaimRequest; answer: Promise<ClaimedBundle[]> }>();
  const gatherer = createGatherer<Entry, ClaimedBundle[] | 'yield' | 'wait', HeldLocks>({
    batchMax: BATCH_MAX,
    weight: { of: ({ request }) => weightOf(request), max: BATCH_MAX },
    line: LINE,
    async prepare(entries) {
      const targets = new Map(entries.map(({ target, targetKey }) => [targetKey, target]));
      return await locks.acquire([...targets.values()]);
    },
    run: runBatch,
  });
  /** Requests whose device stays held wait beside the others: each keeps nobody waiting but who asks for the same. */
  const lines = new Map<string, WaitingLine>();
  const waitedFor = createSlots({
    clock,
    slotCount: WAITED_FOR_MAX,
    waitingMax: WAITED_FOR_LATER_MAX,
    waitMaxMs: LATER_WAIT_MAX_MS,
  });

  async function runBatch(
    entries: Entry[],
    lock: HeldLocks,
  ): Promise<(ClaimedBundle[] | 'yield' | 'wait')[]> {
    try {
      const goes = entries.map(({ targetKey, yields }) => lock.held.has(targetKey) || yields >= YIELDS_MAX);
      const requests = entries.filter((_, index) => goes[index]).map((entry) => entry.request);
      const bundles = requests.length === 0 ? [] : await claimAll(requests, false);
      let next = 0;
      return goes.map((went) => (went ? (bundles[next++] ?? 'wait') : 'yield'));
    } finally {
      // The answers need not wait for it: the lock is a courtesy, and expires by itself.
      void lock.release();
    }
  }

  async function claimAll(requests: ClaimRequest[], waits: boolean): Promise<(ClaimedBundle[] | null)[]> {
    const { bundles, ranLow } = await store.claim(requests, { nowMs: clock.nowMs(), lowThreshold, waits });
    if (ranLow.length > 0) parts.onRanLow(ranLow);
    return bundles;
  }

  async function waitInLine({ targetKey, request }: Entry): Promise<ClaimedBundle[]> {
    const line = lines.get(targetKey) ?? {
      gatherer: createGatherer({
        batchMax: BATCH_MAX,
        weight: { of: weightOf, max: BATCH_MAX },
        line: LINE,
        run: claimWaiting,
      }),
      length: 0,
    };
    lines.set(targetKey, line);
    line.length += 1;
    try {
      return await line.gatherer.submit(request);
    } finally {
      line.length -= 1;
      if (line.length === 0) lines.delete(targetKey);
    }
  }

  async function claimWaiting(requests: ClaimRequest[]): Promise<ClaimedBundle[][]> {
    try {
      const bundles = await waitedFor.run(() => claimAll(requests, true));
      return bundles.map((list) => list!);
    } catch (error) {
      if (error instanceof NoSlotError) throw new GatewayError('UNAVAILABLE', error.message);
      throw error;
    }
  }

  async function ask(request: ClaimRequest): Promise<ClaimedBundle[]> {
    // Device 0 exists nowhere: it stands for all devices of a user.
    const target = { userId: request.userId, deviceId: request.deviceId ?? 0 };
    const entry: Entry = { request, target, targetKey: addressKey(target), yields: 0, retries: 0 };
    for (;;) {
      const answer = await gatherer.submit(entry);
      if (answer === 'yield') entry.yields += 1;
      else if (answer !== 'wait') return answer;
      else if (entry.retries === RETRIES_MAX) return await waitInLine(entry);
      else entry.retries += 1;
    }
  }

  async function askOnce(request: ClaimRequest): Promise<ClaimedBundle[]> {
    const { claimId } = request;
    const twin = underWay.get(claimId);
    if (twin !== undefined && isSame(twin.request, request)) return await twin.answer;
    const answer = ask(request);
    // Another's claim under the same id goes its own way.
    if (twin === undefined) underWay.set(claimId, { request, answer });
    try {
      return await answer;
    } finally {
      if (twin === undefined) underWay.delete(claimId);
    }
  }

  return {
    async claim(claimer, input, { isTargetSpared } = { isTargetSpared: false }) {
      const request: ClaimRequest = {
        claimer,
        claimId: input.claimId,
        userId: input.userId,
        deviceId: input.deviceId ?? null,
        isTargetSpared,
      };
      const bundles = await askOnce(request);
      if (bundles.length === 0) await explainAbsence(store, claimer, request);
      return { userId: input.userId, devices: bundles.map(toWire) };
    },
  };
}

function weightOf({ deviceId }: ClaimRequest): number {
  return deviceId === null ? ALL_DEVICES_WEIGHT : 1;
}

function isSame(a: ClaimRequest, b: ClaimRequest): boolean {
  return (
    a.claimId === b.claimId &&
    a.userId === b.userId &&
    a.deviceId === b.deviceId &&
    a.claimer.userId === b.claimer.userId &&
    a.claimer.deviceId === b.claimer.deviceId
  );
}

/** @throws GatewayError unless the user simply has no other device than the caller's */
async function explainAbsence(store: KeyStore, claimer: DeviceAddress, request: ClaimRequest): Promise<void> {
  const devices = await store.devicesOf(request.userId);
  if (devices.length === 0) throw new GatewayError('USER_NOT_FOUND');
  if (request.deviceId !== null) {
    if (devices.some((device) => device.deviceId === request.deviceId)) {
      // Its keys were replaced while they were claimed.
      throw new GatewayError('UNAVAILABLE', 'the device’s keys are changing; try again', {
        retryAfterMs: 100,
      });
    }
    throw new GatewayError('DEVICE_NOT_FOUND');
  }
  const onlyCaller =
    request.userId === claimer.userId && devices.every((device) => device.deviceId === claimer.deviceId);
  if (!onlyCaller) {
    throw new GatewayError('UNAVAILABLE', 'the user’s keys are changing; try again', { retryAfterMs: 100 });
  }
}

function absenceOf({ isTargetSpared }: ClaimedBundle): DeviceBundle['oneTimePreKeyAbsent'] {
  return isTargetSpared ? 'limited' : 'noneLeft';
}

function toWire(bundle: ClaimedBundle): DeviceBundle {
  const { identity, oneTimePreKey } = bundle;
  const { identityKey, identityKeyEd25519 } = identity;
  return {
    deviceId: bundle.deviceId,
    registrationId: bundle.registrationId,
    identityKey,
    ...(identityKeyEd25519 === null ? {} : { identityKeyEd25519 }),
    signedPreKey: bundle.signedPreKey,
    oneTimePreKey,
    ...(oneTimePreKey === null ? { oneTimePreKeyAbsent: absenceOf(bundle) } : {}),
    pqPreKey: bundle.pqPreKey,
  };
}
