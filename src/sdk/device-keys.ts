/** What an application implements over its own crypto library; the kit never sees a private key or a session. */
import type { RequestInput } from '../protocol/events.ts';

export type WireSignedPreKey = RequestInput<'uploadKeys'>['signedPreKey'];
export type WireOneTimePreKey = { keyId: number; publicKey: string };

export interface WireIdentity {
  registrationId: number;
  /** Base64, as it is to be uploaded. */
  identityKey: string;
  identityKeyEd25519?: string;
}

/** One-time prekeys of one kind: `Key` is what is uploaded of each. */
export interface PreKeyPool<Key> {
  /** Ids whose private halves are held, readable or not. */
  ids(): Promise<number[]>;
  /** The public halves of `ids`, in their order. @throws where one can't be read */
  read(ids: readonly number[]): Promise<Key[]>;
  /** Whether the private half under `id` can be read and fits its public half. */
  isReadable(id: number): Promise<boolean>;
  /** Makes and keeps one key under each id; durable when it resolves. The kit names an id once. */
  generate(ids: readonly number[]): Promise<void>;
  /** An id that isn't held is no error. */
  delete(ids: readonly number[]): Promise<void>;
}

/** A signed prekey of one kind: the present one, and those before it for as long as messages may need them. */
export interface SignedPreKeySlot {
  /** The present one's id and those of older ones that are still held. */
  ids(): Promise<number[]>;
  /** The public half of the present one; null where there is none. @throws where it can't be read */
  read(): Promise<WireSignedPreKey | null>;
  /** Whether the present one's private half can be read and the identity key's signature over it is true. */
  isSound(): Promise<boolean>;
  /** Makes a new one under `id`, present from now on; older ones stay. Durable when it resolves. */
  generate(id: number): Promise<void>;
  delete(ids: readonly number[]): Promise<void>;
}

/**
 * A device's own keys. Every method may reject: where the kit only looks, that counts as "can't be read".
 * Ids are the kit's to choose, and no two keys of a device have the same.
 *
 * Sessions are the application's own affair, with one rule: what opens, encrypts or decrypts with a session never runs
 * at the same time as another such call. A library reads the session, works and writes it back: two calls at once begin
 * from the same state, so that two messages bear the same counter, and the recipient takes the second for a duplicate
 * and drops it (`DuplicateMessageError`), without an error on either side. The kit calls `onMessage` for one envelope
 * after the other; that it does not decrypt while the application encrypts is for the application to see to, as the
 * README's app does.
 */
export interface DeviceKeys {
  /** Null where this device has none yet. */
  identity(): Promise<WireIdentity | null>;
  /**
   * Makes and keeps a new identity key and a registration id, another one than before: by it peers learn that the device
   * was set up anew.
   */
  createIdentity(): Promise<void>;
  signedPreKey: SignedPreKeySlot;
  oneTimePreKeys: PreKeyPool<WireOneTimePreKey>;
  /** Libraries without post-quantum prekeys leave both out. */
  pqLastResortPreKey?: SignedPreKeySlot;
  pqOneTimePreKeys?: PreKeyPool<WireSignedPreKey>;
  /** Forgets every key and session, readable or not. */
  reset(): Promise<void>;
}

/** Thrown by the message handler: this ciphertext can't be decrypted, now or later. */
export class UndecryptableError extends Error {
  override name = 'UndecryptableError';
}

/** Thrown by the message handler: this very message was decrypted before, so it counts as processed. */
export class DuplicateMessageError extends Error {
  override name = 'DuplicateMessageError';
}
