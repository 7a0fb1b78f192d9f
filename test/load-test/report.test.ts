/** What is told of a result whose every figure is another: no figure stands under the name of its neighbour. */
import { describe, expect, it } from 'vitest';
import { htmlReport } from '../../src/load-test/html-report.ts';
import { partOf } from '../../src/load-test/load-plan.ts';
import type { StepResult } from '../../src/load-test/meter.ts';
import type { LoadResult, PartResult } from '../../src/load-test/result.ts';
import { textReport } from '../../src/load-test/text-report.ts';

const NONE = { p50: 0, p90: 0, p99: 0, p999: 0, max: 0 };

const STORED: StepResult = {
  name: 'stored',
  count: 990,
  meanMs: 2.345,
  ms: { p50: 1.234, p90: 12.34, p99: 98.76, p999: 123.4, max: 1234.5 },
  curve: [
    { percentile: 0, ms: 1 },
    { percentile: 90, ms: 10 },
    { percentile: 99, ms: 100 },
  ],
  overTime: [
    { count: 500, ms: { p50: 1, p90: 2, p99: 3, p999: 4, max: 5 } },
    null,
    { count: 490, ms: { p50: 1, p90: 2, p99: 3, p999: 4, max: 5 } },
  ],
};
const NEVER: StepResult = { name: 'delivered', count: 0, meanMs: 0, ms: NONE, curve: [], overTime: [] };

const PART: PartResult = {
  plan: partOf('chat', { name: 'a <chat>', deviceCount: 8, ratePerSecond: 100, durationMs: 10_000 }),
  offeredPerSecond: 100,
  achievedPerSecond: 98.76,
  intervalMs: 500,
  offeringMs: 9_990,
  completingMs: 9_999,
  offered: 1_000,
  completed: 987,
  failed: 3,
  unfinished: 4,
  withheld: 6,
  failures: { RATE_LIMITED: 2, DISCONNECTED: 1 },
  lateMs: NONE,
  lateCount: 0,
  steps: [STORED, NEVER],
  rates: { offered: [40, 50, 60], achieved: [30, 50, 70] },
  messages: {
    sent: 1_000,
    stored: 990,
    delivered: 980,
    redelivered: 9,
    lost: 11,
    unproven: 12,
    doubled: 13,
    outOfOrder: 14,
    bounced: 1,
    foreign: 0,
  },
  claims: null,
};

const CLAIMS: PartResult = {
  ...PART,
  plan: partOf('claims', { deviceCount: 8, ratePerSecond: 100, durationMs: 10_000 }),
  unfinished: 0,
  withheld: 0,
  failures: {},
  steps: [],
  messages: null,
  claims: {
    withOneTimePreKey: 21,
    noneLeft: 22,
    limited: 23,
    handedOutTwice: 24,
    withPqOneTimePreKey: 25,
    withPqLastResortPreKey: 26,
  },
};

function resultOf(more: Partial<LoadResult> = {}): LoadResult {
  return {
    formatVersion: 1,
    keygateVersion: '1.2.3',
    startedAt: '2026-01-02T03:04:05.678Z',
    url: 'http://127.0.0.1:3000',
    wasInterrupted: false,
    machine: { node: 'v20.0.0', cpu: 'a <cpu>', cpuCount: 2 },
    ownLoad: { cores: 0.256, eventLoopDelayP99Ms: 1.5, eventLoopDelayMaxMs: 25.55 },
    parts: [PART, CLAIMS],
    warnings: ['a <warning>'],
    faults: ['a <fault>'],
    ...more,
  };
}

it('the table has each figure under its name', () => {
  expect(textReport(resultOf())).toBe(`Load test of http://127.0.0.1:3000

a <chat>  chat, 8 devices, 100/s, 10 s
  offered 1000 (100.0/s)   achieved 987 (98.8/s)   failed 3   unfinished 4   withheld 6
  ms          count       p50       p90       p99     p99.9       max
  stored        990      1.23      12.3      98.8       123      1235
  messages stored 990   delivered 980   lost 11   doubled 13   out of order 14   redelivered 9   not proven 12   bounced 1
  answered or ended with  RATE_LIMITED 2   DISCONNECTED 1

claims  claims, 8 devices, 100/s, 10 s
  offered 1000 (100.0/s)   achieved 987 (98.8/s)   failed 3
  one-time prekeys 21   handed out twice 24   bundles without, none left 22   bundles without, limited 23

load process: 0.26 of a core, timers 1.50 ms late at p99; Node v20.0.0, 2 cores
warning: a <warning>
fault: a <fault>`);
});

it('the table has the PQ prekeys of devices that have some', () => {
  const table = textReport(resultOf({ parts: [{ ...CLAIMS, plan: { ...CLAIMS.plan, hasPq: true } }] }));
  expect(table).toContain('claims  claims, 8 devices, 100/s, 10 s, with PQ prekeys\n');
  expect(table).toContain('limited 23   one-time PQ prekeys 25   last-resort ones instead 26\n');
});

describe('the page', () => {
  it('has each figure under its name, and a dash where there is none', () => {
    const page = htmlReport(resultOf());
    const [head, stored, never] = [...page.matchAll(/<tr>(.*?)<\/tr>/g)].map(([, row]) =>
      [...row!.matchAll(/<t[hd]>(.*?)<\/t[hd]>/g)].map(([, cell]) => cell),
    );
    expect(head).toEqual(['ms', 'count', 'mean', 'p50', 'p90', 'p99', 'p99.9', 'max']);
    expect(stored).toEqual(['stored', '990', '2.35', '1.23', '12.3', '98.8', '123', '1235']);
    expect(never).toEqual(['delivered', '0', ...Array.from({ length: 6 }, () => '–')]);
    for (const [name, figure] of [
      ['achieved', '987 (98.8/s)'],
      ['lost', '11'],
      ['bundles without, none left', '22'],
    ]) {
      expect(page).toContain(`<dt>${name}</dt><dd>${figure}</dd>`);
    }
    expect(page).toContain('<code>RATE_LIMITED</code> 2, <code>DISCONNECTED</code> 1');
    expect(page).toContain('2026-01-02 03:04:05 UTC, Keygate 1.2.3');
    expect(page).toContain('0.26 of a core, timers 1.50 ms late at p99 and 25.6 ms at most');
  });

  it('tells faults and warnings, and takes what others named as words', () => {
    const page = htmlReport(resultOf());
    expect(page).toContain('<p class="verdict bad">The gateway broke a promise, or nothing succeeded.</p>');
    expect(page).toContain('<ul class="bad"><li>a &lt;fault&gt;</li></ul>');
    expect(page).toContain('<ul class="warning"><li>a &lt;warning&gt;</li></ul>');
    expect(page).toContain('<h2>a &lt;chat&gt;</h2>');
    expect(page).toContain('2 × a &lt;cpu&gt;');
  });

  it('calls good what has no fault, and says where something did not end', () => {
    const verdict = (result: LoadResult) =>
      /<p class="verdict good">(.*?)<\/p>/.exec(htmlReport(result))?.[1];
    expect(verdict(resultOf({ faults: [] }))).toBe(
      'Of what ended, nothing was lost, doubled or out of order; 4 operations did not end.',
    );
    expect(verdict(resultOf({ faults: [], parts: [CLAIMS] }))).toBe(
      'Nothing was lost, doubled or out of order.',
    );
  });

  it('plots rates by the second, and each nine of the percentiles as wide as the other', () => {
    const page = htmlReport(resultOf({ parts: [PART] }));
    const plot = (title: string) =>
      page.split('<figure>').find((figure) => figure.includes(`<b>${title}</b>`))!;
    const labels = (figure: string, axis: 'x' | 'y') =>
      [
        ...figure.matchAll(new RegExp(`<text x="([\\d.]+)" y="[\\d.]+" class="${axis}">(.*?)</text>`, 'g')),
      ].map(([, place, label]) => ({ place: Number(place), label }));
    // Seventy in half a second are 140 a second.
    expect(labels(plot('Operations a second'), 'y').at(-1)).toMatchObject({ label: '150' });
    expect(labels(plot('Operations a second'), 'x').at(-1)).toMatchObject({ label: '1.4' });
    const nines = labels(plot('Latency by percentile'), 'x').filter(({ label }) => label !== '50');
    expect(nines.map(({ label }) => label)).toEqual(['0', '90', '99']);
    const [zero, one, two] = nines.map(({ place }) => place);
    expect(two! - one!).toBeCloseTo(one! - zero!, 1);
  });
});
