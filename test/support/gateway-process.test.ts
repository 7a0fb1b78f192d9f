/** The process harness itself: it serves, it can be killed and comes back, and a start that fails says why. */
import { readFileSync } from 'node:fs';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createDatabase } from './engines.ts';
import { type GatewayProcess, startGatewayProcess } from './gateway-process.ts';

describe('startGatewayProcess', () => {
  let database: Awaited<ReturnType<typeof createDatabase>>;
  let gateway: GatewayProcess;
  beforeAll(async () => {
    database = await createDatabase();
    gateway = await startGatewayProcess({ databaseUrl: database.url });
  });
  afterAll(async () => {
    await gateway.stop();
    await database.drop();
  });

  it('serves, and after SIGKILL comes back at the same address', async () => {
    const before = await gateway.connect({ userId: 'alice', deviceId: 1 });
    expect(await before.call('keyStatus')).toMatchObject({ keyVersion: 0 });
    const { pid } = gateway;
    await gateway.kill('SIGKILL');
    expect(await gateway.ended).toEqual({ cause: 'ended', code: null, signal: 'SIGKILL' });
    await before.disconnected;
    await gateway.restart();
    expect(gateway.pid).not.toBe(pid);
    const after = await gateway.connect({ userId: 'alice', deviceId: 1 });
    expect(await after.call('keyStatus')).toMatchObject({ keyVersion: 0 });
    expect((await fetch(`${gateway.adminUrl}/readyz`)).status).toBe(200);
  });

  it('stands still from the moment that SIGSTOP is answered', async () => {
    const client = await gateway.connect({ userId: 'bob', deviceId: 1 });
    await gateway.kill('SIGSTOP');
    expect(readFileSync(`/proc/${gateway.pid}/status`, 'utf8')).toContain('State:\tT (stopped)');
    await gateway.kill('SIGCONT');
    expect(await client.call('keyStatus')).toMatchObject({ keyVersion: 0 });
  });

  it('passes on the words of a start that fails', async () => {
    await expect(startGatewayProcess({ databaseUrl: database.url }, { LOG_LEVEL: 'loud' })).rejects.toThrow(
      /LOG_LEVEL must be one of/,
    );
  });
});
