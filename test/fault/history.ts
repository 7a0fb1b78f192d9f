/**
 * What clients asked, were answered, were handed and said, in the order in which one observer saw it. Devices are
 * `addressKey`s; public keys stand for themselves, texts for the ciphertext that they were sent as.
 */

export type Asked =
  | { name: 'upload'; preKeys: readonly string[]; replacesIdentity: boolean }
  | { name: 'rotate' }
  | { name: 'ready' }
  | { name: 'claim'; claimId: string; target: string }
  | { name: 'send'; messageId: string; recipient: string; text: string };

export type Answer =
  | { ok: false; code: string }
  | { ok: true; name: 'upload'; keyVersion: number }
  | { ok: true; name: 'rotate'; keyVersion: number }
  | { ok: true; name: 'ready'; keyVersion: number; pendingCount: number }
  /** `preKey` null is "without", and `absent` says why. */
  | { ok: true; name: 'claim'; preKey: string | null; absent: 'noneLeft' | 'limited' | null }
  | { ok: true; name: 'send' };

export type Envelope =
  | { kind: 'message'; id: string; messageId: string; sender: string; text: string }
  | { kind: 'bounce'; id: string; messageId: string; recipient: string };

export type HistoryEvent =
  /** `connection` is null for what came by HTTP. */
  | { event: 'asked'; request: number; device: string; connection: number | null; asked: Asked }
  | { event: 'answered'; request: number; answer: Answer }
  /** No answer will come: whether it was carried out is not known. */
  | { event: 'broken'; request: number }
  /** An observer of its own asked the store, after the answer, whether what it said was there. */
  | { event: 'witnessed'; request: number; committed: boolean }
  | { event: 'delivered'; device: string; connection: number; envelopes: readonly Envelope[] }
  | {
      event: 'acknowledged';
      device: string;
      connection: number;
      processed: readonly string[];
      failed: readonly string[];
    }
  | { event: 'gateClosed'; device: string; connection: number }
  | { event: 'queueEmpty'; device: string; connection: number; deliveredCount: number }
  /** The server does not know what it had answered before. */
  | { event: 'missed'; device: string; what: string }
  /** `expected`: a fault, or an order to end, made it end so. */
  | { event: 'gatewayEnded'; expected: boolean; how: string };

/** What the store holds when everybody has finished. */
export interface FinalState {
  queued: readonly { device: string; kind: 'message' | 'bounce'; peer: string; messageId: string }[];
  pool: readonly { device: string; preKey: string }[];
  claims: readonly { device: string; claimer: string; claimId: string; preKey: string | null }[];
}

export type Recorder = (event: HistoryEvent) => void;
