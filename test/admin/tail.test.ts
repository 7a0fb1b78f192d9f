/** `keygate tail` in a process of its own, against gateways in processes of their own. */
import { type ChildProcess, spawn } from 'node:child_process';
import { mkdtemp, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { lineOf } from '../../src/admin/tail-lines.ts';
import { ERRORS } from '../../src/protocol/errors.ts';
import { addressKey } from '../../src/protocol/ids.ts';
import { type StreamEvent, streamEvent } from '../../src/protocol/inspector/events.ts';
import { createDatabase } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { opened, redisFor, someone, undoAfterEach } from '../support/flow.ts';
import { send } from '../support/gateway.ts';
import { startGatewayProcess } from '../support/gateway-process.ts';
import { ADMIN_TOKEN } from '../support/inspector.ts';
import { KEYGATE } from '../support/program.ts';

const undo = undoAfterEach();

interface Tail {
  /** What is written to standard output, line by line. */
  lines(): string[];
  notices(): string;
  /** Ends it by SIGINT, unless it has ended. @returns its exit code */
  end(): Promise<number | null>;
  ended: Promise<number | null>;
}

function tail(args: string[], env: Record<string, string>): Tail {
  const { PATH = '', HOME = '' } = process.env;
  const child: ChildProcess = spawn(process.execPath, [KEYGATE, 'tail', ...args], {
    env: { PATH, HOME, ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let output = '';
  let notices = '';
  child.stdout!.setEncoding('utf8').on('data', (text: string) => {
    output += text;
  });
  child.stderr!.setEncoding('utf8').on('data', (text: string) => {
    notices += text;
  });
  const ended = new Promise<number | null>((resolve) => child.once('exit', (code) => resolve(code)));
  const end = (): Promise<number | null> => {
    child.kill('SIGINT');
    return ended;
  };
  undo.push(end);
  return { lines: () => output.split('\n').slice(0, -1), notices: () => notices, end, ended };
}

function eventsOf({ lines }: Tail): StreamEvent[] {
  return lines().map((line) => streamEvent.parse(JSON.parse(line)));
}

describe('keygate tail', () => {
  it('writes NDJSON of what matches on all nodes, and comes back by itself when its gateway does', async () => {
    const redis = await redisFor(undo);
    const database = await createDatabase();
    undo.push(() => database.drop());
    const store = { databaseUrl: database.url, redisUrl: redis.url };
    const [one, two] = await Promise.all([
      startGatewayProcess(store, { ADMIN_TOKEN }),
      startGatewayProcess(store, { ADMIN_TOKEN }),
    ]);
    undo.push(() => Promise.all([one.stop(), two.stop()]));
    const bobAddress = someone();
    const tailing = tail(['--url', one.adminUrl, '--device', addressKey(bobAddress), '--event', 'message'], {
      ADMIN_TOKEN,
    });
    const probe = await opened(one);
    const bob = await opened(two, bobAddress);
    // It is there when it shows something.
    await eventually(
      async () => {
        await send(probe.client, bob, 'anybody there?');
        return tailing.lines().length > 0;
      },
      { waitMaxMs: 20_000 },
    );
    const messageId = await send(probe.client, bob, 'hello');
    const life = () =>
      eventsOf(tailing).filter((event) => event.kind === 'message' && event.messageId === messageId);
    await eventually(() => expect(life()).toHaveLength(4));
    expect(life().map((event) => event.kind === 'message' && event.stage)).toEqual(
      expect.arrayContaining(['stored', 'poked', 'pushed', 'acknowledged']),
    );
    expect(new Set(life().map(({ node }) => node)).size).toBe(2);
    expect(eventsOf(tailing).every(({ kind }) => kind === 'message')).toBe(true);

    await one.restart();
    await eventually(() => expect(tailing.notices()).toContain('connected again'), { waitMaxMs: 20_000 });
    expect(tailing.notices()).toContain('trying again in');
    const alice = await opened(one);
    const count = tailing.lines().length;
    await eventually(async () => {
      await send(alice.client, bob, 'again');
      return tailing.lines().length > count;
    });
    expect(await tailing.end()).toBe(0);
  });

  it('takes the token from the file that the embedded gateway made, and needs no other configuration', async () => {
    const dataDir = await mkdtemp(join(tmpdir(), 'keygate-tail-'));
    undo.push(() => rm(dataDir, { recursive: true, force: true }));
    const gateway = await startGatewayProcess({ dataDir }, { LOG_LEVEL: 'info' });
    undo.push(() => gateway.stop());
    expect(await gateway.output()).toContain(join(dataDir, 'admin-token'));
    expect((await stat(join(dataDir, 'admin-token'))).mode & 0o777).toBe(0o600);
    const env = { DATA_DIR: dataDir, ADMIN_PORT: new URL(gateway.adminUrl).port };
    const tailing = tail(['--event', 'handshakeRefused', '--json'], env);
    const wrong = tail(['--json'], { ...env, ADMIN_TOKEN: 'not-the-admin-token' });
    await eventually(
      async () => {
        await fetch(`${gateway.url}/api/keys/stats`);
        return tailing.lines().length > 0;
      },
      { waitMaxMs: 20_000 },
    );
    expect(eventsOf(tailing)[0]).toMatchObject({ kind: 'handshakeRefused', code: 'UNAUTHENTICATED' });
    expect(await wrong.ended).toBe(1);
    expect(wrong.notices()).toContain('this is not the admin token');
  });

  it('says what it was asked wrongly, without asking a gateway', async () => {
    const wrongs = [
      tail(['--event', 'nonsense'], { ADMIN_TOKEN }),
      tail(['--slower-than', 'soon'], { ADMIN_TOKEN }),
      tail(['--url', 'ftp://x'], { ADMIN_TOKEN }),
      tail(['--url', 'http://operator:hunter2@127.0.0.1:1'], { ADMIN_TOKEN }),
      tail(['--code', 'NOPE'], { ADMIN_TOKEN }),
    ];
    expect(await Promise.all(wrongs.map(({ ended }) => ended))).toEqual([2, 2, 2, 2, 2]);
    expect(wrongs[0]!.notices()).toMatch(
      /--event: is no request, push or kind of event; there are uploadKeys,/,
    );
    expect(wrongs[1]!.notices()).toMatch(/--slower-than: /);
    expect(wrongs[2]!.notices()).toMatch(/--url must be/);
    expect(wrongs[3]!.notices()).toMatch(/--url must hold no name and no password/);
    expect(wrongs[3]!.notices()).not.toContain('hunter2');
    const codes = Object.keys(ERRORS).join(', ');
    expect(wrongs[4]!.notices()).toContain(`--code: must be ok or one of ${codes}\n`);
  });
});

describe('a line of a terminal', () => {
  const request = streamEvent.parse({
    time: '2026-03-01T12:34:56.789Z',
    node: 'one',
    number: 1,
    device: 'alice.1',
    socket: 7,
    gate: 'open',
    kind: 'request',
    event: 'requestBundle',
    direction: 'in',
    door: 'socket',
    bytes: 120,
    latencyMs: 3,
    code: null,
    input: null,
    answer: null,
  });

  it('has columns that line up', () => {
    const late = { ...request, device: 'bob.12', code: 'RATE_LIMITED', latencyMs: 1_234 } as StreamEvent;
    expect([request, late].map((event) => lineOf(event, { colours: false }))).toEqual([
      '12:34:56.789 alice.1              → requestBundle      ok                        3 ms  socket 7, 120 B, one',
      '12:34:56.789 bob.12               → requestBundle      RATE_LIMITED           1234 ms  socket 7, 120 B, one',
    ]);
  });

  it('is coloured on a terminal: what went well, what did not, and what was slow', () => {
    expect(lineOf(request, { colours: true })).toContain('\u001b[32mok');
    const slow = { ...request, code: 'INTERNAL', latencyMs: 300 } as StreamEvent;
    expect(lineOf(slow, { colours: true })).toContain('\u001b[31mINTERNAL');
    expect(lineOf(slow, { colours: true })).toContain('\u001b[33m   300 ms');
  });
});
