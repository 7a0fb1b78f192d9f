/** One pass over the device's own keys. It only reads; what to do about a fault is the caller's. */
import type { MissingKey } from '../protocol/events.ts';
import type { DeviceKeys, PreKeyPool } from './device-keys.ts';

export interface KeyVerdict {
  /** There is no key set, or it is lost: the application asks its user, then calls `setUp`. */
  needsSetup: boolean;
  missingKeys: MissingKey[];
  /** Why, in plain words; null where all is well. */
  reason: string | null;
  /** The gateway could not be asked: the verdict is of the local keys alone, and nothing was deleted. */
  offline: boolean;
}

export interface LocalFindings {
  /** What is wrong with the key set as a whole; the pass ended there. */
  fault: LocalFault | null;
  /** One-time prekeys that alone can't be read. */
  broken: { ec: number[]; pq: number[] };
}

export interface LocalFault {
  missing: MissingKey;
  reason: string;
  /** There is no key set at all, so that nothing is to be reset. */
  fresh: boolean;
}

/** When one prekey can't be read, so many others tell whether it is this key or all of them. */
const OTHERS_TRIED_MAX = 3;

/** Looks at identity, signed prekeys and one-time prekeys in this order and stops at the first systemic fault. */
export async function inspectLocalKeys(keys: DeviceKeys): Promise<LocalFindings> {
  const broken: LocalFindings['broken'] = { ec: [], pq: [] };
  const fault = (missing: MissingKey, reason: string, fresh = false): LocalFindings => ({
    fault: { missing, reason, fresh },
    broken,
  });

  const identity = await attempt(() => keys.identity());
  if (identity === UNREADABLE) return fault('identity', 'the identity key can’t be read');
  if (identity === null) return fault('identity', 'this device has no keys yet', true);

  for (const name of ['signedPreKey', 'pqLastResortPreKey'] as const) {
    const slot = keys[name];
    if (slot === undefined) continue;
    const key = await attempt(() => slot.read());
    if (key === UNREADABLE) return fault(name, `the ${name} can’t be read`);
    if (key === null) return fault(name, `the ${name} is missing`);
    if ((await attempt(() => slot.isSound())) !== true) {
      return fault(name, `the ${name} is not signed by the identity key, or its private half can’t be read`);
    }
  }

  for (const kind of ['ec', 'pq'] as const) {
    const pool = kind === 'ec' ? keys.oneTimePreKeys : keys.pqOneTimePreKeys;
    if (pool === undefined) continue;
    const found = await brokenIds(pool);
    if (found === 'all') return fault('identity', 'no one-time prekey can be read');
    broken[kind] = found;
  }
  return { fault: null, broken };
}

/** @returns the ids that can't be read, or `'all'` where some others can't be read either */
async function brokenIds(pool: PreKeyPool<unknown>): Promise<number[] | 'all'> {
  const ids = await attempt(() => pool.ids());
  if (ids === UNREADABLE) return 'all';
  const isReadable = async (id: number): Promise<boolean> =>
    (await attempt(() => pool.isReadable(id))) === true;
  const broken: number[] = [];
  for (const id of ids) {
    if (await isReadable(id)) continue;
    if (broken.length === 0) {
      const others = spread(
        ids.filter((other) => other !== id),
        OTHERS_TRIED_MAX,
      );
      // A pool of one tells nothing of the others: the signed prekey could be read.
      if (others.length > 0 && !(await some(others, isReadable))) return 'all';
    }
    broken.push(id);
  }
  return broken;
}

/** Neighbours tend to break together: those that are tried lie apart. */
function spread<Item>(list: readonly Item[], count: number): Item[] {
  if (list.length <= count) return [...list];
  return Array.from(
    { length: count },
    (_, index) => list[Math.round((index * (list.length - 1)) / (count - 1))]!,
  );
}

async function some<Item>(list: readonly Item[], test: (item: Item) => Promise<boolean>): Promise<boolean> {
  for (const item of list) if (await test(item)) return true;
  return false;
}

const UNREADABLE = Symbol('unreadable');

async function attempt<Value>(read: () => Promise<Value>): Promise<Value | typeof UNREADABLE> {
  try {
    return await read();
  } catch {
    return UNREADABLE;
  }
}
