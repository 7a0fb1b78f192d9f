/** Gateways in this process, on clocks that a test can set: for what is not a fault of processes. */
import postgres from 'postgres';
import { type Clock, systemClock } from '../../src/lib/clock.ts';
import { createDatabase } from '../support/engines.ts';
import { startGateway, type TestGateway } from '../support/gateway.ts';
import { startTcpProxy } from '../support/tcp-proxy.ts';
import { QUICK_TIMING, type Stage } from './stage.ts';

export interface LocalStage extends Stage {
  clocks: readonly SteppedClock[];
  stop(): Promise<void>;
}

/** The system's clock, set wrong by so much. Timers run on, as they do when an operator or NTP sets a clock. */
export interface SteppedClock extends Clock {
  stepTo(offsetMs: number): void;
}

function steppedClock(): SteppedClock {
  let offsetMs = 0;
  return {
    nowMs: () => systemClock.nowMs() + offsetMs,
    after: systemClock.after,
    stepTo(next) {
      offsetMs = next;
    },
  };
}

/** Two gateways over the suite's PostgreSQL and the Redis, or the Cluster, of this URL. */
export async function startLocalStage(redisUrl: string): Promise<LocalStage> {
  const database = await createDatabase();
  const clocks = [steppedClock(), steppedClock()];
  const gateways: TestGateway[] = [];
  // One after the other: the first makes the schema.
  for (const clock of clocks) {
    gateways.push(await startGateway({ databaseUrl: database.url, redisUrl, clock, timing: QUICK_TIMING }));
  }
  let turn = 0;
  const clientLink = await startTcpProxy(() => gateways[turn++ % gateways.length]!.url);
  const sql = postgres(database.url, { max: 2, onnotice: () => {} });
  return {
    gateways,
    clocks,
    clientLink,
    sql,
    onGatewayEnd: () => {},
    async stop() {
      await clientLink.stop();
      await Promise.all(gateways.map((gateway) => gateway.stop()));
      await sql.end({ timeout: 1 });
      await database.drop();
    },
  };
}
