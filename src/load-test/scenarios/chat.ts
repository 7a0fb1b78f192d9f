import { createMessaging, neighbourOf } from './messaging.ts';
import { createPresence } from './presence.ts';
import type { Scenario, Stage } from './scenario.ts';

/** Each device sends to its neighbour: sent, stored, delivered, acknowledged. */
export function createChat(stage: Stage): Scenario {
  const { devices, meter } = stage;
  const presence = createPresence(stage);
  const messaging = createMessaging(stage, presence);

  return {
    async prepare(device) {
      messaging.receive(device, ({ startMs }) => meter.step('delivered', startMs));
      await device.connect();
      await device.ask('uploadKeys', { ...device.keys.upload(0), replaceIdentity: true });
      await device.openGate();
      presence.keep(device);
    },

    async operate({ index, startMs }) {
      const turn = index % devices.length;
      const { stored, delivered } = messaging.send({
        sender: devices[turn]!,
        recipient: neighbourOf(devices, turn),
        startMs,
      });
      await stored;
      meter.step('stored', startMs);
      await delivered;
    },

    collect: messaging.collect,
    messages: () => messaging.ledger.counts(),
  };
}
