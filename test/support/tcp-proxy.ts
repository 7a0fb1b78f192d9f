/**
 * A TCP proxy in front of a gateway that cuts connections where a test asks for it. It reads along just enough of
 * WebSocket and Socket.IO to know a request and its answer.
 */
import { connect, createServer, type Socket } from 'node:net';
import type { RequestName } from '../../src/protocol/events.ts';

export interface TcpProxy {
  /** Where clients connect instead of the gateway. */
  readonly url: string;
  /** Sends new connections to another gateway. */
  retarget(gatewayUrl: string): void;
  /** Cuts every connection, and refuses new ones until `plugIn`. */
  unplug(): void;
  plugIn(): void;
  /** Cuts every connection; new ones are taken. */
  cut(): void;
  /**
   * The next request of this name goes through and is answered by the gateway, but the answer is swallowed and the
   * connection cut.
   *
   * @returns resolves when that has happened
   */
  loseAnswerOf(name: RequestName): Promise<void>;
  /** The next acknowledgement by a client is swallowed and the connection cut. @returns resolves when that has happened */
  loseAcknowledgement(): Promise<void>;
  stop(): Promise<void>;
}

interface Trap {
  name: RequestName;
  sprung(): void;
}

export async function startTcpProxy(targetUrl: string): Promise<TcpProxy> {
  let target = new URL(targetUrl);
  const connections = new Set<() => void>();
  let unplugged = false;
  let trap: Trap | null = null;
  let acknowledgementTrap: (() => void) | null = null;

  const server = createServer((client) => {
    if (unplugged) return void client.destroy();
    const gateway = connect(Number(target.port), target.hostname);
    const cutThis = (): void => {
      connections.delete(cutThis);
      client.destroy();
      gateway.destroy();
    };
    connections.add(cutThis);
    for (const socket of [client, gateway]) {
      socket.setNoDelay(true);
      socket.on('error', cutThis);
      socket.on('close', cutThis);
    }
    /** The number of the request whose answer is to be lost on this connection. */
    let awaited: { number: string; sprung(): void } | null = null;

    passOn(client, gateway, (packet) => {
      if (/^43\d/.test(packet) && acknowledgementTrap !== null) {
        const sprung = acknowledgementTrap;
        acknowledgementTrap = null;
        cutThis();
        sprung();
        return false;
      }
      const [, number, name] = /^42(\d+)\["(\w+)"/.exec(packet) ?? [];
      if (number !== undefined && trap !== null && trap.name === name) {
        awaited = { number, sprung: trap.sprung };
        trap = null;
      }
      return true;
    });
    passOn(gateway, client, (packet) => {
      if (awaited === null || !packet.startsWith(`43${awaited.number}[`)) return true;
      const { sprung } = awaited;
      cutThis();
      sprung();
      return false;
    });
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const address = server.address();
  const port = typeof address === 'object' && address !== null ? address.port : 0;
  const cut = (): void => {
    for (const cutOne of connections) cutOne();
  };

  return {
    url: `http://127.0.0.1:${port}`,
    retarget(gatewayUrl) {
      target = new URL(gatewayUrl);
    },
    unplug() {
      unplugged = true;
      cut();
    },
    plugIn() {
      unplugged = false;
    },
    cut,
    loseAnswerOf: (name) =>
      new Promise((resolve) => {
        trap = { name, sprung: resolve };
      }),
    loseAcknowledgement: () =>
      new Promise((resolve) => {
        acknowledgementTrap = resolve;
      }),
    async stop() {
      cut();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}

/**
 * Hands on what comes, frame by frame once the HTTP upgrade is through.
 *
 * @param look is shown each text packet before it goes on; false keeps it and everything after it
 */
function passOn(from: Socket, to: Socket, look: (packet: string) => boolean): void {
  let upgraded = false;
  let pending = Buffer.alloc(0);
  from.on('data', (chunk: Buffer) => {
    pending = Buffer.concat([pending, chunk]);
    if (!upgraded) {
      const end = pending.indexOf('\r\n\r\n');
      if (end < 0) return;
      upgraded = true;
      to.write(pending.subarray(0, end + 4));
      pending = pending.subarray(end + 4);
    }
    for (;;) {
      const frame = readFrame(pending);
      if (frame === null) return;
      if (!look(frame.text)) {
        from.removeAllListeners('data');
        return;
      }
      to.write(pending.subarray(0, frame.length));
      pending = pending.subarray(frame.length);
    }
  });
}

/** The first WebSocket frame of `bytes`; null while it is not all there. */
function readFrame(bytes: Buffer): { text: string; length: number } | null {
  if (bytes.length < 2) return null;
  const isMasked = (bytes[1]! & 0x80) !== 0;
  let payload = bytes[1]! & 0x7f;
  let at = 2;
  if (payload === 126) {
    if (bytes.length < 4) return null;
    payload = bytes.readUInt16BE(2);
    at = 4;
  } else if (payload === 127) {
    if (bytes.length < 10) return null;
    payload = Number(bytes.readBigUInt64BE(2));
    at = 10;
  }
  const mask = isMasked ? bytes.subarray(at, at + 4) : null;
  if (isMasked) at += 4;
  if (bytes.length < at + payload) return null;
  const content = Buffer.from(bytes.subarray(at, at + payload));
  if (mask !== null) for (let index = 0; index < payload; index++) content[index]! ^= mask[index & 3]!;
  return { text: content.toString(), length: at + payload };
}
