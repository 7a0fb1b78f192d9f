/** A plain Socket.IO server, as all contestants but the gateway have it. */
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { Server, type Socket } from 'socket.io';

/** Listens on a free loopback port and prints it. @param admit throws where a connection is refused */
export function serveSockets(
  onConnection: (socket: Socket) => void,
  admit: (socket: Socket) => Promise<void> = async () => {},
): void {
  const server = createServer();
  const io = new Server(server, {
    transports: ['websocket'],
    serveClient: false,
    perMessageDeflate: false,
  });
  io.use((socket, next) => {
    admit(socket).then(() => next(), next);
  });
  io.on('connection', onConnection);
  server.listen(0, '127.0.0.1', () => {
    process.stdout.write(`listening on http://127.0.0.1:${(server.address() as AddressInfo).port}\n`);
  });
}
