import { Failure, type LoadDevice } from '../device.ts';
import { createMessaging, neighbourOf } from './messaging.ts';
import { createPresence } from './presence.ts';
import type { Scenario, Stage } from './scenario.ts';

/** All connections are cut with messages in flight, and all devices come back at once. */
export function createStorm(stage: Stage): Scenario {
  const { devices, meter } = stage;
  const presence = createPresence(stage);
  const messaging = createMessaging(stage, presence);
  const away = new Set<LoadDevice>();

  async function weather(device: LoadDevice, startMs: number): Promise<void> {
    device.cut();
    const isBack = await presence.comeBack(device, () => meter.step('connected', startMs));
    if (!isBack) throw new Failure('NOT_ANSWERED');
    meter.step('served again', startMs);
  }

  return {
    async prepare(device) {
      messaging.receive(device);
      await device.connect();
      await device.ask('uploadKeys', { ...device.keys.upload(0), replaceIdentity: true });
      await device.openGate();
      presence.keep(device);
    },

    operate({ index, startMs }) {
      const turn = index % devices.length;
      const device = devices[turn]!;
      if (away.has(device) || !device.isConnected) return null;
      away.add(device);
      // Its answer is lost with the connection, and the device asks again when it is back.
      const { stored, delivered } = messaging.send({
        sender: device,
        recipient: neighbourOf(devices, turn),
        startMs,
      });
      const back = weather(device, startMs).finally(() => away.delete(device));
      return Promise.all([back, stored, delivered]).then(() => {});
    },

    collect: messaging.collect,
    messages: () => messaging.ledger.counts(),
  };
}
