/** A gateway that keeps nothing, and answers the load test as it is told to. */
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { Server, type Socket } from 'socket.io';
import { onTestFinished } from 'vitest';
import type { Reply, RequestInput, RequestName } from '../../src/protocol/events.ts';

export interface Asked<Name extends RequestName = RequestName> {
  name: Name;
  /** Who asks. */
  userId: string;
  input: RequestInput<Name>;
  socket: Socket;
}

/** What is answered: the data of a success, a refusal, or nothing at all. */
type Answers = {
  [Name in RequestName]?: (asked: Asked<Name>) => object | Extract<Reply<Name>, { ok: false }> | null;
};

export interface ToldGateway {
  url: string;
  /** Every request, in the order of arrival. */
  asked: Asked[];
  /** The names of what was asked, in the order of arrival. */
  names(): RequestName[];
  sockets: Map<string, Socket>;
  stop(): Promise<void>;
}

export const refusal = (
  code: 'RATE_LIMITED' | 'UNAVAILABLE' | 'KEYS_OUT_OF_SYNC',
  retryAfterMs?: number,
) => ({
  ok: false as const,
  error: {
    code,
    message: `told to: ${code}`,
    retryable: true,
    ...(retryAfterMs === undefined ? {} : { retryAfterMs }),
  },
});

/**
 * Ends with the test.
 *
 * @param answers what is left out succeeds
 */
export async function startToldGateway(answers: Answers = {}): Promise<ToldGateway> {
  const http = createServer();
  const io = new Server(http, { transports: ['websocket'] });
  const sockets = new Map<string, Socket>();
  const asked: Asked[] = [];
  const usual: Answers = {
    uploadKeys: () => ({ keyVersion: 1 }),
    validateKeys: () => ({ keysValid: true, validation: 'any' }),
    clientReady: ({ socket }) => {
      setImmediate(() => socket.emit('queueEmpty', { deliveredCount: 0 }));
      return { pendingCount: 0, keyVersion: 1 };
    },
    sendMessages: ({ input }) => ({
      storedAt: new Date().toISOString(),
      accepted: input.envelopes.map(({ deviceId }) => deviceId),
      rejected: [],
    }),
    keyStatus: () => ({}),
  };

  io.on('connection', (socket) => {
    const [, payload = ''] = String(socket.handshake.auth.token).split('.');
    const { sub: userId } = JSON.parse(Buffer.from(payload, 'base64url').toString());
    sockets.set(userId, socket);
    socket.onAny((name: RequestName, input, acknowledge: (reply: unknown) => void) => {
      const request = { name, userId, input, socket };
      asked.push(request);
      const answer = (answers[name] ?? usual[name])?.(request as never) ?? null;
      if (answer === null) return;
      acknowledge('ok' in answer ? answer : { ok: true, data: answer });
    });
  });

  await new Promise<void>((resolve) => http.listen(0, '127.0.0.1', resolve));
  const stop = async (): Promise<void> => {
    await io.close();
  };
  onTestFinished(stop);
  return {
    url: `http://127.0.0.1:${(http.address() as AddressInfo).port}`,
    asked,
    names: () => asked.map(({ name }) => name),
    sockets,
    stop,
  };
}
