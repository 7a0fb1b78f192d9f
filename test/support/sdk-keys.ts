/**
 * The kit's `DeviceKeys` over libsignal: all that an application writes of cryptography. Records lie sealed under a
 * local key on a disk that outlives the application, so that tests can restart it, damage it, or lose the key.
 */
import { createCipheriv, createDecipheriv, randomBytes } from 'node:crypto';
import {
  ErrorCode,
  IdentityChange,
  IdentityKeyPair,
  IdentityKeyStore,
  KEMKeyPair,
  KEMPublicKey,
  KyberPreKeyRecord,
  KyberPreKeyStore,
  LibSignalErrorBase,
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
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import type { DeviceBundle } from '../../src/protocol/keys.ts';
import {
  type DeviceKeys,
  DuplicateMessageError,
  type KitMemory,
  type KitStorage,
  type PreKeyPool,
  type SignedPreKeySlot,
  UndecryptableError,
  type WireIdentity,
  type WireOneTimePreKey,
  type WireSignedPreKey,
} from '../../src/sdk/index.ts';
import type { OutgoingEnvelope } from './libsignal-device.ts';
import { nextRegistrationId } from './registration-ids.ts';

type Bytes = Uint8Array<ArrayBuffer>;
/** A folder of records: `preKey/7`. */
type Folder = 'preKey' | 'signedPreKey' | 'pqPreKey' | 'pqLastResort' | 'session' | 'peer' | 'pqUse';

/** What outlives the application: records sealed under a local key, and what the user was shown. */
export class Disk {
  readonly shown: string[];
  readonly #records: Map<string, Buffer>;
  readonly #lock: { key: Buffer };
  #beforeChange: (name: string) => void = () => {};
  /** Of a transaction: what `commit` is to put in place; null is to be removed. */
  #changes: Map<string, Buffer | null> | null = null;

  /** @param same another view of this disk */
  constructor(same: Disk | null = null) {
    this.shown = same === null ? [] : same.shown;
    this.#records = same === null ? new Map() : same.#records;
    this.#lock = same === null ? { key: randomBytes(32) } : same.#lock;
  }

  /**
   * The same disk, as one run of the application sees it.
   *
   * @param beforeChange called with the name of what is about to be changed; where it throws, nothing is
   */
  mount(beforeChange: (name: string) => void): Disk {
    const mounted = new Disk(this);
    mounted.#beforeChange = beforeChange;
    return mounted;
  }

  /** A view of this disk whose changes nobody else sees before its `commit`. */
  begin(): Disk {
    const transaction = this.mount(this.#beforeChange);
    transaction.#changes = new Map();
    return transaction;
  }

  /** Puts the changes of a transaction in place, all or none of them. */
  commit(): void {
    const changes = [...this.#changes!];
    this.#changes = null;
    this.#beforeChange(changes.map(([name]) => name).join());
    for (const [name, record] of changes) this.#put(name, record);
  }

  write(name: string, plain: Uint8Array): void {
    const nonce = randomBytes(12);
    const cipher = createCipheriv('aes-256-gcm', this.#lock.key, nonce);
    this.#change(name, Buffer.concat([nonce, cipher.update(plain), cipher.final(), cipher.getAuthTag()]));
  }

  /** Null where there is no such record. @throws where it is damaged, or sealed under another key */
  read(name: string): Bytes | null {
    const sealed = this.#get(name);
    if (sealed === null) return null;
    const cipher = createDecipheriv('aes-256-gcm', this.#lock.key, sealed.subarray(0, 12));
    cipher.setAuthTag(sealed.subarray(-16));
    return Uint8Array.from(Buffer.concat([cipher.update(sealed.subarray(12, -16)), cipher.final()]));
  }

  remove(name: string): void {
    this.#change(name, null);
  }

  names(): string[] {
    const names = new Set([...this.#records.keys(), ...(this.#changes?.keys() ?? [])]);
    return [...names].filter((name) => this.#get(name) !== null);
  }

  #get(name: string): Buffer | null {
    const changed = this.#changes?.get(name);
    return changed === undefined ? (this.#records.get(name) ?? null) : changed;
  }

  #change(name: string, record: Buffer | null): void {
    if (this.#changes !== null) this.#changes.set(name, record);
    else {
      this.#beforeChange(name);
      this.#put(name, record);
    }
  }

  #put(name: string, record: Buffer | null): void {
    if (record === null) this.#records.delete(name);
    else this.#records.set(name, record);
  }

  /** Every record becomes unreadable. */
  changeLocalKey(): void {
    this.#lock.key = randomBytes(32);
  }

  /** This one record becomes unreadable. */
  damage(name: string): void {
    const sealed = this.#get(name);
    if (sealed === null) throw new Error(`there is no record ${name}`);
    sealed[sealed.length - 1]! ^= 1;
  }

  /** The kit's memory, beside the keys. */
  kitStorage(): KitStorage {
    return {
      load: async () => {
        const record = this.read('kit');
        return record && (JSON.parse(Buffer.from(record).toString()) as KitMemory);
      },
      save: async (memory) => this.write('kit', Buffer.from(JSON.stringify(memory))),
    };
  }
}

/** One device's keys. A second instance on the same disk is the application, started again. */
export class LibsignalKeys implements DeviceKeys {
  readonly #disk: Disk;
  readonly #localAddress: ProtocolAddress;
  readonly #stores: Stores;
  readonly #takesTurns: boolean;
  #lastTurn: Promise<unknown> = Promise.resolve();

  /** @param options `takesTurns: false` where the application itself sees to it that no two calls overlap */
  constructor(disk: Disk, device: DeviceAddress, { takesTurns = true } = {}) {
    this.#disk = disk;
    this.#takesTurns = takesTurns;
    this.#localAddress = addressOf(device);
    this.#stores = new Stores(disk);
  }

  // What the kit asks for.

  async identity(): Promise<WireIdentity | null> {
    const identity = this.#stores.identity();
    return (
      identity && {
        registrationId: identity.registrationId,
        identityKey: base64(identity.pair.publicKey.serialize()),
      }
    );
  }

  async createIdentity(): Promise<void> {
    const pair = base64(IdentityKeyPair.generate().serialize());
    const registrationId = nextRegistrationId();
    this.#disk.write('identity', Buffer.from(JSON.stringify({ registrationId, pair })));
  }

  readonly oneTimePreKeys: PreKeyPool<WireOneTimePreKey> = {
    ids: async () => this.#stores.ids('preKey'),
    read: async (ids) =>
      ids.map((keyId) => ({ keyId, publicKey: base64(this.#stores.preKey(keyId).publicKey().serialize()) })),
    isReadable: async (id) => isPair(this.#stores.preKey(id)),
    generate: async (ids) => {
      for (const id of ids) {
        const privateKey = PrivateKey.generate();
        this.#stores.keep('preKey', id, PreKeyRecord.new(id, privateKey.getPublicKey(), privateKey));
      }
    },
    delete: async (ids) => this.#stores.remove('preKey', ids),
  };

  readonly pqOneTimePreKeys: PreKeyPool<WireSignedPreKey> = {
    ids: async () => this.#stores.ids('pqPreKey'),
    read: async (ids) => ids.map((id) => wireSigned(this.#stores.pqPreKey('pqPreKey', id))),
    isReadable: async (id) => this.#stores.pqPreKey('pqPreKey', id).secretKey().serialize().length > 0,
    generate: async (ids) => {
      for (const id of ids) this.#generatePq('pqPreKey', id);
    },
    delete: async (ids) => this.#stores.remove('pqPreKey', ids),
  };

  readonly signedPreKey: SignedPreKeySlot = this.#slot('signedPreKey', {
    record: (id) => this.#stores.signedPreKey(id),
    isWhole: (record) => isPair(record),
    generate: (id) => {
      const privateKey = PrivateKey.generate();
      const publicKey = privateKey.getPublicKey();
      const signature = this.#stores.identityOrThrow().pair.privateKey.sign(publicKey.serialize());
      const record = SignedPreKeyRecord.new(id, systemClock.nowMs(), publicKey, privateKey, signature);
      this.#stores.keep('signedPreKey', id, record);
    },
  });

  readonly pqLastResortPreKey: SignedPreKeySlot = this.#slot('pqLastResort', {
    record: (id) => this.#stores.pqPreKey('pqLastResort', id),
    isWhole: (record) => record.secretKey().serialize().length > 0,
    generate: (id) => this.#generatePq('pqLastResort', id),
  });

  async reset(): Promise<void> {
    // The identity last: what a crash leaves is still found to be broken.
    const names = this.#disk.names().filter((name) => /^(preKey|signed|pq|session)/.test(name));
    for (const name of [...names, 'identity']) this.#disk.remove(name);
  }

  #slot<Made extends SignedPreKeyRecord | KyberPreKeyRecord>(
    folder: Folder,
    parts: { record(id: number): Made; isWhole(record: Made): boolean; generate(id: number): void },
  ): SignedPreKeySlot {
    /** Ids rise: the highest is the present one. */
    const present = (): Made | null => {
      const id = this.#stores.ids(folder).at(-1);
      return id === undefined ? null : parts.record(id);
    };
    return {
      ids: async () => this.#stores.ids(folder),
      read: async () => {
        const record = present();
        return record && wireSigned(record);
      },
      isSound: async () => {
        const record = present();
        const { publicKey } = this.#stores.identityOrThrow().pair;
        return (
          record !== null &&
          parts.isWhole(record) &&
          publicKey.verify(record.publicKey().serialize(), record.signature())
        );
      },
      generate: async (id) => parts.generate(id),
      delete: async (ids) => this.#stores.remove(folder, ids),
    };
  }

  #generatePq(folder: Folder, id: number): void {
    const pair = KEMKeyPair.generate();
    const signature = this.#stores.identityOrThrow().pair.privateKey.sign(pair.getPublicKey().serialize());
    this.#stores.keep(folder, id, KyberPreKeyRecord.new(id, systemClock.nowMs(), pair, signature));
  }

  // What the application does with messages.

  hasSession(peer: DeviceAddress): boolean {
    return this.#disk.names().includes(`session/${addressOf(peer)}`);
  }

  forgetSession(peer: DeviceAddress): void {
    this.#disk.remove(`session/${addressOf(peer)}`);
  }

  /** @param bundle one element of the `devices` of `requestBundle`, with the user whose device it is */
  async establish(bundle: { userId: string } & DeviceBundle): Promise<void> {
    const { oneTimePreKey, signedPreKey, pqPreKey } = bundle;
    if (pqPreKey === null) throw new Error('libsignal starts no session without a PQ prekey');
    const theirs = PreKeyBundle.new(
      bundle.registrationId,
      bundle.deviceId,
      oneTimePreKey?.keyId ?? null,
      oneTimePreKey && PublicKey.deserialize(unbase64(oneTimePreKey.publicKey)),
      signedPreKey.keyId,
      PublicKey.deserialize(unbase64(signedPreKey.publicKey)),
      unbase64(signedPreKey.signature),
      PublicKey.deserialize(unbase64(bundle.identityKey)),
      pqPreKey.keyId,
      KEMPublicKey.deserialize(unbase64(pqPreKey.publicKey)),
      unbase64(pqPreKey.signature),
    );
    const { sessions, identities } = this.#stores;
    await this.#inTurn(() =>
      processPreKeyBundle(theirs, addressOf(bundle), this.#localAddress, sessions, identities),
    );
  }

  /** @throws Error where there is no session with `peer` */
  encrypt(peer: DeviceAddress, text: string): Promise<OutgoingEnvelope> {
    const { sessions, identities } = this.#stores;
    return this.#inTurn(async () => {
      const session = await sessions.getSession(addressOf(peer));
      if (session === null) throw new Error(`no session with ${addressOf(peer)}`);
      const plain = Uint8Array.from(Buffer.from(text));
      const message = await signalEncrypt(plain, addressOf(peer), this.#localAddress, sessions, identities);
      return {
        deviceId: peer.deviceId,
        registrationId: session.remoteRegistrationId(),
        type: message.type(),
        content: base64(message.serialize()),
      };
    });
  }

  /**
   * Decrypts and, in the same step, puts what it says on the disk: `alice.1: hello`.
   *
   * @throws DuplicateMessageError, UndecryptableError, as the kit wants to be told
   */
  receive(envelope: { sender: DeviceAddress; type: number; content: string }): Promise<string> {
    return this.#inTurn(async () => {
      const transaction = this.#disk.begin();
      const plain = Buffer.from(await this.#decrypt(envelope, new Stores(transaction))).toString();
      transaction.commit();
      this.#disk.shown.push(`${envelope.sender.userId}.${envelope.sender.deviceId}: ${plain}`);
      return plain;
    });
  }

  async #decrypt(
    envelope: { sender: DeviceAddress; type: number; content: string },
    stores: Stores,
  ): Promise<Uint8Array> {
    const { sessions, identities, preKeys, signedPreKeys, pqPreKeys } = stores;
    const sender = addressOf(envelope.sender);
    try {
      const content = unbase64(envelope.content);
      if (envelope.type !== 3) {
        const message = SignalMessage.deserialize(content);
        return await signalDecrypt(message, sender, this.#localAddress, sessions, identities);
      }
      return await signalDecryptPreKey(
        PreKeySignalMessage.deserialize(content),
        sender,
        this.#localAddress,
        sessions,
        identities,
        preKeys,
        signedPreKeys,
        pqPreKeys,
      );
    } catch (error) {
      if (error instanceof LibSignalErrorBase && error.code === ErrorCode.DuplicatedMessage) {
        throw new DuplicateMessageError(error.message);
      }
      throw new UndecryptableError(String(error));
    }
  }

  /** libsignal reads a session, works and writes it back: overlapping calls would lose a step of the ratchet. */
  #inTurn<Result>(work: () => Promise<Result>): Promise<Result> {
    if (!this.#takesTurns) return work();
    const turn = this.#lastTurn.then(work);
    this.#lastTurn = turn.catch(() => {});
    return turn;
  }
}

/** libsignal's stores on the disk. */
class Stores {
  readonly sessions: SessionStore;
  readonly identities: IdentityKeyStore;
  readonly preKeys: PreKeyStore;
  readonly signedPreKeys: SignedPreKeyStore;
  readonly pqPreKeys: KyberPreKeyStore;
  readonly #disk: Disk;

  constructor(disk: Disk) {
    this.#disk = disk;
    const keep = this.keep.bind(this);
    const remove = this.remove.bind(this);
    const identityOrThrow = this.identityOrThrow.bind(this);
    const preKey = this.preKey.bind(this);
    const signedPreKey = this.signedPreKey.bind(this);
    const pqPreKey = (id: number): KyberPreKeyRecord =>
      this.pqPreKey(disk.names().includes(`pqPreKey/${id}`) ? 'pqPreKey' : 'pqLastResort', id);

    this.sessions = new (class extends SessionStore {
      override async saveSession(peer: ProtocolAddress, record: SessionRecord): Promise<void> {
        disk.write(`session/${peer}`, record.serialize());
      }
      override async getSession(peer: ProtocolAddress): Promise<SessionRecord | null> {
        const record = disk.read(`session/${peer}`);
        return record && SessionRecord.deserialize(record);
      }
      override async getExistingSessions(peers: ProtocolAddress[]): Promise<SessionRecord[]> {
        return peers.map((peer) => SessionRecord.deserialize(disk.read(`session/${peer}`)!));
      }
    })();

    this.identities = new (class extends IdentityKeyStore {
      override async getIdentityKey(): Promise<PrivateKey> {
        return identityOrThrow().pair.privateKey;
      }
      override async getLocalRegistrationId(): Promise<number> {
        return identityOrThrow().registrationId;
      }
      /** Whether to warn the user of a change is the application's own affair. */
      override async saveIdentity(peer: ProtocolAddress, key: PublicKey): Promise<IdentityChange> {
        const known = await this.getIdentity(peer);
        disk.write(`peer/${peer}`, key.serialize());
        return known === null || known.equals(key)
          ? IdentityChange.NewOrUnchanged
          : IdentityChange.ReplacedExisting;
      }
      override async isTrustedIdentity(): Promise<boolean> {
        return true;
      }
      override async getIdentity(peer: ProtocolAddress): Promise<PublicKey | null> {
        const key = disk.read(`peer/${peer}`);
        return key && PublicKey.deserialize(key);
      }
    })();

    this.preKeys = new (class extends PreKeyStore {
      override async savePreKey(id: number, record: PreKeyRecord): Promise<void> {
        keep('preKey', id, record);
      }
      override async getPreKey(id: number): Promise<PreKeyRecord> {
        return preKey(id);
      }
      override async removePreKey(id: number): Promise<void> {
        remove('preKey', [id]);
      }
    })();

    this.signedPreKeys = new (class extends SignedPreKeyStore {
      override async saveSignedPreKey(id: number, record: SignedPreKeyRecord): Promise<void> {
        keep('signedPreKey', id, record);
      }
      override async getSignedPreKey(id: number): Promise<SignedPreKeyRecord> {
        return signedPreKey(id);
      }
    })();

    this.pqPreKeys = new (class extends KyberPreKeyStore {
      override async saveKyberPreKey(id: number, record: KyberPreKeyRecord): Promise<void> {
        keep('pqPreKey', id, record);
      }
      override async getKyberPreKey(id: number): Promise<KyberPreKeyRecord> {
        return pqPreKey(id);
      }
      /** A last-resort key stays, but libsignal asks that no first message be taken twice. */
      override async markKyberPreKeyUsed(id: number, signedId: number, baseKey: PublicKey): Promise<void> {
        if (disk.names().includes(`pqPreKey/${id}`)) return remove('pqPreKey', [id]);
        const use = `pqUse/${id}/${signedId}/${base64(baseKey.serialize())}`;
        if (disk.names().includes(use)) throw new Error(`last-resort key ${id} was used with this base key`);
        disk.write(use, new Uint8Array());
      }
    })();
  }

  identity(): { registrationId: number; pair: IdentityKeyPair } | null {
    const record = this.#disk.read('identity');
    if (record === null) return null;
    const { registrationId, pair } = JSON.parse(Buffer.from(record).toString());
    return { registrationId, pair: IdentityKeyPair.deserialize(unbase64(pair)) };
  }

  identityOrThrow(): { registrationId: number; pair: IdentityKeyPair } {
    const identity = this.identity();
    if (identity === null) throw new Error('there is no identity key');
    return identity;
  }

  preKey(id: number): PreKeyRecord {
    return PreKeyRecord.deserialize(this.#record('preKey', id));
  }

  signedPreKey(id: number): SignedPreKeyRecord {
    return SignedPreKeyRecord.deserialize(this.#record('signedPreKey', id));
  }

  pqPreKey(folder: Folder, id: number): KyberPreKeyRecord {
    return KyberPreKeyRecord.deserialize(this.#record(folder, id));
  }

  /** In rising order. */
  ids(folder: Folder): number[] {
    return this.#disk
      .names()
      .filter((name) => name.startsWith(`${folder}/`))
      .map((name) => Number(name.slice(folder.length + 1)))
      .sort((a, b) => a - b);
  }

  keep(folder: Folder, id: number, record: { serialize(): Uint8Array }): void {
    this.#disk.write(`${folder}/${id}`, record.serialize());
  }

  remove(folder: Folder, ids: readonly number[]): void {
    for (const id of ids) this.#disk.remove(`${folder}/${id}`);
  }

  #record(folder: Folder, id: number): Bytes {
    const record = this.#disk.read(`${folder}/${id}`);
    if (record === null) throw new Error(`not held: ${folder} ${id}`);
    return record;
  }
}

function isPair(record: PreKeyRecord | SignedPreKeyRecord): boolean {
  return record.privateKey().getPublicKey().equals(record.publicKey());
}

function wireSigned(record: SignedPreKeyRecord | KyberPreKeyRecord): WireSignedPreKey {
  return {
    keyId: record.id(),
    publicKey: base64(record.publicKey().serialize()),
    signature: base64(record.signature()),
  };
}

function addressOf(device: DeviceAddress): ProtocolAddress {
  return ProtocolAddress.new(device.userId, device.deviceId);
}

function base64(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString('base64');
}

function unbase64(encoded: string): Bytes {
  return Uint8Array.from(Buffer.from(encoded, 'base64'));
}
