import { describe, expect, it } from 'vitest';
import { type LogFields, silentLog } from '../../src/lib/log.ts';
import { createObserver } from '../../src/requests/observe.ts';

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

  it('hands a push’s acknowledgement to those who wait for it, and to nobody where none does', () => {
    const observer = createObserver(silentLog);
    expect(observer.pushSent(device, 7, 'messages', { envelopes: [] })).toBeNull();
    const heard: unknown[] = [];
    const wait = () => (acknowledgement: unknown) => {
      heard.push(acknowledgement);
    };
    observer.attach({ pushSent: () => null });
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
