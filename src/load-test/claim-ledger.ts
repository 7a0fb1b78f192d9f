/** The books of claims: no one-time prekey may be handed out twice. Knows no socket and no clock. */
import type { DeviceBundle } from '../protocol/keys.ts';

export interface ClaimCounts {
  /** Bundles with a one-time prekey. */
  withOneTimePreKey: number;
  /** Bundles without, since the target had none left. */
  noneLeft: number;
  /** Bundles without, since the limit that protects the target was reached. */
  limited: number;
  /** Handed out to a second claim. */
  handedOutTwice: number;
}

export class ClaimLedger {
  readonly #handedOut = new Map<string, Set<number>>();
  readonly #counts: ClaimCounts = { withOneTimePreKey: 0, noneLeft: 0, limited: 0, handedOutTwice: 0 };

  /** @param claim.target names the device whose bundle it is; each claim is told once, its repeats are not */
  claimed(claim: { target: string; bundle: DeviceBundle }): void {
    const { oneTimePreKey, oneTimePreKeyAbsent } = claim.bundle;
    if (oneTimePreKey === null) {
      this.#counts[oneTimePreKeyAbsent === 'limited' ? 'limited' : 'noneLeft'] += 1;
      return;
    }
    this.#counts.withOneTimePreKey += 1;
    let keyIds = this.#handedOut.get(claim.target);
    if (keyIds === undefined) {
      keyIds = new Set();
      this.#handedOut.set(claim.target, keyIds);
    }
    if (keyIds.has(oneTimePreKey.keyId)) this.#counts.handedOutTwice += 1;
    keyIds.add(oneTimePreKey.keyId);
  }

  counts(): ClaimCounts {
    return { ...this.#counts };
  }
}
