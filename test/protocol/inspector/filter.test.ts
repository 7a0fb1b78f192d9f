import { describe, expect, it } from 'vitest';
import { type StreamEvent, streamEvent } from '../../../src/protocol/inspector/events.ts';
import {
  filterFromQuery,
  filterToQuery,
  matchesFilter,
  type StreamFilter,
} from '../../../src/protocol/inspector/filter.ts';

const request: StreamEvent = {
  time: '2026-03-01T12:00:00.000Z',
  node: 'n',
  number: 1,
  device: 'alice.1',
  socket: 7,
  gate: 'open',
  kind: 'request',
  event: 'requestBundle',
  direction: 'in',
  door: 'socket',
  bytes: 100,
  latencyMs: 20,
  code: null,
  input: null,
  answer: null,
};
const claim = streamEvent.parse({
  ...request,
  kind: 'claim',
  event: 'claim',
  direction: 'server',
  device: 'bob.2',
  socket: null,
  gate: null,
  peer: 'alice.1',
  claimId: 'c',
  keyId: 1,
  absent: null,
  pqKeyId: null,
  pqFallback: false,
});
const messageId = 'a9a35a0e-4b1c-4d5e-8c2e-2f3a4b5c6d7e';
const message = streamEvent.parse({
  ...claim,
  kind: 'message',
  event: 'message',
  messageId,
  envelopeId: null,
  stage: 'stored',
  reason: null,
});

describe('the filter', () => {
  it.each<[StreamFilter, StreamEvent, boolean]>([
    [{}, request, true],
    [{ device: ['alice.1'] }, request, true],
    [{ device: ['alice'] }, request, true],
    [{ device: ['alice.2'] }, request, false],
    [{ device: ['al'] }, request, false],
    [{ device: ['alice.1'] }, claim, true],
    [{ device: ['bob.2', 'carol'] }, claim, true],
    [{ device: ['alice.1'] }, { ...request, device: null }, false],
    [{ event: ['requestBundle'] }, request, true],
    [{ event: ['requestBundle'] }, claim, false],
    [{ direction: ['in', 'out'] }, claim, false],
    [{ direction: ['server'] }, claim, true],
    [{ code: ['ok'] }, request, true],
    [{ code: ['ok'] }, { ...request, code: 'RATE_LIMITED' }, false],
    [{ code: ['RATE_LIMITED'] }, { ...request, code: 'RATE_LIMITED' }, true],
    [{ code: ['ok'] }, claim, false],
    [{ slowerThanMs: 19 }, request, true],
    [{ slowerThanMs: 20 }, request, false],
    [{ slowerThanMs: 0 }, claim, false],
    [{ gate: ['open'] }, request, true],
    [{ gate: ['validated'] }, request, false],
    [{ gate: ['open'] }, claim, false],
    [{ messageId }, message, true],
    [{ messageId: messageId.replace('a', 'b') }, message, false],
    [{ messageId }, request, false],
    [{ device: ['alice'], event: ['gate'] }, request, false],
  ])('%o is met by %o: %s', (filter, event, isMet) => {
    expect(matchesFilter(filter, event)).toBe(isMet);
  });

  it('has a text form for addresses, to be read and to come back from', () => {
    const filter: StreamFilter = {
      device: ['alice.1', 'bob@example.org'],
      event: ['requestBundle', 'gate'],
      direction: ['in'],
      code: ['ok', 'RATE_LIMITED'],
      slowerThanMs: 12.5,
      gate: ['validated'],
      messageId,
    };
    const query = filterToQuery(filter);
    expect(query).toBe(
      `device=alice.1,bob@example.org&event=requestBundle,gate&direction=in&code=ok,RATE_LIMITED&slowerThanMs=12.5&gate=validated&messageId=${messageId}`,
    );
    expect(filterFromQuery(query)).toEqual({ ok: true, filter });
    expect(filterFromQuery(`?${query}`)).toEqual({ ok: true, filter });
    expect(filterFromQuery('view=live&device=a.1&device=b.2,')).toEqual({
      ok: true,
      filter: { device: ['a.1', 'b.2'] },
    });
    expect(filterToQuery({})).toBe('');
    expect(filterFromQuery('')).toEqual({ ok: true, filter: {} });
  });

  it.each([
    ['event=nonsense', /^event: /],
    ['slowerThanMs=fast', /^slowerThanMs: /],
    ['slowerThanMs=-1', /^slowerThanMs: /],
    ['gate=ajar', /^gate: /],
    ['code=WRONG', /^code: /],
    ['messageId=1', /^messageId: /],
    [`device=${Array(40).fill('a').join(',')}`, /^device: /],
  ])('is refused as %s, by name', (query, message) => {
    const read = filterFromQuery(query);
    expect(read.ok ? '' : read.message).toMatch(message);
  });
});
