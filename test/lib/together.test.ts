import { expect, it } from 'vitest';
import { together } from '../../src/lib/together.ts';

function deferred() {
  let resolve!: (value: string) => void;
  let reject!: (error: Error) => void;
  const promise = new Promise<string>((yes, no) => {
    [resolve, reject] = [yes, no];
  });
  return { promise, resolve, reject };
}

it('gives what each gave, in order, promises or not', async () => {
  const slow = deferred();
  const all = together([slow.promise, Promise.resolve(2), false]);
  slow.resolve('one');
  expect(await all).toEqual(['one', 2, false]);
});

it('fails when the last has ended, with what failed first', async () => {
  const [slow, early, late] = [deferred(), deferred(), deferred()];
  const events: string[] = [];
  const all = together([slow.promise, late.promise, early.promise]).catch((error: Error) => {
    events.push(error.message);
  });
  early.reject(new Error('early'));
  await new Promise((resolve) => setImmediate(resolve));
  late.reject(new Error('late'));
  await new Promise((resolve) => setImmediate(resolve));
  events.push('the slow one ends');
  slow.resolve('');
  await all;
  expect(events).toEqual(['the slow one ends', 'early']);
});

it('awaits each once: a query that is made when it is awaited is made once', async () => {
  let made = 0;
  const query: PromiseLike<string> = {
    // biome-ignore lint/suspicious/noThenProperty: a query of Drizzle's is such an object
    then(resolve, reject) {
      made += 1;
      return Promise.resolve('row').then(resolve, reject);
    },
  };
  expect(await together([query])).toEqual(['row']);
  expect(made).toBe(1);
});
