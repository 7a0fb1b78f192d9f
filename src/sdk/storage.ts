/** What the kit must remember over restarts of the application: versions, ids and times; no key, no message. */

/** Kept by the application beside its keys. */
export interface KitStorage {
  /** Null where nothing was ever saved. A memory that can't be read is as good as none. */
  load(): Promise<KitMemory | null>;
  /** All of it anew, after each page of messages too. Durable when it resolves; never called again before that. */
  save(memory: KitMemory): Promise<void>;
}

/** JSON: about 80 KB of it once 2,000 envelopes have come. */
export interface KitMemory {
  /** The newest that the gateway told of: an older one later means that it was restored from a backup. */
  lastKeyVersion: number;
  lastCountVersion: number;
  /** No key of any kind had this id or a higher one. */
  nextKeyId: number;
  /** Ids of the last 2,000 envelopes that the application was handed, oldest first. */
  seenEnvelopes: string[];
  /**
   * One-time prekeys that were offered to the gateway, each with the time at which it was first known to be handed
   * out, or null. What is not in here was never offered.
   */
  offered: ByKind<number | null>;
  /** Signed prekeys that others have replaced, and when that was first seen. */
  replaced: ByKind<number>;
}

/** By kind and key id; times in ms since the epoch. */
export interface ByKind<Value> {
  ec: Record<number, Value>;
  pq: Record<number, Value>;
}

function emptyMemory(): KitMemory {
  return {
    lastKeyVersion: 0,
    lastCountVersion: 0,
    nextKeyId: 1,
    seenEnvelopes: [],
    offered: { ec: {}, pq: {} },
    replaced: { ec: {}, pq: {} },
  };
}

/** Forgets with the process: for trials. A chat client keeps its memory where it keeps its keys. */
export function memoryStorage(): KitStorage {
  let kept: KitMemory | null = null;
  return {
    load: async () => structuredClone(kept),
    save: async (memory) => {
      kept = memory;
    },
  };
}

/** The memory in use, and the way to have it on disk. */
export interface Notebook {
  readonly memory: KitMemory;
  /** Whether it begins empty. */
  readonly isNew: boolean;
  /** Resolves when everything that is in the memory now is durable. */
  save(): Promise<void>;
}

export async function openNotebook(storage: KitStorage): Promise<Notebook> {
  const kept = await storage.load().catch(() => null);
  const memory: KitMemory = { ...emptyMemory(), ...kept };
  let writing: Promise<void> | null = null;
  let next: Promise<void> | null = null;

  async function write(): Promise<void> {
    // An older state must not be written over a newer one: the next waits, for all that ask meanwhile.
    await writing?.catch(() => {});
    next = null;
    writing = storage.save(structuredClone(memory));
    await writing;
  }

  return {
    memory,
    isNew: kept === null,
    save() {
      next ??= write();
      return next;
    },
  };
}
