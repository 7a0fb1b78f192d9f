/** What is of one device takes turns, so that however much is asked of it holds one place among what is asked of all. */
import { type Clock, steadyClock } from '../../lib/clock.ts';
import { createSlots, NoSlotError, type Slots } from '../../lib/slots.ts';
import { addressKey, type DeviceAddress } from '../../protocol/ids.ts';
import { unavailable } from './faults.ts';

/**
 * Runs `action` when what is of the same device before it has ended.
 *
 * @throws GatewayError UNAVAILABLE where too much waits already, or it has waited until its caller may have given up:
 *   nothing was begun then; and whatever `action` throws
 */
export type DeviceTurns = <Result>(device: DeviceAddress, action: () => Promise<Result>) => Promise<Result>;

const LINE = { slotCount: 1, waitingMax: 1_000, waitMaxMs: 5_000 };

/** @param clock by default the steady one */
export function createDeviceTurns(clock: Clock = steadyClock): DeviceTurns {
  const lines = new Map<string, { slots: Slots; length: number }>();
  return async (device, action) => {
    const key = addressKey(device);
    const line = lines.get(key) ?? { slots: createSlots({ clock, ...LINE }), length: 0 };
    lines.set(key, line);
    line.length += 1;
    try {
      return await line.slots.run(action);
    } catch (error) {
      throw error instanceof NoSlotError ? unavailable(error) : error;
    } finally {
      line.length -= 1;
      if (line.length === 0) lines.delete(key);
    }
  };
}
