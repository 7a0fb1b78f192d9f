/** What the bench says of its runs: a figure that was not measured must never look like one that was reached. */
import { describe, expect, it } from 'vitest';
import type { Run } from './contest.ts';
import { type Results, type Verdict, verdictsOf } from './figures.ts';

const TWO_NODES = 'claims a second of two gateway processes ÷ of one';

function run(perSecond: number, cpuPerOperationUs: Record<string, number> = {}): Run {
  return {
    perSecond,
    latencyMs: null,
    cpuPerOperationUs,
    loadShare: null,
    loopShare: null,
    othersShare: 0,
    remarks: [],
  };
}

function resultsOf(rounds: Record<string, Run>[], more: Partial<Results> = {}): Results {
  const pools = { devices: 2_000, perDevice: 100 };
  return {
    setting: { commit: '', date: '', machine: '', versions: {} },
    options: {
      rounds: rounds.length,
      seconds: 1,
      pools,
      deepPools: pools,
      manyPools: pools,
      backlog: 10_000,
      cores: 2,
    },
    entrants: [],
    rounds,
    idle: {},
    start: null,
    ...more,
  };
}

function verdict(results: Results, figure: string): Verdict {
  return verdictsOf(results).find((each) => each.figure.startsWith(figure))!;
}

describe('the bench’s verdicts', () => {
  it('calls a figure unmeasured whose contestants did not take part', () => {
    for (const each of verdictsOf(resultsOf([{ gateway: run(1_000) }]))) {
      expect(each).toMatchObject({ value: null, outcome: 'not measured' });
    }
  });

  it('takes the median of the ratios within each round', () => {
    const rounds = [
      { gateway: run(100), 'pgbench-update': run(50) },
      { gateway: run(10_000), 'pgbench-update': run(10_000) },
      { gateway: run(300), 'pgbench-update': run(200) },
    ];
    expect(verdict(resultsOf(rounds), 'bundles a second ÷ pgbench')).toMatchObject({
      value: 1.5,
      outcome: 'passed',
    });
  });

  it('tells a bound from above from one from below', () => {
    const cpu = (us: number) => [{ gateway: run(1, { server: us }), echo: run(1, { server: 10 }) }];
    const figure = 'server CPU per bundle ÷ per bare Socket.IO echo';
    expect(verdict(resultsOf(cpu(25)), figure).outcome).toBe('passed');
    expect(verdict(resultsOf(cpu(26)), figure).outcome).toBe('missed');
  });

  it('has the recipient’s node and Redis in the cost of a message across nodes', () => {
    const rounds = [
      {
        'cross-node-messages': run(1_000, { server: 100, peer: 60, redis: 20, postgres: 500 }),
        'one-node-messages': run(1_000, { server: 100, redis: 50, postgres: 500 }),
      },
    ];
    expect(verdict(resultsOf(rounds), 'cross-node message').value).toBe(1.8);
  });

  it('names the machine where it is what limits two processes, and no miss', () => {
    const twoNodes = (us: number) => [
      { gateway: run(10_000), 'two-nodes': run(10_000, { server: us, peer: us, postgres: us }) },
    ];
    expect(verdict(resultsOf(twoNodes(65)), TWO_NODES)).toMatchObject({
      outcome: 'not judged',
      reason: 'the machine is the limit: 1.95 of 2 cores busy',
    });
    expect(verdict(resultsOf(twoNodes(40)), TWO_NODES).outcome).toBe('missed');
  });

  it('judges memory, and the start by its median', () => {
    const idle = {
      sockets: 10_000,
      bytesPerSocket: 19 * 1024,
      heapBytesPerSocket: 0,
      handshakesPerSecond: 1,
    };
    const results = resultsOf([], {
      idle: { gateway: idle },
      start: { coldMs: 9_000, warmMs: [900, 1_000, 5_000] },
    });
    expect(verdict(results, 'resident KB').outcome).toBe('missed');
    expect(verdict(results, 'seconds from start')).toMatchObject({ value: 1, outcome: 'passed' });
  });
});
