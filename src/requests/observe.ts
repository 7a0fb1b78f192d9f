/**
 * The one tap: whatever happens to requests, gates, messages and sockets is reported here, and log, metrics and
 * inspector hang on it. A report that nobody hears is an empty call.
 */
import type { GateState } from '../delivery/gate.ts';
import type { DeliveryReports } from '../delivery/reports.ts';
import type { Log } from '../lib/log.ts';
import type { ErrorCode } from '../protocol/errors.ts';
import type { PushName, Reply, RequestName } from '../protocol/events.ts';
import { addressKey, type DeviceAddress } from '../protocol/ids.ts';
import type { LimitName } from './limits.ts';

export type { GateState };

export type Door = 'socket' | 'http';

/** A request and its answer. `input` and `reply` hold keys, ciphertext and tokens: a listener passes them on redacted only. */
export interface RequestEnded {
  door: Door;
  device: DeviceAddress;
  /** A name of the registry, or `unknown`. */
  name: RequestName | 'unknown';
  /** Null for success. */
  code: ErrorCode | null;
  durationMs: number;
  /** The connection's number; absent where it came by HTTP. */
  fence?: number | undefined;
  /** Of the frame that brought it. */
  bytes?: number | undefined;
  /** Absent where it was refused before it was found well-formed. */
  input?: unknown;
  /** Absent where it was refused before dispatch. */
  reply?: Reply<RequestName>;
}

/** A served socket, as long as it is open. */
export interface LiveSocket {
  /** How things stand now; never throws. */
  facts(): LiveSocketFacts;
  /** Ends the connection; the client may come back at once. */
  close(reason: string): void;
}

export interface LiveSocketFacts {
  /** Pushed and not yet acknowledged. */
  windowCount: number;
  windowBytes: number;
  windowFull: boolean;
  oldestPushAtMs: number | null;
  /** Of the latest ping; null before the first. */
  roundTripMs: number | null;
  /** Written and not yet taken by the network. */
  bufferedBytes: number;
  tokenExpiresAtMs: number;
}

export interface Reports extends DeliveryReports {
  requestEnded(event: RequestEnded): void;
  /** A fault of ours: the client got the same `errorId`. */
  requestFailed(event: { name: string; device: DeviceAddress; errorId: string; error: unknown }): void;
  socketOpened(event: { device: DeviceAddress; fence: number; live: LiveSocket }): void;
  /** `gate` as it was until then. */
  socketClosed(event: {
    device: DeviceAddress;
    fence: number;
    reason: string;
    gate: GateState['name'];
  }): void;
  /** `errorId` where the client got one with a fault of ours. */
  handshakeRefused(event: {
    door: Door;
    code: ErrorCode;
    errorId?: string | undefined;
    error: unknown;
  }): void;
  /**
   * A push leaves. Like a request's, its payload is passed on redacted only.
   *
   * @returns who wants to hear of its acknowledgement: null stands for one that never came
   */
  pushSent(
    device: DeviceAddress,
    fence: number | null,
    name: PushName,
    payload: unknown,
  ): ((acknowledgement: unknown) => void) | null;
  /** Somebody was beyond a limit; `device` is null where no token was looked at. */
  limitHit(event: { limit: LimitName; device: DeviceAddress | null }): void;
  /** A device's one-time prekeys are claimed far more often than is usual for it. */
  drainSuspected(event: { device: DeviceAddress; claimCount: number; usualCount: number }): void;
}

export interface Observer extends Reports {
  /**
   * Hands the reports that `listener` names to it too, in the order of attachment. One that throws harms nobody.
   *
   * @returns takes it away again
   */
  attach(listener: Partial<Reports>): () => void;
}

const REPORTS = [
  'stored',
  'poked',
  'gateMoved',
  'pushed',
  'settled',
  'bounced',
  'requestEnded',
  'requestFailed',
  'socketOpened',
  'socketClosed',
  'handshakeRefused',
  'limitHit',
  'drainSuspected',
  'pushSent',
] as const satisfies (keyof Reports)[];

/** Of fixed arity, so that a report makes no list of its arguments on the way. */
type Report = (a?: unknown, b?: unknown, c?: unknown, d?: unknown) => unknown;

/**
 * An observer that nobody but the log listens to.
 *
 * @param options.logsDebug false where the log drops what is below `info`: then nothing is made ready for it
 */
export function createObserver(log: Log, options: { logsDebug: boolean } = { logsDebug: true }): Observer {
  const listeners: Partial<Reports>[] = [];
  const observer = {
    attach(listener) {
      listeners.push(listener);
      rewire();
      return () => {
        const index = listeners.indexOf(listener);
        if (index !== -1) listeners.splice(index, 1);
        rewire();
      };
    },
  } as Observer;

  /** Each report becomes the very function of its only listener, or one that calls all: none is looked up on the way. */
  function rewire(): void {
    for (const name of REPORTS) {
      const heard = listeners.flatMap((listener) => {
        const report = listener[name] as Report | undefined;
        return report === undefined ? [] : [guarded(report.bind(listener))];
      });
      (observer as unknown as Record<string, Report>)[name] = joined(heard);
    }
  }

  function guarded(report: Report): Report {
    return (a, b, c, d) => {
      try {
        return report(a, b, c, d);
      } catch (error) {
        log.error({ error: asError(error) }, 'a listener of the tap threw');
        return null;
      }
    };
  }

  observer.attach(faultListener(log));
  if (options.logsDebug) observer.attach(debugListener(log));
  return observer;
}

function joined(reports: readonly Report[]): Report {
  const [only] = reports;
  if (only === undefined) return () => null;
  if (reports.length === 1) return only;
  return (a, b, c, d) => {
    let answers: Report[] | null = null;
    for (const report of reports) {
      const answer = report(a, b, c, d);
      if (typeof answer === 'function') answers = [...(answers ?? []), answer as Report];
    }
    return answers === null ? null : joined(answers);
  };
}

function faultListener(log: Log): Partial<Reports> {
  return {
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
    handshakeRefused({ code, errorId, error }) {
      if (code !== 'INTERNAL') return;
      log.error({ errorId, error: asError(error) }, 'a handshake failed by a fault of the server');
    },
    drainSuspected({ device, claimCount, usualCount }) {
      log.warn(
        { device: addressKey(device), claimCount, usualCount },
        'a device’s prekeys are claimed far more often than is usual for it',
      );
    },
  };
}

function debugListener(log: Log): Partial<Reports> {
  return {
    requestEnded({ door, device, name, code, durationMs }) {
      log.debug({ door, device: addressKey(device), request: name, code, durationMs }, 'request');
    },
    socketOpened({ device, fence }) {
      log.debug({ device: addressKey(device), fence }, 'socket opened');
    },
    socketClosed({ device, fence, reason }) {
      log.debug({ device: addressKey(device), fence, reason }, 'socket closed');
    },
    handshakeRefused({ code }) {
      if (code !== 'INTERNAL') log.debug({ code }, 'handshake refused');
    },
    limitHit({ limit, device }) {
      log.debug({ limit, device: device && addressKey(device) }, 'limit hit');
    },
  };
}

function asError(error: unknown): Error {
  return error instanceof Error ? error : new Error(String(error));
}
