/** Gateways that are killed at the worst moments, started again, started twice, and asked to end. */
import { spawn } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { chmod, mkdtemp, rm } from 'node:fs/promises';
import { connect as connectTcp } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import postgres from 'postgres';
import { describe, expect, it } from 'vitest';
import { embeddedSecret } from '../../src/embedded-secret.ts';
import { systemClock } from '../../src/lib/clock.ts';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import { signToken } from '../../src/requests/authenticate.ts';
import { createDatabase } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { FEW_KEYS, hold, opened, reopened, someone, undoAfterEach } from '../support/flow.ts';
import {
  type Client,
  connectClient,
  contents,
  enrol,
  open,
  type Party,
  send,
  tokenFor,
} from '../support/gateway.ts';
import { type GatewayProcess, startGatewayProcess } from '../support/gateway-process.ts';
import { KEYGATE } from '../support/program.ts';
import { startTcpProxy } from '../support/tcp-proxy.ts';

const undo = undoAfterEach();

async function onPostgres(): Promise<{ gateway: GatewayProcess; databaseUrl: string }> {
  const database = await createDatabase();
  undo.push(() => database.drop());
  const gateway = await startGatewayProcess({ databaseUrl: database.url });
  undo.push(() => gateway.stop());
  return { gateway, databaseUrl: database.url };
}

async function emptyFolder(): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'keygate-crash-'));
  // As root, PostgreSQL's user has to pass through.
  await chmod(folder, 0o711);
  undo.push(() => rm(folder, { recursive: true, force: true, maxRetries: 20 }));
  return folder;
}

async function killAndRestart(gateway: GatewayProcess): Promise<void> {
  await gateway.kill('SIGKILL');
  await gateway.restart();
}

/** Tells the statement that stores by its beginning: PostgreSQL shows no more of it. */
const STORES = '%send_anyway%';

/** Keeps the statement that stores this message waiting in its midst, for the end of a rival that stores the same. */
async function holdStoring(databaseUrl: string, message: { from: Party; to: Party; messageId: string }) {
  const sql = postgres(databaseUrl, { max: 3, onnotice: () => {} });
  undo.push(() => sql.end());
  const blocker = await sql.reserve();
  await blocker`BEGIN`;
  const { from, to, messageId } = message;
  await blocker`
    INSERT INTO message_receipts
      (user_id, device_id, kind, peer_user_id, peer_device_id, message_id, sequence, stored_at)
    VALUES (${to.address.userId}, ${to.address.deviceId}, 0, ${from.address.userId}, ${from.address.deviceId},
            ${messageId}, 0, now())`;
  const waiting = () => sql<{ pid: number }[]>`
    SELECT pid FROM pg_stat_activity
    WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE ${STORES}`;
  return {
    async oneWaits(): Promise<void> {
      await eventually(async () => expect(await waiting()).toHaveLength(1));
    },
    async letGo(): Promise<void> {
      await blocker`ROLLBACK`;
      blocker.release();
    },
    /** What waits is never carried out. */
    async endWaiting(): Promise<void> {
      await sql`SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE ${STORES}`;
      await eventually(async () => expect(await waiting()).toHaveLength(0));
    },
    async storedCount(): Promise<number> {
      return (await sql`SELECT 1 FROM messages WHERE message_id = ${messageId}`).length;
    },
  };
}

describe('immunity 15: a gateway that is killed', () => {
  it('between push and acknowledgement: everything is delivered again, in order, under the same ids', async () => {
    const { gateway } = await onPostgres();
    const alice = await opened(gateway);
    const bob = await opened(gateway);
    const held = hold(bob.client);
    const texts = Array.from({ length: 120 }, (_, i) => String(i));
    for (const text of texts) await send(alice.client, bob, text);
    await eventually(() => expect(bob.client.envelopes).toHaveLength(120));
    // One page is processed, and its acknowledgement stored; the others are pushed and nothing more.
    const [first] = bob.client.pushes.filter((push) => push.name === 'messages');
    const done = (first!.payload as { envelopes: unknown[] }).envelopes.length;
    held.answerOne();
    await eventually(async () => expect((await open(bob)).pendingCount).toBe(120 - done));

    await killAndRestart(gateway);
    const again = await reopened(gateway, bob);
    await again.client.next('queueEmpty');
    expect(again.client.envelopes).toEqual(bob.client.envelopes.slice(done, 120));
    expect(contents(again.client)).toEqual(texts.slice(done));
  });

  it('before the commit of sendMessages: nothing was stored, and sent again it is delivered once', async () => {
    const { gateway, databaseUrl } = await onPostgres();
    const alice = await enrol(gateway, someone(), FEW_KEYS);
    const bob = await enrol(gateway, someone(), FEW_KEYS);
    const messageId = randomUUID();
    const storing = await holdStoring(databaseUrl, { from: alice, to: bob, messageId });
    const sending = send(alice.client, bob, 'once', messageId).catch((error: Error) => error.message);
    await storing.oneWaits();
    await gateway.kill('SIGKILL');
    expect(await sending).toContain('disconnected');
    await storing.endWaiting();
    await storing.letGo();
    expect(await storing.storedCount()).toBe(0);

    await gateway.restart();
    await deliveredOnce(gateway, alice, bob, messageId);
  });

  it('after the commit and before its answer: it is stored, and sent again it is still delivered once', async () => {
    const { gateway, databaseUrl } = await onPostgres();
    const alice = await enrol(gateway, someone(), FEW_KEYS);
    const bob = await enrol(gateway, someone(), FEW_KEYS);
    const messageId = randomUUID();
    const storing = await holdStoring(databaseUrl, { from: alice, to: bob, messageId });
    const sending = send(alice.client, bob, 'once', messageId).catch((error: Error) => error.message);
    await storing.oneWaits();
    // Frozen, it can't hear of the commit.
    await gateway.kill('SIGSTOP');
    await storing.letGo();
    await eventually(async () => expect(await storing.storedCount()).toBe(1));
    await gateway.kill('SIGKILL');
    expect(await sending).toContain('disconnected');

    await gateway.restart();
    await deliveredOnce(gateway, alice, bob, messageId);
  });

  async function deliveredOnce(gateway: GatewayProcess, alice: Party, bob: Party, messageId: string) {
    const sender = await gateway.connect(alice.address);
    await send(sender, bob, 'once', messageId);
    const again = await reopened(gateway, bob);
    await again.client.next('queueEmpty');
    expect(contents(again.client)).toEqual(['once']);
    await send(sender, bob, 'once', messageId);
    await send(sender, bob, 'the next');
    await eventually(() => expect(contents(again.client)).toEqual(['once', 'the next']));
  }

  it('at any moment of a stream, again and again: nothing is lost, and after de-duplication in order', async () => {
    const { gateway } = await onPostgres();
    let alice = await opened(gateway);
    let bob = await opened(gateway);
    const seen = new Map<string, string>();
    /** What a client does that keeps the ids of what it has processed. */
    const process = (client: Client): void => {
      client.onMessages = (page) => {
        for (const envelope of page.envelopes) {
          if (envelope.kind === 'message' && !seen.has(envelope.id)) {
            seen.set(envelope.id, Buffer.from(envelope.content, 'base64').toString());
          }
        }
        return { processed: page.envelopes.map((envelope) => envelope.id) };
      };
    };
    process(bob.client);
    let next = 0;
    for (const untilCount of [20, 50, 90]) {
      let killed: Promise<void> | null = null;
      for (let messageId = randomUUID(); ; ) {
        if (seen.size >= untilCount && killed === null) killed = gateway.kill('SIGKILL');
        try {
          await send(alice.client, bob, String(next), messageId);
        } catch {
          await killed;
          await gateway.restart();
          alice = await reopened(gateway, alice);
          bob = { ...bob, client: await gateway.connect(bob.address) };
          process(bob.client);
          await open(bob);
          // The sender does not know whether it was stored: the same id settles it.
          await send(alice.client, bob, String(next), messageId);
          next += 1;
          break;
        }
        next += 1;
        messageId = randomUUID();
      }
    }
    await eventually(() => expect(seen.size).toBe(next));
    expect([...seen.values()]).toEqual(Array.from({ length: next }, (_, i) => String(i)));
  });
});

/** What must outlive the process: asked for before it ends, and compared after it has started again. */
async function remembered(connect: (device: DeviceAddress) => Promise<Client>) {
  const at = { connect };
  const alice = await enrol(at, someone(), FEW_KEYS);
  const bob = await enrol(at, someone());
  const claimId = randomUUID();
  const claim = { claimId, userId: bob.address.userId };
  const bundle = await alice.client.call('requestBundle', claim);
  const messageId = await send(alice.client, bob, 'waits');
  const status = await bob.client.call('keyStatus');
  const { validation } = await bob.client.call('validateKeys', bob.device.validateInput());
  return async (): Promise<void> => {
    const client = await connect(bob.address);
    expect(await client.call('keyStatus')).toEqual(status);
    const claimer = await connect(alice.address);
    expect(await claimer.call('requestBundle', claim)).toEqual(bundle);
    const other = await claimer.call('requestBundle', { ...claim, claimId: randomUUID() });
    expect(other.devices[0]!.oneTimePreKey!.keyId).not.toBe(bundle.devices[0]!.oneTimePreKey!.keyId);
    // Made before the crash, it is good after it: every start shares the one secret.
    expect(await client.call('clientReady', { validation: validation! })).toMatchObject({ pendingCount: 1 });
    await client.next('queueEmpty');
    expect(client.envelopes).toMatchObject([{ kind: 'message', messageId, sender: alice.address }]);
  };
}

describe('over kill -9, everything is kept', () => {
  it('on a PostgreSQL by URL', async () => {
    const { gateway } = await onPostgres();
    const check = await remembered((device) => gateway.connect(device));
    await killAndRestart(gateway);
    await check();
  });

  it('on the embedded one, with the tokens that were signed with its folder’s secret', async () => {
    const dataDir = join(await emptyFolder(), 'data');
    // Without a configured key, the folder has a secret of its own.
    const gateway = await startGatewayProcess({ dataDir }, { JWT_SECRET: '' });
    undo.push(() => gateway.stop());
    const tokens = new Map<string, string>();
    const check = await remembered(async (device) => {
      const token =
        tokens.get(device.userId) ??
        (await signToken({
          secret: await embeddedSecret(dataDir),
          device,
          ttlMs: 3_600_000,
          clock: systemClock,
        }));
      tokens.set(device.userId, token);
      const client = await connectClient(gateway.url, token);
      undo.push(() => client.close());
      return client;
    });
    await killAndRestart(gateway);
    await check();
  });
});

describe('two starts on one DATA_DIR', () => {
  /** Runs `keygate serve` to its end. */
  function serve(dataDir: string) {
    const child = spawn(process.execPath, [KEYGATE, 'serve'], {
      env: { PATH: process.env.PATH, HOME: process.env.HOME, DATA_DIR: dataDir, PORT: '0', ADMIN_PORT: '0' },
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    let output = '';
    for (const stream of [child.stdout, child.stderr]) {
      stream.setEncoding('utf8').on('data', (chunk: string) => {
        output += chunk;
      });
    }
    const ended = new Promise<number | null>((resolve) => child.on('close', resolve));
    undo.push(async () => {
      child.kill('SIGTERM');
      await ended;
    });
    return { child, ended, output: () => output, serves: () => output.includes('gateway  http') };
  }

  it('one after the other: the second says so and ends with 1, the first serves on', async () => {
    const dataDir = join(await emptyFolder(), 'data');
    const first = await startGatewayProcess({ dataDir });
    undo.push(() => first.stop());
    const second = serve(dataDir);
    expect(await second.ended).toBe(1);
    expect(second.output().trim().split('\n')).toEqual([
      expect.stringMatching(/^keygate: .*(already|another|in use|runs)/i),
    ]);
    expect(second.output()).toContain(dataDir);
    expect(await (await first.connect(someone())).call('keyStatus')).toMatchObject({ keyVersion: 0 });
  });

  it('at once: one serves, the other says so and ends with 1', async () => {
    const dataDir = join(await emptyFolder(), 'data');
    const both = [serve(dataDir), serve(dataDir)];
    const loser = await Promise.race(both.map(async (start) => start.ended.then(() => start)));
    expect(await loser.ended).toBe(1);
    expect(loser.serves()).toBe(false);
    expect(loser.output()).toContain(dataDir);
    const winner = both.find((start) => start !== loser)!;
    await eventually(() => winner.serves(), { waitMaxMs: 20_000, that: `serving: ${winner.output()}` });
    winner.child.kill('SIGTERM');
    expect(await winner.ended).toBe(0);
  });
});

describe('SIGTERM', () => {
  it('tells every client to come back later, closes the sockets, and ends with 0', async () => {
    const { gateway } = await onPostgres();
    const clients = await Promise.all([1, 2, 3].map(() => gateway.connect(someone())));
    await gateway.kill('SIGTERM');
    expect(await gateway.ended).toEqual({ cause: 'ended', code: 0, signal: null });
    for (const client of clients) {
      expect(await client.next('serverDraining')).toEqual({ retryAfterMs: expect.any(Number) });
      // A reason after which Socket.IO's client reconnects by itself.
      expect(await client.disconnected).toBe('transport close');
    }
  });

  it('loses nothing of what was in flight', async () => {
    const { gateway } = await onPostgres();
    const alice = await opened(gateway);
    const bob = await opened(gateway);
    hold(bob.client);
    await send(alice.client, bob, 'in flight');
    await eventually(() => expect(bob.client.envelopes).toHaveLength(1));
    await gateway.kill('SIGTERM');
    await gateway.restart();
    const again = await reopened(gateway, bob);
    await again.client.next('queueEmpty');
    expect(again.client.envelopes).toEqual(bob.client.envelopes);
  });

  it('ends it although a client has fallen silent, which would hold it up for half a minute', async () => {
    const { gateway } = await onPostgres();
    const link = await startTcpProxy(gateway.url);
    undo.push(() => link.stop());
    const device = someone();
    const client = await connectClient(link.url, await tokenFor(device));
    undo.push(() => client.close());
    expect(await client.call('keyStatus')).toMatchObject({ keyVersion: 0 });
    link.impair({ swallow: 'both' });
    await gateway.kill('SIGTERM');
    expect(await gateway.ended).toEqual({ cause: 'ended', code: 0, signal: null });
  });

  it('a second time ends it at once', async () => {
    const { gateway } = await onPostgres();
    const client = await gateway.connect(someone());
    // A request that never ends holds up an end in good order.
    const { hostname, port } = new URL(gateway.url);
    const slow = connectTcp(Number(port), hostname);
    slow.on('error', () => {});
    await new Promise((resolve) =>
      slow.write('POST /api/keys/upload HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n', resolve),
    );
    await client.call('keyStatus');
    const first = gateway.kill('SIGTERM');
    await client.next('serverDraining');
    await gateway.kill('SIGTERM');
    await first;
    slow.destroy();
    expect(await gateway.ended).toEqual({ cause: 'ended', code: null, signal: 'SIGTERM' });
  });
});
