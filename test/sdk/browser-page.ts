/** What the page of the browser test runs: the kit over keys that were made elsewhere. */
import { connect, type DeviceKeys, type MessageEnvelope } from '../../src/sdk/index.ts';

/** Public halves, and the ids of private halves that the page is taken to hold. */
export interface KeyMaterial {
  identity: NonNullable<Awaited<ReturnType<DeviceKeys['identity']>>>;
  signedPreKey: NonNullable<Awaited<ReturnType<DeviceKeys['signedPreKey']['read']>>>;
  pqLastResortPreKey: NonNullable<Awaited<ReturnType<DeviceKeys['signedPreKey']['read']>>>;
  oneTimePreKeyIds: number[];
  pqOneTimePreKeyIds: number[];
}

export interface PageResult {
  states: string[];
  verdict: unknown;
  envelopes: MessageEnvelope[];
}

/** Ends when so many messages were received and the queue is empty. */
export async function run(options: {
  url: string;
  token: string;
  material: KeyMaterial;
  messageCount: number;
}): Promise<PageResult> {
  const envelopes: MessageEnvelope[] = [];
  const states: string[] = [];
  const client = await connect({
    url: options.url,
    getToken: async () => options.token,
    keys: keysOf(options.material),
    // No new keys can be made in this page.
    poolLevel: 0,
    async onMessage(envelope) {
      envelopes.push(envelope);
    },
  });
  const drained = new Promise<void>((resolve) => {
    client.subscribe(({ state, drainProgress }) => {
      if (state !== states.at(-1)) states.push(state);
      if (state === 'ready' && drainProgress === null && envelopes.length === options.messageCount) resolve();
    });
  });
  await client.start();
  const verdict = await client.checkKeys();
  await drained;
  client.close();
  return { states, verdict, envelopes };
}

function keysOf(material: KeyMaterial): DeviceKeys {
  const refuse = async (): Promise<never> => {
    throw new Error('this page makes no keys');
  };
  const slot = (key: KeyMaterial['signedPreKey']): DeviceKeys['signedPreKey'] => ({
    ids: async () => [key.keyId],
    read: async () => key,
    isSound: async () => true,
    generate: refuse,
    delete: refuse,
  });
  const pool = (ids: number[]) => ({
    ids: async () => ids,
    read: refuse,
    isReadable: async () => true,
    generate: refuse,
    delete: async () => {},
  });
  return {
    identity: async () => material.identity,
    createIdentity: refuse,
    signedPreKey: slot(material.signedPreKey),
    pqLastResortPreKey: slot(material.pqLastResortPreKey),
    oneTimePreKeys: pool(material.oneTimePreKeyIds),
    pqOneTimePreKeys: pool(material.pqOneTimePreKeyIds),
    reset: refuse,
  };
}
