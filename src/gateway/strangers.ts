/**
 * Below Socket.IO: a connection that has not been taken in yet may send little, and not for long; one that is over
 * ends soon; and WebSocket's own frames are bounded, which the engine never sees.
 */
import type { Server, Socket } from 'socket.io';
import { type Clock, hasPassed } from '../lib/clock.ts';
import { TOKEN_LENGTH_MAX } from '../protocol/limits.ts';
import type { LibraryWebSocket } from './plain-frames.ts';

type Engine = Server['engine'];
/** One connection of the engine, whatever rides on it. */
type EngineConnection = Socket['conn'];

/** A connection that has not shown a good token by then is cut. */
const HANDSHAKE_TIMEOUT_MS = 10_000;
/** A connection that is over waits so long for its client to agree. */
const CLOSE_GRACE_MS = 2_000;
/** Room for the longest token and what stands around it: of strangers, ten thousand hold no more than 160 MB. */
const STRANGER_BYTES_MAX = 2 * TOKEN_LENGTH_MAX;
/** WebSocket's own pings and pongs, which the engine does not need: some clients send one every few seconds. */
const CONTROL_FRAMES_MAX = 100;
const CONTROL_FRAMES_PERIOD_MS = 10_000;

export interface Strangers {
  /** The connection was taken in: from now on it is bounded as one of a device. */
  admitted(connection: EngineConnection): void;
}

export function watchStrangers(engine: Engine, clock: Clock): Strangers {
  const releases = new WeakMap<EngineConnection, () => void>();
  const endSoon = function (this: EngineConnection): void {
    const webSocket = webSocketOf(this);
    clock.after(CLOSE_GRACE_MS, () => webSocket.terminate());
  };

  engine.on('connection', (connection: EngineConnection) => {
    const webSocket = webSocketOf(connection);
    const tcp = connection.request.socket;
    let bytes = 0;
    const count = (chunk: Buffer): void => {
      bytes += chunk.length;
      if (bytes > STRANGER_BYTES_MAX) webSocket.terminate();
    };
    // A polite end would wait half a minute for the stranger's agreement.
    const timer = clock.after(HANDSHAKE_TIMEOUT_MS, () => webSocket.terminate());
    // All of this is forgotten: most connections were taken in long ago.
    const release = (): void => {
      timer.cancel();
      tcp.off('data', count);
      webSocket.off('close', release);
      releases.delete(connection);
    };
    tcp.on('data', count);
    webSocket.on('close', release);
    connection.on('close', endSoon);
    releases.set(connection, release);
    boundControlFrames(webSocket, clock);
  });

  return { admitted: (connection) => releases.get(connection)?.() };
}

/** Each ping is answered by the library, also where nobody reads the answers. */
function boundControlFrames(webSocket: WebSocketOfEngine, clock: Clock): void {
  let frames = 0;
  let sinceMs = clock.nowMs();
  const count = (): void => {
    if (hasPassed(clock, sinceMs, CONTROL_FRAMES_PERIOD_MS)) {
      sinceMs = clock.nowMs();
      frames = 0;
    }
    frames += 1;
    if (frames > CONTROL_FRAMES_MAX) webSocket.terminate();
  };
  webSocket.on('ping', count);
  webSocket.on('pong', count);
}

/** What is used of the WebSocket under a connection: the only transport that there is. */
interface WebSocketOfEngine extends LibraryWebSocket {
  readonly bufferedAmount: number;
  on(event: 'ping' | 'pong' | 'close', listener: () => void): void;
  on(event: 'message', listener: OnMessage): void;
  off(event: 'close', listener: () => void): void;
  off(event: 'message', listener: OnMessage): void;
  listeners(event: 'message'): OnMessage[];
  terminate(): void;
}

/** Hears each message whole; `data` is UTF-8 unless `isBinary`. */
type OnMessage = (this: unknown, data: Buffer, isBinary: boolean) => void;

export function webSocketOf(connection: EngineConnection): WebSocketOfEngine {
  return (connection.transport as unknown as { socket: WebSocketOfEngine }).socket;
}
