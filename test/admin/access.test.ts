import { beforeEach, describe, expect, it } from 'vitest';
import { type Access, createAccess } from '../../src/admin/access.ts';
import { type LogFields, silentLog } from '../../src/lib/log.ts';
import { createManualClock, type ManualClock } from '../support/manual-clock.ts';

const TOKEN = 'the-admin-token-of-the-tests';

describe('access to the inspector', () => {
  let clock: ManualClock;
  let access: Access;
  let logged: { fields: LogFields; message: string }[];
  beforeEach(() => {
    clock = createManualClock();
    logged = [];
    const note = (fields: LogFields, message: string) => logged.push({ fields, message });
    access = createAccess({ token: TOKEN, clock, log: { ...silentLog, info: note, warn: note } });
  });

  function loggedIn(): string {
    const outcome = access.login(TOKEN, 'a');
    if (outcome.kind !== 'session') throw new Error(outcome.kind);
    return outcome.id;
  }

  it('looks at five wrong tokens of a thousand, and at the right one only when the wait is over', async () => {
    const kinds = new Map<string, number>();
    for (let i = 0; i < 1_000; i++) {
      const { kind } = access.login(`wrong token ${i}`, 'a');
      kinds.set(kind, (kinds.get(kind) ?? 0) + 1);
    }
    expect(Object.fromEntries(kinds)).toEqual({ wrong: 5, throttled: 995 });
    expect(access.login(TOKEN, 'a')).toEqual({ kind: 'throttled', retryAfterMs: 1_000 });
    expect(access.check(TOKEN, 'a').kind).toBe('throttled');
    await clock.advance(1_000);
    expect(access.login(TOKEN, 'a').kind).toBe('session');
    expect(logged.filter(({ message }) => message === 'admin: a wrong token was shown')).toHaveLength(5);
    expect(JSON.stringify(logged)).not.toContain('wrong token 1');
  });

  it('waits twice as long after each further wrong token, up to a minute, and forgets after a while', async () => {
    for (let i = 0; i < 5; i++) access.login('wrong', 'a');
    const waitsMs: number[] = [];
    for (let i = 0; i < 8; i++) {
      const outcome = access.login('wrong', 'a');
      if (outcome.kind !== 'throttled') throw new Error(outcome.kind);
      waitsMs.push(outcome.retryAfterMs);
      await clock.advance(outcome.retryAfterMs);
      expect(access.login('wrong', 'a').kind).toBe('wrong');
    }
    expect(waitsMs).toEqual([1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000]);
    await clock.advance(15 * 60_000);
    expect(access.login('wrong', 'a').kind).toBe('wrong');
    expect(access.login('wrong', 'a').kind).toBe('wrong');
  });

  it('lets others in while one address waits, until guesses from many addresses make all wait', () => {
    for (let i = 0; i < 6; i++) access.login('wrong', 'a');
    expect(access.login(TOKEN, 'a').kind).toBe('throttled');
    expect(access.login(TOKEN, 'b').kind).toBe('session');
    for (let i = 0; i < 50; i++) access.login('wrong', `address ${i}`);
    expect(access.login(TOKEN, 'c').kind).toBe('throttled');
    // Whoever has been here with the right token is not kept out by what others guess.
    expect(access.login(TOKEN, 'b').kind).toBe('session');
    for (let i = 0; i < 6; i++) access.login('wrong', 'b');
    expect(access.login(TOKEN, 'b').kind).toBe('throttled');
  });

  it('tells what was opened with a session when its time is over, though nobody shows its id again', async () => {
    const ended: string[] = [];
    access.session(loggedIn())!.onEnd(() => ended.push('told'));
    await clock.advance(12 * 3_600_000 - 1);
    expect(ended).toEqual([]);
    await clock.advance(1);
    expect(ended).toEqual(['told']);
  });

  it('ends a session by logout, and tells what was opened with it', () => {
    const id = loggedIn();
    const ended: string[] = [];
    access.session(id)!.onEnd(() => ended.push('told'));
    const forget = access.session(id)!.onEnd(() => ended.push('forgotten'));
    forget();
    access.logout(id);
    expect(ended).toEqual(['told']);
    expect(access.session(id)).toBeNull();
    expect(access.session('made up')).toBeNull();
    expect(access.session(undefined)).toBeNull();
  });

  it('ends a session after twelve hours, and the oldest when there are too many', async () => {
    const first = loggedIn();
    for (let i = 0; i < 255; i++) loggedIn();
    expect(access.session(first)).not.toBeNull();
    const newest = loggedIn();
    expect(access.session(first)).toBeNull();
    await clock.advance(12 * 3_600_000);
    expect(access.session(newest)).toBeNull();
  });
});
