/** The device's keys against the gateway's identity, and the one reset that a systemic fault leads to. */
import type { MissingKey } from '../protocol/events.ts';
import { REASON_LENGTH_MAX } from '../protocol/limits.ts';
import { inspectLocalKeys, type KeyVerdict, type LocalFault, type LocalFindings } from './check-keys.ts';
import type { Link } from './connection.ts';
import type { DeviceKeys } from './device-keys.ts';
import { isOutOfStep, KitError } from './errors.ts';
import type { KeySync } from './key-sync.ts';
import type { Metrics } from './metrics.ts';
import type { Notebook } from './storage.ts';
import type { KitClock } from './time.ts';

export interface KeyCheckParts {
  link: Link;
  keys: DeviceKeys;
  clock: KitClock;
  metrics: Metrics;
  notebook: Notebook;
  sync: Pick<KeySync, 'uploadKeySet' | 'replaceBroken'>;
  /** Whether the user wants this device's keys in place of whatever the gateway holds. */
  isSetUpAskedFor(): boolean;
  /** A check found that there is no key set, or that it is lost. */
  onNeedsSetup(): void;
  /** The keys are gone, here and on the gateway: what was proven of them counts no more. */
  onReset(): void;
}

/** `check` and `reset` must not overlap with anything that changes keys. */
export interface KeyCheck {
  /** Looks here and, where there is a connection, on the gateway; resets both where that is due. */
  check(): Promise<KeyVerdict>;
  /** The check that runs now. */
  underWay(): Promise<KeyVerdict> | null;
  /** The verdict of the local keys alone. It changes nothing. */
  checkLocally(): Promise<KeyVerdict>;
  /** What is wrong with the local key set, and stays so for more than a moment. */
  lastingFault(): Promise<LocalFault | null>;
  /** Resets the gateway first, so that a crash in between leaves a fault that is found again. */
  reset(reason: string): Promise<void>;
}

/** Looks at keys that can't be read before they are given up, which can't be undone. */
const LOOKS_MAX = 3;
const LOOK_PAUSE_MS = 1_000;
/** Times that a reset is asked for while the gateway's keys change. */
const RESET_ROUNDS_MAX = 5;

export function createKeyCheck(parts: KeyCheckParts): KeyCheck {
  const { link, keys, clock, metrics, notebook, sync } = parts;
  let running: Promise<KeyVerdict> | null = null;

  async function checkOnce(): Promise<KeyVerdict> {
    const first = await inspectLocalKeys(keys);
    if (link.state() !== 'online') return localVerdict(first);
    const local = await lookedAtAgain(first);
    if (local.fault !== null) {
      const { missing, reason, fresh } = local.fault;
      if (!fresh) await reset(reason);
      return needsSetup(missing, reason);
    }
    const status = await link.call('keyStatus', {}, { own: true, once: true }).catch((error: unknown) => {
      if (error instanceof KitError && error.code === 'UNANSWERED') return null;
      throw error;
    });
    if (status === null) return localVerdict(local);
    if (status.identityKey === null) {
      await sync.replaceBroken(local.broken, { upload: false });
      return mayBeMended(['identity', 'signedPreKey'], 'the gateway has no keys of this device');
    }
    if (!(await isOwnIdentity(status.identityKey))) {
      const reason = 'the gateway has another identity key';
      if (!parts.isSetUpAskedFor()) {
        await reset(reason);
        return needsSetup('identity', reason);
      }
      // A set-up that failed made these keys and did not upload them: who asks for one again wants them in place.
      await sync.uploadKeySet({ replaceIdentity: true });
      await sync.replaceBroken(local.broken, { upload: true });
      return mayBeMended(['identity'], reason);
    }
    await sync.replaceBroken(local.broken, { upload: true });
    const missing: MissingKey[] = [];
    if ((await keys.signedPreKey.read())?.keyId !== status.signedPreKeyId) missing.push('signedPreKey');
    const lastResort = await keys.pqLastResortPreKey?.read();
    if (lastResort && lastResort.keyId !== status.pqLastResortPreKeyId) missing.push('pqLastResortPreKey');
    return mayBeMended(
      missing,
      missing.length === 0 ? null : `the gateway has another ${missing.join(' and ')}`,
    );
  }

  function needsSetup(missing: MissingKey, reason: string): KeyVerdict {
    parts.onNeedsSetup();
    return { needsSetup: true, missingKeys: [missing], reason, offline: false };
  }

  /** A store that was busy for a moment must not cost the device its keys. */
  async function lookedAtAgain(first: LocalFindings): Promise<LocalFindings> {
    let found = first;
    for (let look = 1; found.fault !== null && !found.fault.fresh && look < LOOKS_MAX; look++) {
      await new Promise<void>((resolve) => clock.after(LOOK_PAUSE_MS, resolve));
      found = await inspectLocalKeys(keys);
    }
    return found;
  }

  async function isOwnIdentity(identityKey: string): Promise<boolean> {
    const identity = await keys.identity();
    return identity !== null && isSameKey(identityKey, identity.identityKey);
  }

  async function reset(reason: string): Promise<void> {
    const before = await link.call('keyStatus', {}, { own: true });
    let ifKeyVersion = before.keyVersion;
    for (let round = 1; ; round++) {
      // With the version, so that a late repeat can't wipe what was uploaded since.
      const input = { reason: reason.slice(0, REASON_LENGTH_MAX), ifKeyVersion };
      try {
        await link.call('resetKeys', input, { own: true });
        break;
      } catch (error) {
        if (!isOutOfStep(error) || round >= RESET_ROUNDS_MAX) throw error;
        const now = await link.call('keyStatus', {}, { own: true });
        // What was to be wiped is gone, and somebody has set this device up anew.
        if (now.identityKey !== before.identityKey) break;
        ifKeyVersion = now.keyVersion;
      }
    }
    await keys.reset();
    parts.onReset();
    Object.assign(notebook.memory, { offered: { ec: {}, pq: {} }, replaced: { ec: {}, pq: {} } });
    await notebook.save();
    metrics.resets.push({ reason, atMs: clock.nowMs() });
  }

  return {
    check() {
      running ??= checkOnce().finally(() => {
        running = null;
      });
      return running;
    },
    underWay: () => running,
    checkLocally: async () => localVerdict(await inspectLocalKeys(keys)),
    lastingFault: async () => (await lookedAtAgain(await inspectLocalKeys(keys))).fault,
    reset,
  };
}

function mayBeMended(missingKeys: MissingKey[], reason: string | null): KeyVerdict {
  return { needsSetup: false, missingKeys, reason, offline: false };
}

function localVerdict({ fault }: LocalFindings): KeyVerdict {
  return {
    needsSetup: fault !== null,
    missingKeys: fault === null ? [] : [fault.missing],
    reason: fault?.reason ?? null,
    offline: true,
  };
}

/** An EC key may come with its type byte or without. */
function isSameKey(one: string, other: string): boolean {
  const bare = (key: string): string => {
    const bytes = atob(key);
    return bytes.length === 33 ? bytes.slice(1) : bytes;
  };
  return bare(one) === bare(other);
}
