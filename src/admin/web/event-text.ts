/** What an event says in one line. */
import type { Direction, StreamEvent } from '../../protocol/inspector/events.ts';
import { count } from './format.ts';
import { inOneLine } from './redacted-text.ts';

export const DIRECTION_SIGNS: Readonly<Record<Direction, string>> = { in: '→', out: '←', server: '·' };
export const DIRECTION_WORDS: Readonly<Record<Direction, string>> = {
  in: 'from the client',
  out: 'to the client',
  server: 'inside the server',
};

type MessageEvent = Extract<StreamEvent, { kind: 'message' }>;

/** The part of a line that says what happened. */
export function summaryOf(event: StreamEvent): string {
  switch (event.kind) {
    case 'request':
    case 'push':
      return event.input === null ? '' : inOneLine(event.input);
    case 'gate':
      return `${event.from} → ${event.to}${event.keyVersion === null ? '' : `, version ${event.keyVersion}`}${event.reason === null ? '' : `, because ${event.reason}`}`;
    case 'claim':
      return `by ${event.peer}: ${claimText(event)}`;
    case 'message':
      return messageText(event);
    case 'handshakeRefused':
      return event.errorId === null ? 'refused' : `refused, log id ${event.errorId}`;
    case 'socketOpened':
      return event.socket === null ? '' : `connection ${event.socket}`;
    case 'socketClosed':
      return event.reason;
  }
}

function messageText({ messageId, envelopeId, peer, reason }: MessageEvent): string {
  const id = messageId === null ? `envelope ${envelopeId?.slice(0, 8)}…` : `${messageId.slice(0, 8)}…`;
  return `${id}${peer === null ? '' : ` from ${peer}`}${reason === null ? '' : `, ${reason}`}`;
}

export function claimText(claim: {
  keyId: number | null;
  absent?: 'noneLeft' | 'limited' | null;
  pqKeyId: number | null;
  pqFallback: boolean;
}): string {
  const ec =
    claim.keyId === null
      ? `no one-time prekey (${claim.absent === 'limited' ? 'limit reached' : 'none left'})`
      : `prekey ${claim.keyId}`;
  if (claim.pqFallback) return `${ec}, PQ last resort`;
  return claim.pqKeyId === null ? ec : `${ec}, PQ ${claim.pqKeyId}`;
}

/** The event's name; a message's is its stage. */
export function nameOf(event: StreamEvent): string {
  return event.kind === 'message' ? `message ${event.stage}` : event.event;
}

/** How it ended: a code, `ok`, or nothing where nothing was asked. */
export function outcomeOf(event: StreamEvent): { text: string; tone: 'ok' | 'bad' | 'none' } {
  switch (event.kind) {
    case 'request':
      return event.code === null ? { text: 'ok', tone: 'ok' } : { text: event.code, tone: 'bad' };
    case 'handshakeRefused':
      return { text: event.code, tone: 'bad' };
    case 'push':
      if (event.acknowledged === null) return { text: '', tone: 'none' };
      return event.acknowledged ? { text: 'acknowledged', tone: 'ok' } : { text: 'no answer', tone: 'bad' };
    case 'gate':
      return event.reason === null ? { text: '', tone: 'none' } : { text: 'closed', tone: 'bad' };
    case 'message':
      return event.stage === 'bounced' ? { text: 'bounced', tone: 'bad' } : { text: '', tone: 'none' };
    case 'claim':
      return event.keyId === null
        ? { text: event.absent ?? 'none', tone: 'bad' }
        : { text: '', tone: 'none' };
    default:
      return { text: '', tone: 'none' };
  }
}

/** What a program reads: one event a line. */
export function toNdjson(events: readonly StreamEvent[]): string {
  return events.map((event) => `${JSON.stringify(event)}\n`).join('');
}

export function latencyOf(event: StreamEvent): number | null {
  return 'latencyMs' in event ? event.latencyMs : null;
}

export function bytesOf(event: StreamEvent): number | null {
  return 'bytes' in event ? event.bytes : null;
}

export function eventsCounted(value: number): string {
  return `${count(value)} ${value === 1 ? 'event' : 'events'}`;
}
