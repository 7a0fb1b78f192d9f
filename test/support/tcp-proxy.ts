/**
 * A TCP proxy in front of a gateway that cuts connections where a test asks for it. It reads along just enough of
 * WebSocket and Socket.IO to know a request and its answer; in front of an engine it carries bytes and knows nothing of
 * them. Either way the link can be made slow, narrow, short-lived or silent.
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
   * The first connection that carries more bytes than this from now on is cut, in the midst of what it carries.
   *
   * @returns resolves when that has happened
   */
  cutOneAfter(byteCount: number): Promise<void>;
  /** From now on the link is as bad as this. With null it is good again, and connections that have lost bytes are cut. */
  impair(impairment: Impairment | null): void;
  /**
   * The next request of this name is swallowed, and the connection cut, before the gateway sees it.
   *
   * @returns resolves when that has happened, as all of these do
   */
  loseRequest(name: RequestName): Promise<void>;
  /** The next request of this name is answered by the gateway, but the answer is swallowed and the connection cut. */
  loseAnswerOf(name: RequestName): Promise<void>;
  /** The next page of messages is swallowed and the connection cut. */
  losePush(): Promise<void>;
  /** The next acknowledgement by a client is swallowed and the connection cut. */
  loseAcknowledgement(): Promise<void>;
  stop(): Promise<void>;
}

/** What ails a link. */
export interface Impairment {
  /** Bytes arrive so much later, either way. */
  delayMs?: number;
  /** So many bytes pass in a second, each way. */
  bytesPerSecond?: number;
  /** Every connection is cut when it has carried so many bytes more, both ways together. */
  cutAfterBytes?: number;
  /** What goes this way vanishes. With `both` the ends of connections do too: neither side learns that the other has gone. */
  swallow?: 'toServer' | 'toClient' | 'both';
}

interface Trap {
  /** Null for a push, which has no name that a client chose. */
  request: RequestName | null;
  loses: 'request' | 'answer' | 'push' | 'acknowledgement';
  sprung(): void;
}

interface Connection {
  cut(): void;
  /** Counted from when the link was last impaired. */
  carriedBytes: number;
  hasLostBytes: boolean;
}

/**
 * @param target the URL behind it, or who names one for each new connection, as a load balancer does
 * @param options.raw carries any protocol, and knows nothing of requests
 */
export async function startTcpProxy(
  target: string | (() => string),
  { raw = false }: { raw?: boolean } = {},
): Promise<TcpProxy> {
  let nextTarget = typeof target === 'string' ? () => target : target;
  const connections = new Set<Connection>();
  let unplugged = false;
  let impairment: Impairment = {};
  let onCutAfterBytes: (() => void) | null = null;
  let trap: Trap | null = null;

  function impair(next: Impairment): void {
    impairment = next;
    for (const connection of connections) {
      connection.carriedBytes = 0;
      // A stream with a hole can't be made whole.
      if (connection.hasLostBytes && impairment.swallow === undefined) connection.cut();
    }
  }

  /** Takes the trap away that waits for this. */
  function springs(loses: Trap['loses'], request: RequestName | null): Trap | null {
    if (trap === null || trap.loses !== loses || trap.request !== request) return null;
    const sprung = trap;
    trap = null;
    return sprung;
  }

  function setTrap(loses: Trap['loses'], request: RequestName | null = null): Promise<void> {
    return new Promise((resolve) => {
      trap = { loses, request, sprung: resolve };
    });
  }

  const server = createServer((client) => {
    if (unplugged) return void client.destroy();
    const { port, hostname } = new URL(nextTarget());
    const gateway = connect(Number(port), hostname);
    const connection: Connection = {
      cut() {
        connections.delete(connection);
        client.destroy();
        gateway.destroy();
      },
      carriedBytes: 0,
      hasLostBytes: false,
    };
    connections.add(connection);
    for (const socket of [client, gateway]) {
      socket.setNoDelay(true);
      // What was wrong shows in the end that follows.
      socket.on('error', () => {});
      socket.on('close', () => {
        if (impairment.swallow === 'both') connection.hasLostBytes = true;
        // An end travels behind the last bytes.
        else if (impairment.delayMs !== undefined) setTimeout(() => connection.cut(), impairment.delayMs);
        else connection.cut();
      });
    }
    const carry = (from: Socket, to: Socket, way: 'toServer' | 'toClient') =>
      carrier(from, to, (byteCount) => {
        if (impairment.swallow === way || impairment.swallow === 'both') {
          connection.hasLostBytes = true;
          return null;
        }
        connection.carriedBytes += byteCount;
        if (connection.carriedBytes <= (impairment.cutAfterBytes ?? Number.POSITIVE_INFINITY))
          return impairment;
        connection.cut();
        onCutAfterBytes?.();
        return null;
      });
    const toServer = carry(client, gateway, 'toServer');
    const toClient = carry(gateway, client, 'toClient');
    if (raw) {
      client.on('data', toServer);
      gateway.on('data', toClient);
      return;
    }

    /** The number of the request whose answer is to be lost on this connection. */
    let awaited: { number: string; trap: Trap } | null = null;
    // A connection that ends by itself before the answer has come springs nothing: the next such request will.
    client.on('close', () => {
      if (awaited !== null) trap ??= awaited.trap;
    });
    const spring = (sprung: Trap): false => {
      awaited = null;
      connection.cut();
      sprung.sprung();
      return false;
    };
    onPackets(client, toServer, (packet) => {
      if (/^43\d/.test(packet)) {
        const lost = springs('acknowledgement', null);
        return lost === null || spring(lost);
      }
      const [, number, name] = /^42(\d+)\["(\w+)"/.exec(packet) ?? [];
      if (number === undefined) return true;
      const lost = springs('request', name as RequestName);
      if (lost !== null) return spring(lost);
      const answerLost = springs('answer', name as RequestName);
      if (answerLost !== null) awaited = { number, trap: answerLost };
      return true;
    });
    onPackets(gateway, toClient, (packet) => {
      if (awaited !== null && packet.startsWith(`43${awaited.number}[`)) return spring(awaited.trap);
      const lost = /^42\d+\["messages"/.test(packet) ? springs('push', null) : null;
      return lost === null || spring(lost);
    });
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const address = server.address();
  const port = typeof address === 'object' && address !== null ? address.port : 0;
  const cut = (): void => {
    for (const connection of connections) connection.cut();
  };

  return {
    url: `http://127.0.0.1:${port}`,
    retarget(gatewayUrl) {
      nextTarget = () => gatewayUrl;
    },
    unplug() {
      unplugged = true;
      cut();
    },
    plugIn() {
      unplugged = false;
    },
    cut,
    cutOneAfter: (cutAfterBytes) =>
      new Promise((resolve) => {
        impair({ cutAfterBytes });
        onCutAfterBytes = () => {
          impair({});
          onCutAfterBytes = null;
          resolve();
        };
      }),
    impair: (next) => impair(next ?? {}),
    loseRequest: (name) => setTrap('request', name),
    loseAnswerOf: (name) => setTrap('answer', name),
    losePush: () => setTrap('push'),
    loseAcknowledgement: () => setTrap('acknowledgement'),
    async stop() {
      cut();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}

/**
 * @param passes is asked about every chunk: how it travels, or null where it doesn't
 * @returns hands bytes on, in order, no faster than they are taken
 */
function carrier(
  from: Socket,
  to: Socket,
  passes: (byteCount: number) => Impairment | null,
): (bytes: Buffer) => void {
  /** The last byte so far arrives then. */
  let arrivesAtMs = 0;
  const underWay: Buffer[] = [];
  const write = (bytes: Buffer): void => {
    if (to.destroyed || to.write(bytes)) return;
    from.pause();
    to.once('drain', () => from.resume());
  };
  return (bytes) => {
    const travels = passes(bytes.length);
    if (travels === null) return;
    const { delayMs = 0, bytesPerSecond = Number.POSITIVE_INFINITY } = travels;
    const nowMs = performance.now();
    arrivesAtMs = Math.max(arrivesAtMs, nowMs + delayMs) + (bytes.length / bytesPerSecond) * 1_000;
    if (underWay.length === 0 && arrivesAtMs <= nowMs) return write(bytes);
    underWay.push(bytes);
    // Whatever the order in which timers fire, the oldest bytes come first.
    setTimeout(() => write(underWay.shift()!), arrivesAtMs - nowMs);
  };
}

/**
 * Hands on what comes, frame by frame once the HTTP upgrade is through.
 *
 * @param look is shown each text packet before it goes on; false keeps it and everything after it
 */
function onPackets(from: Socket, carry: (bytes: Buffer) => void, look: (packet: string) => boolean): void {
  let upgraded = false;
  let pending = Buffer.alloc(0);
  from.on('data', (chunk: Buffer) => {
    pending = Buffer.concat([pending, chunk]);
    if (!upgraded) {
      const end = pending.indexOf('\r\n\r\n');
      if (end < 0) return;
      upgraded = true;
      carry(pending.subarray(0, end + 4));
      pending = pending.subarray(end + 4);
    }
    for (;;) {
      const frame = readFrame(pending);
      if (frame === null) return;
      if (!look(frame.text)) {
        from.removeAllListeners('data');
        return;
      }
      carry(pending.subarray(0, frame.length));
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
