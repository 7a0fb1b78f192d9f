/** The thread that signatures are checked on: see `signature-checks.ts`, which starts it. */
import { parentPort } from 'node:worker_threads';
import { verifyingKeyOf, verifySignature } from './signature.ts';
import type { Answer, Question, Signed, Signer, Verdicts } from './signature-checks.ts';

/** Signatures that are checked between two looks at what else is asked: a millisecond of them. */
const TURN_SIGNATURES_MAX = 8;

parentPort!.on('message', async ({ id, signer, signed }: Question) => {
  const answer: Answer = { id, verdicts: await verdictsOf(signer, signed) };
  parentPort!.postMessage(answer);
});

/** All questions take turns, so that a large one keeps no small one waiting long. */
async function verdictsOf(signer: Signer, signed: readonly Signed[]): Promise<Verdicts> {
  const key = verifyingKeyOf(signer);
  if (key === null) return null;
  const verdicts: boolean[] = [];
  for (let start = 0; start < signed.length; start += TURN_SIGNATURES_MAX) {
    if (start > 0) await new Promise((resolve) => setImmediate(resolve));
    for (const { message, signature } of signed.slice(start, start + TURN_SIGNATURES_MAX)) {
      verdicts.push(verifySignature(key, message, signature));
    }
  }
  return verdicts;
}
