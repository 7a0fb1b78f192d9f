/** The gate machine by itself: every state with every event, and what no sequence of events may bring about. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { CONNECTED, type GateEffect, type GateEvent, type GateState, step } from '../../src/delivery/gate.ts';

const validated = (keyVersion: number): GateState => ({ name: 'validated', keyVersion });
const open = (
  keyVersion: number,
  more: Partial<Extract<GateState, { name: 'open' }>> = {},
): Extract<GateState, { name: 'open' }> => ({
  name: 'open',
  keyVersion,
  ownRotations: 0,
  ahead: [],
  seen: null,
  ...more,
});
const replaced = (keyVersion: number) => ({ keyVersion, reason: 'identityReplaced' as const });

/** Every state stands at version 5, so that 4 is older and 6 newer. */
const STATES = {
  connected: CONNECTED,
  validated: validated(5),
  open: open(5),
  'open, one own rotation': open(5, { ownRotations: 1 }),
  'open, one own rotation, a change seen': open(5, { ownRotations: 1, seen: replaced(6) }),
  'open, two own rotations': open(5, { ownRotations: 2 }),
  'open, the later of two own rotations ended': open(5, { ownRotations: 1, ahead: [7] }),
} satisfies Record<string, GateState>;

const EVENTS = {
  'validated 4': { name: 'validated', keyVersion: 4 },
  'validated 5': { name: 'validated', keyVersion: 5 },
  'validated 6': { name: 'validated', keyVersion: 6 },
  'opened 4': { name: 'opened', keyVersion: 4 },
  'opened 5': { name: 'opened', keyVersion: 5 },
  'opened 6': { name: 'opened', keyVersion: 6 },
  'keys changed to 4': { name: 'keysChanged', keyVersion: 4, reason: 'keysReset' },
  'keys changed to 5': { name: 'keysChanged', keyVersion: 5, reason: 'keysReset' },
  'keys changed to 6': { name: 'keysChanged', keyVersion: 6, reason: 'keysReset' },
  'keys changed to 7': { name: 'keysChanged', keyVersion: 7, reason: 'keysReset' },
  'server restored to 4': { name: 'keysChanged', keyVersion: 4, reason: 'serverRestored' },
  'own rotation started': { name: 'rotationStarted' },
  'own rotation changed nothing': { name: 'rotationEnded', keyVersion: null },
  'own rotation made 5': { name: 'rotationEnded', keyVersion: 5 },
  'own rotation made 6': { name: 'rotationEnded', keyVersion: 6 },
  'own rotation made 7': { name: 'rotationEnded', keyVersion: 7 },
} satisfies Record<string, GateEvent>;

type Row = Record<keyof typeof EVENTS, [GateState, ...GateEffect[]]>;
const DELIVER: GateEffect = { name: 'deliver' };
const close = (reason: Extract<GateEffect, { name: 'close' }>['reason'], keyVersion: number): GateEffect => ({
  name: 'close',
  reason,
  keyVersion,
});

/** A row in which every event leaves the state as it is, but for those named. */
function row(state: GateState, changes: Partial<Row>): Row {
  const unmoved = Object.keys(EVENTS).map((name) => [name, [state]]);
  return { ...Object.fromEntries(unmoved), ...changes };
}

const oneOwn = STATES['open, one own rotation'];
const changeSeen = STATES['open, one own rotation, a change seen'];
const twoOwn = STATES['open, two own rotations'];
const laterEnded = STATES['open, the later of two own rotations ended'];
const restored: [GateState, GateEffect] = [CONNECTED, close('serverRestored', 4)];

const TABLE: Record<keyof typeof STATES, Row> = {
  connected: row(CONNECTED, {
    'validated 4': [validated(4)],
    'validated 5': [validated(5)],
    'validated 6': [validated(6)],
  }),
  validated: row(validated(5), {
    'validated 6': [validated(6)],
    'opened 5': [open(5), DELIVER],
    'server restored to 4': [CONNECTED],
  }),
  open: row(open(5), {
    'opened 5': [open(5), DELIVER],
    'keys changed to 6': [validated(5), close('keysReset', 6)],
    'keys changed to 7': [validated(5), close('keysReset', 7)],
    'server restored to 4': restored,
    'own rotation started': [oneOwn],
    'own rotation changed nothing': [open(5), DELIVER],
    'own rotation made 5': [open(5), DELIVER],
    'own rotation made 6': [open(6), DELIVER],
    'own rotation made 7': [validated(5), close('keysRotated', 7)],
  }),
  'open, one own rotation': row(oneOwn, {
    'opened 5': [oneOwn, DELIVER],
    'keys changed to 6': [open(5, { ownRotations: 1, seen: { keyVersion: 6, reason: 'keysReset' } })],
    'keys changed to 7': [open(5, { ownRotations: 1, seen: { keyVersion: 7, reason: 'keysReset' } })],
    'server restored to 4': restored,
    'own rotation started': [twoOwn],
    'own rotation changed nothing': [open(5), DELIVER],
    'own rotation made 5': [open(5), DELIVER],
    'own rotation made 6': [open(6), DELIVER],
    'own rotation made 7': [validated(5), close('keysRotated', 7)],
  }),
  'open, one own rotation, a change seen': row(changeSeen, {
    'opened 5': [changeSeen, DELIVER],
    'keys changed to 7': [open(5, { ownRotations: 1, seen: { keyVersion: 7, reason: 'keysReset' } })],
    'server restored to 4': restored,
    'own rotation started': [open(5, { ownRotations: 2, seen: replaced(6) })],
    'own rotation changed nothing': [validated(5), close('identityReplaced', 6)],
    'own rotation made 5': [validated(5), close('identityReplaced', 6)],
    // What was seen was the rotation itself, before its reply came.
    'own rotation made 6': [open(6), DELIVER],
    'own rotation made 7': [validated(5), close('keysRotated', 7)],
  }),
  'open, two own rotations': row(twoOwn, {
    'opened 5': [twoOwn, DELIVER],
    'keys changed to 6': [open(5, { ownRotations: 2, seen: { keyVersion: 6, reason: 'keysReset' } })],
    'keys changed to 7': [open(5, { ownRotations: 2, seen: { keyVersion: 7, reason: 'keysReset' } })],
    'server restored to 4': restored,
    'own rotation started': [open(5, { ownRotations: 3 })],
    'own rotation changed nothing': [oneOwn],
    'own rotation made 5': [oneOwn],
    'own rotation made 6': [open(6, { ownRotations: 1 })],
    'own rotation made 7': [laterEnded],
  }),
  'open, the later of two own rotations ended': row(laterEnded, {
    'opened 5': [laterEnded, DELIVER],
    'keys changed to 6': [
      open(5, { ownRotations: 1, ahead: [7], seen: { keyVersion: 6, reason: 'keysReset' } }),
    ],
    'keys changed to 7': [
      open(5, { ownRotations: 1, ahead: [7], seen: { keyVersion: 7, reason: 'keysReset' } }),
    ],
    'server restored to 4': restored,
    'own rotation started': [open(5, { ownRotations: 2, ahead: [7] })],
    'own rotation changed nothing': [validated(5), close('keysRotated', 7)],
    'own rotation made 5': [validated(5), close('keysRotated', 7)],
    'own rotation made 6': [open(7), DELIVER],
    'own rotation made 7': [validated(5), close('keysRotated', 7)],
  }),
};

const cases = Object.entries(TABLE).flatMap(([stateName, events]) =>
  Object.entries(events).map(([eventName, [next, ...effects]]) => ({ stateName, eventName, next, effects })),
);

describe('the gate, state by event', () => {
  it.each(cases)('$stateName: $eventName', ({ stateName, eventName, next, effects }) => {
    const state = STATES[stateName as keyof typeof STATES];
    expect(step(state, EVENTS[eventName as keyof typeof EVENTS])).toEqual({ state: next, effects });
  });
});

const keyVersion = fc.integer({ min: 1, max: 6 });
const reason = fc.constantFrom('identityReplaced', 'keysReset', 'keysRotated', 'serverRestored' as const);
const event: fc.Arbitrary<GateEvent> = fc.oneof(
  fc.record({ name: fc.constant('validated' as const), keyVersion }),
  fc.record({ name: fc.constant('opened' as const), keyVersion }),
  fc.record({ name: fc.constant('keysChanged' as const), keyVersion, reason }),
  fc.record({ name: fc.constant('rotationStarted' as const) }),
  fc.record({ name: fc.constant('rotationEnded' as const), keyVersion: fc.option(keyVersion) }),
);

/** Every step of a sequence: what was, what came, what is. */
function walk(events: readonly GateEvent[]) {
  let state = CONNECTED;
  return events.map((each) => {
    const before = state;
    const { state: after, effects } = step(before, each);
    state = after;
    return { before, event: each, after, effects };
  });
}

function everyWalk(check: (steps: ReturnType<typeof walk>) => void): void {
  fc.assert(
    fc.property(fc.array(event, { maxLength: 40 }), (events) => check(walk(events))),
    { numRuns: 5_000 },
  );
}

describe('the gate, over every sequence of events', () => {
  it('opens only by `opened(v)` after `validated(v)` or an own rotation to v, with nothing restored between', () => {
    everyWalk((steps) => {
      const proven = new Set<number>();
      for (const { before, event: each, after } of steps) {
        if (each.name === 'validated') proven.add(each.keyVersion);
        // Carried through the open gate, the socket's own rotation is a proof too.
        if (each.name === 'rotationEnded' && before.name === 'open' && after.name !== 'connected') {
          proven.add(after.keyVersion);
        }
        if (each.name === 'keysChanged' && each.reason === 'serverRestored') proven.clear();
        if (before.name === 'open' || after.name !== 'open') continue;
        expect(each).toEqual({ name: 'opened', keyVersion: after.keyVersion });
        expect(proven).toContain(after.keyVersion);
      }
    });
  });

  it('stays open at another version only over rotations of its own, one version after the other', () => {
    everyWalk((steps) => {
      const made = new Set<number>();
      for (const { before, event: each, after } of steps) {
        if (each.name === 'rotationEnded' && each.keyVersion !== null) made.add(each.keyVersion);
        if (before.name !== 'open') made.clear();
        if (before.name !== 'open' || after.name !== 'open') continue;
        for (let version = before.keyVersion + 1; version <= after.keyVersion; version++) {
          expect(made).toContain(version);
        }
        expect(after.keyVersion).toBeGreaterThanOrEqual(before.keyVersion);
      }
    });
  });

  it('changes nothing on a verdict about an older key set', () => {
    everyWalk((steps) => {
      for (const { before, event: each, after, effects } of steps) {
        if (each.name !== 'validated' || before.name === 'connected') continue;
        if (each.keyVersion <= before.keyVersion)
          expect({ after, effects }).toEqual({ after: before, effects: [] });
      }
    });
  });

  it('says that it closes whenever it closes, and never twice', () => {
    everyWalk((steps) => {
      for (const { before, after, effects } of steps) {
        const closes = effects.filter((effect) => effect.name === 'close');
        expect(closes).toHaveLength(before.name === 'open' && after.name !== 'open' ? 1 : 0);
      }
    });
  });

  it('asks for delivery only while it is open', () => {
    everyWalk((steps) => {
      for (const { after, effects } of steps) {
        if (effects.some((effect) => effect.name === 'deliver')) expect(after.name).toBe('open');
      }
    });
  });

  it('with no rotation of its own under way, never stays open on a version older than one it heard of', () => {
    everyWalk((steps) => {
      for (const { event: each, after } of steps) {
        if (each.name !== 'keysChanged' || each.reason === 'serverRestored') continue;
        if (after.name === 'open' && after.ownRotations === 0) {
          expect(each.keyVersion).toBeLessThanOrEqual(after.keyVersion);
        }
      }
    });
  });

  it('is carried by overlapping rotations of its own in whatever order they end', () => {
    fc.assert(
      fc.property(
        fc.shuffledSubarray([6, 7, 8, 9], { minLength: 4 }),
        fc.integer({ max: 4 }),
        (order, seen) => {
          const events: GateEvent[] = [
            { name: 'validated', keyVersion: 5 },
            { name: 'opened', keyVersion: 5 },
            ...order.map((): GateEvent => ({ name: 'rotationStarted' })),
            ...order.flatMap((version, index): GateEvent[] => [
              // A read proves the newest version before all the replies have come.
              ...(index === seen
                ? [{ name: 'keysChanged', keyVersion: 9, reason: 'keysRotated' } as const]
                : []),
              { name: 'rotationEnded', keyVersion: version },
            ]),
          ];
          expect(walk(events).at(-1)).toMatchObject({ after: open(9), effects: [DELIVER] });
        },
      ),
    );
  });
});
