/** What a running gateway exports, after things have really happened in it. */
import { randomUUID } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { parse } from 'yaml';
import { eventually } from '../support/eventually.ts';
import { FEW_KEYS, gatewayFor, undoAfterEach } from '../support/flow.ts';
import {
  connectClient,
  enrol,
  open,
  RefusedError,
  send,
  startGateway,
  type TestGateway,
} from '../support/gateway.ts';
import { createManualClock } from '../support/manual-clock.ts';

const undo = undoAfterEach();
const ALICE = { userId: 'alice', deviceId: 1 };
const BOB = { userId: 'bob', deviceId: 1 };
let gateway: TestGateway;

beforeAll(async () => {
  gateway = await startGateway();
  const alice = await enrol(gateway, ALICE);
  const bob = await enrol(gateway, BOB, { oneTimePreKeys: 1, pqOneTimePreKeys: 0 });
  await open(alice);
  // Two claims of the one key: the second goes without.
  for (let index = 0; index < 2; index++) {
    await alice.client.call('requestBundle', { claimId: randomUUID(), ...BOB });
  }
  const input = bob.device.uploadInput({ oneTimePreKeys: 3, pqOneTimePreKeys: 0 });
  await bob.client.call('uploadKeys', input);
  const bad = bob.device.newSignedPreKey();
  await bob.client.refusal('rotateSignedPreKey', {
    signedPreKey: { ...bad, keyId: 77, signature: input.signedPreKey.signature },
  });
  await send(alice.client, bob, 'held');
  await bob.client.call('uploadKeys', bob.device.uploadInput({ oneTimePreKeys: 0, pqOneTimePreKeys: 0 }));
  await open(bob);
  await bob.client.next('queueEmpty');
  // Nobody can read this one any more: it comes back.
  await bob.client.call('resetKeys');
  await bob.client.next('gateClosed');
  await expect(connectClient(gateway.url, 'no token')).rejects.toBeInstanceOf(RefusedError);
  await fetch(`${gateway.url}/api/keys/stats`, { headers: { authorization: 'Bearer no' } });
});
afterAll(() => gateway.stop());

async function read({ adminUrl } = gateway): Promise<string> {
  const answer = await fetch(`${adminUrl}/metrics`);
  expect(answer.status).toBe(200);
  expect(answer.headers.get('content-type')).toMatch(/^text\/plain; version=0\.0\.4/);
  return await answer.text();
}

/** The value of one series as it stands in the text. */
function seriesValue(text: string, series: string): number {
  const line = text.split('\n').find((one) => one.startsWith(`${series} `));
  if (line === undefined) throw new Error(`there is no ${series} in\n${text}`);
  return Number(line.slice(series.length + 1));
}

describe('/metrics', () => {
  it.each([
    ['keygate_connections', 2],
    ['keygate_gates{state="open"}', 1],
    ['keygate_handshakes_total{result="ok"}', 2],
    ['keygate_handshakes_total{result="UNAUTHENTICATED"}', 1],
    ['keygate_http_refused_total{code="UNAUTHENTICATED"}', 1],
    ['keygate_gates_closed_total{reason="keysReset"}', 1],
    ['keygate_gate_open_seconds_count', 2],
    ['keygate_request_duration_seconds_count{event="requestBundle",code="ok"}', 2],
    ['keygate_request_duration_seconds_count{event="rotateSignedPreKey",code="SIGNATURE_INVALID"}', 1],
    ['keygate_claims_total{kind="oneTime"}', 1],
    ['keygate_claims_total{kind="noneLeft"}', 1],
    ['keygate_prekeys_uploaded_total{verdict="stored"}', 10 + 5 + 1 + 3],
    ['keygate_signature_failures_total{kind="signedPreKey"}', 1],
    ['keygate_batch_size_count{of="claim"}', 2],
    ['keygate_batch_size_bucket{of="push",le="1"}', 1],
    ['keygate_messages_stored_total', 1],
    ['keygate_messages_delivered_total', 1],
    ['keygate_delivery_latency_seconds_count', 1],
    ['keygate_bus_up', 1],
    ['keygate_database_waiting', 0],
    ['keygate_devices_by_available_prekeys{le="10"}', 1],
    ['keygate_devices_by_available_prekeys{le="+Inf"}', 1],
  ])('%s is %d', async (series, value) => {
    await eventually(async () => expect(seriesValue(await read(), series)).toBe(value));
  });

  it('is not stuck after the clock was set back by a day', async () => {
    const clock = createManualClock();
    const moved = await gatewayFor(undo, { clock });
    const devices = async (): Promise<number> =>
      seriesValue(await read(moved), 'keygate_devices_by_available_prekeys{le="+Inf"}');
    expect(await devices()).toBe(0);
    await enrol(moved, ALICE, FEW_KEYS);
    expect(await devices()).toBe(0);
    await clock.advance(-86_400_000);
    expect(await devices()).toBe(1);
  });

  it('has labels of few values, and nothing of a device in any', async () => {
    const text = await read();
    expect(text).not.toMatch(/alice|bob/);
    const series = text.split('\n').filter((line) => line.startsWith('keygate_'));
    expect(series.length).toBeGreaterThan(50);
    expect(series.length).toBeLessThan(2_000);
  });

  it('tells of a distribution what it is: cumulated buckets, the last of them the count', async () => {
    const text = await read();
    const counts = [
      ...text.matchAll(
        /^keygate_request_duration_seconds_bucket\{event="uploadKeys",code="ok",le="[^"]+"\} (\d+)$/gm,
      ),
    ].map(([, count]) => Number(count));
    expect(counts).toHaveLength(15);
    expect(counts).toEqual([...counts].sort((a, b) => a - b));
    expect(counts.at(-1)).toBe(
      seriesValue(text, 'keygate_request_duration_seconds_count{event="uploadKeys",code="ok"}'),
    );
    const sum = seriesValue(text, 'keygate_request_duration_seconds_sum{event="uploadKeys",code="ok"}');
    expect(sum).toBeGreaterThan(0);
  });
});

describe('what is shipped to watch it', () => {
  const NAME = /\b(?:keygate|nodejs|process)_[a-z0-9_]+/g;

  async function exported(): Promise<Set<string>> {
    const names = new Set<string>();
    for (const [, name, type] of (await read()).matchAll(/^# TYPE (\S+) (\S+)$/gm)) {
      names.add(name!);
      if (type === 'histogram') for (const part of ['bucket', 'sum', 'count']) names.add(`${name}_${part}`);
    }
    return names;
  }

  it('is a dashboard that asks for nothing but what is exported, and for every metric of Keygate', async () => {
    const dashboard = JSON.parse(readFileSync('deploy/grafana-dashboard.json', 'utf8')) as {
      panels: { targets?: { expr: string }[] }[];
    };
    const asked = dashboard.panels
      .flatMap(({ targets = [] }) => targets)
      .flatMap(({ expr }) => expr.match(NAME) ?? []);
    const names = await exported();
    expect(asked.filter((name) => !names.has(name))).toEqual([]);
    const shown = new Set(asked.map((name) => name.replace(/_(bucket|sum|count)$/, '')));
    const ours = [...names]
      .map((name) => name.replace(/_(bucket|sum|count)$/, ''))
      .filter((name) => name.startsWith('keygate_'));
    // Whether the bus is up is a matter for an alert, not for a curve.
    expect(ours.filter((name) => !shown.has(name) && name !== 'keygate_bus_up')).toEqual([]);
  });

  it('is a set of alert rules that ask for nothing but what is exported, each with a summary', async () => {
    const { groups } = parse(readFileSync('deploy/alerts.yaml', 'utf8')) as {
      groups: { rules: { alert: string; expr: string; annotations: { summary: string } }[] }[];
    };
    const rules = groups.flatMap((group) => group.rules);
    expect(rules.length).toBeGreaterThan(8);
    const names = await exported();
    for (const { alert, expr, annotations } of rules) {
      expect(annotations.summary, alert).not.toBe('');
      const asked = expr.match(NAME) ?? [];
      expect(asked.length, alert).toBeGreaterThan(0);
      expect(
        asked.filter((name) => !names.has(name)),
        alert,
      ).toEqual([]);
    }
  });
});
