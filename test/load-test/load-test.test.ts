/** Every scenario against a gateway in a process of its own, and one that breaks its promises. */
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { Server } from 'socket.io';
import { afterAll, beforeAll, describe, expect, it, onTestFinished } from 'vitest';
import { steadyClock } from '../../src/lib/clock.ts';
import { htmlReport } from '../../src/load-test/html-report.ts';
import { type PartPlan, partOf, SCENARIO_NAMES, type ScenarioName } from '../../src/load-test/load-plan.ts';
import { type LoadTest, LoadTestError, startLoadTest } from '../../src/load-test/load-test.ts';
import { progressLine } from '../../src/load-test/progress.ts';
import type { LoadResult, PartResult } from '../../src/load-test/result.ts';
import { textReport } from '../../src/load-test/text-report.ts';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import { UPLOAD_PRE_KEYS_MAX } from '../../src/protocol/limits.ts';
import { createDatabase } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { tokenFor } from '../support/gateway.ts';
import { type GatewayProcess, startGatewayProcess } from '../support/gateway-process.ts';
import { createManualClock } from '../support/manual-clock.ts';
import { startBrokenGateway } from './broken-gateway.ts';

let database: Awaited<ReturnType<typeof createDatabase>>;
let gateway: GatewayProcess;
beforeAll(async () => {
  database = await createDatabase();
  gateway = await startGatewayProcess({ databaseUrl: database.url });
});
afterAll(async () => {
  await gateway?.stop();
  await database?.drop();
});

let runs = 0;

async function start(
  parts: PartPlan[],
  { url = gateway.url, interrupted = new AbortController().signal, clock = steadyClock } = {},
): Promise<LoadTest> {
  const run = ++runs;
  const count = parts.reduce((sum, part) => sum + part.deviceCount, 0);
  const credentials = await Promise.all(
    Array.from({ length: count }, async (_, index) => {
      const address = { userId: `load-${run}-${index}`, deviceId: 1 };
      return { address, token: await tokenFor(address) };
    }),
  );
  return startLoadTest({
    plan: { url, parts },
    credentials,
    clock,
    random: Math.random,
    interrupted,
    keygateVersion: '0.0.0',
  });
}

const BRIEF = { deviceCount: 6, ratePerSecond: 40, durationMs: 1_000, contentBytes: 100, backlogLength: 20 };

describe('a load test of every scenario at once', () => {
  let result: LoadResult;
  beforeAll(async () => {
    const parts = SCENARIO_NAMES.map((name) =>
      partOf(name, name === 'storm' ? { ...BRIEF, ratePerSecond: null } : BRIEF),
    );
    result = await (await start(parts)).result;
  });

  function part(name: ScenarioName): PartResult {
    return result.parts.find(({ plan }) => plan.name === name)!;
  }

  function counts(name: ScenarioName): [string, number][] {
    return part(name).steps.map((step) => [step.name, step.count]);
  }

  it('finds no fault', () => {
    expect(result.faults).toEqual([]);
    expect(result.wasInterrupted).toBe(false);
    for (const { plan, failed, unfinished, failures } of result.parts) {
      expect({ name: plan.name, failed, unfinished, failures }).toEqual({
        name: plan.name,
        failed: 0,
        unfinished: 0,
        failures: {},
      });
    }
  });

  it('connects devices that each end their last connection first', () => {
    const { offered, completed, withheld } = part('connect');
    expect(offered).toBe(40);
    expect(completed + withheld).toBe(40);
    expect(counts('connect')).toEqual([['connected', completed]]);
  });

  it('claims prekeys, none twice', () => {
    expect(counts('claims')).toEqual([['claimed', 40]]);
    expect(part('claims').claims).toEqual({
      withOneTimePreKey: 40,
      handedOutTwice: 0,
      noneLeft: 0,
      limited: 0,
      withPqOneTimePreKey: 0,
      withPqLastResortPreKey: 0,
    });
  });

  it('chats, and measures storing and delivering', () => {
    expect(counts('chat')).toEqual([
      ['stored', 40],
      ['delivered', 40],
    ]);
    expect(part('chat').messages).toMatchObject({ sent: 40, stored: 40, delivered: 40 });
    for (const step of part('chat').steps) {
      expect(step.ms.p50).toBeGreaterThan(0);
      expect(step.ms.max).toBeGreaterThanOrEqual(step.ms.p99);
    }
  });

  it('drains each backlog once', () => {
    expect(counts('backlog')).toEqual([
      ['first message', 6],
      ['drained', 6],
    ]);
    expect(part('backlog').messages).toMatchObject({ stored: 120, delivered: 120 });
  });

  it('cuts all connections, and the messages that were in flight arrive once', () => {
    expect(counts('storm')).toEqual([
      ['connected', 6],
      ['served again', 6],
    ]);
    expect(part('storm').messages).toMatchObject({ sent: 6, stored: 6, delivered: 6, doubled: 0 });
  });

  it('writes to devices that read in fits as to the others', () => {
    const [stored, slow, others] = counts('slow-readers');
    expect(stored).toEqual(['stored', 40]);
    expect(slow![1]).toBeGreaterThan(0);
    expect(slow![1] + others![1]).toBe(40);
    expect(part('slow-readers').steps[1]!.ms.max).toBeGreaterThan(part('slow-readers').steps[2]!.ms.p50);
  });

  it('is told as a table with every part, its steps and its books', () => {
    const text = textReport(result);
    for (const name of SCENARIO_NAMES) expect(text).toContain(`\n${name}  `);
    for (const step of result.parts.flatMap(({ steps }) => steps)) expect(text).toContain(step.name);
    expect(text).toContain('lost 0   doubled 0   out of order 0');
    expect(text).toContain('handed out twice 0');
  });

  it('is told as a page that loads nothing, with plots of every step', () => {
    const page = htmlReport(result);
    expect(page).toContain(`content="default-src 'none'; style-src 'unsafe-inline'"`);
    expect(page).not.toMatch(
      /\b(src|href|srcset|action)\s*=|url\(|@import|<(script|link|iframe|object|img)\b/i,
    );
    const addresses = page.match(/https?:\/\/[^\s<,]+/g) ?? [];
    expect([...new Set(addresses)]).toEqual([gateway.url]);
    for (const step of ['connected', 'claimed', 'stored', 'delivered', 'delivered to the others']) {
      expect(page).toContain(`<b>${step}: latency over time</b>`);
    }
    // One storm makes no line over time.
    expect(page).not.toContain('<b>served again: latency over time</b>');
    expect(page.match(/<b>Latency by percentile<\/b>/g)).toHaveLength(result.parts.length);
    expect(page.match(/<b>Operations a second<\/b>/g)).toHaveLength(result.parts.length);
    expect(page).not.toMatch(/NaN|Infinity|undefined|null/);
  });
});

describe('a load test', () => {
  it('goes on over a gateway that is killed, and loses nothing', async () => {
    const interrupted = new AbortController();
    const warnings: Error[] = [];
    const onWarning = (warning: Error) => warnings.push(warning);
    process.on('warning', onWarning);
    onTestFinished(() => void process.off('warning', onWarning));
    // More than Node lets listen to one signal without a word.
    const part = partOf('chat', { ...BRIEF, deviceCount: 12, durationMs: 3_600_000 });
    const test = await start([part], { interrupted: interrupted.signal });
    const completed = () => test.progress().parts[0]!.completed;
    await eventually(() => completed() >= 20);
    const before = test.progress();
    await gateway.kill('SIGKILL');
    await gateway.restart();
    const atRestart = completed();
    await eventually(() => completed() >= atRestart + 40, { waitMaxMs: 20_000 });
    const line = progressLine(before, test.progress());
    expect(line).toMatch(/^\d+ of 3600 s \| chat: offered \d+\/s, achieved \d+\/s, p50 [\d.]+ p99 [\d.]+ ms/);

    interrupted.abort();
    const result = await test.result;
    expect(result.wasInterrupted).toBe(true);
    expect(result.faults).toEqual([]);
    expect(result.parts[0]!.failures.DISCONNECTED).toBeGreaterThanOrEqual(part.deviceCount);
    expect(result.parts[0]!.messages).toMatchObject({ lost: 0, doubled: 0, outOfOrder: 0, unproven: 0 });
    expect(warnings).toEqual([]);
    // Whoever was due while it was away had to wait.
    expect(result.parts[0]!.steps[0]!.ms.max).toBeGreaterThan(300);
  });

  it('waits for answers also where the gateway stands still as the last operations leave', async () => {
    const clock = createManualClock();
    const test = await start([partOf('claims', BRIEF)], { clock });
    await eventually(() => test.progress().phase === 'running');
    await gateway.kill('SIGSTOP');
    try {
      await clock.advance(BRIEF.durationMs);
      expect(test.progress().parts[0]).toMatchObject({ offered: 40, completed: 0 });
      await clock.advance(20_000);
      expect(test.progress().phase).toBe('running');
    } finally {
      await gateway.kill('SIGCONT');
    }
    const { parts, faults } = await test.result;
    expect(faults).toEqual([]);
    expect(parts[0]).toMatchObject({ completed: 40, failed: 0, unfinished: 0 });
    expect(parts[0]!.steps[0]!.ms.p50).toBeGreaterThan(20_000);
  });

  it('tells of what the gateway never answered', async () => {
    const clock = createManualClock();
    const test = await start([partOf('claims', BRIEF)], { clock });
    await eventually(() => test.progress().phase === 'running');
    await clock.advance(BRIEF.durationMs / 2);
    await eventually(() => test.progress().parts[0]!.underWay === 0);
    const { completed } = test.progress().parts[0]!;
    expect(completed).toBeGreaterThan(0);
    await gateway.kill('SIGSTOP');
    try {
      await clock.advance(60_000);
      const result = await test.result;
      const unfinished = 40 - completed;
      expect(result.parts[0]).toMatchObject({ offered: 40, completed, unfinished });
      expect(result.warnings.join()).toMatch(
        /claims: \d+ % of the operations had not ended when the test did/,
      );
      expect(htmlReport(result)).toContain(`${unfinished} operations did not end`);
    } finally {
      await gateway.kill('SIGCONT');
    }
  });

  it('refills the prekeys of devices that run low, each under a new id', async () => {
    // More claims of each than one upload can hold.
    const part = partOf('claims', { deviceCount: 2, ratePerSecond: 400, durationMs: 1_000 });
    const { faults, parts } = await (await start([part])).result;
    expect(faults).toEqual([]);
    expect(parts[0]!.failures).toEqual({});
    expect(parts[0]!.claims!.withOneTimePreKey).toBeGreaterThan(2 * UPLOAD_PRE_KEYS_MAX);
  });

  it('claims PQ prekeys too, and refills them', async () => {
    const part = partOf('claims', { deviceCount: 2, ratePerSecond: 400, durationMs: 1_000, hasPq: true });
    const { faults, parts } = await (await start([part])).result;
    expect(faults).toEqual([]);
    expect(parts[0]!.failures).toEqual({});
    const { withOneTimePreKey, withPqOneTimePreKey, withPqLastResortPreKey } = parts[0]!.claims!;
    expect(withPqOneTimePreKey).toBe(withOneTimePreKey);
    expect(withPqOneTimePreKey).toBeGreaterThan(2 * UPLOAD_PRE_KEYS_MAX);
    expect(withPqOneTimePreKey + withPqLastResortPreKey).toBe(400);
  });

  it('leaves unread what comes to a slow reader, in fits, while the others read', async () => {
    const clock = createManualClock();
    const part = partOf('slow-readers', { ...BRIEF, ratePerSecond: 10, durationMs: 4_000 });
    const test = await start([part], { clock });
    await eventually(() => test.progress().phase === 'running');
    const completed = () => test.progress().parts[0]!.completed;
    await clock.advance(2_950);
    // The first device is the slow one: it is written to in its turn, and by whoever would write to himself.
    const toSlow = (operations: number) =>
      Array.from({ length: operations }, (_, index) => index).filter(
        (index) => index % 6 === 0 || index % 6 === 1 + (index % 5),
      ).length;
    await eventually(() => expect(completed()).toBe(30 - toSlow(30)));
    expect(test.progress().parts[0]!.underWay).toBe(toSlow(30));
    await clock.advance(50);
    await eventually(() => expect(completed()).toBe(31));
    await clock.advance(1_000);
    const [, slow, others] = (await test.result).parts[0]!.steps;
    expect([slow!.count, others!.count]).toEqual([toSlow(40), 40 - toSlow(40)]);
  });

  it('finds what a broken gateway loses, doubles, misorders and refuses', async () => {
    const broken = await startBrokenGateway();
    try {
      // Two devices, so that many messages go the same way.
      const part = partOf('chat', { ...BRIEF, deviceCount: 2, ratePerSecond: 100 });
      const interrupted = new AbortController();
      const test = await start([part], { url: broken.url, interrupted: interrupted.signal });
      const { faults, parts } = await test.result;
      expect(parts[0]!.failures.RATE_LIMITED).toBe(10);
      expect(parts[0]!.failed).toBe(10);
      const { lost, doubled, outOfOrder } = parts[0]!.messages!;
      expect({ lost, doubled }).toEqual({ lost: 10, doubled: 10 });
      expect(outOfOrder).toBeGreaterThan(0);
      expect(faults).toEqual([
        'chat: 10 messages were acknowledged as stored and lost',
        'chat: 10 messages came under a second envelope id, so that no client can tell',
        `chat: ${outOfOrder} messages came after later ones of the same sender`,
      ]);
    } finally {
      await broken.stop();
    }
  });

  it('says so where nothing serves', async () => {
    const test = await start([partOf('chat', BRIEF)], { url: 'http://127.0.0.1:1' });
    await expect(test.result).rejects.toThrow(LoadTestError);
    await expect(test.result).rejects.toThrow(
      'no gateway serves at http://127.0.0.1:1 (connect ECONNREFUSED 127.0.0.1:1)',
    );
  });

  it.each(SCENARIO_NAMES)('says so where something else serves, to %s too', async (scenario) => {
    const http = createServer();
    const io = new Server(http, { transports: ['websocket'] });
    const asked = new Promise<unknown>((resolve) => {
      io.on('connection', (socket) => socket.onAny(resolve));
    });
    await new Promise<void>((resolve) => http.listen(0, '127.0.0.1', resolve));
    try {
      const clock = createManualClock();
      const url = `http://127.0.0.1:${(http.address() as AddressInfo).port}`;
      const test = await start([partOf(scenario, BRIEF)], { url, clock });
      const failure = expect(test.result).rejects.toThrow(`what serves at ${url} does not answer`);
      await asked;
      await clock.advance(30_000);
      await failure;
    } finally {
      await io.close();
    }
  });

  it('counts a refusal before the connection is a WebSocket by its code, and shows what it waits for', async () => {
    const limited = await startGatewayProcess(
      { databaseUrl: database.url },
      { LIMIT_HANDSHAKES_PER_ADDRESS: '9' },
    );
    try {
      const clock = createManualClock();
      const part = partOf('connect', { deviceCount: 6, ratePerSecond: 10, durationMs: 600 });
      const test = await start([part], { url: limited.url, clock });
      await eventually(() => test.progress().phase === 'running');
      await clock.advance(part.durationMs);
      const { parts } = await test.result;
      expect(parts[0]).toMatchObject({ completed: 3, failed: 3, failures: { RATE_LIMITED: 3 } });

      const interrupted = new AbortController();
      const again = await start([part], { url: limited.url, clock, interrupted: interrupted.signal });
      await eventually(() => again.progress().refusal === 'RATE_LIMITED');
      expect(progressLine(null, again.progress())).toBe('preparing: 0 of 6 devices (RATE_LIMITED)');
      interrupted.abort();
      expect(await again.result).toMatchObject({ wasInterrupted: true, faults: [], warnings: [] });
    } finally {
      await limited.stop();
    }
  });

  it('ends at once where it is interrupted while a gateway that stands still is to prepare the devices', async () => {
    const interrupted = new AbortController();
    await gateway.kill('SIGSTOP');
    try {
      const test = await start([partOf('chat', BRIEF)], {
        clock: createManualClock(),
        interrupted: interrupted.signal,
      });
      expect(test.progress().phase).toBe('preparing');
      interrupted.abort();
      expect(await test.result).toMatchObject({ wasInterrupted: true, faults: [] });
    } finally {
      await gateway.kill('SIGCONT');
    }
  });

  it('ends in good order where it is interrupted while queues are filled', async () => {
    const interrupted = new AbortController();
    const part = partOf('backlog', { ...BRIEF, backlogLength: 10_000 });
    const test = await start([part], { interrupted: interrupted.signal });
    await eventually(() => test.progress().preparedCount === part.deviceCount);
    interrupted.abort();
    const { parts, faults } = await test.result;
    expect(faults).toEqual([]);
    expect(parts[0]!.messages).toMatchObject({ lost: 0, unproven: 0 });
    expect(parts[0]!.messages!.delivered).toBe(parts[0]!.messages!.stored);
    expect(parts[0]!.messages!.sent).toBeLessThan(part.deviceCount * part.backlogLength);
  });

  it('ends also where the gateway stands still while queues are filled', async () => {
    const clock = createManualClock();
    const interrupted = new AbortController();
    const part = partOf('backlog', { ...BRIEF, backlogLength: 10_000 });
    const test = await start([part], { clock, interrupted: interrupted.signal });
    const failure = expect(test.result).rejects.toThrow('the queues were not filled yet');
    await eventually(() => test.progress().preparedCount === part.deviceCount);
    await gateway.kill('SIGSTOP');
    try {
      interrupted.abort();
      await clock.advance(30_000);
      await failure;
    } finally {
      await gateway.kill('SIGCONT');
    }
  });

  it.each([
    ['are forged', async () => 'none'],
    ['ran out', (address: DeviceAddress) => tokenFor(address, { ttlMs: -5_000 })],
  ])('says so where the tokens %s', async (_, tokenOf) => {
    const address = { userId: 'mallory', deviceId: 1 };
    const test = startLoadTest({
      plan: { url: gateway.url, parts: [partOf('connect', { deviceCount: 1 })] },
      credentials: [{ address, token: await tokenOf(address) }],
      clock: steadyClock,
      random: Math.random,
      interrupted: new AbortController().signal,
      keygateVersion: '0.0.0',
    });
    await expect(test.result).rejects.toThrow('the gateway refuses the tokens');
  });
});
