/** Events of the stream as lines of a terminal: columns that line up, colours that mean something. */
import { unreachable } from '../lib/unreachable.ts';
import type { Direction, StreamEvent } from '../protocol/inspector/events.ts';

const ARROWS: Readonly<Record<Direction, string>> = { in: '→', out: '←', server: '·' };
const COLOURS = { grey: 90, red: 31, green: 32, yellow: 33, cyan: 36 } as const;
type Colour = keyof typeof COLOURS;

const DEVICE_WIDTH = 20;
const EVENT_WIDTH = 18;
const OUTCOME_WIDTH = 20;
const SLOW_MS = 250;

/** One line, without its end. */
export function lineOf(event: StreamEvent, { colours }: { colours: boolean }): string {
  const paint = (text: string, colour: Colour): string =>
    colours ? `\u001b[${COLOURS[colour]}m${text}\u001b[0m` : text;
  const { outcome, colour } = outcomeOf(event);
  const latencyMs = 'latencyMs' in event ? event.latencyMs : null;
  const took = (latencyMs === null ? '' : `${Math.round(latencyMs)} ms`).padStart(9);
  return [
    paint(event.time.slice(11, 23), 'grey'),
    (event.device ?? '-').padEnd(DEVICE_WIDTH),
    ARROWS[event.direction],
    paint(event.event.padEnd(EVENT_WIDTH), 'cyan'),
    paint(outcome.padEnd(OUTCOME_WIDTH), colour),
    latencyMs !== null && latencyMs > SLOW_MS ? paint(took, 'yellow') : took,
    ` ${paint(detailOf(event), 'grey')}`,
  ]
    .join(' ')
    .trimEnd();
}

function outcomeOf(event: StreamEvent): { outcome: string; colour: Colour } {
  switch (event.kind) {
    case 'request':
      return event.code === null
        ? { outcome: 'ok', colour: 'green' }
        : { outcome: event.code, colour: event.code === 'INTERNAL' ? 'red' : 'yellow' };
    case 'push':
      if (event.acknowledged === null) return { outcome: 'sent', colour: 'green' };
      return event.acknowledged
        ? { outcome: 'acknowledged', colour: 'green' }
        : { outcome: 'not acknowledged', colour: 'red' };
    case 'gate':
      return { outcome: event.to, colour: event.to === 'open' ? 'green' : 'yellow' };
    case 'claim':
      return event.keyId === null
        ? { outcome: event.absent ?? 'without', colour: 'yellow' }
        : { outcome: `key ${event.keyId}`, colour: 'green' };
    case 'message':
      return {
        outcome: event.stage,
        colour: event.stage === 'bounced' ? 'red' : event.stage === 'putOff' ? 'yellow' : 'green',
      };
    case 'handshakeRefused':
      return { outcome: event.code, colour: 'red' };
    case 'socketOpened':
      return { outcome: 'opened', colour: 'green' };
    case 'socketClosed':
      return { outcome: 'closed', colour: 'yellow' };
    default:
      return unreachable(event);
  }
}

function detailOf(event: StreamEvent): string {
  const socket = event.socket === null ? [] : [`socket ${event.socket}`];
  const parts = (() => {
    switch (event.kind) {
      case 'request':
        return [
          ...socket,
          ...(event.bytes === null ? [] : [`${event.bytes} B`]),
          ...(event.door === 'http' ? ['http'] : []),
        ];
      case 'push':
        return [...socket, ...(event.bytes === null ? [] : [`${event.bytes} B`])];
      case 'gate':
        return [
          ...socket,
          `from ${event.from}`,
          ...(event.keyVersion === null ? [] : [`key version ${event.keyVersion}`]),
          ...(event.reason === null ? [] : [event.reason]),
        ];
      case 'claim':
        return [
          `by ${event.peer}`,
          ...(event.pqKeyId === null
            ? []
            : [`pq key ${event.pqKeyId}${event.pqFallback ? ' (last resort)' : ''}`]),
        ];
      case 'message':
        return [
          ...(event.messageId === null ? [] : [event.messageId]),
          ...(event.peer === null ? [] : [`from ${event.peer}`]),
          ...(event.reason === null ? [] : [event.reason]),
        ];
      case 'handshakeRefused':
        return event.errorId === null ? [] : [`error ${event.errorId}`];
      case 'socketOpened':
        return socket;
      case 'socketClosed':
        return [...socket, event.reason];
      default:
        return unreachable(event);
    }
  })();
  return [...parts, event.node].join(', ');
}
