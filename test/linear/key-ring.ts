/** Few keys of few identities, made once for all devices of a run: the model's names, and what stands for them on the wire. */
import { KeyMaker } from '../support/key-maker.ts';
import type { SignedKey } from '../support/libsignal-device.ts';
import type { Key, Kind } from './key-model.ts';

/** Under each id there are two keys, so that an id can be asked for twice with different ones. */
const HALVES = ['a', 'b'] as const;
const IDS = {
  signed: { ec: [1, 2, 3, 4, 5, 6], pq: [101, 102, 103] },
  oneTime: { ec: [1, 2, 3, 4, 5, 6, 7, 8], pq: [11, 12, 13, 14, 15] },
} as const satisfies Record<'signed' | 'oneTime', Record<Kind, readonly number[]>>;

export const IDENTITIES = ['A', 'B'] as const;

export interface KeyRing {
  signed: Readonly<Record<Kind, readonly Key[]>>;
  oneTime: Readonly<Record<Kind, readonly Key[]>>;
  identityKey(identity: string): string;
  wire(key: Key): SignedKey;
  /** @returns the name of exactly these bytes under exactly this id; what they are, where nobody made them */
  nameOf(key: { keyId: number; publicKey: string; signature?: string }): string;
  identityOf(publicKey: string): string;
}

export function createKeyRing(): KeyRing {
  const makers = new Map(IDENTITIES.map((identity) => [identity as string, new KeyMaker()]));
  const wires = new Map<string, SignedKey>();
  const keysOf = (use: 'signed' | 'oneTime', kind: Kind): Key[] =>
    [...makers].flatMap(([identity, maker]) =>
      IDS[use][kind].flatMap((keyId) =>
        HALVES.map((half) => {
          const name = `${identity}/${use === 'signed' ? 's' : ''}${kind}${keyId}${half}`;
          wires.set(name, kind === 'pq' ? maker.pq(keyId) : maker.signed(keyId));
          return { keyId, name, identity };
        }),
      ),
    );
  const signed = { ec: keysOf('signed', 'ec'), pq: keysOf('signed', 'pq') };
  const oneTime = { ec: keysOf('oneTime', 'ec'), pq: keysOf('oneTime', 'pq') };
  const names = new Map([...wires].map(([name, { publicKey }]) => [publicKey, name]));
  const identities = new Map([...makers].map(([identity, maker]) => [maker.identityKey(), identity]));
  return {
    signed,
    oneTime,
    identityKey: (identity) => makers.get(identity)!.identityKey(),
    wire: (key) => wires.get(key.name)!,
    nameOf(key) {
      const name = names.get(key.publicKey);
      const made = wires.get(name ?? '');
      const isSame =
        made?.keyId === key.keyId && (key.signature === undefined || made.signature === key.signature);
      return isSame ? name! : `not ${name ?? 'made'}: ${JSON.stringify(key).slice(0, 80)}`;
    },
    identityOf: (publicKey) => identities.get(publicKey) ?? `not made: ${publicKey}`,
  };
}
