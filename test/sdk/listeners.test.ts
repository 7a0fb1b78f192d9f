/** Registering listeners: all of them or none. */
import { randomUUID } from 'node:crypto';
import { Socket } from 'socket.io-client';
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from 'vitest';
import { redisUrl } from '../support/engines.ts';
import { eventually } from '../support/eventually.ts';
import { startGateway, type TestGateway } from '../support/gateway.ts';
import { closePhones, enrolPhone, installPhone } from './phone.ts';

let gateway: TestGateway;

beforeAll(async () => {
  gateway = await startGateway({ redisUrl: redisUrl() });
});
afterAll(() => gateway.stop());
afterEach(() => {
  vi.restoreAllMocks();
  closePhones();
});

/** What `start` registers. */
const PUSHES = ['messages', 'queueEmpty', 'preKeysLow', 'gateClosed'];

/** Makes the n-th registration of a listener fail from now on, once; tells which were asked for. */
function failAt(n: number): { sockets: Set<Socket>; names: string[] } {
  const sockets = new Set<Socket>();
  const names: string[] = [];
  const { on } = Socket.prototype;
  vi.spyOn(Socket.prototype, 'on').mockImplementation(function (this: Socket, name, listener) {
    sockets.add(this);
    names.push(String(name));
    if (names.length === n) throw new Error(`the listener of ${String(name)} could not be registered`);
    return on.call(this, name, listener) as Socket;
  });
  return { sockets, names };
}

describe('`start`', () => {
  it('registers these listeners, once, however often it is called', async () => {
    const phone = await installPhone(gateway.url, { userId: `bob-${randomUUID()}`, deviceId: 1 });
    const { names, sockets } = failAt(0);
    await Promise.all([phone.client.start(), phone.client.start()]);
    await phone.client.setUp();
    await phone.client.start();
    expect(names).toEqual(PUSHES);
    for (const socket of sockets) {
      for (const name of PUSHES) expect(socket.listeners(name)).toHaveLength(1);
    }
  });

  it.each(PUSHES.map((name, index) => [index + 1, name]))(
    'that fails at listener %i, %s, leaves none, and works when it is tried again',
    async (n) => {
      const address = { userId: `bob-${randomUUID()}`, deviceId: 1 };
      await enrolPhone(gateway.url, address).then((phone) => phone.close());
      const friend = await enrolPhone(gateway.url, { userId: `alice-${randomUUID()}`, deviceId: 1 });
      const phone = await enrolPhone(gateway.url, address);
      phone.close();
      await friend.say(address.userId, 'hello');

      await phone.restart();
      const { sockets } = failAt(Number(n));
      await expect(phone.client.start()).rejects.toThrow('could not be registered');
      expect(sockets.size).toBe(1);
      for (const socket of sockets) {
        for (const name of PUSHES) expect(socket.listeners(name)).toEqual([]);
      }

      expect(await phone.client.start()).toBe('ready');
      for (const socket of sockets) {
        for (const name of PUSHES) expect(socket.listeners(name)).toHaveLength(1);
      }
      await eventually(() => expect(phone.shown).toEqual([`${friend.address.userId}.1: hello`]));
    },
  );
});
