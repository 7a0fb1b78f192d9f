// The one buffer is for sockets as Node builds them, with nothing in them; every other is left as it is.
import { once } from 'node:events';
import { type AddressInfo, connect, createServer, Socket } from 'node:net';
import { PassThrough } from 'node:stream';
import { expect, it, onTestFinished } from 'vitest';
import { readIntoOneBuffer } from '../../src/gateway/read-buffer.ts';
import { eventually } from '../support/eventually.ts';

it.each([
  [
    'keeps nothing where `onread` would',
    () => Object.assign(new PassThrough(), { _handle: { useUserBuffer: () => expect.unreachable() } }),
  ],
  ['has no connection', () => new Socket()],
])('leaves a socket as it is that %s', async (_, make) => {
  const stream = make();
  readIntoOneBuffer(stream as Socket);
  const heard = once(stream, 'data');
  stream.push('chunk');
  expect(String((await heard)[0])).toBe('chunk');
  stream.destroy();
});

it('leaves a paused socket as it is, whose chunks would come before those that wait', async () => {
  const server = createServer();
  await once(server.listen(0, '127.0.0.1'), 'listening');
  const accepted = once(server, 'connection') as Promise<[Socket]>;
  const client = connect((server.address() as AddressInfo).port, '127.0.0.1');
  const [socket] = await accepted;
  onTestFinished(() => {
    socket.destroy();
    client.destroy();
    server.close();
  });
  const heard: string[] = [];
  socket.on('data', (chunk: Buffer) => heard.push(chunk.toString()));
  client.write('first');
  await eventually(() => expect(heard).toEqual(['first']));
  socket.pause();
  client.write('second');
  await eventually(() => expect(socket.readableLength).toBe('second'.length));
  readIntoOneBuffer(socket);
  client.end('third');
  await eventually(() => expect(socket.bytesRead).toBe('firstsecondthird'.length));
  expect(heard).toEqual(['first']);
  socket.resume();
  await once(socket, 'end');
  expect(heard.join('')).toBe('firstsecondthird');
});
