/**
 * `npm run demo`: two phones with Signal's own library talk through a gateway, and every step is told in plain words.
 * It needs nothing but what npm installed, leaves nothing behind and ends by itself: 0 is success.
 */
import { randomUUID } from 'node:crypto';
import { chmod, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as pause } from 'node:timers/promises';
import { createGateway } from '../../src/compose.ts';
import { parseConfig } from '../../src/config.ts';
import { embeddedSecret } from '../../src/embedded-secret.ts';
import { systemClock } from '../../src/lib/clock.ts';
import { silentLog } from '../../src/lib/log.ts';
import { signToken } from '../../src/requests/authenticate.ts';
import { type Client, connectClient } from '../support/gateway.ts';
import { SignalDevice } from '../support/libsignal-device.ts';
import { buildKeygate } from '../support/program.ts';

/** A cold machine needs a few seconds; what takes longer is stuck. */
const DEMO_MAX_MS = 90_000;
const CLEAN_UP_MAX_MS = 15_000;

const undo: (() => Promise<unknown> | unknown)[] = [];
let steps = 0;

function step(title: string): void {
  steps += 1;
  console.log(`\n${steps}. ${title}`);
}

function tell(line: string): void {
  console.log(`   ${line}`);
}

function must(isSo: boolean, what: string): void {
  if (!isSo) throw new Error(`${what} did not come true`);
}

async function demo(): Promise<void> {
  // Its thread is a file of the build.
  buildKeygate();
  const folder = await mkdtemp(join(tmpdir(), 'keygate-demo-'));
  undo.push(() => rm(folder, { recursive: true, force: true, maxRetries: 20 }));
  // Started by root, PostgreSQL runs as somebody else, who has to pass through.
  await chmod(folder, 0o711);
  const dataDir = join(folder, 'data');

  step('A gateway starts, with a database of its own in a temporary folder.');
  const config = parseConfig({ PORT: '0', ADMIN_PORT: '0', HOST: '127.0.0.1', DATA_DIR: dataDir });
  const gateway = await createGateway(config, { log: silentLog });
  undo.push(() => gateway.stop());
  tell(`It listens on ${gateway.url}.`);

  const secret = await embeddedSecret(dataDir);
  const connect = async (device: SignalDevice): Promise<Client> => {
    const { userId, deviceId } = device;
    const token = await signToken({
      secret,
      device: { userId, deviceId },
      ttlMs: 3_600_000,
      clock: systemClock,
    });
    const client = await connectClient(gateway.url, token);
    undo.push(() => client.close());
    return client;
  };

  step('Two phones sign in: Alice’s and Bob’s.');
  const alice = new SignalDevice({ userId: 'alice', deviceId: 1 });
  const bob = new SignalDevice({ userId: 'bob', deviceId: 1 });
  const aliceClient = await connect(alice);
  let bobClient = await connect(bob);
  tell(
    'Each shows a token that says whose device it is; the gateway believes nothing else about who is who.',
  );

  step('Each phone makes its keys and uploads the public halves.');
  for (const [name, device, client] of [
    ['Alice', alice, aliceClient],
    ['Bob', bob, bobClient],
  ] as const) {
    const stored = await client.call(
      'uploadKeys',
      device.uploadInput({ oneTimePreKeys: 3, pqOneTimePreKeys: 3 }),
    );
    must(
      stored.oneTimePreKeys.stored === 3 && stored.pqOneTimePreKeys.stored === 3,
      'the storing of all keys',
    );
    tell(
      `${name}: an identity key, a signed prekey, a last-resort key, and ${stored.availableCount} one-time prekeys of each kind.`,
    );
  }
  tell('The private halves stay on the phones: the gateway never sees one, and has checked every signature.');

  step('Bob’s phone goes offline.');
  bobClient.close();

  step('Alice wants to write to Bob, and claims his keys.');
  const { devices } = await aliceClient.call('requestBundle', { claimId: randomUUID(), userId: 'bob' });
  const [bundle] = devices;
  must(devices.length === 1 && bundle?.oneTimePreKey != null, 'a bundle with a one-time prekey');
  tell(
    `She gets his identity key, his signed prekey and his one-time prekey number ${bundle!.oneTimePreKey!.keyId}.`,
  );
  tell('That one-time prekey is hers alone: the gateway will never hand it out again.');

  step('Alice’s phone encrypts a message, and the gateway takes it in.');
  const text = 'Meet me at the old mill at noon.';
  await alice.establishSession({ userId: 'bob', ...bundle! });
  const envelope = await alice.encrypt(bob, text);
  const { storedAt } = await aliceClient.call('sendMessages', {
    messageId: randomUUID(),
    userId: 'bob',
    envelopes: [envelope],
  });
  tell(`She writes:           ${text}`);
  tell(`The gateway stores:   ${envelope.content.slice(0, 44)}… (nobody but Bob’s phone can read it)`);
  tell(`It is on disk since ${storedAt}, and waits for Bob.`);

  step('Bob’s phone comes back, and asks for its messages at once.');
  bobClient = await connect(bob);
  const refused = await bobClient.refusal('clientReady');
  must(refused.code === 'KEYS_NOT_VALIDATED', 'the refusal');
  must(bobClient.envelopes.length === 0, 'the silence before the proof');
  tell(`The gateway refuses: ${refused.code}.`);
  tell(
    'If the phone had lost its keys, the message would be lost on it. So it has to show first that it has them.',
  );

  step('Bob’s phone tells which keys it holds, and the gateway compares.');
  const view = await bobClient.call('validateKeys', bob.validateInput());
  must(view.keysValid && view.validation !== undefined, 'the agreement on the keys');
  tell(`Both sides agree on version ${view.keyVersion} of his keys.`);
  tell(`Prekey ${view.preKeyIdsToDelete.join(', ')} was handed out: somebody will write with it.`);

  step('Now Bob’s phone says that it is ready, and the gate opens.');
  const incoming = firstMessage(bobClient, bob);
  const { pendingCount } = await bobClient.call('clientReady', { validation: view.validation! });
  tell(`${pendingCount} message is waiting, and is pushed to the phone.`);

  step('Bob’s phone decrypts the message.');
  const read = await incoming;
  must(read.text === text, 'the reading of the very message');
  tell(`From ${read.from}: ${read.text}`);
  const { deliveredCount } = await bobClient.next('queueEmpty');
  tell(`It tells the gateway so, which only now deletes its copy: ${deliveredCount} delivered, none left.`);

  step('Bob answers, and Alice’s phone goes the same way.');
  const mine = await aliceClient.call('validateKeys', alice.validateInput());
  const answered = firstMessage(aliceClient, alice);
  await aliceClient.call('clientReady', { validation: mine.validation! });
  const answer = 'I will be there.';
  await bobClient.call('sendMessages', {
    messageId: randomUUID(),
    userId: 'alice',
    envelopes: [await bob.encrypt(alice, answer)],
  });
  const heard = await answered;
  must(heard.text === answer, 'the reading of the very answer');
  tell(`From ${heard.from}: ${heard.text}`);
}

/** The first message that is pushed, decrypted; what can be read is acknowledged, and nothing before it was. */
function firstMessage(client: Client, device: SignalDevice): Promise<{ from: string; text: string }> {
  client.onMessages = () => null;
  return new Promise((resolve, reject) => {
    client.socket.once('messages', ({ envelopes: [envelope] }, acknowledge) => {
      if (envelope?.kind !== 'message') return reject(new Error('what arrived is no message'));
      device.decrypt(envelope).then((text) => {
        acknowledge({ processed: [envelope.id] });
        resolve({ from: envelope.sender.userId, text });
      }, reject);
    });
  });
}

/** Ends what was started, last to first; a part that hangs or fails keeps nothing else from its end. */
async function cleanUp(): Promise<void> {
  for (const end of undo.splice(0).reverse()) {
    await Promise.race([
      Promise.resolve()
        .then(end)
        .catch(() => {}),
      pause(CLEAN_UP_MAX_MS, undefined, { ref: false }),
    ]);
  }
}

function reasonOf(error: unknown): string {
  return (error instanceof Error ? error.message : String(error)).split('\n')[0]!;
}

const interrupted = new Promise<never>((_, reject) => {
  for (const signal of ['SIGINT', 'SIGTERM'] as const) {
    process.once(signal, () => reject(new Error(`it was ended by ${signal}`)));
  }
  for (const fault of ['uncaughtException', 'unhandledRejection'] as const) process.once(fault, reject);
});
const tooLate = pause(DEMO_MAX_MS, undefined, { ref: false }).then(() => {
  throw new Error(`it took longer than ${DEMO_MAX_MS / 1000} s`);
});

try {
  await Promise.race([demo(), interrupted, tooLate]);
  await cleanUp();
  console.log('\nThat is all. The gateway has ended, and its folder is gone.');
  process.exitCode = 0;
} catch (error) {
  // One line says why; what else falls while everything ends, needs no words.
  process.removeAllListeners('warning');
  await cleanUp();
  console.error(`The demo failed at step ${steps}: ${reasonOf(error)}`);
  process.exitCode = 1;
}
// The native library may keep threads: the demo is over all the same.
process.exit();
