/** The line that shows a test while it runs. */
import { describe, expect, it } from 'vitest';
import type { Progress } from '../../src/load-test/load-test.ts';
import { progressLine } from '../../src/load-test/progress.ts';

const CHAT = { name: 'chat', offered: 0, completed: 0, failed: 0, underWay: 0, latencyMs: null };

function moment(more: Partial<Progress> = {}): Progress {
  return {
    phase: 'running',
    preparedCount: 6,
    deviceCount: 6,
    refusal: null,
    elapsedMs: 10_000,
    durationMs: 30_000,
    parts: [CHAT],
    ...more,
  };
}

describe('the line of a test that prepares', () => {
  const preparing = (preparedCount: number, refusal: Progress['refusal'] = null) =>
    progressLine(null, moment({ phase: 'preparing', preparedCount, refusal, elapsedMs: 0 }));

  it('counts devices, tells why the last one has to wait, and then that queues are filled', () => {
    expect(preparing(2)).toBe('preparing: 2 of 6 devices');
    expect(preparing(2, 'RATE_LIMITED')).toBe('preparing: 2 of 6 devices (RATE_LIMITED)');
    expect(preparing(6)).toBe('preparing: filling queues');
  });
});

describe('the line of a test that runs', () => {
  it('has the rates since the earlier moment, and the latencies since the start', () => {
    const before = moment({ parts: [{ ...CHAT, offered: 1_000, completed: 900 }] });
    const latencyMs = { p50: 1.5, p90: 20, p99: 123, p999: 400, max: 500 };
    const now = moment({
      elapsedMs: 12_000,
      parts: [
        { ...CHAT, offered: 1_200, completed: 1_000, failed: 3, underWay: 197, latencyMs },
        { ...CHAT, name: 'storm' },
      ],
    });
    expect(progressLine(before, now)).toBe(
      '12 of 30 s | ' +
        'chat: offered 100/s, achieved 50/s, p50 1.50 p99 123 ms, 197 under way, 3 failed | ' +
        'storm: offered 0/s, achieved 0/s, 0 under way',
    );
  });

  it('has the rates since the start where it was still preparing before, and none at the first instant', () => {
    const now = moment({ elapsedMs: 2_000, parts: [{ ...CHAT, offered: 100, completed: 60 }] });
    for (const before of [null, moment({ phase: 'preparing', elapsedMs: 0 })]) {
      expect(progressLine(before, now)).toBe('2 of 30 s | chat: offered 50/s, achieved 30/s, 0 under way');
    }
    const first = moment({ elapsedMs: 0 });
    expect(progressLine(null, first)).toBe('0 of 30 s | chat: offered –, achieved –, 0 under way');
  });

  it('shows no more time than the test has, while last answers are waited for', () => {
    expect(progressLine(null, moment({ elapsedMs: 41_000 }))).toMatch(/^30 of 30 s \| /);
    expect(progressLine(null, moment({ elapsedMs: 41_000, phase: 'ending' }))).toMatch(/^ending \| /);
  });
});
