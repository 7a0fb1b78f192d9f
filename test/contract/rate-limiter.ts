// The promises of ports/rate-limiter, for every backend.
import { randomUUID } from 'node:crypto';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Limit, RateLimiter } from '../../src/ports/rate-limiter.ts';

export interface OpenLimiters {
  limiter: RateLimiter;
  /** The same limits, as another node holds them; the same object where there is only one node. */
  otherNode: RateLimiter;
  /** Moves to the end of the windows that run. */
  endWindows(): Promise<void>;
  close(): Promise<void>;
}

export const WINDOW_MS = 60_000;
const limits: Limit[] = [
  { name: 'few', points: 3, windowMs: WINDOW_MS },
  { name: 'some', points: 100, windowMs: WINDOW_MS },
  { name: 'bytes', points: 100_000, windowMs: WINDOW_MS },
];

/** @param open makes limiters on which nothing has been charged */
export function describeRateLimiter(
  backend: string,
  open: (limits: readonly Limit[]) => Promise<OpenLimiters>,
): void {
  describe(`the rate limiter (${backend})`, () => {
    let opened: OpenLimiters;
    let limiter: RateLimiter;
    /** Nobody shares it with another test. */
    let key: string;

    beforeEach(async () => {
      opened = await open(limits);
      limiter = opened.limiter;
      key = `k-${randomUUID()}`;
    });
    afterEach(() => opened.close());

    /** How many of so many charges were let through. */
    async function letThrough(limit: string, times: number, by: RateLimiter = limiter): Promise<number> {
      let count = 0;
      for (let i = 0; i < times; i++) {
        if ((await by.charge([{ limit, key, points: 1 }])).length === 0) count += 1;
      }
      return count;
    }

    it('lets through what the limit allows, exactly, and says when to come again', async () => {
      expect(await letThrough('some', 150)).toBe(100);
      const hits = await limiter.charge([{ limit: 'some', key, points: 1 }]);
      expect(hits).toEqual([{ limit: 'some', retryAfterMs: expect.any(Number) }]);
      expect(hits[0]!.retryAfterMs).toBeGreaterThan(0);
      expect(hits[0]!.retryAfterMs).toBeLessThanOrEqual(WINDOW_MS);
    });

    it('lets through as many of those that come at once', async () => {
      const answers = await Promise.all(
        Array.from({ length: 150 }, () => limiter.charge([{ limit: 'some', key, points: 1 }])),
      );
      expect(answers.filter((hits) => hits.length === 0)).toHaveLength(100);
    });

    it('gives a key its points again in every window, however hard it is pressed', async () => {
      for (let window = 0; window < 3; window++) {
        expect(await letThrough('few', 50)).toBe(3);
        await opened.endWindows();
      }
    });

    it('counts keys and limits apart', async () => {
      expect(await letThrough('few', 5)).toBe(3);
      key = `k-${randomUUID()}`;
      expect(await letThrough('few', 5)).toBe(3);
      expect(await letThrough('some', 5)).toBe(5);
    });

    it('charges several limits by one call, and tells which was hit', async () => {
      const charge = () =>
        limiter.charge([
          { limit: 'few', key, points: 1 },
          { limit: 'bytes', key, points: 40_000 },
        ]);
      expect(await charge()).toEqual([]);
      expect(await charge()).toEqual([]);
      expect((await charge()).map((hit) => hit.limit)).toEqual(['bytes']);
      expect(await limiter.charge([{ limit: 'bytes', key, points: 20_000 }])).toEqual([]);
    });

    it('charges nothing where one of the limits is known to be spent', async () => {
      await letThrough('few', 4);
      for (let i = 0; i < 200; i++) {
        const hits = await limiter.charge([
          { limit: 'few', key, points: 1 },
          { limit: 'some', key, points: 1 },
        ]);
        expect(hits.map((hit) => hit.limit)).toEqual(['few']);
      }
      expect(await letThrough('some', 100)).toBe(100);
    });

    it('makes the other charges where what is spent only tells, and tells of it', async () => {
      await letThrough('few', 3);
      const hitsOf = async () =>
        (
          await limiter.charge([
            { limit: 'some', key, points: 1 },
            { limit: 'few', key, points: 1, onlyTells: true },
          ])
        ).map((hit) => hit.limit);
      for (let i = 0; i < 100; i++) expect(await hitsOf()).toEqual(['few']);
      expect(await hitsOf()).toEqual(['some', 'few']);
    });

    it('judges without charging what is charged when it has come to pass, also beyond the limit', async () => {
      const judged = { limit: 'bytes', key, points: 60_000, onlyJudged: true };
      for (let i = 0; i < 5; i++) expect(await limiter.charge([judged])).toEqual([]);
      limiter.note(judged);
      expect((await limiter.charge([judged])).map((hit) => hit.limit)).toEqual(['bytes']);
      expect(await limiter.charge([{ ...judged, points: 40_000 }])).toEqual([]);
      limiter.note(judged);
      expect((await limiter.charge([{ ...judged, points: 1 }])).map((hit) => hit.limit)).toEqual(['bytes']);
    });

    it('tells the other nodes of what has come to pass', async () => {
      const done = { limit: 'bytes', key, points: 60_000 };
      limiter.note(done);
      // So much is told as well, and its answer waited for.
      expect(await limiter.charge([{ ...done, points: 10_000 }])).toEqual([]);
      expect(await opened.otherNode.charge([{ ...done, points: 40_000 }])).toHaveLength(1);
    });

    it('knows no limit that is switched off', async () => {
      expect(await letThrough('off', 1_000)).toBe(1_000);
    });

    it('holds a limit over the nodes, but for less than a sixteenth of it', async () => {
      let count = 0;
      for (let i = 0; i < 100; i++) {
        count += await letThrough('some', 1);
        count += await letThrough('some', 1, opened.otherNode);
      }
      expect(count).toBeGreaterThanOrEqual(100);
      expect(count).toBeLessThanOrEqual(106);
      key = `k-${randomUUID()}`;
      expect((await letThrough('few', 3)) + (await letThrough('few', 3, opened.otherNode))).toBe(3);
    });
  });
}
