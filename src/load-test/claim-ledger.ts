/** The books of claims: no one-time prekey may be handed out twice. Knows no socket and no clock. */
import type { DeviceBundle } from '../protocol/keys.ts';

export interface ClaimCounts {
  /** Bundles with a one-time prekey. */
  withOneTimePreKey: number;
  /** Bundles without, since the target had none left. */
  noneLeft: number;
  /** Bundles without, since the limit that protects the target was reached. */
  limited: number;
  /** Bundles with a one-time PQ prekey, and with the last-resort one in its place. */
  withPqOneTimePreKey: number;
  withPqLastResortPreKey: number;
  /** One-time prekeys of either kind that were handed out to a second claim. */
  handedOutTwice: number;
}

export class ClaimLedger {
  readonly #handedOut = new Map<string, Set<number>>();
  readonly #counts: ClaimCounts = {
    withOneTimePreKey: 0,
    noneLeft: 0,
    limited: 0,
    withPqOneTimePreKey: 0,
    withPqLastResortPreKey: 0,
    handedOutTwice: 0,
  };

  /** @param claim.target names the device whose bundle it is; each claim is told once, its repeats are not */
  claimed({ target, bundle }: { target: string; bundle: DeviceBundle }): void {
    const { oneTimePreKey, oneTimePreKeyAbsent, pqPreKey } = bundle;
    if (oneTimePreKey === null) {
      this.#counts[oneTimePreKeyAbsent === 'limited' ? 'limited' : 'noneLeft'] += 1;
    } else {
      this.#counts.withOneTimePreKey += 1;
      this.#handOut(`${target} ec`, oneTimePreKey.keyId);
    }
    if (pqPreKey?.lastResort) this.#counts.withPqLastResortPreKey += 1;
    else if (pqPreKey != null) {
      this.#counts.withPqOneTimePreKey += 1;
      this.#handOut(`${target} pq`, pqPreKey.keyId);
    }
  }

  counts(): ClaimCounts {
    return { ...this.#counts };
  }

  #handOut(pool: string, keyId: number): void {
    const keyIds = this.#handedOut.get(pool) ?? new Set();
    this.#handedOut.set(pool, keyIds);
    if (keyIds.has(keyId)) this.#counts.handedOutTwice += 1;
    keyIds.add(keyId);
  }
}
