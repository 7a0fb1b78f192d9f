/** Gateways that are killed, frozen and drained in the midst of their work, and all their clients at once. */
import { describe } from 'vitest';
import {
  clientsServedElsewhere,
  gatewayDrained,
  gatewayFrozen,
  gatewayKilled,
  reconnectsAtOnce,
} from './faults.ts';
import { onStage } from './suite.ts';

describe('the rules hold', () => {
  const over = onStage();
  over('when nothing breaks', () => async () => {});
  over('when a gateway is killed under load', () => gatewayKilled);
  over('when a gateway is killed: its clients are served by another', () => clientsServedElsewhere);
  over('when a gateway is frozen beyond its lease, and thaws', () => gatewayFrozen);
  over('when a gateway drains under load', () => gatewayDrained);
  over('when 2,000 clients, or some hundred, reconnect at once', (seed) =>
    reconnectsAtOnce(seed === 1 ? 2_000 : 200),
  );
});
