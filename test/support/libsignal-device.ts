/**
 * A real Signal client over the wire shapes of the contract, for tests and the demo: libsignal with its stores
 * in memory. Private keys live here and nowhere else.
 */
import {
  type Direction,
  IdentityChange,
  IdentityKeyPair,
  IdentityKeyStore,
  KEMKeyPair,
  KEMPublicKey,
  KyberPreKeyRecord,
  KyberPreKeyStore,
  PreKeyBundle,
  PreKeyRecord,
  PreKeySignalMessage,
  PreKeyStore,
  PrivateKey,
  ProtocolAddress,
  PublicKey,
  processPreKeyBundle,
  SessionRecord,
  SessionStore,
  SignalMessage,
  SignedPreKeyRecord,
  SignedPreKeyStore,
  signalDecrypt,
  signalDecryptPreKey,
  signalEncrypt,
} from '@signalapp/libsignal-client';
import { systemClock } from '../../src/lib/clock.ts';
import type { RequestInput } from '../../src/protocol/events.ts';
import { addressKey, type DeviceAddress } from '../../src/protocol/ids.ts';
import type { DeviceBundle } from '../../src/protocol/keys.ts';
import { nextRegistrationId } from './registration-ids.ts';

type UploadInput = RequestInput<'uploadKeys'>;
/** The input of `uploadKeys` with every kind of key that libsignal has. */
export type FullUpload = {
  [Name in Exclude<
    keyof UploadInput,
    'identityKeyEd25519' | 'replaceIdentity' | 'ifKeyVersion'
  >]-?: NonNullable<UploadInput[Name]>;
};
export type OneTimePreKey = FullUpload['oneTimePreKeys'][number];
/** A signed prekey, a last-resort key or a one-time PQ key: on the wire they look alike. */
export type SignedKey = FullUpload['signedPreKey'];
/** One element of the `envelopes` of `sendMessages`. */
export type OutgoingEnvelope = RequestInput<'sendMessages'>['envelopes'][number];

/** The lists of `addPreKeys`. */
export type AddedPreKeys = Pick<FullUpload, 'oneTimePreKeys' | 'pqOneTimePreKeys'>;

/** How many one-time prekeys to make of each kind. */
export interface PreKeyCounts {
  oneTimePreKeys: number;
  pqOneTimePreKeys: number;
}

type Bytes = Uint8Array<ArrayBuffer>;

const WHISPER_TYPES: readonly number[] = [2, 1];
const PRE_KEY_TYPE = 3;

/**
 * One installed client. A new instance with the same ids is a fresh install: another identity, no sessions.
 *
 * Calls may overlap: those that touch a session wait for each other, as the ratchet demands.
 */
export class SignalDevice {
  readonly userId: string;
  readonly deviceId: number;
  readonly registrationId = nextRegistrationId();

  readonly #localAddress: ProtocolAddress;
  readonly #identity = IdentityKeyPair.generate();
  readonly #sessions = new MemorySessionStore();
  readonly #identities: MemoryIdentityKeyStore;
  readonly #preKeys = new MemoryPreKeyStore();
  readonly #signedPreKeys = new MemorySignedPreKeyStore();
  readonly #kyberPreKeys = new MemoryKyberPreKeyStore();

  #nextPreKeyId: number;
  #nextSignedPreKeyId = 1;
  /** Last-resort and one-time PQ keys share libsignal's one store, and so one line of ids. */
  #nextKyberPreKeyId: number;
  #signedPreKey: SignedKey;
  #pqLastResortPreKey: SignedKey;
  #lastTurn: Promise<unknown> = Promise.resolve();

  /** @param device `firstPreKeyId` is where the ids of both kinds of one-time prekeys start; 1 if absent */
  constructor(device: DeviceAddress & { firstPreKeyId?: number }) {
    this.userId = device.userId;
    this.deviceId = device.deviceId;
    this.#localAddress = protocolAddress(device);
    this.#identities = new MemoryIdentityKeyStore(this.#identity.privateKey, this.registrationId);
    this.#nextPreKeyId = device.firstPreKeyId ?? 1;
    this.#nextKyberPreKeyId = this.#nextPreKeyId;
    this.#signedPreKey = this.newSignedPreKey();
    this.#pqLastResortPreKey = this.newPqLastResort();
  }

  /** Base64 of the 33 bytes, as uploaded. */
  get identityKey(): string {
    return base64(this.#identity.publicKey.serialize());
  }

  /** `alice.1`, once for each time that a peer was met with another identity key than before. */
  get identityChanges(): readonly string[] {
    return this.#identities.changes;
  }

  /** The input of `uploadKeys`: the current signed and last-resort keys, and that many fresh one-time prekeys. */
  uploadInput(counts: PreKeyCounts): FullUpload {
    return {
      registrationId: this.registrationId,
      identityKey: this.identityKey,
      signedPreKey: this.#signedPreKey,
      pqLastResortPreKey: this.#pqLastResortPreKey,
      oneTimePreKeys: this.#newOneTimePreKeys(counts.oneTimePreKeys),
      pqOneTimePreKeys: this.#newPqOneTimePreKeys(counts.pqOneTimePreKeys),
    };
  }

  /** The input of `addPreKeys`; a kind of which none is asked for is absent. */
  morePreKeys(oneTimePreKeyCount: number, { pqOneTimePreKeys = 0 } = {}): Partial<AddedPreKeys> {
    return {
      ...(oneTimePreKeyCount > 0 && { oneTimePreKeys: this.#newOneTimePreKeys(oneTimePreKeyCount) }),
      ...(pqOneTimePreKeys > 0 && { pqOneTimePreKeys: this.#newPqOneTimePreKeys(pqOneTimePreKeys) }),
    };
  }

  /** Makes another signed prekey the current one; messages for the one before can still be decrypted. */
  newSignedPreKey(): SignedKey {
    const keyId = this.#nextSignedPreKeyId++;
    const privateKey = PrivateKey.generate();
    const publicKey = privateKey.getPublicKey();
    const signature = this.#identity.privateKey.sign(publicKey.serialize());
    this.#signedPreKeys.add(
      SignedPreKeyRecord.new(keyId, systemClock.nowMs(), publicKey, privateKey, signature),
    );
    this.#signedPreKey = {
      keyId,
      publicKey: base64(publicKey.serialize()),
      signature: base64(signature),
    };
    return this.#signedPreKey;
  }

  /** Makes another last-resort key the current one; messages for the one before can still be decrypted. */
  newPqLastResort(): SignedKey {
    this.#pqLastResortPreKey = this.#newKyberPreKey({ lastResort: true });
    return this.#pqLastResortPreKey;
  }

  /** The input of `validateKeys`: what this device holds now. */
  validateInput(): RequestInput<'validateKeys'> {
    return {
      localIdentityKey: this.identityKey,
      localSignedPreKeyId: this.#signedPreKey.keyId,
      localSignedPreKeyPublicKey: this.#signedPreKey.publicKey,
      localRegistrationId: this.registrationId,
      localPqLastResortPreKeyId: this.#pqLastResortPreKey.keyId,
      localPreKeyIds: this.#preKeys.ids(),
      localPqPreKeyIds: this.#kyberPreKeys.oneTimeIds(),
    };
  }

  /** Whether the private half of this one-time prekey is held; it goes when a message that uses it is decrypted. */
  hasPreKey(keyId: number): boolean {
    return this.#preKeys.ids().includes(keyId);
  }

  hasPqPreKey(keyId: number): boolean {
    return this.#kyberPreKeys.oneTimeIds().includes(keyId);
  }

  /** Forgets private halves of one-time prekeys, as a damaged or tidied store would. */
  losePreKeys(lost: { preKeyIds?: readonly number[]; pqPreKeyIds?: readonly number[] }): void {
    for (const keyId of lost.preKeyIds ?? []) this.#preKeys.remove(keyId);
    for (const keyId of lost.pqPreKeyIds ?? []) this.#kyberPreKeys.removeOneTime(keyId);
  }

  /**
   * Starts a session, or a new one, with one device of a bundle.
   *
   * @param bundle one element of the `devices` of `requestBundle`, with the user whose device it is
   * @throws Error when there is no PQ prekey, without which libsignal starts no session, or when libsignal
   *   finds a signature bad
   */
  async establishSession(bundle: { userId: string } & DeviceBundle): Promise<void> {
    const { oneTimePreKey, signedPreKey, pqPreKey } = bundle;
    if (pqPreKey === null) throw new Error(`no PQ prekey of ${addressKey(bundle)}`);
    const theirs = PreKeyBundle.new(
      bundle.registrationId,
      bundle.deviceId,
      oneTimePreKey === null ? null : oneTimePreKey.keyId,
      oneTimePreKey === null ? null : PublicKey.deserialize(unbase64(oneTimePreKey.publicKey)),
      signedPreKey.keyId,
      PublicKey.deserialize(unbase64(signedPreKey.publicKey)),
      unbase64(signedPreKey.signature),
      PublicKey.deserialize(unbase64(bundle.identityKey)),
      pqPreKey.keyId,
      KEMPublicKey.deserialize(unbase64(pqPreKey.publicKey)),
      unbase64(pqPreKey.signature),
    );
    await this.#inTurn(() =>
      processPreKeyBundle(
        theirs,
        protocolAddress(bundle),
        this.#localAddress,
        this.#sessions,
        this.#identities,
      ),
    );
  }

  /**
   * @returns an envelope as `sendMessages` takes it; `type` is 3 until the peer's first answer is decrypted, then 2
   * @throws Error when there is no session with `recipient`
   */
  encrypt(recipient: DeviceAddress, text: string): Promise<OutgoingEnvelope> {
    const address = protocolAddress(recipient);
    return this.#inTurn(async () => {
      const session = await this.#sessions.getSession(address);
      if (session === null) throw new Error(`no session with ${addressKey(recipient)}`);
      const registrationId = session.remoteRegistrationId();
      const message = await signalEncrypt(
        Uint8Array.from(Buffer.from(text)),
        address,
        this.#localAddress,
        this.#sessions,
        this.#identities,
      );
      return {
        deviceId: recipient.deviceId,
        registrationId,
        type: message.type(),
        content: base64(message.serialize()),
      };
    });
  }

  /**
   * @param envelope a pushed message; `type` 3, or 2 (which other libraries call 1)
   * @throws LibSignalErrorBase when it can't be decrypted; its code is DuplicatedMessage where it already was
   */
  decrypt(envelope: { sender: DeviceAddress; type: number; content: string }): Promise<string> {
    const address = protocolAddress(envelope.sender);
    const content = unbase64(envelope.content);
    return this.#inTurn(async () => {
      if (envelope.type === PRE_KEY_TYPE) {
        return text(
          await signalDecryptPreKey(
            PreKeySignalMessage.deserialize(content),
            address,
            this.#localAddress,
            this.#sessions,
            this.#identities,
            this.#preKeys,
            this.#signedPreKeys,
            this.#kyberPreKeys,
          ),
        );
      }
      if (WHISPER_TYPES.includes(envelope.type)) {
        const message = SignalMessage.deserialize(content);
        return text(
          await signalDecrypt(message, address, this.#localAddress, this.#sessions, this.#identities),
        );
      }
      throw new Error(`unknown envelope type ${envelope.type}`);
    });
  }

  /** libsignal reads a session, works and writes it back: overlapping calls would lose a step of the ratchet. */
  #inTurn<Result>(work: () => Promise<Result>): Promise<Result> {
    const turn = this.#lastTurn.then(work);
    this.#lastTurn = turn.catch(() => {});
    return turn;
  }

  #newOneTimePreKeys(count: number): OneTimePreKey[] {
    return Array.from({ length: count }, () => {
      const keyId = this.#nextPreKeyId++;
      const privateKey = PrivateKey.generate();
      const publicKey = privateKey.getPublicKey();
      this.#preKeys.add(PreKeyRecord.new(keyId, publicKey, privateKey));
      return { keyId, publicKey: base64(publicKey.serialize()) };
    });
  }

  #newPqOneTimePreKeys(count: number): SignedKey[] {
    return Array.from({ length: count }, () => this.#newKyberPreKey({ lastResort: false }));
  }

  #newKyberPreKey({ lastResort }: { lastResort: boolean }): SignedKey {
    const keyId = this.#nextKyberPreKeyId++;
    const pair = KEMKeyPair.generate();
    const publicKey = pair.getPublicKey().serialize();
    const signature = this.#identity.privateKey.sign(publicKey);
    this.#kyberPreKeys.add(KyberPreKeyRecord.new(keyId, systemClock.nowMs(), pair, signature), {
      lastResort,
    });
    return { keyId, publicKey: base64(publicKey), signature: base64(signature) };
  }
}

class MemorySessionStore extends SessionStore {
  /** Serialised, so that nobody holds a record which the ratchet has left behind. */
  readonly #records = new Map<string, Bytes>();

  override async saveSession(name: ProtocolAddress, record: SessionRecord): Promise<void> {
    this.#records.set(name.toString(), record.serialize());
  }

  override async getSession(name: ProtocolAddress): Promise<SessionRecord | null> {
    const record = this.#records.get(name.toString());
    return record === undefined ? null : SessionRecord.deserialize(record);
  }

  override async getExistingSessions(addresses: ProtocolAddress[]): Promise<SessionRecord[]> {
    return addresses.map((address) =>
      SessionRecord.deserialize(present(this.#records.get(address.toString()), `session with ${address}`)),
    );
  }
}

/** Trusts whom the server names and notes every change: whether to warn its user is a client's own affair. */
class MemoryIdentityKeyStore extends IdentityKeyStore {
  readonly changes: string[] = [];
  readonly #privateKey: PrivateKey;
  readonly #registrationId: number;
  readonly #known = new Map<string, PublicKey>();

  constructor(privateKey: PrivateKey, registrationId: number) {
    super();
    this.#privateKey = privateKey;
    this.#registrationId = registrationId;
  }

  override async getIdentityKey(): Promise<PrivateKey> {
    return this.#privateKey;
  }

  override async getLocalRegistrationId(): Promise<number> {
    return this.#registrationId;
  }

  override async saveIdentity(name: ProtocolAddress, key: PublicKey): Promise<IdentityChange> {
    const known = this.#known.get(name.toString());
    this.#known.set(name.toString(), key);
    if (known === undefined || known.equals(key)) return IdentityChange.NewOrUnchanged;
    this.changes.push(name.toString());
    return IdentityChange.ReplacedExisting;
  }

  override async isTrustedIdentity(
    _name: ProtocolAddress,
    _key: PublicKey,
    _direction: Direction,
  ): Promise<boolean> {
    return true;
  }

  override async getIdentity(name: ProtocolAddress): Promise<PublicKey | null> {
    return this.#known.get(name.toString()) ?? null;
  }
}

class MemoryPreKeyStore extends PreKeyStore {
  readonly #records = new Map<number, PreKeyRecord>();

  add(record: PreKeyRecord): void {
    this.#records.set(record.id(), record);
  }

  ids(): number[] {
    return [...this.#records.keys()];
  }

  remove(id: number): void {
    this.#records.delete(id);
  }

  override async savePreKey(_id: number, record: PreKeyRecord): Promise<void> {
    this.add(record);
  }

  override async getPreKey(id: number): Promise<PreKeyRecord> {
    return present(this.#records.get(id), `one-time prekey ${id}`);
  }

  override async removePreKey(id: number): Promise<void> {
    this.remove(id);
  }
}

class MemorySignedPreKeyStore extends SignedPreKeyStore {
  readonly #records = new Map<number, SignedPreKeyRecord>();

  add(record: SignedPreKeyRecord): void {
    this.#records.set(record.id(), record);
  }

  override async saveSignedPreKey(_id: number, record: SignedPreKeyRecord): Promise<void> {
    this.add(record);
  }

  override async getSignedPreKey(id: number): Promise<SignedPreKeyRecord> {
    return present(this.#records.get(id), `signed prekey ${id}`);
  }
}

class MemoryKyberPreKeyStore extends KyberPreKeyStore {
  readonly #oneTime = new Map<number, KyberPreKeyRecord>();
  readonly #lastResort = new Map<number, KyberPreKeyRecord>();
  readonly #lastResortUses = new Set<string>();

  add(record: KyberPreKeyRecord, { lastResort }: { lastResort: boolean }): void {
    (lastResort ? this.#lastResort : this.#oneTime).set(record.id(), record);
  }

  oneTimeIds(): number[] {
    return [...this.#oneTime.keys()];
  }

  removeOneTime(id: number): void {
    this.#oneTime.delete(id);
  }

  override async saveKyberPreKey(_id: number, record: KyberPreKeyRecord): Promise<void> {
    this.add(record, { lastResort: false });
  }

  override async getKyberPreKey(id: number): Promise<KyberPreKeyRecord> {
    return present(this.#oneTime.get(id) ?? this.#lastResort.get(id), `PQ prekey ${id}`);
  }

  /** A last-resort key stays, but the same first message must not be taken twice: libsignal asks for that. */
  override async markKyberPreKeyUsed(id: number, signedPreKeyId: number, baseKey: PublicKey): Promise<void> {
    if (this.#oneTime.delete(id)) return;
    const use = `${id} ${signedPreKeyId} ${base64(baseKey.serialize())}`;
    if (this.#lastResortUses.has(use)) throw new Error(`last-resort key ${id} was used with this base key`);
    this.#lastResortUses.add(use);
  }
}

function present<Value>(value: Value | undefined, what: string): Value {
  if (value === undefined) throw new Error(`not held: ${what}`);
  return value;
}

function protocolAddress(device: DeviceAddress): ProtocolAddress {
  return ProtocolAddress.new(device.userId, device.deviceId);
}

function base64(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString('base64');
}

function unbase64(encoded: string): Bytes {
  return Uint8Array.from(Buffer.from(encoded, 'base64'));
}

function text(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString();
}
