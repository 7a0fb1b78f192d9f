/**
 * What a run plays on: several gateways, each a process of its own, over a real PostgreSQL and a real Redis. Clients
 * come by a proxy that balances their connections, gateways reach the engines by proxies too, so that every link can be
 * broken; an observer of its own has a direct way to the store.
 */
import postgres from 'postgres';
import { type Engine, type PostgresEngine, startPostgres, startRedis } from '../support/engines.ts';
import { type GatewayProcess, startGatewayProcess } from '../support/gateway-process.ts';
import { startTcpProxy, type TcpProxy } from '../support/tcp-proxy.ts';

export interface Stage {
  gateways: readonly { readonly url: string }[];
  /** Between clients and gateways: each new connection goes to the next gateway. */
  clientLink: TcpProxy;
  /** The observer's way to the store, past the proxy. */
  sql: postgres.Sql;
  /** Is told of the end of every gateway while it is set. */
  onGatewayEnd: (end: { expected: boolean; how: string }) => void;
}

export interface ProcessStage extends Stage {
  gateways: GatewayProcess[];
  postgres: PostgresEngine;
  redis: Engine;
  postgresLink: TcpProxy;
  redisLink: TcpProxy;
  /** Between `expectEnd` and the next start the end of this gateway is no surprise. */
  expectEnd(gateway: GatewayProcess): void;
  restart(gateway: GatewayProcess): Promise<void>;
  /** What `/readyz` of a gateway says: its status line and body. */
  readiness(gateway: GatewayProcess): Promise<{ status: number; text: string }>;
  stop(): Promise<void>;
}

/** Leases, probes and sweeps of the suite's gateways: as in production, but sooner. */
export const QUICK_TIMING = {
  bus: { leaseMs: 1_500, probeMs: 300, probeWaitMaxMs: 500 },
  sweepPeriodMs: 1_000,
};

export async function startStage(
  options: { gateways?: number; timing?: object; env?: Record<string, string> } = {},
): Promise<ProcessStage> {
  const { gateways: gatewayCount = 2, timing = QUICK_TIMING, env = {} } = options;
  const undo: (() => Promise<unknown>)[] = [];
  const stop = async (): Promise<void> => {
    for (const step of undo.splice(0).reverse()) await step();
  };
  try {
    // Commits are on the disk when they are acknowledged, as in production.
    const engine = await startPostgres({ durable: true });
    undo.push(() => engine.stop());
    const redis = await startRedis();
    undo.push(() => redis.stop());
    const postgresLink = await startTcpProxy(engine.url, { raw: true });
    undo.push(() => postgresLink.stop());
    const redisLink = await startTcpProxy(redis.url, { raw: true });
    undo.push(() => redisLink.stop());

    const start = () =>
      startGatewayProcess(
        { databaseUrl: through(engine.url, postgresLink), redisUrl: through(redis.url, redisLink) },
        { ...env, NODE_TIMING: JSON.stringify(timing) },
        { program: ['--import', 'tsx', 'test/fault/gateway-node.ts'] },
      );
    // The first one makes the schema.
    const gateways = [await start()];
    gateways.push(...(await Promise.all(Array.from({ length: gatewayCount - 1 }, start))));
    for (const gateway of gateways) undo.push(() => gateway.stop());
    let turn = 0;
    const clientLink = await startTcpProxy(() => gateways[turn++ % gateways.length]!.url);
    undo.push(() => clientLink.stop());
    const sql = postgres(engine.url, {
      // The driver tells what ended a query with its connection to the first query of the next connection too: a second
      // one might bear that until long after the recovery.
      max: 1,
      onnotice: () => {},
      connection: { application_name: 'observer' },
    });
    undo.push(() => sql.end({ timeout: 1 }));

    const expected = new Set<GatewayProcess>();
    const watch = (gateway: GatewayProcess): void => {
      void gateway.ended.then((end) => {
        const how = end.cause === 'ended' ? `with ${end.code ?? end.signal}` : 'unwatched';
        stage.onGatewayEnd({ expected: expected.has(gateway), how });
      });
    };
    const stage: ProcessStage = {
      gateways,
      postgres: engine,
      redis,
      clientLink,
      postgresLink,
      redisLink,
      sql,
      expectEnd: (gateway) => expected.add(gateway),
      async restart(gateway) {
        expected.add(gateway);
        await gateway.restart();
        expected.delete(gateway);
        watch(gateway);
      },
      onGatewayEnd: () => {},
      async readiness(gateway) {
        const response = await fetch(`${gateway.adminUrl}/readyz`, { signal: AbortSignal.timeout(3_000) });
        return { status: response.status, text: await response.text() };
      },
      async stop() {
        for (const gateway of gateways) expected.add(gateway);
        await stop();
      },
    };
    for (const gateway of gateways) watch(gateway);
    return stage;
  } catch (error) {
    await stop();
    throw error;
  }
}

function through(url: string, proxy: TcpProxy): string {
  const there = new URL(url);
  there.port = new URL(proxy.url).port;
  return there.href;
}
