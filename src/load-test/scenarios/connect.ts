import type { Scenario, Stage } from './scenario.ts';

/** Devices connect, one after the other; each ends its last connection first. */
export function createConnect({ devices, meter }: Stage): Scenario {
  const connecting = new Set<number>();

  return {
    async prepare(device) {
      await device.connect();
      // Any Socket.IO server takes a connection; only a gateway answers this.
      await device.ask('keyStatus', {});
    },

    operate({ index, startMs }) {
      const turn = index % devices.length;
      if (connecting.has(turn)) return null;
      const device = devices[turn]!;
      connecting.add(turn);
      device.close();
      return device
        .connect()
        .then(() => meter.step('connected', startMs))
        .finally(() => connecting.delete(turn));
    },
  };
}
