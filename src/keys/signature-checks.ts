/**
 * Signatures are checked on a thread of their own. Of a full upload that is 11 ms, which nobody else on the event loop
 * waits for; on node's own pool each signature would be a job, and to wake a thread for it takes this one as long as the
 * job takes that one.
 */
import { Worker } from 'node:worker_threads';
import { steadyClock } from '../lib/clock.ts';
import { createSlots, NoSlotError } from '../lib/slots.ts';
import { GatewayError } from '../protocol/errors.ts';

export interface Signer {
  identityKey: Uint8Array;
  identityKeyEd25519: Uint8Array | null;
}

export interface Signed {
  message: Uint8Array;
  signature: Uint8Array;
}

/** Whether each is the signer's, in order; null where the signer's keys themselves are unusable. */
export type Verdicts = boolean[] | null;

export interface Question {
  id: number;
  signer: Signer;
  signed: readonly Signed[];
}

export interface Answer {
  id: number;
  verdicts: Verdicts;
}

/** The built one, also from `src`: a thread is not given the loader that reads TypeScript. */
const THREAD_FILE = new URL('../../dist/keys/signature-thread.js', import.meta.url);

interface Asker {
  resolve(verdicts: Verdicts): void;
  reject(error: Error): void;
}

interface CheckThread {
  worker: Worker;
  askers: Map<number, Asker>;
}

/** One for the process, from the first question on: it does what the event loop can ask for. */
let running: CheckThread | null = null;
let lastId = 0;

/** What is no longer than this is asked at once: it weighs little, and need not wait until large ones are done. */
const SMALL_MAX = 8;
/** The thread is given copies, and takes its turns among all that it has: of large ones so many. */
const large = createSlots({ clock: steadyClock, slotCount: 32, waitingMax: 10_000, waitMaxMs: 30_000 });

/**
 * Checks what `signer` is said to have signed, by its Ed25519 key where it has one, else by XEdDSA.
 *
 * @throws GatewayError UNAVAILABLE where too many wait; Error where the thread has ended, which is a fault of ours, and
 *   the next question starts another
 */
export async function checkSignatures(signer: Signer, signed: readonly Signed[]): Promise<Verdicts> {
  if (signed.length <= SMALL_MAX) return await ask(signer, signed);
  try {
    return await large.run(() => ask(signer, signed));
  } catch (error) {
    if (!(error instanceof NoSlotError)) throw error;
    throw new GatewayError('UNAVAILABLE', undefined, { retryAfterMs: 1_000, cause: error });
  }
}

async function ask(signer: Signer, signed: readonly Signed[]): Promise<Verdicts> {
  running ??= startThread();
  const { worker, askers } = running;
  const question: Question = { id: ++lastId, signer, signed };
  return await new Promise((resolve, reject) => {
    worker.postMessage(question);
    askers.set(question.id, { resolve, reject });
    worker.ref();
  });
}

function startThread(): CheckThread {
  const worker = new Worker(THREAD_FILE, { name: 'signatures' });
  const thread: CheckThread = { worker, askers: new Map() };
  const { askers } = thread;
  worker.on('message', ({ id, verdicts }: Answer) => {
    askers.get(id)?.resolve(verdicts);
    askers.delete(id);
    // Idle, it does not keep the process alive.
    if (askers.size === 0) worker.unref();
  });
  let cause: unknown;
  worker.on('error', (error) => {
    cause = error;
  });
  // An answer that can't be read is of somebody, nobody knows whom.
  worker.on('messageerror', (error) => {
    cause = error;
    void worker.terminate();
  });
  worker.on('exit', () => {
    if (running === thread) running = null;
    for (const { reject } of askers.values()) {
      reject(new Error('the thread that checks signatures has ended', { cause }));
    }
  });
  return thread;
}
