/**
 * Random interleavings of upload, claim, reset, reconnect and send, through the kit and against a real gateway: after
 * each step the rules of the design hold.
 */
import { randomInt, randomUUID } from 'node:crypto';
import fc from 'fast-check';
import { afterAll, afterEach, beforeAll, expect, it } from 'vitest';
import type { DeviceBundle } from '../../src/protocol/keys.ts';
import { KeygateError } from '../../src/sdk/index.ts';
import { redisUrl } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { startGateway, type TestGateway } from '../support/gateway.ts';
import { startTcpProxy, type TcpProxy } from '../support/tcp-proxy.ts';
import { closePhones, enrolPhone, oneTimePreKeysIn, type Phone } from './phone.ts';

const RUNS = 30;
const STEPS_MAX = 30;

let gateway: TestGateway;

beforeAll(async () => {
  gateway = await startGateway({ redisUrl: redisUrl() });
});
afterAll(() => gateway.stop());
afterEach(closePhones);

/** What a step needs to know to be possible. */
interface Model {
  hasKeys: boolean;
  isOnline: boolean;
}

interface World {
  proxy: TcpProxy;
  /** Whose keys it is about, behind a proxy. */
  owner: Phone;
  /** Who claims and sends. */
  friend: Phone;
  /** Everything that was ever handed out: identity key, kind and id. */
  claimed: Set<string>;
  claims: { claimId: string; bundle: DeviceBundle }[];
  sent: { text: string; messageId: string }[];
  resets: number;
  lastKeyVersion: number;
}

type Step = fc.AsyncCommand<Model, World>;

/** @param change what the step does to what is known of the owner */
function step(
  name: string,
  when: (model: Readonly<Model>) => boolean,
  act: (world: World, model: Model) => Promise<void>,
): Step {
  return {
    check: when,
    toString: () => name,
    async run(model, world) {
      await act(world, model);
      await rulesHold(model, world);
    },
  };
}

const steps = [
  fc.integer({ min: 1, max: 5 }).map((count) =>
    step(
      `upload ${count}`,
      (model) => model.isOnline && model.hasKeys,
      async ({ owner }) => {
        const { oneTimePreKeys } = owner.keys;
        const first = Math.max(0, ...(await oneTimePreKeys.ids())) + 100_000;
        const ids = Array.from({ length: count }, (_, index) => first + index);
        await oneTimePreKeys.generate(ids);
        const input = { oneTimePreKeys: await oneTimePreKeys.read(ids) };
        const { oneTimePreKeys: verdict } = await owner.client.call('addPreKeys', input);
        expect(verdict).toEqual({ stored: count, unchanged: 0, conflicts: [] });
      },
    ),
  ),
  fc.integer({ min: 1, max: 4 }).map((count) =>
    step(
      `claim ${count}`,
      (model) => model.hasKeys,
      async (world) => {
        for (let index = 0; index < count; index++) {
          const claimId = randomUUID();
          const bundle = await claim(world, claimId);
          for (const preKey of oneTimePreKeysIn(bundle)) {
            // A one-time prekey is handed out at most once.
            expect(world.claimed).not.toContain(preKey);
            world.claimed.add(preKey);
          }
          world.claims.push({ claimId, bundle });
        }
      },
    ),
  ),
  fc.constant(
    step(
      'claim again',
      (model) => model.hasKeys,
      async (world) => {
        const earlier = world.claims.at(-1);
        if (earlier === undefined) return;
        const bundle = await claim(world, earlier.claimId);
        // A retry costs nothing, unless the identity was replaced since: then it is answered anew.
        if (bundle.identityKey === earlier.bundle.identityKey) expect(bundle).toEqual(earlier.bundle);
        else world.claims.pop();
      },
    ),
  ),
  fc.constant(
    step(
      'send',
      (model) => model.hasKeys,
      async (world) => {
        const text = `message ${world.sent.length}`;
        world.sent.push({ text, messageId: await say(world, text) });
      },
    ),
  ),
  fc.constant(
    step(
      'send by a new claim',
      (model) => model.hasKeys,
      async (world) => {
        world.friend.keys.forgetSession(world.owner.address);
        const text = `message ${world.sent.length}`;
        world.sent.push({ text, messageId: await say(world, text) });
      },
    ),
  ),
  fc.constant(
    step(
      'reset',
      (model) => model.isOnline && model.hasKeys,
      async (world, model) => {
        await world.owner.client.reset('because it can');
        world.resets += 1;
        model.hasKeys = false;
        expect(world.owner.client.state).toBe('needsSetup');
      },
    ),
  ),
  fc.constant(
    step(
      'set up',
      (model) => model.isOnline && !model.hasKeys,
      async ({ owner }, model) => {
        expect(await owner.client.setUp()).toBe('ready');
        model.hasKeys = true;
      },
    ),
  ),
  fc.constant(
    step(
      'reconnect',
      (model) => model.isOnline,
      async ({ owner, proxy }) => {
        const before = owner.client.metrics().reconnects;
        proxy.cut();
        await eventually(() => expect(owner.client.metrics().reconnects).toBeGreaterThan(before));
      },
    ),
  ),
  fc.constant(
    step(
      'unplug',
      (model) => model.isOnline,
      async ({ owner, proxy }, model) => {
        proxy.unplug();
        model.isOnline = false;
        await eventually(async () => expect(await owner.client.checkKeys()).toMatchObject({ offline: true }));
      },
    ),
  ),
  fc.constant(
    step(
      'plug in',
      (model) => !model.isOnline,
      async ({ proxy }, model) => {
        proxy.plugIn();
        model.isOnline = true;
      },
    ),
  ),
  fc.constant(
    step(
      'restart',
      () => true,
      async (world, model) => {
        await world.owner.restart();
        world.resets = 0;
        const started = world.owner.client.start();
        if (model.isOnline) expect(await started).toBe(model.hasKeys ? 'ready' : 'needsSetup');
        else started.catch(() => {});
      },
    ),
  ),
];

async function claim({ friend, owner }: World, claimId: string): Promise<DeviceBundle> {
  const { devices } = await friend.client.call('requestBundle', { claimId, ...owner.address });
  expect(devices).toHaveLength(1);
  return devices[0]!;
}

/** As an application would: where the recipient's keys have changed, begins a new session. */
async function say({ friend, owner }: World, text: string): Promise<string> {
  try {
    return await friend.say(owner.address.userId, text);
  } catch (error) {
    if (!(error instanceof KeygateError) || error.code !== 'DEVICES_MISMATCHED') throw error;
    friend.keys.forgetSession(owner.address);
    return await friend.say(owner.address.userId, text);
  }
}

async function rulesHold(model: Model, world: World): Promise<void> {
  const { owner, friend } = world;
  const shown = owner.shown.map((line) => line.slice(line.indexOf(': ') + 2));
  const order = world.sent.map(({ text }) => text);
  // Once, and in the order in which they were sent.
  expect(shown).toEqual(order.filter((text) => shown.includes(text)));

  if (!model.isOnline) return;
  if (!model.hasKeys) {
    await eventually(() => expect(owner.client.state).toBe('needsSetup'));
    expect(await owner.keys.oneTimePreKeys.ids()).toEqual([]);
    return;
  }
  await eventually(() => {
    expect(owner.client.snapshot()).toMatchObject({ state: 'ready', drainProgress: null });
    const bounced = new Set(friend.bounces.map(({ messageId }) => messageId));
    const lost = world.sent.filter(
      ({ text, messageId }) =>
        !owner.shown.some((line) => line.endsWith(`: ${text}`)) && !bounced.has(messageId),
    );
    // Nothing vanishes: it is shown, or it comes back.
    expect(lost).toEqual([]);
  });
  expect(await owner.client.checkKeys()).toEqual({
    needsSetup: false,
    missingKeys: [],
    reason: null,
    offline: false,
  });
  const status = await owner.client.call('keyStatus', {});
  // A version never goes back.
  expect(status.keyVersion).toBeGreaterThanOrEqual(world.lastKeyVersion);
  world.lastKeyVersion = status.keyVersion;
  // A pool that fell below the threshold is filled again.
  await eventually(async () => {
    const { preKeyCount, pqPreKeyCount } = await owner.client.call('keyStatus', {});
    expect(Math.min(preKeyCount, pqPreKeyCount)).toBeGreaterThanOrEqual(10);
  });
  // Whatever is offered is held, so that whoever claims it can be read; a refill may be under way.
  await eventually(async () => {
    const signedPreKey = (await owner.keys.signedPreKey.read())!;
    const found = await owner.client.call('validateKeys', {
      localIdentityKey: (await owner.keys.identity())!.identityKey,
      localSignedPreKeyId: signedPreKey.keyId,
      localPreKeyIds: await owner.keys.oneTimePreKeys.ids(),
      localPqPreKeyIds: await owner.keys.pqOneTimePreKeys.ids(),
    });
    expect(found).toMatchObject({
      keysValid: true,
      preKeyIdsNotHeld: [],
      pqPreKeyIdsNotHeld: [],
      preKeyIdsToUpload: [],
      pqPreKeyIdsToUpload: [],
    });
  });
  expect(owner.client.metrics().resets).toHaveLength(world.resets);
  expect(owner.client.metrics().decryptionFailures).toBe(0);
}

it('the rules of the design hold after every step, whatever the order', async () => {
  const seed = randomInt(2 ** 31);
  console.info(`seed ${seed}`);
  await fc.assert(
    fc.asyncProperty(fc.commands(steps, { maxCommands: STEPS_MAX, size: 'max' }), async (commands) => {
      const run = randomUUID().slice(0, 8);
      const proxy = await startTcpProxy(gateway.url);
      const owner = await enrolPhone(proxy.url, { userId: `owner-${run}`, deviceId: 1 });
      const friend = await enrolPhone(gateway.url, { userId: `friend-${run}`, deviceId: 1 });
      const world: World = {
        proxy,
        owner,
        friend,
        claimed: new Set(),
        claims: [],
        sent: [],
        resets: 0,
        lastKeyVersion: 0,
      };
      try {
        await fc.asyncModelRun(
          () => ({ model: { hasKeys: true, isOnline: true }, real: world }),
          commands as Iterable<Step>,
        );
        // Whatever was left offline comes back, and finds everything.
        proxy.plugIn();
        await eventually(() => expect(['ready', 'needsSetup']).toContain(owner.client.state));
      } finally {
        closePhones();
        await proxy.stop();
      }
    }),
    { seed, numRuns: RUNS, endOnFailure: true },
  );
}, 240_000);
