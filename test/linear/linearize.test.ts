/** The checker itself: what it accepts, what it refuses, and that it says so where it can't tell. */
import { describe, expect, it } from 'vitest';
import { contradiction, type KeyEntry } from './key-history.ts';
import { KEY_LIMITS } from './key-limits.ts';
import type { Data, Key, KeyRequest } from './key-model.ts';
import { type Entry, linearize, type Machine } from './linearize.ts';

const key = (keyId: number): Key => ({ keyId, name: `key ${keyId}`, identity: 'A' });
const signed = (keyId: number): Key => ({ keyId, name: `signed ${keyId}`, identity: 'A' });
const NONE = { stored: 0, unchanged: 0, conflicts: [] };

/** Writes a history line by line. */
function scene() {
  const entries: KeyEntry[] = [];
  let moment = 0;
  const scene = {
    entries,
    ask(request: KeyRequest): KeyEntry {
      const entry: KeyEntry = {
        ...{ by: 'somebody', request, answer: null },
        ...{ askedAt: moment++, answeredAt: Number.POSITIVE_INFINITY },
      };
      entries.push(entry);
      return entry;
    },
    answer(entry: KeyEntry, data: Data): void {
      Object.assign(entry, { answer: { ok: true, data }, answeredAt: moment++ });
    },
    refuse(entry: KeyEntry, code: string): void {
      Object.assign(entry, { answer: { ok: false, code }, answeredAt: moment++ });
    },
    upload: (...keyIds: number[]) => scene.ask(uploadOf(keyIds)),
    add: (...keyIds: number[]) => scene.ask({ name: 'addPreKeys', oneTime: { ec: keyIds.map(key), pq: [] } }),
    withdraw: (...keyIds: number[]) => scene.ask({ name: 'withdrawPreKeys', ids: { ec: keyIds, pq: [] } }),
    claim: (claimId: string) => scene.ask({ name: 'requestBundle', claimer: 'c', claimId, ofAll: false }),
    status: () => scene.ask({ name: 'keyStatus' }),
    check: () => scene.ask({ name: 'checkPreKeys' }),
    stored(entry: KeyEntry, stored: number, availableCount: number, countVersion: number): void {
      const oneTimePreKeys = { ...NONE, stored };
      scene.answer(entry, {
        ...{ keyVersion: 1, oneTimePreKeys, pqOneTimePreKeys: NONE },
        ...{ availableCount, pqAvailableCount: 0, countVersion },
      });
    },
    gave(entry: KeyEntry, keyId: number | null, signedId = 1): void {
      scene.answer(entry, {
        ...{ registrationId: 1, identityKey: 'A', signedPreKey: `signed ${signedId}` },
        oneTimePreKey: keyId === null ? null : `key ${keyId}`,
        oneTimePreKeyAbsent: keyId === null ? 'noneLeft' : null,
        ...{ pqPreKey: null, isLastResort: false },
      });
    },
    counted(entry: KeyEntry, availableCount: number, countVersion: number): void {
      const needsMorePreKeys = availableCount < KEY_LIMITS.lowThreshold;
      scene.answer(entry, { needsMorePreKeys, availableCount, pqAvailableCount: 0, countVersion });
    },
    stood(entry: KeyEntry, how: { signedPreKeyId: number; keyVersion: number; countVersion: number }): void {
      scene.answer(entry, {
        ...{ identityKey: 'A', pqLastResortPreKeyId: null, preKeyCount: 0, pqPreKeyCount: 0, expires: true },
        ...how,
      });
    },
    /** A device with these keys, whose upload has been answered. */
    device(...keyIds: number[]): void {
      scene.stored(scene.upload(...keyIds), keyIds.length, keyIds.length, keyIds.length === 0 ? 0 : 1);
    },
    verdict: () => contradiction(entries, KEY_LIMITS),
  };
  return scene;
}

function uploadOf(keyIds: readonly number[]): KeyRequest {
  return {
    ...{ name: 'uploadKeys', identity: 'A', registrationId: 1, signedPreKey: signed(1), lastResort: null },
    oneTime: { ec: keyIds.map(key), pq: [] },
    ...{ replaceIdentity: false, ifKeyVersion: null },
  };
}

const rotateTo = (keyId: number): KeyRequest => ({
  ...{ name: 'rotateSignedPreKey', signedPreKey: signed(keyId), lastResort: null, ifKeyVersion: null },
});

describe('the checker accepts', () => {
  it('claims at once, whichever came first', () => {
    const story = scene();
    story.device(1, 2);
    const [one, other, third] = [story.claim('c1'), story.claim('c2'), story.claim('c3')];
    story.gave(one, 2);
    story.gave(third, null);
    story.gave(other, 1);
    expect(story.verdict()).toBeNull();
  });

  it('a read beside a change, of before or of after', () => {
    for (const isBefore of [true, false]) {
      const story = scene();
      story.device();
      const rotation = story.ask(rotateTo(2));
      const status = story.status();
      story.answer(rotation, { keyVersion: 2 });
      story.stood(
        status,
        isBefore
          ? { signedPreKeyId: 1, keyVersion: 1, countVersion: 0 }
          : { signedPreKeyId: 2, keyVersion: 2, countVersion: 0 },
      );
      expect(story.verdict()).toBeNull();
    }
  });

  it('a request whose answer was lost, whether it was carried out, was not, or is long after', () => {
    for (const available of [1, 2]) {
      const story = scene();
      story.device(1);
      story.add(2);
      story.counted(story.check(), available, available);
      expect(story.verdict()).toBeNull();
    }
    const story = scene();
    story.device(1);
    story.add(2);
    story.counted(story.check(), 1, 1);
    story.counted(story.check(), 2, 2);
    expect(story.verdict()).toBeNull();
  });

  it('a repeated claim with its first answer, also where that was lost', () => {
    const story = scene();
    story.device(1, 2);
    story.claim('c1');
    story.gave(story.claim('c2'), 2);
    story.gave(story.claim('c1'), 1);
    story.gave(story.claim('c1'), 1);
    expect(story.verdict()).toBeNull();
  });

  it('a countVersion that leaps, where the pools have changed', () => {
    const story = scene();
    story.device(1, 2);
    story.gave(story.claim('c1'), 1);
    story.counted(story.check(), 1, 7);
    story.counted(story.check(), 1, 7);
    expect(story.verdict()).toBeNull();
  });

  it('a refusal of what took long, beside a change of the keys', () => {
    const story = scene();
    story.device(1);
    const [late, claim] = [story.add(2), story.claim('c1')];
    const replacement = story.ask({ ...uploadOf([3]), identity: 'B', replaceIdentity: true } as KeyRequest);
    story.stored(replacement, 1, 1, 3);
    Object.assign(replacement.answer!, {
      data: { ...(replacement.answer as { data: Data }).data, keyVersion: 2 },
    });
    story.refuse(late, 'KEYS_OUT_OF_SYNC');
    story.refuse(claim, 'UNAVAILABLE');
    expect(story.verdict()).toBeNull();
  });
});

describe('the checker refuses', () => {
  it('a key that is given twice', () => {
    const story = scene();
    story.device(1, 2);
    const [one, other] = [story.claim('c1'), story.claim('c2')];
    story.gave(one, 1);
    story.gave(other, 1);
    expect(story.verdict()).toContain('no order explains the answers');
  });

  it('a key that overtakes an older one', () => {
    const story = scene();
    story.device(1, 2);
    story.gave(story.claim('c1'), 2);
    expect(story.verdict()).not.toBeNull();
  });

  it('"none left" while one is left', () => {
    const story = scene();
    story.device(1, 2);
    const [one, other] = [story.claim('c1'), story.claim('c2')];
    story.gave(one, null);
    story.gave(other, 1);
    expect(story.verdict()).not.toBeNull();
  });

  it('a repeated claim with another answer', () => {
    const story = scene();
    story.device(1, 2);
    const [one, again] = [story.claim('c1'), story.claim('c1')];
    story.gave(again, 2);
    story.gave(one, 1);
    expect(story.verdict()).not.toBeNull();
  });

  it('a key that is handed out although its withdrawal was answered', () => {
    const story = scene();
    story.device(1, 2);
    story.answer(story.withdraw(1), {
      ...{ withdrawnCount: 1, availableCount: 1, pqAvailableCount: 0, countVersion: 2 },
    });
    story.gave(story.claim('c1'), 1);
    expect(story.verdict()).not.toBeNull();
  });

  it('a count that goes back', () => {
    const story = scene();
    story.device(1, 2);
    const claim = story.claim('c1');
    story.counted(story.check(), 1, 2);
    story.counted(story.check(), 2, 1);
    story.gave(claim, 1);
    expect(story.verdict()).not.toBeNull();
  });

  it('another count under the same countVersion, and the same count under another', () => {
    for (const [available, countVersion] of [
      [1, 1],
      [2, 3],
    ] as const) {
      const story = scene();
      story.device(1, 2);
      const claim = story.claim('c1');
      story.counted(story.check(), available, countVersion);
      story.gave(claim, 1);
      expect(story.verdict()).not.toBeNull();
    }
  });

  it('an upload that was lost although it was answered', () => {
    const story = scene();
    story.device(1);
    const [one, other] = [story.add(2), story.add(3)];
    story.stored(one, 1, 2, 2);
    story.stored(other, 1, 2, 2);
    expect(story.verdict()).not.toBeNull();
  });

  it('a read that is older than a change that was answered before it was asked', () => {
    const story = scene();
    story.device();
    story.answer(story.ask(rotateTo(2)), { keyVersion: 2 });
    story.stood(story.status(), { signedPreKeyId: 1, keyVersion: 1, countVersion: 0 });
    expect(story.verdict()).not.toBeNull();
  });

  it('a read that is half of before and half of after a change', () => {
    const story = scene();
    story.device();
    const rotation = story.ask(rotateTo(2));
    const status = story.status();
    story.answer(rotation, { keyVersion: 2 });
    story.stood(status, { signedPreKeyId: 2, keyVersion: 1, countVersion: 0 });
    expect(story.verdict()).not.toBeNull();
  });

  it('two changes that were both to be the first since the same keyVersion', () => {
    const story = scene();
    story.device();
    const [one, other] = [2, 3].map((keyId) =>
      story.ask({ ...rotateTo(keyId), ifKeyVersion: 1 } as KeyRequest),
    );
    story.answer(one!, { keyVersion: 2 });
    story.answer(other!, { keyVersion: 3 });
    expect(story.verdict()).not.toBeNull();
  });

  it('a refusal for lateness, and one for unavailability, where nothing was changed beside it', () => {
    for (const code of ['KEYS_OUT_OF_SYNC', 'UNAVAILABLE']) {
      const story = scene();
      story.device(1);
      story.refuse(story.add(2), code);
      expect(story.verdict()).not.toBeNull();
    }
  });
});

describe('the search', () => {
  /** A number that is added to, and read. */
  const counter: Machine<number, 'add' | 'read', number> = {
    initial: 0,
    explain: (state, request, answer) =>
      request === 'add' ? state + 1 : answer === null || answer === state ? state : null,
    fingerprint: String,
  };
  const atOnce = Array.from(
    { length: 12 },
    (): Entry<'add' | 'read', number> => ({ request: 'add', answer: 0, askedAt: 0, answeredAt: 1 }),
  );
  const read: Entry<'add' | 'read', number> = { request: 'read', answer: 11, askedAt: 2, answeredAt: 3 };

  it('says that it could not tell, where it meets more states than it may', () => {
    expect(linearize([...atOnce, read], counter, { statesMax: 1_000 })).toEqual({ verdict: 'undecided' });
    expect(linearize([...atOnce, read], counter, { statesMax: 10_000 })).toMatchObject({
      verdict: 'refused',
    });
    expect(linearize([...atOnce, { ...read, answer: 12 }], counter, { statesMax: 1_000 })).toEqual({
      verdict: 'linearizable',
    });
  });

  it('tells how far an order goes, and what does not go on from there', () => {
    expect(linearize([...atOnce, read], counter, { statesMax: 10_000 })).toEqual({
      ...{ verdict: 'refused', explained: atOnce, state: 12, stuck: [read] },
    });
  });
});
