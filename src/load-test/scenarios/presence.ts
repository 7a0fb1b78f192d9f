/** Devices that come back: whoever loses the connection connects again and opens the gate, as a real client does. */
import { pause } from '../../lib/clock.ts';
import { Failure, type LoadDevice } from '../device.ts';
import type { Stage } from './scenario.ts';

export interface Presence {
  /** From now on, a connection that ends by itself is made again. */
  keep(device: LoadDevice): void;
  /**
   * Connects and opens the gate, again and again until that works. Calls for one device at once are one.
   *
   * @returns false where the test was over first
   */
  comeBack(device: LoadDevice, onConnected?: () => void): Promise<boolean>;
  /**
   * Asks until there is an answer: at once where there is a connection, and again over the next one where it breaks.
   *
   * @throws Failure for a refusal; NOT_ANSWERED where the test was over first
   */
  untilAnswered<Result>(device: LoadDevice, ask: () => Promise<Result>): Promise<Result>;
}

const BACKOFF_MIN_MS = 250;
const BACKOFF_MAX_MS = 8_000;

export function createPresence(stage: Stage): Presence {
  const { clock, meter, random, over } = stage;
  const returning = new Map<LoadDevice, Promise<boolean>>();

  async function tryUntilBack(device: LoadDevice, onConnected: () => void): Promise<boolean> {
    for (let failures = 0; !over.aborted; failures++) {
      try {
        if (!device.isConnected) await device.connect();
        onConnected();
        await device.openGate();
        return true;
      } catch (error) {
        if (!(error instanceof Failure)) throw error;
        meter.noted(error.code);
        const backoffMs = Math.min(BACKOFF_MAX_MS, BACKOFF_MIN_MS * 2 ** failures) * (1 + random());
        await pause(clock, Math.max(backoffMs, error.retryAfterMs ?? 0), over);
      }
    }
    return false;
  }

  const presence: Presence = {
    keep(device) {
      device.listener.onDisconnect = () => {
        meter.noted('DISCONNECTED');
        void presence.comeBack(device);
      };
    },

    comeBack(device, onConnected = () => {}) {
      const underWay = returning.get(device);
      if (underWay !== undefined) return underWay;
      const back = tryUntilBack(device, onConnected).finally(() => returning.delete(device));
      returning.set(device, back);
      return back;
    },

    async untilAnswered(device, ask) {
      for (;;) {
        const isOnline = device.isConnected && !returning.has(device);
        if (!isOnline && !(await presence.comeBack(device))) throw new Failure('NOT_ANSWERED');
        try {
          return await ask();
        } catch (error) {
          if (!(error instanceof Failure && error.isUncertain)) throw error;
        }
      }
    },
  };
  return presence;
}
