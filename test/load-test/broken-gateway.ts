/** A gateway that breaks its promises, so that the load test has something to find. It keeps no keys at all. */
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { Server, type Socket } from 'socket.io';
import type { RequestInput } from '../../src/protocol/events.ts';

export interface BrokenGateway {
  url: string;
  stop(): Promise<void>;
}

/** Every tenth message, and one request in ten, is treated otherwise than the contract says. */
export async function startBrokenGateway(): Promise<BrokenGateway> {
  const http = createServer();
  const io = new Server(http, { transports: ['websocket'] });
  const sockets = new Map<string, Socket>();
  const held = new Map<string, unknown[]>();
  let messages = 0;
  let envelopes = 0;

  io.on('connection', (socket) => {
    const [, payload = ''] = String(socket.handshake.auth.token).split('.');
    const { sub } = JSON.parse(Buffer.from(payload, 'base64url').toString());
    sockets.set(sub, socket);
    const answers: Record<string, (input: RequestInput<'sendMessages'>) => unknown> = {
      uploadKeys: () => ({ keyVersion: 1 }),
      validateKeys: () => ({ keysValid: true, validation: 'any' }),
      clientReady: () => {
        setImmediate(() => socket.emit('queueEmpty', { deliveredCount: 0 }));
        return { pendingCount: 0, keyVersion: 1 };
      },
      sendMessages: ({ messageId, userId, envelopes: [first] }) => {
        store({ messageId, userId, content: first!.content });
        return { storedAt: new Date().toISOString(), accepted: [1], rejected: [] };
      },
    };
    for (const [name, answer] of Object.entries(answers)) {
      socket.on(name, (input: RequestInput<'sendMessages'>, acknowledge: (reply: unknown) => void) => {
        const isLimited = name === 'sendMessages' && messages++ % 10 === 7;
        acknowledge(
          isLimited
            ? { ok: false, error: { code: 'RATE_LIMITED', message: '', retryable: true, retryAfterMs: 1 } }
            : { ok: true, data: answer(input) },
        );
      });
    }
  });

  function store({
    messageId,
    userId,
    content,
  }: {
    messageId: string;
    userId: string;
    content: string;
  }): void {
    const envelope = () => ({
      id: String(++envelopes),
      kind: 'message',
      messageId,
      sender: { userId: 'somebody', deviceId: 1 },
      type: 2,
      content,
      storedAt: new Date().toISOString(),
    });
    // Counted per recipient: what is held back meets the next one of the same sender.
    const waiting = held.get(userId) ?? [];
    const turn = messages % 10;
    if (turn === 1) return;
    const page = [envelope(), ...(turn === 3 ? [envelope()] : [])];
    if (turn === 5) held.set(userId, [...waiting, ...page]);
    else {
      // The next one overtakes what was held back.
      sockets.get(userId)?.emit('messages', { envelopes: [...page, ...waiting] }, () => {});
      held.delete(userId);
    }
  }

  await new Promise<void>((resolve) => http.listen(0, '127.0.0.1', resolve));
  return {
    url: `http://127.0.0.1:${(http.address() as AddressInfo).port}`,
    stop: async () => {
      await io.close();
    },
  };
}
