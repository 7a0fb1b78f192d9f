const CAUSES_MAX = 4;

/** One line: the message and what lies behind it, without statements, whose parameters are nobody's business. */
export function reasonOf(error: unknown): string {
  const reasons: string[] = [];
  let at = error;
  for (let depth = 0; at instanceof Error && depth < CAUSES_MAX; depth++) {
    const code = 'code' in at ? String(at.code) : at.name;
    const message = at.message.replace(/\s*\n\s*/g, ' ') || code;
    const isTold = reasons.some((reason) => reason.includes(message));
    if (!message.startsWith('Failed query') && !isTold) reasons.push(message);
    at = at.cause;
  }
  return reasons.join(': ') || 'failed for an unknown reason';
}
