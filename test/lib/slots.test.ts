import { describe, expect, it } from 'vitest';
import { createSlots, NoSlotError } from '../../src/lib/slots.ts';
import { createManualClock } from '../support/manual-clock.ts';

function held() {
  let end = (): void => {};
  const over = new Promise<void>((resolve) => {
    end = resolve;
  });
  return { over, end };
}

describe('slots', () => {
  it('run so many actions at once, and the rest in the order of their coming', async () => {
    const slots = createSlots({ clock: createManualClock(), slotCount: 2, waitingMax: 10, waitMaxMs: 1_000 });
    const begun: number[] = [];
    const holds = [held(), held(), held(), held()];
    const runs = holds.map((hold, index) =>
      slots.run(async () => {
        begun.push(index);
        await hold.over;
        return index;
      }),
    );
    await Promise.resolve();
    expect(begun).toEqual([0, 1]);
    holds[1]!.end();
    expect(await runs[1]).toBe(1);
    await Promise.resolve();
    expect(begun).toEqual([0, 1, 2]);
    for (const hold of holds) hold.end();
    expect(await Promise.all(runs)).toEqual([0, 1, 2, 3]);
  });

  it('let nobody in after their number was lowered, until few enough are under way, and all when it is raised', async () => {
    const slots = createSlots({ clock: createManualClock(), slotCount: 2, waitingMax: 10, waitMaxMs: 1_000 });
    const begun: number[] = [];
    const holds = [held(), held(), held(), held(), held()];
    const runs = holds.map((hold, index) =>
      slots.run(async () => {
        begun.push(index);
        await hold.over;
      }),
    );
    slots.limit(1);
    holds[0]!.end();
    await runs[0];
    expect(begun).toEqual([0, 1]);
    holds[1]!.end();
    await runs[1];
    await Promise.resolve();
    expect(begun).toEqual([0, 1, 2]);
    slots.limit(3);
    await Promise.resolve();
    expect(begun).toEqual([0, 1, 2, 3, 4]);
    for (const hold of holds) hold.end();
    await Promise.all(runs);
  });

  it('give the slot on where an action fails', async () => {
    const slots = createSlots({ clock: createManualClock(), slotCount: 1, waitingMax: 10, waitMaxMs: 1_000 });
    const failing = slots.run(async () => {
      throw new Error('broken');
    });
    const next = slots.run(async () => 'served');
    await expect(failing).rejects.toThrow('broken');
    expect(await next).toBe('served');
  });

  it('refuse one that would wait in too long a line, without running it', async () => {
    const slots = createSlots({ clock: createManualClock(), slotCount: 1, waitingMax: 1, waitMaxMs: 1_000 });
    const hold = held();
    const first = slots.run(() => hold.over);
    const second = slots.run(async () => 'second');
    let ran = false;
    await expect(
      slots.run(async () => {
        ran = true;
      }),
    ).rejects.toThrow(NoSlotError);
    expect(ran).toBe(false);
    hold.end();
    await first;
    expect(await second).toBe('second');
  });

  it('refuse one that waited too long, and serve those after it', async () => {
    const clock = createManualClock();
    const slots = createSlots({ clock, slotCount: 1, waitingMax: 5, waitMaxMs: 1_000 });
    const hold = held();
    const first = slots.run(() => hold.over);
    const late = expect(slots.run(async () => 'late')).rejects.toThrow(NoSlotError);
    await clock.advance(1_000);
    await late;
    const next = slots.run(async () => 'next');
    hold.end();
    await first;
    expect(await next).toBe('next');
  });
});
