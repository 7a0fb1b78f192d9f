/** What the README tells a newcomer to run, run as it stands there. */
import { spawn } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { mkdir, rm, writeFile } from 'node:fs/promises';
import { resolve } from 'node:path';
import { queryObjects } from 'node:v8';
import { beforeEach, describe, expect, it } from 'vitest';
import type { DeviceAddress } from '../src/protocol/ids.ts';
import type { DeviceBundle } from '../src/protocol/keys.ts';
import type { KeygateClient, MessageEnvelope } from '../src/sdk/index.ts';
import { eventually } from './support/eventually.ts';
import { undoAfterEach } from './support/flow.ts';
import { startGateway, type TestGateway } from './support/gateway.ts';
import { Disk, LibsignalKeys } from './support/sdk-keys.ts';

const undo = undoAfterEach();

/** Every map of promises in this process, as a debugger shows it: what the app holds is nobody else's to see. */
function turnsHeld(): string {
  const maps = queryObjects(Map, { format: 'summary' });
  return maps.filter((map) => map.includes('=> [Promise]')).join();
}

it('the script of the README lets two clients chat', async () => {
  const [, script] = /```js\n(\/\/ node chat\.mjs .*?)```/s.exec(readFileSync('README.md', 'utf8')) ?? [];
  expect(script, 'the README holds the script').toContain("from 'socket.io-client'");
  const gateway = await startGateway();
  undo.push(() => gateway.stop());
  // Inside the project, so that it finds socket.io-client as a newcomer's does.
  await mkdir('test-output', { recursive: true });
  const file = 'test-output/chat-of-the-readme.mjs';
  await writeFile(file, script!);
  undo.push(() => rm(file));
  const tokens = await Promise.all(['alice', 'bob'].map((userId) => gateway.token({ userId, deviceId: 1 })));
  const run = () =>
    new Promise<{ code: number | null; lines: string[] }>((resolve) => {
      const child = spawn(process.execPath, [file, ...tokens, gateway.url], {
        stdio: ['ignore', 'pipe', 'pipe'],
      });
      let said = '';
      for (const stream of [child.stdout, child.stderr]) {
        stream.setEncoding('utf8').on('data', (chunk: string) => {
          said += chunk;
        });
      }
      child.on('close', (code) => resolve({ code, lines: said.trim().split('\n') }));
    });
  const told = [
    'bob    uploads his public keys, and goes away',
    "alice  gets the one-time prekey 1 of bob's device 1",
    'alice  sends; the gateway keeps ciphertext until bob has proven his keys',
    'bob    comes back; his keys are in step',
    'bob    reads of alice: hello, bob',
    'bob    has read everything',
  ];
  expect(await run()).toEqual({ code: 0, lines: told });
  // And the README shows what it really prints.
  expect(readFileSync('README.md', 'utf8')).toContain(told.join('\n'));
  // Again: new installations of both, on the same store.
  expect(await run()).toMatchObject({ code: 0 });
});

describe('the app of the README', () => {
  let gateway: TestGateway;
  let openChat: (app: Record<string, unknown>) => Promise<Chat>;

  interface Chat {
    client: KeygateClient;
    send(userId: string, text: string, messageId?: string): Promise<string>;
  }

  beforeEach(async () => {
    const [, script] = /```js\n(\/\/ The typed client .*?)```/s.exec(readFileSync('README.md', 'utf8')) ?? [];
    expect(script, 'the README holds the app').toContain("from 'keygate/sdk'");
    gateway = await startGateway();
    undo.push(() => gateway.stop());
    await mkdir('test-output', { recursive: true });
    const file = resolve('test-output/app-of-the-readme.mjs');
    await writeFile(file, script!.replace("'keygate/sdk'", "'../src/sdk/index.ts'"));
    undo.push(() => rm(file));
    ({ openChat } = await import(file));
  });

  /** A new installation, over libsignal as it is: nothing but the app sees to it that its calls don't overlap. */
  async function install(userId: string, deviceId = 1, at = gateway) {
    const address = { userId, deviceId };
    const disk = new Disk();
    const keys = new LibsignalKeys(disk, address, { takesTurns: false });
    const shown: string[] = [];
    const app = {
      beforeSending: async () => {},
      beforeReading: async () => {},
      atOnceMax: 0,
      opened: [] as string[],
      dropped: [] as string[],
    };
    let atOnce = 0;
    const counted = async <Result>(work: () => Result | Promise<Result>): Promise<Result> => {
      atOnce += 1;
      app.atOnceMax = Math.max(app.atOnceMax, atOnce);
      try {
        return await work();
      } finally {
        atOnce -= 1;
      }
    };
    const chat = await openChat({
      url: at.url,
      getToken: () => at.token(address),
      me: address,
      crypto: {
        keys,
        hasSession: (peer: DeviceAddress) => counted(() => keys.hasSession(peer)),
        openSession: (peer: string, bundle: DeviceBundle) =>
          counted(async () => {
            app.opened.push(`${peer}.${bundle.deviceId}`);
            await keys.establish({ ...bundle, userId: peer });
          }),
        dropSession: (peer: DeviceAddress) =>
          counted(() => {
            app.dropped.push(`${peer.userId}.${peer.deviceId}`);
            keys.forgetSession(peer);
          }),
        encrypt: (peer: DeviceAddress, text: string) =>
          counted(async () => {
            const envelope = await keys.encrypt(peer, text);
            await app.beforeSending();
            return envelope;
          }),
        decrypt: (envelope: MessageEnvelope) =>
          counted(async () => {
            await app.beforeReading();
            return await keys.receive(envelope);
          }),
      },
      storage: disk.kitStorage(),
      show: (sender: DeviceAddress, text: string) => shown.push(`${sender.userId}: ${text}`),
      showUnsent: (messageId: string, why: string) => shown.push(`${messageId}: ${why}`),
    });
    undo.push(() => chat.client.close());
    return Object.assign(app, { chat, keys, shown });
  }

  it('sends to and reads of another', async () => {
    const [alice, bob] = [await install('alice'), await install('bob')];
    await alice.chat.send('bob', 'hello, bob');
    await eventually(() => expect(bob.shown).toEqual(['alice: hello, bob']));
    await bob.chat.send('alice', 'hello, alice');
    await alice.chat.send('bob', 'and again');
    await eventually(() => expect(bob.shown).toEqual(['alice: hello, bob', 'alice: and again']));
    await eventually(() => expect(alice.shown).toEqual(['bob: hello, alice']));
  });

  it('loses none of ten messages that are sent at once while ten others arrive', async () => {
    const [alice, bob] = [await install('alice'), await install('bob')];
    const texts = Array.from({ length: 10 }, (_, index) => `message ${index}`);
    await Promise.all(texts.flatMap((text) => [alice.chat.send('bob', text), bob.chat.send('alice', text)]));
    // What was sent is shown, or will be before this.
    await Promise.all([alice.chat.send('bob', 'the last'), bob.chat.send('alice', 'the last')]);
    await eventually(() => expect(bob.shown).toContain('alice: the last'));
    await eventually(() => expect(alice.shown).toContain('bob: the last'));
    expect(bob.shown).toEqual([...texts, 'the last'].map((text) => `alice: ${text}`));
    expect(alice.shown).toEqual([...texts, 'the last'].map((text) => `bob: ${text}`));
    expect([alice.atOnceMax, bob.atOnceMax]).toEqual([1, 1]);
  });

  it('writes again to one who has installed anew', async () => {
    const [alice, bob] = [await install('alice'), await install('bob')];
    await alice.chat.send('bob', 'hello');
    await eventually(() => expect(bob.shown).toEqual(['alice: hello']));
    bob.chat.client.close();
    const anew = await install('bob');
    await Promise.all(['one', 'two'].map((text) => alice.chat.send('bob', text)));
    await alice.chat.send('bob', 'three');
    await eventually(() => expect(anew.shown).toEqual(['alice: one', 'alice: two', 'alice: three']));
    await anew.chat.send('alice', 'here I am');
    await eventually(() => expect(alice.shown).toEqual(['bob: here I am']));
  });

  it('writes to a device that came while it encrypted, and not to one that went', async () => {
    const [alice, bob] = [await install('alice'), await install('bob')];
    let tablet: Awaited<ReturnType<typeof install>> | null = null;
    alice.beforeSending = async () => {
      tablet ??= await install('bob', 2);
    };
    await alice.chat.send('bob', 'to both');
    await eventually(() => expect(tablet?.shown).toEqual(['alice: to both']));
    let isGone = false;
    alice.beforeSending = async () => {
      if (!isGone) await tablet?.chat.client.reset('given away');
      isGone = true;
    };
    await alice.chat.send('bob', 'to one');
    await eventually(() => expect(bob.shown).toEqual(['alice: to both', 'alice: to one']));
    expect(tablet!.shown).toEqual(['alice: to both']);
    // Set up again, it is another device.
    expect(alice.dropped).toEqual(['bob.2']);
  });

  it('goes on with the session that it has with a device which came while it encrypted', async () => {
    const [alice, bob] = [await install('alice'), await install('bob')];
    let tablet: Awaited<ReturnType<typeof install>> | null = null;
    alice.beforeSending = async () => {
      if (tablet !== null) return;
      tablet = await install('bob', 2);
      // As by a message of the tablet's own, which would wait for its turn.
      const input = { claimId: randomUUID(), userId: 'bob', deviceId: 2 };
      const { devices } = await alice.chat.client.call('requestBundle', input);
      for (const bundle of devices) await alice.keys.establish({ ...bundle, userId: 'bob' });
    };
    await alice.chat.send('bob', 'to both');
    await eventually(() => expect(tablet?.shown).toEqual(['alice: to both']));
    await eventually(() => expect(bob.shown).toEqual(['alice: to both']));
    expect([alice.opened, alice.dropped]).toEqual([['bob.1'], []]);
  });

  it('writes to the other devices of its own user, where there are any', async () => {
    const phone = await install('alice');
    await phone.chat.send('alice', 'to nobody');
    const tablet = await install('alice', 2);
    await phone.chat.send('alice', 'from the phone');
    expect(phone.opened).toEqual(['alice.2']);
    await tablet.chat.send('alice', 'from the tablet');
    await eventually(() => expect(tablet.shown).toEqual(['alice: from the phone']));
    await eventually(() => expect(phone.shown).toEqual(['alice: from the tablet']));
  });

  it('tells of a device whose queue is full, and reaches it under the same id when it has room', async () => {
    const queueMax = 5;
    const at = await startGateway({ env: { QUEUE_MAX: String(queueMax) } });
    undo.push(() => at.stop());
    const [alice, bob, tablet] = [
      await install('alice', 1, at),
      await install('bob', 1, at),
      await install('bob', 2, at),
    ];
    let goOn = () => {};
    const isBusy = new Promise<void>((done) => {
      goOn = done;
    });
    tablet.beforeReading = () => isBusy;
    const texts = Array.from({ length: queueMax }, (_, index) => `message ${index}`);
    for (const text of texts) {
      await alice.chat.send('bob', text);
      await eventually(() => expect(bob.shown).toContain(`alice: ${text}`));
    }
    expect(alice.shown).toEqual([]);
    const messageId = await alice.chat.send('bob', 'one more');
    expect(alice.shown).toEqual([`${messageId}: QUEUE_FULL`]);

    goOn();
    await eventually(async () => {
      await alice.chat.send('bob', 'one more', messageId);
      expect(tablet.shown).toContain('alice: one more');
    });
    await alice.chat.send('bob', 'the last');
    const all = [...texts, 'one more', 'the last'].map((text) => `alice: ${text}`);
    await eventually(() => expect([bob.shown, tablet.shown]).toEqual([all, all]));
  });

  it('delivers once what is sent again under its id', async () => {
    const [alice, bob] = [await install('alice'), await install('bob')];
    const messageId = await alice.chat.send('bob', 'once');
    expect(await alice.chat.send('bob', 'once', messageId)).toBe(messageId);
    await alice.chat.send('bob', 'the last');
    await eventually(() => expect(bob.shown).toContain('alice: the last'));
    expect(bob.shown).toEqual(['alice: once', 'alice: the last']);
  });

  it('holds nothing of those whom it wrote to, once that is done', async () => {
    const [alice] = [await install('alice'), await install('bob')];
    await alice.chat.send('bob', 'hello');
    await expect(alice.chat.send('nobody', 'hello')).rejects.toMatchObject({ code: 'USER_NOT_FOUND' });
    await eventually(() => expect(turnsHeld()).not.toMatch(/'bob'|'nobody'/));
    let isHeld = false;
    alice.beforeSending = async () => {
      isHeld = turnsHeld().includes("'bob'");
    };
    await alice.chat.send('bob', 'hello again');
    expect(isHeld, 'while it is sending').toBe(true);
  });

  it('throws what no other round can mend, and keeps nothing behind it', async () => {
    const alice = await install('alice');
    await expect(alice.chat.send('nobody', 'hello')).rejects.toMatchObject({ code: 'USER_NOT_FOUND' });
    const nobody = await install('nobody');
    await alice.chat.send('nobody', 'are you there now?');
    await eventually(() => expect(nobody.shown).toEqual(['alice: are you there now?']));
  });
});
