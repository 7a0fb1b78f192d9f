import { expect, it } from 'vitest';
import { opened, undoAll } from '../../src/lib/undo.ts';

const broken = new Error('broken');

/** Steps that note that they ran; the second one fails. */
function stepsInto(ran: number[]) {
  return [1, 2, 3].map((step) => async () => {
    ran.push(step);
    if (step === 2) throw broken;
  });
}

it('runs every step from the last to the first, also those before one that fails', async () => {
  const ran: number[] = [];
  const undo = stepsInto(ran);
  await expect(undoAll(undo)).rejects.toBe(broken);
  expect(ran).toEqual([3, 2, 1]);
  await undoAll(undo);
  expect(ran).toHaveLength(3);
});

it('tells of what failed instead of throwing it, where somebody listens', async () => {
  const told: Error[] = [];
  await undoAll(stepsInto([]), (error) => told.push(error));
  expect(told).toEqual([broken]);
});

it('undoes what was begun when opening fails, and says why it failed', async () => {
  const ran: number[] = [];
  const fault = new Error('could not be opened');
  await expect(
    opened(async (undo) => {
      undo.push(...stepsInto(ran));
      throw fault;
    }),
  ).rejects.toBe(fault);
  expect(ran).toEqual([3, 2, 1]);
});

it('undoes what was opened when it is closed', async () => {
  const ran: number[] = [];
  const made = await opened(async (undo) => {
    undo.push(() => void ran.push(1));
    return { name: 'made' };
  });
  expect([made.name, ran]).toEqual(['made', []]);
  await made.close();
  expect(ran).toEqual([1]);
});
