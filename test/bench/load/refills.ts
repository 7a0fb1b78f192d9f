/** Devices that fill their pools up, each with new keys under new ids. */
import { faultOf } from './claims.ts';
import { type DriveInput, drive } from './drive.ts';
import type { Measurement } from './measurement.ts';
import type { RawSocket } from './raw-socket.ts';

export interface RefillsInput extends DriveInput {
  /** EC public keys in base64: each refill has all of them. */
  publicKeys: readonly string[];
  /** Of each device: then its pool is full, and the run ends. */
  refillsMax: number;
}

/** Of all runs: what was offered once is never offered again. */
let nextKeyId = 0;

export async function driveRefills(sockets: readonly RawSocket[], input: RefillsInput): Promise<Measurement> {
  const { publicKeys, refillsMax } = input;
  const stored = `"stored":${publicKeys.length}`;
  return await drive(sockets, input, ({ socket, meter, again }) => {
    let begunAtMs = 0;
    let refills = 0;
    return {
      begin(startMs) {
        if (refills++ === refillsMax) {
          meter.endEarly();
          return;
        }
        begunAtMs = startMs;
        const keys = publicKeys.map((key) => `{"keyId":${nextKeyId++},"publicKey":"${key}"}`);
        socket.request('addPreKeys', `{"oneTimePreKeys":[${keys.join(',')}]}`);
      },
      onReply(_, text) {
        if (text.startsWith('[{"ok":true') && text.includes(stored)) meter.done(begunAtMs);
        else meter.fault(faultOf(text));
        again();
      },
      onEvent() {},
    };
  });
}
