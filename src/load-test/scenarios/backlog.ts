import { pause } from '../../lib/clock.ts';
import { createSlots } from '../../lib/slots.ts';
import { Failure, type LoadDevice } from '../device.ts';
import { createMessaging, neighbourOf } from './messaging.ts';
import { createPresence } from './presence.ts';
import type { Scenario, Stage } from './scenario.ts';

/** Sends under way at once while the queues are filled. */
const FILLING_MAX = 64;
const RETRY_MS = 1_000;

/** Each device opens its gate once, on messages that wait, until its queue is empty. */
export function createBacklog(stage: Stage): Scenario {
  const { devices, meter, clock, interrupted, part } = stage;
  const presence = createPresence(stage);
  const messaging = createMessaging(stage, presence);
  /** When the latency of a drain counts from, for a device of which no message has arrived yet. */
  const opened = new Map<LoadDevice, number>();

  async function store(sender: LoadDevice, recipient: LoadDevice): Promise<void> {
    while (!interrupted.aborted) {
      try {
        await messaging.send({ sender, recipient, startMs: clock.nowMs() }).stored;
        return;
      } catch (error) {
        if (!(error instanceof Failure) || error.retryAfterMs === null) throw error;
        await pause(clock, Math.max(RETRY_MS, error.retryAfterMs), interrupted);
      }
    }
  }

  return {
    async prepare(device) {
      messaging.receive(device, () => {
        const startMs = opened.get(device);
        if (startMs !== undefined) meter.step('first message', startMs);
        opened.delete(device);
      });
      await device.connect();
      await device.ask('uploadKeys', { ...device.keys.upload(0), replaceIdentity: true });
    },

    async prepareAll() {
      const slots = createSlots({
        clock,
        slotCount: FILLING_MAX,
        waitingMax: devices.length,
        waitMaxMs: Number.MAX_SAFE_INTEGER,
      });
      await Promise.all(
        devices.map((device, turn) =>
          slots.run(async () => {
            for (let sent = 0; sent < part.backlogLength && !interrupted.aborted; sent++) {
              await store(device, neighbourOf(devices, turn));
            }
          }),
        ),
      );
    },

    async operate({ index, startMs }) {
      const device = devices[index]!;
      opened.set(device, startMs);
      if (!(await presence.comeBack(device))) throw new Failure('NOT_ANSWERED');
      meter.step('drained', startMs);
      presence.keep(device);
    },

    collect: messaging.collect,
    messages: () => messaging.ledger.counts(),
  };
}
