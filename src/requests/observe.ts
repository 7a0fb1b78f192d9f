/** The one tap: whatever happens to requests and sockets is reported here, and log and later viewers hang on it. */
import type { Log } from '../lib/log.ts';
import type { ErrorCode } from '../protocol/errors.ts';
import { addressKey, type DeviceAddress } from '../protocol/ids.ts';

export type Door = 'socket' | 'http';

export interface Observer {
  /** A request was answered; `code` is null for success. */
  requestEnded(event: {
    door: Door;
    device: DeviceAddress;
    name: string;
    code: ErrorCode | null;
    durationMs: number;
  }): void;
  /** A fault of ours: the client got the same `errorId`. */
  requestFailed(event: { name: string; device: DeviceAddress; errorId: string; error: unknown }): void;
  socketOpened(event: { device: DeviceAddress; fence: number }): void;
  socketClosed(event: { device: DeviceAddress; fence: number; reason: string }): void;
  /** `errorId` where the client got one with a fault of ours. */
  handshakeRefused(event: { code: ErrorCode; errorId?: string | undefined; error: unknown }): void;
}

export function createObserver(log: Log): Observer {
  return {
    requestEnded({ door, device, name, code, durationMs }) {
      log.debug({ door, device: addressKey(device), request: name, code, durationMs }, 'request');
    },
    requestFailed({ name, device, errorId, error }) {
      log.error(
        {
          request: name,
          device: addressKey(device),
          errorId,
          error: asError(error),
        },
        'a request failed by a fault of the server',
      );
    },
    socketOpened({ device, fence }) {
      log.debug({ device: addressKey(device), fence }, 'socket opened');
    },
    socketClosed({ device, fence, reason }) {
      log.debug({ device: addressKey(device), fence, reason }, 'socket closed');
    },
    handshakeRefused({ code, errorId, error }) {
      if (code === 'INTERNAL') {
        log.error({ errorId, error: asError(error) }, 'a handshake failed by a fault of the server');
      } else log.debug({ code }, 'handshake refused');
    },
  };
}

function asError(error: unknown): Error {
  return error instanceof Error ? error : new Error(String(error));
}
