/** A chat application in a few lines: libsignal for cryptography, the kit for everything else. */
import { randomUUID } from 'node:crypto';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import type { DeviceBundle } from '../../src/protocol/keys.ts';
import {
  type BounceEnvelope,
  type ConnectOptions,
  connect,
  type KeygateClient,
  KeygateError,
  type KitClock,
  type MessageEnvelope,
  systemKitClock,
} from '../../src/sdk/index.ts';
import { tokenFor } from '../support/gateway.ts';
import { Disk, LibsignalKeys } from '../support/sdk-keys.ts';

export interface Phone {
  address: DeviceAddress;
  disk: Disk;
  /** Of the running application. */
  keys: LibsignalKeys;
  client: KeygateClient;
  /** What the user was shown, over restarts: `alice.1: hello`. */
  shown: string[];
  bounces: BounceEnvelope[];
  /** Called before each message is decrypted; what it throws is thrown by the handler. */
  beforeReceiving: (envelope: MessageEnvelope) => Promise<void>;
  /** Called when it is decrypted and shown. */
  afterReceiving: (envelope: MessageEnvelope) => Promise<void>;
  /** Called before each change that the application makes of its disk; where it throws, nothing is changed. */
  beforeChange: (name: string) => void;
  /** Starts the application again on what the disk holds; the old one is gone without a word. */
  restart(options?: Partial<ConnectOptions>): Promise<KeygateClient>;
  /** Encrypts for every device of a user and sends; claims bundles where there is no session. @returns the `messageId` */
  say(userId: string, text: string): Promise<string>;
  close(): void;
}

/** Few enough for a test to claim them all. */
export const POOL_LEVEL = 12;

/** Back-off and pauses pass quickly, everything else as it is. */
export const hurriedClock: KitClock = {
  ...systemKitClock,
  after: (delayMs, action) => systemKitClock.after(delayMs <= 2_000 ? delayMs / 20 : delayMs, action),
};

/** Every phone of a test file, to be closed at its end. */
const phones: Phone[] = [];

export function closePhones(): void {
  for (const phone of phones.splice(0)) phone.close();
}

export async function installPhone(
  url: string,
  address: DeviceAddress,
  options: Partial<ConnectOptions> = {},
): Promise<Phone> {
  const disk = new Disk();
  let runs = 0;
  const launch = async (more: Partial<ConnectOptions>): Promise<[LibsignalKeys, KeygateClient]> => {
    const run = ++runs;
    const mounted = disk.mount((name) => {
      if (run !== runs) throw new Error('this run of the application is over');
      phone.beforeChange(name);
    });
    const keys = new LibsignalKeys(mounted, address);
    const client = await connect({
      url,
      getToken: () => tokenFor(address),
      keys,
      storage: mounted.kitStorage(),
      clock: hurriedClock,
      poolLevel: POOL_LEVEL,
      async onMessage(envelope) {
        await phone.beforeReceiving(envelope);
        await keys.receive(envelope);
        await phone.afterReceiving(envelope);
      },
      async onBounce(envelope) {
        phone.bounces.push(envelope);
      },
      ...options,
      ...more,
    });
    return [keys, client];
  };
  const phone: Phone = {
    address,
    disk,
    keys: undefined!,
    client: undefined!,
    shown: disk.shown,
    bounces: [],
    beforeReceiving: async () => {},
    afterReceiving: async () => {},
    beforeChange: () => {},
    async restart(more = {}) {
      phone.client.close();
      [phone.keys, phone.client] = await launch(more);
      return phone.client;
    },
    async say(userId, text) {
      const targets = await sessionsWith(phone, userId);
      // One after the other: a turn of the ratchet is the order of the messages.
      const envelopes = [];
      for (const target of targets) envelopes.push(await phone.keys.encrypt(target, text));
      const messageId = randomUUID();
      await phone.client.call('sendMessages', { messageId, userId, envelopes });
      return messageId;
    },
    close: () => phone.client.close(),
  };
  [phone.keys, phone.client] = await launch({});
  phones.push(phone);
  return phone;
}

/** A phone whose user has set it up: ready, with its first keys on the gateway. */
export async function enrolPhone(
  url: string,
  address: DeviceAddress,
  options: Partial<ConnectOptions> = {},
): Promise<Phone> {
  const phone = await installPhone(url, address, options);
  await phone.client.start();
  await phone.client.setUp();
  return phone;
}

/** Claims what is missing for a session with each device of a user. @returns the devices */
export async function sessionsWith(phone: Phone, userId: string): Promise<DeviceAddress[]> {
  const { devices } = await phone.client.call('listDevices', { userId });
  const targets = devices
    .map(({ deviceId }) => ({ userId, deviceId }))
    .filter(({ deviceId }) => userId !== phone.address.userId || deviceId !== phone.address.deviceId);
  for (const target of targets) if (!phone.keys.hasSession(target)) await claimSession(phone, target);
  return targets;
}

/** Claims one device's bundle and begins a session with it. */
export async function claimSession(phone: Phone, target: DeviceAddress): Promise<void> {
  const { devices } = await phone.client.call('requestBundle', { claimId: randomUUID(), ...target });
  for (const bundle of devices) await phone.keys.establish({ ...bundle, userId: target.userId });
}

/** The one-time prekeys of a bundle, each by its identity key, kind and id. */
export function oneTimePreKeysIn({ identityKey, oneTimePreKey, pqPreKey }: DeviceBundle): string[] {
  return [
    ...(oneTimePreKey === null ? [] : [`${identityKey} ec ${oneTimePreKey.keyId}`]),
    ...(pqPreKey === null || pqPreKey.lastResort ? [] : [`${identityKey} pq ${pqPreKey.keyId}`]),
  ];
}

/** The refusal that a promise ends in. */
export async function refusalOf(promise: Promise<unknown>): Promise<KeygateError> {
  const outcome = await promise.then(
    () => null,
    (error: unknown) => error,
  );
  if (outcome instanceof KeygateError) return outcome;
  throw new Error(`no refusal, but ${String(outcome)}`);
}
