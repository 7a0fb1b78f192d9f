/** The page's own reasoning, without a browser: what it keeps, how it compares, what it writes. */
import { describe, expect, it } from 'vitest';
import { addressOf, parseAddress } from '../../../src/admin/web/address.ts';
import { differences } from '../../../src/admin/web/diff.ts';
import { createEventLog } from '../../../src/admin/web/event-log.ts';
import { comparable, inOneLine } from '../../../src/admin/web/redacted-text.ts';
import { duration, relative } from '../../../src/admin/web/time.ts';

describe('the log of events', () => {
  it('keeps the newest, in order, and counts what it let go', () => {
    const log = createEventLog<number>(4);
    log.append([1, 2, 3]);
    expect(log.toArray()).toEqual([1, 2, 3]);
    log.append([4, 5, 6, 7, 8, 9]);
    expect(log.toArray()).toEqual([6, 7, 8, 9]);
    expect([log.length, log.forgottenCount, log.at(0), log.at(3), log.at(4), log.at(-1)]).toEqual([
      4,
      5,
      6,
      9,
      undefined,
      undefined,
    ]);
    log.clear();
    expect([log.length, log.forgottenCount, log.toArray()]).toEqual([0, 0, []]);
  });
});

describe('the address', () => {
  it.each([
    ['#/events?device=alice.1&event=gate', 'events', null, 'device=alice.1&event=gate'],
    ['#/devices/alice%3Ax.1?messageId=1', 'devices', 'alice:x.1', 'messageId=1'],
    ['#/messages', 'messages', null, ''],
    ['', 'overview', null, ''],
    ['#/nonsense/%zz', 'overview', null, ''],
  ] as const)('%s is %s of %s with %s', (fragment, view, subject, query) => {
    const address = parseAddress(fragment);
    expect([address.view, address.subject, address.query.toString()]).toEqual([view, subject, query]);
  });

  it('is read as it was written, whatever a user id holds', () => {
    const fragment = addressOf('devices', 'a@b:c-d_e.1', 'messageId=7');
    expect(parseAddress(fragment)).toMatchObject({ view: 'devices', subject: 'a@b:c-d_e.1' });
  });
});

describe('a difference', () => {
  it('tells what changed, came and went, leaf by leaf, and what stayed', () => {
    const before = { code: null, input: { ids: [1, 2], gone: true, same: 'x' }, list: [] };
    const after = { code: 'FORBIDDEN', input: { ids: [1, 3, 4], same: 'x' }, list: [] };
    expect(differences(before, after)).toEqual([
      { kind: 'changed', path: 'code', before: null, after: 'FORBIDDEN' },
      { kind: 'same', path: 'input.ids[0]', value: 1 },
      { kind: 'changed', path: 'input.ids[1]', before: 2, after: 3 },
      { kind: 'removed', path: 'input.gone', before: true },
      { kind: 'same', path: 'input.same', value: 'x' },
      { kind: 'same', path: 'list', value: '[]' },
      { kind: 'added', path: 'input.ids[2]', after: 4 },
    ]);
  });
});

describe('a payload', () => {
  const payload = {
    userId: 'bob',
    messageId: '3f1c8a52-7d1e-4e0b-9c43-55f0a8c2e911',
    envelopes: [{ deviceId: 1, content: { bytes: 2048, digest: 'a1b2c3' } }, { more: 12 }],
    validation: { withheld: 'validation', length: 120 },
  };

  it('is one line, in which marks are short and ids known by their beginning', () => {
    expect(inOneLine(payload, 1000)).toBe(
      'userId: bob, messageId: 3f1c8a52…, envelopes: [{deviceId: 1, content: ‹2.0 KiB #a1b2c3›}, … 12 more], validation: ‹validation, 120 characters›',
    );
    expect(inOneLine(payload, 20).length).toBeLessThan(60);
  });

  it('is compared by its digests', () => {
    const other = structuredClone(payload);
    (other.envelopes[0] as { content: { digest: string } }).content.digest = 'ffffff';
    const changed = differences(comparable(payload), comparable(other)).filter(({ kind }) => kind !== 'same');
    expect(changed).toEqual([
      {
        kind: 'changed',
        path: 'envelopes[0].content',
        before: '‹2.0 KiB #a1b2c3›',
        after: '‹2.0 KiB #ffffff›',
      },
    ]);
  });
});

describe('a time', () => {
  it.each([
    [0.25, '0.3 ms'],
    [18.4, '18 ms'],
    [4_200, '4.2 s'],
    [61_000, '1 min'],
    [3 * 3_600_000 + 5 * 60_000, '3 h 5 min'],
    [49 * 3_600_000, '2 d 1 h'],
  ])('of %d ms is %s', (durationMs, text) => {
    expect(duration(durationMs)).toBe(text);
  });

  it('is told from where one stands', () => {
    expect([relative(0, 5_000), relative(65_000, 5_000), relative(5_000, 5_200)]).toEqual([
      '5.0 s ago',
      'in 1 min',
      'now',
    ]);
  });
});
