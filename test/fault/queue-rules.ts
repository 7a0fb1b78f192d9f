/** What a device is told of its queue: how much waits at `clientReady`, and that all of it has been handed over. */
import {
  type Book,
  groupBy,
  isDone,
  lower,
  mayBeReplaced,
  messageKey,
  type Opening,
  of,
  openings,
  sendKey,
  type Violation,
  violation,
} from './book.ts';

/** A message to one device. Moments are places in the history; Infinity where it did not come to that. */
interface Letter {
  key: string;
  sender: string;
  recipient: string;
  /** When it was first sent. */
  askedAt: number;
  /** When that was first answered with success. */
  acceptedAt: number;
  /** When its recipient first said, over any connection, that it was processed. */
  processedAt: number;
}

/** That everything had been handed over which waited at an opening. */
interface End {
  device: string;
  connection: number;
  deliveredCount: number;
  at: number;
  /** Null where the gate was not open, as far as its client knew. */
  opening: Opening | null;
}

/** Between what had surely come, and what may have come and has not surely gone. */
export function falseCounts(book: Book): Violation[] {
  const letters = readLetters(book);
  const sentTo = groupBy(letters, (letter) => letter.recipient);
  const sentBy = groupBy(letters, (letter) => letter.sender);
  const ends = groupBy(readEnds(book), (end) => end.device);
  return openings(book).flatMap((opening): Violation[] => {
    const { device, askedAt, answeredAt, pendingCount } = opening;
    const mine = sentTo.get(device) ?? [];
    const waited = mine.filter(
      (letter) =>
        letter.acceptedAt < askedAt &&
        letter.processedAt > answeredAt &&
        isStillHis(book, letter, answeredAt),
    );
    const emptiedAt = Math.max(
      -1,
      ...(ends.get(device) ?? []).filter((end) => end.at < askedAt).map((end) => end.opening?.askedAt ?? -1),
    );
    const mayWait = mine.filter((letter) => letter.askedAt < answeredAt && letter.acceptedAt > emptiedAt);
    const mayHaveComeBack = (sentBy.get(device) ?? []).filter(
      (letter) => letter.askedAt < answeredAt && !isStillHis(book, letter, answeredAt),
    );
    const most = mayWait.length + mayHaveComeBack.length;
    if (pendingCount >= waited.length && pendingCount <= most) return [];
    const bounds = `${waited.length} to ${most}`;
    return [
      violation('pendingCount is what waited', `${device} was told ${pendingCount}, where it was ${bounds}`),
    ];
  });
}

export function falseEnds(book: Book): Violation[] {
  const rule = 'queueEmpty after everything that waited';
  const sentTo = groupBy(readLetters(book), (letter) => letter.recipient);
  const processed = groupBy(
    book.history.flatMap((event, at) => (event.event === 'acknowledged' ? [{ ...event, at }] : [])),
    ({ connection }) => String(connection),
  );
  const readies = groupBy(of(book, 'ready'), (ready) => String(ready.connection));
  const told = new Set<Opening>();
  return readEnds(book).flatMap((end): Violation[] => {
    const { device, connection, deliveredCount, at, opening } = end;
    if (opening === null) {
      // One whose answer was lost may have opened it.
      const mayBeOpen = (readies.get(String(connection)) ?? []).some(
        (ready) => ready.askedAt < at && ready.answeredAt > at,
      );
      return mayBeOpen ? [] : [violation(rule, `${device} on ${connection}, whose gate was closed`)];
    }
    if (told.has(opening)) return [violation(rule, `${device} on ${connection} a second time`)];
    told.add(opening);
    const left = (sentTo.get(device) ?? []).filter(
      (letter) =>
        letter.acceptedAt < opening.askedAt && letter.processedAt > at && isStillHis(book, letter, at),
    );
    if (left.length > 0) {
      return [
        violation(rule, `${device} on ${connection}, when ${left.map(({ key }) => key).join()} waited`),
      ];
    }
    const said = (processed.get(String(connection)) ?? []).filter((event) => event.at < at);
    const saidCount = new Set(said.flatMap((event) => event.processed)).size;
    if (deliveredCount <= saidCount) return [];
    return [violation(rule, `${device} on ${connection} had processed ${saidCount}, not ${deliveredCount}`)];
  });
}

/** Whether, until `at`, no replaced identity can have sent it back. */
function isStillHis(book: Book, letter: Letter, at: number): boolean {
  return !mayBeReplaced(book, letter.recipient, { from: letter.askedAt, to: at });
}

function readLetters(book: Book): Letter[] {
  const processedAt = new Map<string, number>();
  for (const [at, event] of book.history.entries()) {
    if (event.event === 'acknowledged') for (const id of event.processed) lower(processedAt, id, at);
  }
  const processedByKey = new Map<string, number>();
  for (const { device, envelope } of book.deliveries) {
    const at = processedAt.get(envelope.id);
    if (envelope.kind === 'message' && at !== undefined) {
      lower(processedByKey, messageKey(envelope.sender, device, envelope.messageId), at);
    }
  }
  return [...groupBy(of(book, 'send'), sendKey)].map(([key, sends]): Letter => {
    const { device, asked } = sends[0]!;
    return {
      ...{ key, sender: device, recipient: asked.recipient },
      askedAt: Math.min(...sends.map((send) => send.askedAt)),
      acceptedAt: Math.min(...sends.filter(isDone).map((send) => send.answeredAt)),
      processedAt: processedByKey.get(key) ?? Number.POSITIVE_INFINITY,
    };
  });
}

function readEnds(book: Book): End[] {
  const opened = new Map(openings(book).map((opening) => [opening.answeredAt, opening]));
  const open = new Map<number, Opening>();
  const ends: End[] = [];
  for (const [at, event] of book.history.entries()) {
    if (event.event === 'answered') {
      const opening = opened.get(at);
      if (opening !== undefined) open.set(opening.connection, opening);
    } else if (event.event === 'gateClosed') open.delete(event.connection);
    else if (event.event === 'queueEmpty') {
      const { device, connection, deliveredCount } = event;
      ends.push({ device, connection, deliveredCount, at, opening: open.get(connection) ?? null });
    }
  }
  return ends;
}
