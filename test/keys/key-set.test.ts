// Key sets as the store's transactions find them: replaced or used meanwhile, restored, refused, run low.
import { sql } from 'drizzle-orm';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createInProcessLocks } from '../../src/backends/in-process/locks.ts';
import { type Database, openDatabase } from '../../src/backends/postgres/database.ts';
import { createKeyStore } from '../../src/backends/postgres/key-store.ts';
import { createMaintenance } from '../../src/backends/postgres/maintenance.ts';
import { migrateDatabase } from '../../src/backends/postgres/migrations.ts';
import { createIdleSweep } from '../../src/keys/idle.ts';
import { draftOf, fellLow } from '../../src/keys/key-set.ts';
import { resetKeys } from '../../src/keys/reset.ts';
import { withdrawAfterRestore } from '../../src/keys/restored.ts';
import { rotateSignedPreKey } from '../../src/keys/rotate.ts';
import { addPreKeys, uploadKeys } from '../../src/keys/upload.ts';
import { openValidation, validateKeys } from '../../src/keys/validate.ts';
import { createValidationProofs } from '../../src/keys/validation.ts';
import { systemClock } from '../../src/lib/clock.ts';
import { silentLog } from '../../src/lib/log.ts';
import { reasonOf } from '../../src/lib/reason.ts';
import type { KeyStore } from '../../src/ports/key-store.ts';
import { requests } from '../../src/protocol/events.ts';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import { createDatabase } from '../support/engines.ts';
import { KeyMaker } from '../support/key-maker.ts';

const DAY_MS = 24 * 3_600_000;

let database: Database;
let store: KeyStore;
let drop: () => Promise<void>;
let users = 0;
beforeAll(async () => {
  const created = await createDatabase();
  drop = created.drop;
  const address = { kind: 'url', url: created.url } as const;
  await migrateDatabase(address);
  database = openDatabase({ address, clock: systemClock, log: silentLog });
  store = createKeyStore(database);
});
afterAll(async () => {
  await database.close();
  await drop();
});

const partsOf = (of: KeyStore) => ({
  store: of,
  locks: createInProcessLocks({ clock: systemClock }),
  clock: systemClock,
  poolMax: 100,
  lowThreshold: 10,
  signedPreKeyLifetimeMs: 86_400_000,
});
const validating = (of: KeyStore) => ({
  ...partsOf(of),
  proofs: createValidationProofs({ store: of, clock: systemClock }),
  claimedPreKeyRetentionMs: 0,
});
const upload = (device: DeviceAddress, keys: KeyMaker, replaceIdentity = false) => {
  const input = keys.keySet({ pqLastResortPreKey: keys.pq(1), replaceIdentity });
  return uploadKeys(partsOf(store), device, requests.uploadKeys.input.parse(input));
};

/** The store, where `meanwhile` happens once before a change begins. */
function interrupted(meanwhile: () => Promise<unknown>): KeyStore {
  let hasHappened = false;
  return {
    ...store,
    async change(device, action, how) {
      if (!hasHappened) {
        hasHappened = true;
        await meanwhile();
      }
      return await store.change(device, action, how);
    },
  };
}

describe('keys that are signed by an identity which is gone before they are stored', () => {
  const additions = {
    addPreKeys: (of: KeyStore, device: DeviceAddress, keys: KeyMaker) =>
      addPreKeys(
        partsOf(of),
        device,
        requests.addPreKeys.input.parse({
          oneTimePreKeys: [keys.oneTime(1)],
          pqOneTimePreKeys: [keys.pq(7)],
        }),
      ),
    rotateSignedPreKey: (of: KeyStore, device: DeviceAddress, keys: KeyMaker) =>
      rotateSignedPreKey(
        partsOf(of),
        device,
        requests.rotateSignedPreKey.input.parse({
          signedPreKey: keys.signed(7),
          pqLastResortPreKey: keys.pq(7),
        }),
      ),
  };

  describe.each(['addPreKeys', 'rotateSignedPreKey'] as const)('by %s', (request) => {
    it('are refused where another identity has replaced it, and nothing of them is stored', async () => {
      const [keys, other] = [new KeyMaker(), new KeyMaker()];
      const device = { userId: `replaced-${++users}`, deviceId: 1 };
      await upload(device, keys);
      const between = interrupted(() => upload(device, other, true));
      await expect(additions[request](between, device, keys)).rejects.toMatchObject({
        code: 'SIGNATURE_INVALID',
      });
      expect(await store.read(device)).toMatchObject({
        availableCounts: { ec: 0, pq: 0 },
        signedPreKeys: { ec: { keyId: 1 }, pq: { keyId: 1 } },
        keyVersion: 2,
      });
    });

    it('are refused where the device was reset, and nothing of them is stored', async () => {
      const keys = new KeyMaker();
      const device = { userId: `reset-${++users}`, deviceId: 1 };
      await upload(device, keys);
      const between = interrupted(() => resetKeys(partsOf(store), device, {}));
      await expect(additions[request](between, device, keys)).rejects.toMatchObject({
        code: 'KEYS_NOT_UPLOADED',
      });
      expect(await store.read(device)).toMatchObject({
        identity: null,
        availableCounts: { ec: 0, pq: 0 },
        signedPreKeys: { ec: null, pq: null },
      });
    });

    it('are stored where the same identity came back meanwhile', async () => {
      const keys = new KeyMaker();
      const device = { userId: `same-${++users}`, deviceId: 1 };
      await upload(device, keys);
      const between = interrupted(async () => {
        await upload(device, new KeyMaker(), true);
        const again = keys.keySet({ signedPreKey: keys.signed(3), pqLastResortPreKey: keys.pq(3) });
        const input = requests.uploadKeys.input.parse({ ...again, replaceIdentity: true });
        await uploadKeys(partsOf(store), device, input);
      });
      await additions[request](between, device, keys);
      const stored = (await store.read(device))!;
      if (request === 'addPreKeys') expect(stored.availableCounts).toEqual({ ec: 1, pq: 1 });
      else expect(stored.signedPreKeys).toMatchObject({ ec: { keyId: 7 }, pq: { keyId: 7 } });
    });
  });
});

describe('one-time prekeys that bear no signature, added while another identity comes', () => {
  it('are refused: they may be of the one that is gone', async () => {
    const [keys, other] = [new KeyMaker(), new KeyMaker()];
    const device = { userId: `unsigned-${++users}`, deviceId: 1 };
    await upload(device, keys);
    const between = interrupted(() => upload(device, other, true));
    const input = requests.addPreKeys.input.parse({ oneTimePreKeys: [keys.oneTime(1)] });
    await expect(addPreKeys(partsOf(between), device, input)).rejects.toMatchObject({
      code: 'KEYS_OUT_OF_SYNC',
      details: { keyVersion: 2 },
    });
    expect(await store.read(device)).toMatchObject({ availableCounts: { ec: 0, pq: 0 }, keyVersion: 2 });
  });

  it('are refused also where it came since the request was taken in', async () => {
    const [keys, other] = [new KeyMaker(), new KeyMaker()];
    const device = { userId: `unsigned-${++users}`, deviceId: 1 };
    await upload(device, keys);
    const { identityVersion: ifIdentityVersion } = (await store.read(device))!;
    await upload(device, other, true);
    const input = requests.addPreKeys.input.parse({ oneTimePreKeys: [keys.oneTime(1)] });
    await expect(addPreKeys(partsOf(store), device, { ...input, ifIdentityVersion })).rejects.toMatchObject({
      code: 'KEYS_OUT_OF_SYNC',
      details: { keyVersion: 2 },
    });
    expect(await store.read(device)).toMatchObject({ availableCounts: { ec: 0, pq: 0 } });
  });
});

describe('a validation', () => {
  it('is given again after an outage in which the secret that seals it was asked for', async () => {
    const keys = new KeyMaker();
    const device = { userId: `outage-${++users}`, deviceId: 1 };
    await upload(device, keys);
    let isAway = true;
    const sharedSecret: KeyStore['sharedSecret'] = async (name) => {
      if (isAway) throw new Error('the store is away');
      return await store.sharedSecret(name);
    };
    const parts = validating({ ...store, sharedSecret });
    const local = { localIdentityKey: keys.identityKey(), localSignedPreKeyId: 1 };
    await expect(validateKeys(parts, device, local)).rejects.toThrow('the store is away');
    isAway = false;
    const { data } = await validateKeys(parts, device, local);
    expect(await openValidation(validating(store), device, data.validation!)).toBe(1);
  });
});

describe('a validation that is brought along', () => {
  const forged = (validation: string): string => `${validation.slice(0, -2)}AA`;

  it('of what the socket itself was found in step at needs no look at the keys, and any other does', async () => {
    const keys = new KeyMaker();
    const device = { userId: `own-${++users}`, deviceId: 1 };
    await upload(device, keys);
    const local = { localIdentityKey: keys.identityKey(), localSignedPreKeyId: 1 };
    const { data } = await validateKeys(validating(store), device, local);
    let looks = 0;
    const read: KeyStore['read'] = async (asked) => {
      looks += 1;
      return await store.read(asked);
    };
    const parts = validating({ ...store, read });
    expect(await openValidation(parts, device, data.validation!, () => 1)).toBe(1);
    expect(looks).toBe(0);
    expect(await openValidation(parts, device, data.validation!, () => 2)).toBe(1);
    expect(await openValidation(parts, device, data.validation!)).toBe(1);
    expect(looks).toBe(2);
    await expect(openValidation(parts, device, forged(data.validation!), () => 1)).rejects.toMatchObject({
      code: 'KEYS_NOT_VALIDATED',
    });
  });
});

describe('ids that are uploaded after a backup was restored, before the client has compared its keys', () => {
  it('are alreadyClaimed, and stay so when it has', async () => {
    const keys = new KeyMaker();
    const device = { userId: `restored-${++users}`, deviceId: 1 };
    await upload(device, keys);
    await withdrawAfterRestore({
      maintenance: createMaintenance(database),
      clock: systemClock,
      onBatch: () => {},
    });
    const add = async (keyId: number) => {
      const input = { oneTimePreKeys: [keys.oneTime(keyId)], pqOneTimePreKeys: [keys.pq(keyId)] };
      return (await addPreKeys(partsOf(store), device, requests.addPreKeys.input.parse(input))).data;
    };
    const refused = { stored: 0, unchanged: 0, conflicts: [{ keyId: 5, reason: 'alreadyClaimed' }] };
    expect(await add(5)).toMatchObject({ oneTimePreKeys: refused, pqOneTimePreKeys: refused });
    const local = { localIdentityKey: keys.identityKey(), localSignedPreKeyId: 1 };
    expect(await validateKeys(validating(store), device, local)).toMatchObject({ changed: true });
    expect(await validateKeys(validating(store), device, local)).toMatchObject({ changed: false });
    expect(await add(5)).toMatchObject({ oneTimePreKeys: refused, pqOneTimePreKeys: refused });
    expect(await add(6)).toMatchObject({ oneTimePreKeys: { stored: 1 }, pqOneTimePreKeys: { stored: 1 } });
  });
});

describe('a validation that finds the server rolled back', () => {
  const add = async (device: DeviceAddress, keys: KeyMaker, keyId: number) => {
    const input = { oneTimePreKeys: [keys.oneTime(keyId)], pqOneTimePreKeys: [keys.pq(keyId)] };
    return (await addPreKeys(partsOf(store), device, requests.addPreKeys.input.parse(input))).data;
  };
  const local = (keys: KeyMaker, more: { localPreKeyIds?: number[]; localPqPreKeyIds?: number[] } = {}) => ({
    localIdentityKey: keys.identityKey(),
    localSignedPreKeyId: 1,
    lastKeyVersion: 9,
    ...more,
  });

  it('withdraws the pools of both kinds for good', async () => {
    const keys = new KeyMaker();
    const device = { userId: `rolled-back-${++users}`, deviceId: 1 };
    await upload(device, keys);
    for (const keyId of [1, 2]) await add(device, keys, keyId);
    expect(await validateKeys(validating(store), device, local(keys))).toMatchObject({ changed: true });
    const { canonicalKey } = (await store.read(device))!.identity!;
    for (const kind of ['ec', 'pq'] as const) {
      const left = await store.change(device, async (set) => ({
        used: [...(await set.usedIds(kind, canonicalKey, [1, 2, 3]))].sort(),
        pooled: (await set.pooled(kind, [1, 2, 3])).size,
      }));
      expect(left).toEqual({ used: [1, 2], pooled: 0 });
    }
  });

  it('takes nothing of what was uploaded since another one has found it', async () => {
    const keys = new KeyMaker();
    const device = { userId: `rolled-back-${++users}`, deviceId: 1 };
    await upload(device, keys);
    const between = interrupted(async () => {
      await validateKeys(validating(store), device, local(keys));
      await add(device, keys, 5);
    });
    await validateKeys(validating(between), device, local(keys));
    expect(await store.read(device)).toMatchObject({ availableCounts: { ec: 1, pq: 1 } });
  });

  it('takes what its client holds, though another one has found it before, and counts that', async () => {
    const keys = new KeyMaker();
    const device = { userId: `rolled-back-${++users}`, deviceId: 1 };
    await upload(device, keys);
    let countVersion = 0;
    const between = interrupted(async () => {
      await validateKeys(validating(store), device, local(keys));
      ({ countVersion } = await add(device, keys, 5));
    });
    const held = { localPreKeyIds: [5], localPqPreKeyIds: [5] };
    const { data } = await validateKeys(validating(between), device, local(keys, held));
    expect(data).toMatchObject({ preKeyIdsToDelete: [5], pqPreKeyIdsToDelete: [5] });
    expect(await store.read(device)).toMatchObject({
      availableCounts: { ec: 0, pq: 0 },
      countVersion: countVersion + 1,
    });
  });

  it('takes nothing of another identity’s that has come since', async () => {
    const [keys, other] = [new KeyMaker(), new KeyMaker()];
    const device = { userId: `rolled-back-${++users}`, deviceId: 1 };
    await upload(device, keys);
    const between = interrupted(async () => {
      await validateKeys(validating(store), device, local(keys));
      await upload(device, other, true);
      await add(device, other, 5);
    });
    const held = { localPreKeyIds: [5], localPqPreKeyIds: [5] };
    await validateKeys(validating(between), device, local(keys, held));
    expect(await store.read(device)).toMatchObject({ availableCounts: { ec: 1, pq: 1 } });
  });
});

describe('a device that is used between the search for idle ones and its turn', () => {
  it('keeps its keys, and the next one loses them', async () => {
    const [used, idle] = ['1-used', '2-idle'].map((userId) => ({ userId, deviceId: 1 })) as [
      DeviceAddress,
      DeviceAddress,
    ];
    for (const device of [used, idle]) await upload(device, new KeyMaker());
    const nowMs = systemClock.nowMs() + 40 * DAY_MS;
    const between = interrupted(() =>
      store.change(used, (set) => set.save({ ...draftOf(set.current), updatedAtMs: nowMs })),
    );
    const wiped: DeviceAddress[] = [];
    const sweep = createIdleSweep({
      ...partsOf(between),
      clock: { ...systemClock, nowMs: () => nowMs },
      retentionMs: 30 * DAY_MS,
      onWiped: async (device) => void wiped.push(device),
    });
    await sweep.run();
    expect((await store.read(used))!.identity).not.toBeNull();
    expect((await store.read(idle))!.identity).toBeNull();
    expect(wiped.slice(0, 1)).toEqual([idle]);
  });
});

describe('the sweep of idle devices', () => {
  it('rests for an hour when it has seen all of them, or until the clock is set back', async () => {
    const startMs = systemClock.nowMs() + 400 * DAY_MS;
    let nowMs = startMs;
    const sweep = createIdleSweep({
      ...partsOf(store),
      clock: { ...systemClock, nowMs: () => nowMs },
      retentionMs: 30 * DAY_MS,
      onWiped: async () => {},
    });
    while (!(await sweep.run()).isAtEnd);
    const wipedAt = async (atMs: number): Promise<number> => {
      nowMs = atMs;
      await upload({ userId: `rested-${++users}`, deviceId: 1 }, new KeyMaker());
      return (await sweep.run()).wipedCount;
    };
    expect(await wipedAt(startMs + 3_599_999)).toBe(0);
    expect(await wipedAt(startMs + 3_600_000)).toBe(2);
    expect(await wipedAt(startMs + 3_600_001)).toBe(0);
    expect(await wipedAt(startMs - DAY_MS)).toBe(2);
  });
});

describe('a change of keys that is refused', () => {
  it('gives the device’s lock back', async () => {
    const device = { userId: `refused-${++users}`, deviceId: 1 };
    await upload(device, new KeyMaker());
    const parts = partsOf(store);
    const input = requests.uploadKeys.input.parse(new KeyMaker().keySet());
    await expect(uploadKeys(parts, device, input)).rejects.toMatchObject({ code: 'IDENTITY_MISMATCH' });
    await expect(resetKeys(parts, device, { ifKeyVersion: 0 })).rejects.toMatchObject({
      code: 'KEYS_OUT_OF_SYNC',
    });
    expect((await parts.locks.acquire([device])).held.size).toBe(1);
  });
});

describe('an upload of which one statement fails', () => {
  // All that it writes is sent together: what comes behind the failure, and what came before it, is undone.
  it.each([
    ['INSERT', 'signed_prekeys', 'NEW.kind = 0'],
    ['INSERT', 'signed_prekeys', 'NEW.kind = 1'],
    ['INSERT', 'one_time_prekeys', 'NEW.kind = 0'],
    ['INSERT', 'one_time_prekeys', 'NEW.kind = 1'],
    ['UPDATE', 'devices', 'NEW.key_version > OLD.key_version'],
    ['UPDATE', 'devices', 'NEW.fence > OLD.fence'],
  ])('stores nothing: %s of %s where %s', async (event, table, condition) => {
    const device = { userId: `failing-${++users}`, deviceId: 1 };
    const keys = new KeyMaker();
    const input = requests.uploadKeys.input.parse(
      keys.keySet({
        oneTimePreKeys: [keys.oneTime(1), keys.oneTime(2)],
        pqLastResortPreKey: keys.pq(1),
        pqOneTimePreKeys: [keys.pq(2)],
      }),
    );
    const fenced: KeyStore = {
      ...store,
      change: (of, action) => store.change(of, action, { fence: 9 }),
    };
    await database.run((db) =>
      db.execute(
        sql.raw(`
          CREATE FUNCTION break_upload() RETURNS trigger LANGUAGE plpgsql AS $$
          BEGIN IF ${condition} THEN RAISE EXCEPTION 'broken on purpose'; END IF; RETURN NEW; END $$;
          CREATE TRIGGER break_upload BEFORE ${event} ON ${table} FOR EACH ROW EXECUTE FUNCTION break_upload()`),
      ),
    );
    try {
      const told = await uploadKeys(partsOf(fenced), device, input).catch((error: unknown) =>
        reasonOf(error),
      );
      expect(told).toContain('broken on purpose');
      expect(await store.read(device)).toBeNull();
    } finally {
      await database.run((db) => db.execute(sql.raw('DROP FUNCTION break_upload() CASCADE')));
    }
    const { data } = await uploadKeys(partsOf(fenced), device, input);
    expect(data).toMatchObject({ keyVersion: 1, availableCount: 2, pqAvailableCount: 1 });
    expect(await store.read(device)).toMatchObject({
      availableCounts: { ec: 2, pq: 1 },
      signedPreKeys: { ec: { keyId: 1 }, pq: { keyId: 1 } },
      fence: 9,
    });
  });
});

describe('a pool runs low', () => {
  const THRESHOLD = 10;
  const plenty = 50;

  it.each([
    [11, 10, false],
    [10, 9, true],
    [9, 8, false],
    [50, 1, true],
    [9, 0, true],
    [0, 0, false],
    [0, 9, false],
    [9, 9, false],
    [50, 0, true],
  ])('or does not, of either kind, from %i to %i: %s', (before, after, ranLow) => {
    for (const kind of ['ec', 'pq'] as const) {
      const counts = (count: number) => ({ ec: plenty, pq: plenty, [kind]: count });
      expect(fellLow(counts(before), counts(after), THRESHOLD)).toBe(ranLow);
    }
  });
});
