import { describe, expect, it } from 'vitest';
import { type LogFields, silentLog } from '../../src/lib/log.ts';
import { createObserver, type LiveSocket, type Reports } from '../../src/requests/observe.ts';

const device = { userId: 'alice', deviceId: 1 };
const ended = { door: 'http', device, name: 'keyStats', code: null, durationMs: 3 } as const;

describe('the tap', () => {
  it('tells every listener, until it is taken away', () => {
    const observer = createObserver(silentLog);
    const heard: string[] = [];
    const first = observer.attach({ requestEnded: () => heard.push('first') });
    observer.attach({ requestEnded: ({ name }) => heard.push(name) });
    observer.requestEnded(ended);
    first();
    first();
    observer.requestEnded(ended);
    expect(heard).toEqual(['first', 'keyStats', 'keyStats']);
  });

  it('goes on when a listener throws, and the log says so', () => {
    const logged: LogFields[] = [];
    const observer = createObserver({ ...silentLog, error: (fields) => logged.push(fields) });
    const heard: string[] = [];
    observer.attach({
      requestEnded: () => {
        throw new Error('a fault');
      },
    });
    observer.attach({ requestEnded: () => heard.push('second') });
    observer.requestEnded(ended);
    expect(heard).toEqual(['second']);
    expect(logged).toEqual([{ error: new Error('a fault') }]);
  });

  it('logs as an error whatever a listener throws, who waits for no acknowledgement then', () => {
    const logged: LogFields[] = [];
    const observer = createObserver({ ...silentLog, error: (fields) => logged.push(fields) });
    observer.attach({
      pushSent: () => {
        throw 'no error';
      },
    });
    expect(observer.pushSent(device, 7, 'messages', { envelopes: [] })).toBeNull();
    expect(logged).toEqual([{ error: new Error('no error') }]);
  });

  it('calls a listener as the object that it is', () => {
    const observer = createObserver(silentLog);
    const listener = {
      heard: [] as string[],
      requestEnded({ name }: { name: string }) {
        this.heard.push(name);
      },
    };
    observer.attach(listener);
    observer.requestEnded(ended);
    expect(listener.heard).toEqual(['keyStats']);
  });

  it('passes every report on', () => {
    const observer = createObserver(silentLog);
    const heard: string[] = [];
    const note = (name: string) => () => {
      heard.push(name);
      return null;
    };
    const names = {
      ...{ stored: 0, poked: 0, gateMoved: 0, pushed: 0, settled: 0, bounced: 0, pushSent: 0 },
      ...{ requestEnded: 0, requestFailed: 0, socketOpened: 0, socketClosed: 0 },
      ...{ handshakeRefused: 0, limitHit: 0, drainSuspected: 0 },
    } satisfies Record<keyof Reports, 0>;
    const kinds = Object.keys(names) as (keyof Reports)[];
    observer.attach(Object.fromEntries(kinds.map((name) => [name, note(name)])));
    const what = { ...ended, errorId: 'x', error: null, reason: '', gate: 'open', limit: 'requests' };
    for (const name of kinds) (observer[name] as (event: unknown) => void)(what);
    expect(heard).toEqual(kinds);
  });

  it('has the log say what is a fault, what is a suspicion, and, to who looks closely, what happens', () => {
    const lines: string[] = [];
    const at = (level: string) => (fields: LogFields, message: string) => {
      lines.push(`${level}: ${message} ${JSON.stringify(fields)}`);
    };
    const observer = createObserver({
      ...{ debug: at('debug'), info: at('info'), warn: at('warn'), error: at('error') },
    });
    const live = {} as LiveSocket;
    observer.requestFailed({ name: 'keyStats', device, errorId: 'one', error: 'a text' });
    observer.handshakeRefused({ door: 'socket', code: 'INTERNAL', errorId: 'two', error: 'a text' });
    observer.handshakeRefused({ door: 'socket', code: 'UNAUTHENTICATED', error: 'a text' });
    observer.drainSuspected({ device, claimCount: 90, usualCount: 3 });
    observer.socketOpened({ device, fence: 7, live });
    observer.socketClosed({ device, fence: 7, reason: 'left', gate: 'open' });
    observer.limitHit({ limit: 'connections', device: null });
    observer.limitHit({ limit: 'requests', device });
    expect(lines).toEqual([
      'error: a request failed by a fault of the server {"request":"keyStats","device":"alice.1","errorId":"one","error":{}}',
      'error: a handshake failed by a fault of the server {"errorId":"two","error":{}}',
      'debug: handshake refused {"code":"UNAUTHENTICATED"}',
      'warn: a device’s prekeys are claimed far more often than is usual for it {"device":"alice.1","claimCount":90,"usualCount":3}',
      'debug: socket opened {"device":"alice.1","fence":7}',
      'debug: socket closed {"device":"alice.1","fence":7,"reason":"left"}',
      'debug: limit hit {"limit":"connections","device":null}',
      'debug: limit hit {"limit":"requests","device":"alice.1"}',
    ]);
  });

  it('hands a push’s acknowledgement to those who wait for it, and to nobody where none does', () => {
    const observer = createObserver(silentLog);
    expect(observer.pushSent(device, 7, 'messages', { envelopes: [] })).toBeNull();
    const heard: unknown[] = [];
    const wait = () => (acknowledgement: unknown) => {
      heard.push(acknowledgement);
    };
    observer.attach({ pushSent: () => null });
    observer.attach({ pushSent: () => null });
    expect(observer.pushSent(device, 7, 'messages', { envelopes: [] })).toBeNull();
    observer.attach({ pushSent: wait });
    observer.attach({ pushSent: wait });
    observer.pushSent(device, 7, 'messages', { envelopes: [] })?.(null);
    expect(heard).toEqual([null, null]);
  });

  it('makes nothing ready for a log that drops it', () => {
    const logged: string[] = [];
    const log = { ...silentLog, debug: (_: LogFields, message: string) => logged.push(message) };
    createObserver(log, { logsDebug: false }).requestEnded(ended);
    expect(logged).toEqual([]);
    createObserver(log).requestEnded(ended);
    expect(logged).toEqual(['request']);
  });
});
