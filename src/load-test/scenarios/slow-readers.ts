import { pause } from '../../lib/clock.ts';
import type { LoadDevice } from '../device.ts';
import { createMessaging } from './messaging.ts';
import { createPresence } from './presence.ts';
import type { Scenario, Stage } from './scenario.ts';

const SLOW_SHARE = 0.1;
/** Longer, and the gateway takes the device for gone. */
const PAUSED_MS = 3_000;
const READING_MS = 500;

/** Chat where a tenth of the devices reads in fits: do the others notice? */
export function createSlowReaders(stage: Stage): Scenario {
  const { devices, meter, clock } = stage;
  const presence = createPresence(stage);
  const messaging = createMessaging(stage, presence);
  const slowCount = Math.max(1, Math.floor(devices.length * SLOW_SHARE));
  const slow: ReadonlySet<LoadDevice> = new Set(devices.slice(0, slowCount));
  const senders = devices.slice(slowCount);
  const stopped = new AbortController();

  async function readInFits(device: LoadDevice): Promise<void> {
    while (!stopped.signal.aborted) {
      device.pauseReading();
      await pause(clock, PAUSED_MS, stopped.signal);
      device.resumeReading();
      await pause(clock, READING_MS, stopped.signal);
    }
  }

  return {
    async prepare(device) {
      const step = slow.has(device) ? 'delivered to slow readers' : 'delivered to the others';
      messaging.receive(device, ({ startMs }) => meter.step(step, startMs));
      await device.connect();
      await device.ask('uploadKeys', { ...device.keys.upload(0), replaceIdentity: true });
      await device.openGate();
      presence.keep(device);
    },

    start() {
      for (const device of slow) void readInFits(device);
    },

    async operate({ index, startMs }) {
      const sender = senders[index % senders.length]!;
      // Everyone is written to in turn; whoever would write to himself writes to the first slow reader.
      const next = devices[index % devices.length]!;
      const recipient = next === sender ? devices[0]! : next;
      const { stored, delivered } = messaging.send({ sender, recipient, startMs });
      await stored;
      meter.step('stored', startMs);
      await delivered;
    },

    stop: () => stopped.abort(),
    collect: messaging.collect,
    messages: () => messaging.ledger.counts(),
  };
}
