/** A history, read for those who judge it. */
import type { Answer, Asked, Envelope, FinalState, HistoryEvent } from './history.ts';

export type Rule =
  | 'a one-time prekey is given once'
  | 'a repeated claim gets its first answer'
  | 'no false empty'
  | 'nothing passes a closed gate'
  | 'a superseded connection gets nothing'
  | 'accepted is processed, bounced or pending'
  | 'stored once'
  | 'in order'
  | 'pendingCount is what waited'
  | 'queueEmpty after everything that waited'
  | 'no answer before its commit'
  | 'nothing that nobody sent'
  | 'no fault of the server';

export interface Violation {
  rule: Rule;
  detail: string;
}

/** A request with its place in the history: it was carried out somewhere between `askedAt` and `answeredAt`, if at all. */
export interface Request<Kind extends Asked = Asked> {
  device: string;
  connection: number | null;
  asked: Kind;
  askedAt: number;
  /** Infinity where no answer came. */
  answeredAt: number;
  answer: Answer | null;
}

export type RequestOf<Name extends Asked['name']> = Request<Extract<Asked, { name: Name }>>;

export interface Delivery {
  device: string;
  connection: number;
  at: number;
  envelope: Envelope;
}

export interface Book {
  requests: readonly Request[];
  /** Uploads of another identity than the one before, by device. */
  replacements: ReadonlyMap<string, readonly RequestOf<'upload'>[]>;
  deliveries: readonly Delivery[];
  final: FinalState;
  history: readonly HistoryEvent[];
}

export function read(history: readonly HistoryEvent[], final: FinalState): Book {
  const requests = new Map<number, Request>();
  const deliveries: Delivery[] = [];
  for (const [at, event] of history.entries()) {
    if (event.event === 'asked') {
      const { device, connection, asked } = event;
      requests.set(event.request, {
        ...{ device, connection, asked, askedAt: at },
        ...{ answeredAt: Number.POSITIVE_INFINITY, answer: null },
      });
    } else if (event.event === 'answered') {
      const request = requests.get(event.request)!;
      request.answeredAt = at;
      request.answer = event.answer;
    } else if (event.event === 'delivered') {
      const { device, connection } = event;
      for (const envelope of event.envelopes) deliveries.push({ device, connection, at, envelope });
    }
  }
  const book = { requests: [...requests.values()], deliveries, final, history };
  const replacing = of(book, 'upload').filter((upload) => upload.asked.replacesIdentity);
  return { ...book, replacements: groupBy(replacing, (upload) => upload.device) };
}

export function of<Name extends Asked['name']>(book: Pick<Book, 'requests'>, name: Name): RequestOf<Name>[] {
  return book.requests.filter((request): request is RequestOf<Name> => request.asked.name === name);
}

export function isDone(request: Request): boolean {
  return request.answer?.ok === true;
}

/** A span of one connection in which its gate stood open, as its client saw it. */
export interface Opening {
  device: string;
  connection: number;
  askedAt: number;
  answeredAt: number;
  keyVersion: number;
  pendingCount: number;
}

export function openings(book: Book): Opening[] {
  return of(book, 'ready').flatMap((ready): Opening[] =>
    ready.answer?.ok === true && ready.answer.name === 'ready' && ready.connection !== null
      ? [
          {
            device: ready.device,
            connection: ready.connection,
            askedAt: ready.askedAt,
            answeredAt: ready.answeredAt,
            keyVersion: ready.answer.keyVersion,
            pendingCount: ready.answer.pendingCount,
          },
        ]
      : [],
  );
}

/** Whether an identity may have been replaced in this time: what was stored under it is no longer to be expected then. */
export function mayBeReplaced(book: Book, device: string, span: { from: number; to: number }): boolean {
  return (book.replacements.get(device) ?? []).some(
    (upload) => upload.askedAt < span.to && upload.answeredAt > span.from,
  );
}

export function messageKey(sender: string, recipient: string, messageId: string): string {
  return `${sender} → ${recipient} ${messageId}`;
}

export function sendKey({ device, asked }: RequestOf<'send'>): string {
  return messageKey(device, asked.recipient, asked.messageId);
}

export function violation(rule: Rule, detail: string): Violation {
  return { rule, detail };
}

export function lower(map: Map<string, number>, key: string, value: number): void {
  map.set(key, Math.min(value, map.get(key) ?? Number.POSITIVE_INFINITY));
}

export function groupBy<T>(items: readonly T[], keyOf: (item: T) => string): Map<string, T[]> {
  const groups = new Map<string, T[]>();
  for (const item of items) {
    const key = keyOf(item);
    const group = groups.get(key);
    if (group === undefined) groups.set(key, [item]);
    else group.push(item);
  }
  return groups;
}
