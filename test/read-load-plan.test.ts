import { describe, expect, it } from 'vitest';
import { ConfigError } from '../src/config.ts';
import { partFromOptions, partsFromMix } from '../src/read-load-plan.ts';
import { UsageError } from '../src/usage-error.ts';

function mix(file: unknown, duration?: string) {
  return partsFromMix({ name: 'mix.json', text: JSON.stringify(file), duration });
}

function problemsOf(file: unknown): readonly string[] {
  try {
    mix(file);
  } catch (error) {
    if (error instanceof ConfigError) return error.problems;
    throw error;
  }
  return [];
}

describe('the options of a load test', () => {
  it('make a chat where nothing is said, and take what is said', () => {
    expect(partFromOptions({})).toEqual({
      name: 'chat',
      scenario: 'chat',
      deviceCount: 100,
      ratePerSecond: 100,
      durationMs: 30_000,
      delayMs: 0,
      contentBytes: 256,
      backlogLength: 100,
      hasPq: false,
    });
    expect(
      partFromOptions({
        scenario: 'claims',
        pq: true,
        devices: '5',
        rate: '0.5',
        duration: '2m',
        'content-bytes': '9',
      }),
    ).toMatchObject({
      scenario: 'claims',
      deviceCount: 5,
      ratePerSecond: 0.5,
      durationMs: 120_000,
      contentBytes: 9,
      hasPq: true,
    });
    expect(partFromOptions({ scenario: 'storm' }).ratePerSecond).toBeNull();
  });

  it.each([
    [{ scenario: 'flood' }, /--scenario/],
    [{ devices: '0' }, /--devices/],
    [{ devices: '1.5' }, /--devices/],
    [{ devices: '' }, /--devices/],
    [{ devices: '0x3' }, /--devices: must be a number/],
    [{ rate: '1e3' }, /--rate: must be a number/],
    [{ devices: '1' }, /two devices/],
    [{ rate: 'fast' }, /--rate/],
    [{ rate: '-1' }, /--rate/],
    [{ duration: '30' }, /--duration: must be a time such as/],
    [{ duration: '25h' }, /--duration/],
    [{ duration: '0s' }, /--duration/],
    [{ rate: '10000', duration: '1h' }, /36000000 operations are more/],
  ])('%o are refused', (options, message) => {
    expect(() => partFromOptions(options)).toThrow(UsageError);
    expect(() => partFromOptions(options)).toThrow(message);
  });
});

describe('a mix file', () => {
  it('makes parts, each with the defaults of its scenario', () => {
    const parts = mix(
      {
        parts: [
          { scenario: 'chat', devices: 10, rate: 20, duration: '1s' },
          { scenario: 'storm', delay: '500ms', pq: true },
          { scenario: 'chat', name: 'large', contentBytes: 4096 },
        ],
      },
      '10s',
    );
    expect(parts).toMatchObject([
      { name: 'chat', deviceCount: 10, ratePerSecond: 20, durationMs: 1_000, delayMs: 0, hasPq: false },
      { name: 'storm', deviceCount: 200, ratePerSecond: null, durationMs: 10_000, delayMs: 500, hasPq: true },
      { name: 'large', scenario: 'chat', deviceCount: 100, contentBytes: 4096 },
    ]);
  });

  it('tells every fault with its place', () => {
    const problems = problemsOf({
      parts: [
        { scenario: 'chats' },
        { scenario: 'chat', devices: 0, rate: 'fast', speed: 1 },
        { scenario: 'chat', duration: 30 },
      ],
    });
    const places = problems.map((line) => line.split(': ').slice(0, 2).join(': '));
    expect(places.sort()).toEqual([
      'mix.json: parts[0].scenario',
      'mix.json: parts[1]',
      'mix.json: parts[1].devices',
      'mix.json: parts[1].rate',
      'mix.json: parts[2].duration',
    ]);
    expect(problems.join('\n')).toContain('"speed"');
  });

  it.each([
    [{}, 'mix.json: parts: '],
    [{ parts: [] }, 'mix.json: parts: '],
    [[], 'mix.json: '],
    [
      { parts: [{ scenario: 'chat' }, { scenario: 'chat' }] },
      'mix.json: parts[1]: a second part is called chat',
    ],
    [{ parts: [{ scenario: 'storm', devices: 1 }] }, 'mix.json: parts[0]: storm needs two devices'],
    [{ parts: [{ scenario: 'backlog', devices: 1000, backlog: 10000 }] }, 'mix.json: 10000000 operations'],
    // Each of them could be, alone.
    [
      { parts: ['a', 'b'].map((name) => ({ scenario: 'chat', name, rate: 500, duration: '1h' })) },
      'mix.json: 3600000 operations',
    ],
    [
      { parts: ['a', 'b'].map((name) => ({ scenario: 'connect', name, devices: 15_000 })) },
      'mix.json: has 30000 devices',
    ],
  ])('refuses %o', (file, beginning) => {
    const problems = problemsOf(file);
    expect(problems).toHaveLength(1);
    expect(problems[0]).toContain(beginning);
  });

  it('is told from what is no JSON', () => {
    expect(() => partsFromMix({ name: 'mix.json', text: 'parts: []' })).toThrow(/^mix\.json: is no JSON: /);
  });
});
