/** A phone in a process of its own, which can be frozen: it only receives. It is told who it is, and tells its history. */
import type { HistoryEvent } from './history.ts';
import { createPhone } from './phone.ts';
import { seeded } from './random.ts';

export interface PhoneOrder {
  userId: string;
  url: string;
  token: string;
  seed: number;
  /** Its requests and connections are numbered from here on. */
  countFrom: number;
}

const order: PhoneOrder = JSON.parse(process.argv[2]!);
const { userId, url, token, seed } = order;
let counted = order.countFrom;
const phone = createPhone({
  address: { userId, deviceId: 1 },
  ...{ url, token, random: seeded(seed), oneTimePreKeys: 2 },
  record: (event: HistoryEvent) => void process.send!(event),
  count: () => ++counted,
});
process.on('disconnect', () => process.exit(0));
await phone.start();
