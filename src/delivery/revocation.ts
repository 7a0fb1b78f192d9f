/** Whether a token still speaks for its device. */

/** What a revocation looks at. */
export interface TokenAge {
  /** Null where the token does not say. */
  issuedAtMs: number | null;
}

/**
 * A revocation ends every token that was issued at or before it, and those that don't say when they were: tokens count
 * whole seconds, so one of the very second of the revocation is ended too.
 */
export function isRevoked({ issuedAtMs }: TokenAge, revokedAtMs: number | null): boolean {
  return revokedAtMs !== null && (issuedAtMs === null || issuedAtMs <= revokedAtMs);
}
