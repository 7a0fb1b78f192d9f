/** Counts since the client was made, for a screen or a report. */
export interface Metrics {
  identityRegenerations: number;
  signedPreKeyRotations: number;
  /** One-time prekeys made after the first set of an identity, and taken by the gateway. */
  preKeysRegenerated: number;
  /** Messages that the application reported as undecryptable, each time that it did. */
  decryptionFailures: number;
  resets: { reason: string; atMs: number }[];
  reconnects: number;
  duplicatesDropped: number;
}

export function newMetrics(): Metrics {
  return {
    identityRegenerations: 0,
    signedPreKeyRotations: 0,
    preKeysRegenerated: 0,
    decryptionFailures: 0,
    resets: [],
    reconnects: 0,
    duplicatesDropped: 0,
  };
}
