/** A bare Socket.IO server that answers every request with an object of a bundle's shape and size, and does nothing else. */
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { Server } from 'socket.io';

const reply = JSON.parse(process.env.BENCH_REPLY ?? '{}');

const server = createServer();
const io = new Server(server, {
  transports: ['websocket'],
  serveClient: false,
  perMessageDeflate: false,
});
io.on('connection', (socket) => {
  socket.on('requestBundle', (_, acknowledge) => acknowledge(reply));
});
server.listen(0, '127.0.0.1', () => {
  process.stdout.write(`listening on http://127.0.0.1:${(server.address() as AddressInfo).port}\n`);
});
