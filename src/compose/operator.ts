/** What an operator's commands work with, beside running gateways or without any. */

import { createInProcessBus } from '../backends/in-process/bus.ts';
import { createInProcessLocks } from '../backends/in-process/locks.ts';
import { isEmbeddedMade } from '../backends/postgres/embedded.ts';
import { examinePostgres } from '../backends/postgres/examine.ts';
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
import { reasonOf } from '../lib/reason.ts';
import { opened } from '../lib/undo.ts';
import type { Bus } from '../ports/bus.ts';
import type { KeyStore } from '../ports/key-store.ts';
import type { DeviceLocks } from '../ports/lock.ts';
import type { Maintenance } from '../ports/maintenance.ts';
import type { MessageStore } from '../ports/message-store.ts';
import type { DeviceAddress } from '../protocol/ids.ts';
import { openBusAndLocks } from './engines.ts';
import { leapOf, openPools, openStore } from './store.ts';

export interface Revocation {
  keyVersion: number;
  revokedAtMs: number;
  hadKeys: boolean;
  untold: string | null;
}

export interface Operator {
  maintenance: Maintenance;
  store: KeyStore;
  /** Of this process alone: gateways that are beside it find the rows locked. */
  locks: DeviceLocks;
  messages: MessageStore;
  bounces: Bounces;
  /** @throws Error where what expires may not be judged here: this machine's clock differs from PostgreSQL's */
  refuseUnsoundClock(): Promise<void>;
  /**
   * Revokes a device, and tells the gateways; those that can't be told find out by themselves, on their next sweep.
   *
   * @returns `untold`: why they could not be told, null where they were
   * @throws GatewayError UNAVAILABLE; the device is not revoked then
   */
  revoke(device: DeviceAddress): Promise<Revocation>;
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
    const database = openPools(address, { log, undo });
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
    // Nobody is told: the gateways' own sweeps find what came home.
    const bounces = bouncesBy(createInProcessBus({ log }));
    const store = createKeyStore(database);
    return {
      maintenance: createMaintenance(database),
      store,
      locks: createInProcessLocks({ clock: systemClock }),
      messages,
      bounces,
      async refuseUnsoundClock() {
        const aheadMs = await leapOf(systemClock, database);
        if (aheadMs === null) return;
        throw new Error(
          `the clock of this machine differs by ${Math.round(aheadMs / 1000)} s from that of PostgreSQL`,
        );
      },
      async revoke(device) {
        const { bus, locks } = openBusAndLocks(config, { log, undo });
        // Tokens end by the time at which they were issued: where this machine is behind, the store's counts.
        const storeMs = (await examinePostgres(database)).nowMs;
        const clock = { ...systemClock, nowMs: () => Math.max(systemClock.nowMs(), storeMs) };
        // First of all: nothing that Redis refuses keeps a device from being revoked.
        const { data } = await revokeDevice({ store, locks, clock }, device);
        const untold = await bus.start({ onPoke() {}, onDisplaced() {}, onGap() {} }).then(() => {
          undo.push(() => bus.stop());
          bus.poke([device]);
          return bus.trouble();
        }, reasonOf);
        // What can't be brought home now is found by the gateways' sweeps.
        await (untold === null ? bouncesBy(bus) : bounces).settle(device).catch(() => {});
        return { ...data, untold };
      },
    };
  });
}
