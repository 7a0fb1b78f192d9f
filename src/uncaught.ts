/** What becomes of an exception that nobody caught: it ends the process, unless it is known to do no harm. */

/** Says whether it knows the fault, and has dealt with it. */
export type FaultJudge = (error: unknown) => boolean;

const judges = new Set<FaultJudge>();

/**
 * Lets the process live through the faults that `judge` knows. For faults of a library that surface where no caller
 * can catch them.
 *
 * @returns takes the judge away again
 */
export function surviveFaults(judge: FaultJudge): () => void {
  judges.add(judge);
  return () => judges.delete(judge);
}

/** From here on, an exception that nobody caught is told and ends the process with 1; so does a rejection. */
export function endOnUncaught(tell: (error: Error) => void): void {
  process.on('uncaughtException', (error: unknown) => {
    if ([...judges].some((judge) => judge(error))) return;
    try {
      tell(error instanceof Error ? error : new Error(String(error)));
    } finally {
      process.exit(1);
    }
  });
}
