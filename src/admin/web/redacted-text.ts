/** Payloads as the server lets them be seen, as text. */
import type { Digested, More, RedactedValue, Withheld } from '../../protocol/redact.ts';
import { bytes, count } from './format.ts';

type Marked =
  | { kind: 'digested'; value: Digested }
  | { kind: 'withheld'; value: Withheld }
  | { kind: 'more'; value: More };

export function markedOf(value: RedactedValue): Marked | null {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) return null;
  if ('digest' in value) return { kind: 'digested', value: value as Digested };
  if ('withheld' in value) return { kind: 'withheld', value: value as Withheld };
  if ('more' in value) return { kind: 'more', value: value as More };
  return null;
}

export function markedText({ kind, value }: Marked): string {
  switch (kind) {
    case 'digested':
      return `‹${bytes(value.bytes)} #${value.digest}›`;
    case 'withheld':
      return `‹${value.withheld}, ${count(value.length)} characters›`;
    case 'more':
      return `… ${count(value.more)} more`;
  }
}

/** `userId: bob, deviceId: 1, content: ‹812 B #a1b2›` */
export function inOneLine(value: RedactedValue, lengthMax = 160): string {
  let text = '';
  const write = (part: string): boolean => {
    text += part;
    return text.length < lengthMax;
  };
  const visit = (part: RedactedValue, isTop: boolean): boolean => {
    const marked = markedOf(part);
    if (marked !== null) return write(markedText(marked));
    if (Array.isArray(part)) {
      if (!write('[')) return false;
      for (const [index, item] of part.entries()) {
        if (index > 0 && !write(', ')) return false;
        if (!visit(item, false)) return false;
      }
      return write(']');
    }
    if (typeof part !== 'object' || part === null) return write(shortened(String(part)));
    if (!isTop && !write('{')) return false;
    for (const [index, [name, item]] of Object.entries(part).entries()) {
      if (!write(`${index > 0 ? ', ' : ''}${name}: `)) return false;
      if (!visit(item, false)) return false;
    }
    return isTop || write('}');
  };
  visit(value, true);
  return text;
}

/** An id is known by its beginning. */
function shortened(text: string): string {
  return UUID.test(text) ? `${text.slice(0, 8)}…` : text;
}

const UUID = /^[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}$/i;

/** The same as plain JSON whose marks are short strings: what two payloads are compared in. */
export function comparable(value: RedactedValue): RedactedValue {
  const marked = markedOf(value);
  if (marked !== null) return markedText(marked);
  if (Array.isArray(value)) return value.map(comparable);
  if (typeof value === 'number') return Number(value.toFixed(3));
  if (typeof value !== 'object' || value === null) return value;
  return Object.fromEntries(
    Object.entries(value).map(([name, part]) => [name, comparable(part as RedactedValue)]),
  );
}
