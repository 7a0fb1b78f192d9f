/** What the kit remembers: whole, in order, and one save after the other. */
import { describe, expect, it } from 'vitest';
import { type KitMemory, type KitStorage, memoryStorage, openNotebook } from '../../src/sdk/storage.ts';

/** A storage whose saves end when the test says so. */
function slowStorage() {
  const saves: { memory: KitMemory; end(error?: Error): void }[] = [];
  const storage: KitStorage = {
    load: async () => null,
    save: (memory) =>
      new Promise((resolve, reject) => {
        saves.push({ memory, end: (error) => (error === undefined ? resolve() : reject(error)) });
      }),
  };
  return { storage, saves };
}

/** Promises settle. */
const settled = () => new Promise((resolve) => setImmediate(resolve));

describe('a notebook', () => {
  it('saves one state after the other, the last of them for all that asked meanwhile', async () => {
    const { storage, saves } = slowStorage();
    const { memory, save } = await openNotebook(storage);
    memory.nextKeyId = 2;
    const first = save();
    await settled();
    memory.nextKeyId = 3;
    const second = save();
    memory.nextKeyId = 4;
    const third = save();
    await settled();
    expect(saves.map((each) => each.memory.nextKeyId)).toEqual([2]);
    saves[0]!.end();
    await first;
    await settled();
    expect(saves.map((each) => each.memory.nextKeyId)).toEqual([2, 4]);
    saves[1]!.end();
    await Promise.all([second, third]);
  });

  it('tells of a save that failed only who asked for it, and saves the next', async () => {
    const { storage, saves } = slowStorage();
    const { memory, save } = await openNotebook(storage);
    const first = save();
    await settled();
    memory.nextKeyId = 9;
    const second = save();
    saves[0]!.end(new Error('the disk is full'));
    await expect(first).rejects.toThrow('the disk is full');
    await settled();
    saves[1]!.end();
    await second;
    expect(saves[1]!.memory.nextKeyId).toBe(9);
  });

  it('saves what stood in it when the save began, whatever is written into it later', async () => {
    const { storage, saves } = slowStorage();
    const { memory, save } = await openNotebook(storage);
    const saved = save();
    await settled();
    memory.seenEnvelopes.push('later');
    expect(saves[0]!.memory.seenEnvelopes).toEqual([]);
    saves[0]!.end();
    await saved;
  });

  it('begins empty, and as new, where what was kept can’t be read', async () => {
    const { storage } = slowStorage();
    storage.load = async () => {
      throw new Error('it is damaged');
    };
    const { memory, isNew } = await openNotebook(storage);
    expect(isNew).toBe(true);
    expect(memory).toMatchObject({ nextKeyId: 1, seenEnvelopes: [], offered: { ec: {}, pq: {} } });
  });

  it('goes on with what was kept, by an older kit too, which remembered less', async () => {
    const { storage } = slowStorage();
    storage.load = async () => ({ nextKeyId: 40, lastKeyVersion: 3 }) as KitMemory;
    const { memory, isNew } = await openNotebook(storage);
    expect(isNew).toBe(false);
    expect(memory).toMatchObject({
      nextKeyId: 40,
      lastKeyVersion: 3,
      lastCountVersion: 0,
      seenEnvelopes: [],
    });
  });
});

it('memory of the process alone gives back what was saved, and a copy of it each time', async () => {
  const storage = memoryStorage();
  expect(await storage.load()).toBeNull();
  const { memory, save } = await openNotebook(storage);
  memory.nextKeyId = 7;
  await save();
  const loaded = await storage.load();
  expect(loaded?.nextKeyId).toBe(7);
  loaded!.seenEnvelopes.push('mine alone');
  expect((await storage.load())?.seenEnvelopes).toEqual([]);
});
