import { afterAll, beforeAll, expect, it } from 'vitest';
import { listenFault } from '../../src/lib/listen-fault.ts';
import { startGateway, type TestGateway } from '../support/gateway.ts';

let gateway: TestGateway;
beforeAll(async () => {
  gateway = await startGateway();
});
afterAll(() => gateway.stop());

/** Why a second gateway on the same database does not start. */
const fault = (env: Record<string, string>): Promise<string> =>
  startGateway({ databaseUrl: gateway.databaseUrl, env }).then(() => 'none', String);

it('a gateway that can’t listen says by which variables, and what to do', async () => {
  const [port, adminPort] = [gateway.url, gateway.adminUrl].map((url) => new URL(url).port) as [
    string,
    string,
  ];
  expect(await fault({ PORT: port })).toBe(
    `Error: can not listen at PORT ${port}, HOST 127.0.0.1: another process listens there; end it, or set PORT to another port (EADDRINUSE)`,
  );
  expect(await fault({ ADMIN_PORT: adminPort })).toBe(
    `Error: can not listen at ADMIN_PORT ${adminPort}, ADMIN_HOST 127.0.0.1: another process listens there; end it, or set ADMIN_PORT to another port (EADDRINUSE)`,
  );
  // An address that is for documentation only.
  expect(await fault({ HOST: '192.0.2.1' })).toMatch(
    /PORT 0, HOST 192\.0\.2\.1: this machine has no such address; set HOST to .+ \(EADDRNOTAVAIL\)$/,
  );
  expect(await fault({ ADMIN_HOST: 'nowhere.invalid' })).toMatch(
    /ADMIN_HOST nowhere\.invalid: the name does not lead to an address; ADMIN_HOST must be .+ \(E\w+\)$/,
  );
});

it('names no host where every address was meant, and leaves other faults as they are', () => {
  const place = { host: null, port: 80, hostName: 'HOST', portName: 'PORT' };
  const refused = Object.assign(new Error('listen EACCES'), { code: 'EACCES' });
  expect(listenFault(refused, place)).toEqual(
    new Error(
      'can not listen at PORT 80: this user may not; set PORT to another port, such as one above 1023 (EACCES)',
    ),
  );
  const other = new Error('it rains');
  expect(listenFault(other, place)).toBe(other);
});
