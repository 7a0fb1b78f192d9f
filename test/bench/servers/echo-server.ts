/**
 * A bare Socket.IO server: it verifies tokens, answers every request with an object of a bundle's shape and size,
 * emits a backlog in acknowledged pages, and does nothing else.
 */
import { randomBytes, randomUUID } from 'node:crypto';
import { jwtVerify } from 'jose';
import type { Socket } from 'socket.io';
import { serveSockets } from './socket-server.ts';

const reply = JSON.parse(process.env.BENCH_REPLY ?? '{}');
const secret = new TextEncoder().encode(process.env.BENCH_SECRET ?? '');
const contentBytes = Number(process.env.BENCH_CONTENT_BYTES ?? 0);
/** What waits for every device that says `clientReady`, as the gateway would push it. */
const backlog = Array.from({ length: Number(process.env.BENCH_BACKLOG ?? 0) }, () => ({
  id: randomUUID(),
  kind: 'message',
  messageId: randomUUID(),
  sender: { userId: 'sender-1000', deviceId: 1 },
  type: 2,
  content: randomBytes(contentBytes).toString('base64'),
  storedAt: new Date().toISOString(),
}));
const PAGE = 100;
/** Pages that are out at once. */
const PAGES_OUT_MAX = 2;

serveSockets(
  (socket) => {
    socket.on('requestBundle', (_, acknowledge) => acknowledge(reply));
    socket.on('validateKeys', (_, acknowledge) => acknowledge({ ok: true, data: {} }));
    socket.on('clientReady', ({ inPages }, acknowledge) => {
      acknowledge({ ok: true, data: { pendingCount: backlog.length, keyVersion: 1 } });
      emitBacklog(socket, inPages === true ? emitPage : emitEach);
    });
  },
  async (socket) => {
    await jwtVerify(socket.handshake.auth.token, secret);
  },
);

type EmitPage = (socket: Socket, page: typeof backlog, onAcknowledged: () => void) => void;

/** An emit for each message; the last one of the page is acknowledged, for all. */
const emitEach: EmitPage = (socket, page, onAcknowledged) => {
  for (const envelope of page.slice(0, -1)) socket.emit('messages', { envelopes: [envelope] });
  socket.emit('messages', { envelopes: page.slice(-1) }, onAcknowledged);
};

const emitPage: EmitPage = (socket, page, onAcknowledged) => {
  socket.emit('messages', { envelopes: page }, onAcknowledged);
};

function emitBacklog(socket: Socket, emit: EmitPage): void {
  let next = 0;
  let out = 0;
  const emitPages = (): void => {
    for (; out < PAGES_OUT_MAX && next < backlog.length; next += PAGE) {
      out += 1;
      emit(socket, backlog.slice(next, next + PAGE), () => {
        out -= 1;
        emitPages();
      });
    }
    if (next >= backlog.length && out === 0) socket.emit('queueEmpty', { deliveredCount: backlog.length });
  };
  emitPages();
}
