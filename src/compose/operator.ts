/** What an operator's commands work with, beside running gateways or without any. */

import { createInProcessBus } from '../backends/in-process/bus.ts';
import { createInProcessLocks } from '../backends/in-process/locks.ts';
import { openDatabase } from '../backends/postgres/database.ts';
import { isEmbeddedMade } from '../backends/postgres/embedded.ts';
import { createKeyStore } from '../backends/postgres/key-store.ts';
import { createMaintenance } from '../backends/postgres/maintenance.ts';
import { createMessageStore } from '../backends/postgres/message-store.ts';
import { migrateDatabase as migrate, missingMigrations } from '../backends/postgres/migrations.ts';
import type { StoreConfig } from '../config.ts';
import { type Bounces, createBounces } from '../delivery/bounce.ts';
import { noReports } from '../delivery/reports.ts';
import { revokeDevice } from '../keys/revoke.ts';
import { systemClock } from '../lib/clock.ts';
import { type Log, silentLog } from '../lib/log.ts';
import type { Bus } from '../ports/bus.ts';
import type { KeyStore } from '../ports/key-store.ts';
import type { DeviceLocks } from '../ports/lock.ts';
import type { Maintenance } from '../ports/maintenance.ts';
import type { MessageStore } from '../ports/message-store.ts';
import type { DeviceAddress } from '../protocol/ids.ts';
import { openEngines } from './engines.ts';
import { leapOf, openStore } from './store.ts';
import { opened } from './undo.ts';

export interface Operator {
  maintenance: Maintenance;
  store: KeyStore;
  /** Of this process alone: gateways that are beside it find the rows locked. */
  locks: DeviceLocks;
  messages: MessageStore;
  bounces: Bounces;
  /** @throws Error where what expires may not be judged here: this machine's clock differs from PostgreSQL's */
  refuseUnsoundClock(): Promise<void>;
  /** Revokes a device, and tells the gateways; those without Redis find out by themselves, on their next sweep. */
  revoke(device: DeviceAddress): Promise<{ keyVersion: number; revokedAtMs: number; hadKeys: boolean }>;
  close(): Promise<void>;
}

/**
 * Opens the configured store for a command; nobody is served.
 *
 * @param options.migrates brings the schema up to date first, as a starting gateway does; otherwise it must be
 * @throws Error where the store can't be reached, is behind, or is an embedded one that is in use or was never made
 */
export async function openOperator(
  config: StoreConfig,
  { migrates, log = silentLog }: { migrates: boolean; log?: Log },
): Promise<Operator> {
  const { store: where } = config;
  if (where.kind === 'embedded' && !isEmbeddedMade(where.dataDir)) {
    throw new Error(
      `there is no store in ${where.dataDir}: DATA_DIR, or DATABASE_URL, must be that of the gateway`,
    );
  }
  return await opened(async (undo) => {
    const address = await openStore(config, { log, undo });
    if (migrates) await migrate(address);
    const database = openDatabase({ address, clock: systemClock, log });
    undo.push(() => database.close());
    const missing = await missingMigrations(database);
    if (missing > 0) throw new Error(`the schema is ${missing} migrations behind: run keygate migrate`);
    const messages = createMessageStore(database);
    const bouncesBy = (bus: Bus): Bounces =>
      createBounces({
        messages,
        bus,
        clock: systemClock,
        messageLifetimeMs: config.messages.lifetimeMs,
        reports: noReports,
      });
    const store = createKeyStore(database);
    return {
      maintenance: createMaintenance(database),
      store,
      locks: createInProcessLocks({ clock: systemClock }),
      messages,
      // Nobody is told: the gateways' own sweeps find what came home.
      bounces: bouncesBy(createInProcessBus({ log })),
      async refuseUnsoundClock() {
        const aheadMs = await leapOf(systemClock, database);
        if (aheadMs === null) return;
        throw new Error(
          `the clock of this machine differs by ${Math.round(aheadMs / 1000)} s from that of PostgreSQL`,
        );
      },
      async revoke(device) {
        const { bus, locks } = openEngines(config, { clock: systemClock, log, undo });
        // First of all: nothing that Redis refuses keeps a device from being revoked.
        const { data } = await revokeDevice({ store, locks, clock: systemClock }, device);
        await bus.start({ onPoke() {}, onDisplaced() {}, onGap() {} });
        undo.push(() => bus.stop());
        bus.poke([device]);
        await bouncesBy(bus).settle(device);
        return data;
      },
    };
  });
}
