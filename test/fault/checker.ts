/**
 * Holds a history against the rules. A rule is broken only where no order of what was under way at once could explain
 * what was seen: requests that overlap, and those whose answer was lost, are given the benefit of the doubt.
 */
import {
  type Book,
  type Delivery,
  groupBy,
  isDone,
  lower,
  mayBeReplaced,
  messageKey,
  of,
  openings,
  type RequestOf,
  type Rule,
  read,
  sendKey,
  type Violation,
  violation,
} from './book.ts';
import type { FinalState, HistoryEvent } from './history.ts';
import { falseCounts, falseEnds } from './queue-rules.ts';

/** @returns every violation that the history proves; empty where the rules held */
export function check(history: readonly HistoryEvent[], final: FinalState): Violation[] {
  const book = read(history, final);
  return [
    ...givenOnce(book),
    ...repeatedClaims(book),
    ...falseEmpties(book),
    ...pastClosedGates(book),
    ...superseded(book),
    ...lost(book),
    ...storedOnce(book),
    ...outOfOrder(book),
    ...falseCounts(book),
    ...falseEnds(book),
    ...uncommitted(book),
    ...invented(book),
    ...faults(book),
  ];
}

/** The prekey of a claim that was answered; undefined where it was not. */
function givenTo(claim: RequestOf<'claim'>): string | null | undefined {
  return claim.answer?.ok === true && claim.answer.name === 'claim' ? claim.answer.preKey : undefined;
}

function claimKey(claimer: string, claim: { claimId: string; target: string }): string {
  return `${claimer} ${claim.claimId} ${claim.target}`;
}

function givenOnce(book: Book): Violation[] {
  const claimsByPreKey = groupBy(
    of(book, 'claim').filter((claim) => typeof givenTo(claim) === 'string'),
    (claim) => `${claim.asked.target} ${givenTo(claim)}`,
  );
  return [...claimsByPreKey].flatMap(([preKey, claims]): Violation[] => {
    const takers = new Set(claims.map((claim) => claimKey(claim.device, claim.asked)));
    if (takers.size < 2) return [];
    return [violation('a one-time prekey is given once', `${preKey} went to ${[...takers].join(', ')}`)];
  });
}

function repeatedClaims(book: Book): Violation[] {
  const claims = of(book, 'claim').filter((claim) => givenTo(claim) !== undefined);
  return [...groupBy(claims, (claim) => claimKey(claim.device, claim.asked))].flatMap(
    ([key, same]): Violation[] => {
      const given = new Set(same.map(givenTo));
      const from = Math.min(...same.map((claim) => claim.askedAt));
      const to = Math.max(...same.map((claim) => claim.answeredAt));
      if (given.size < 2 || mayBeReplaced(book, same[0]!.asked.target, { from, to })) return [];
      return [violation('a repeated claim gets its first answer', `${key} got ${[...given].join(' and ')}`)];
    },
  );
}

/** A prekey that was there before the claim was asked, and that nobody could have had before it was answered. */
function falseEmpties(book: Book): Violation[] {
  const claims = of(book, 'claim');
  const firstAskedAt = new Map<string, number>();
  for (const claim of claims) {
    const key = claimKey(claim.device, claim.asked);
    firstAskedAt.set(key, Math.min(claim.askedAt, firstAskedAt.get(key) ?? Number.POSITIVE_INFINITY));
  }
  /** When the claim that took a prekey was first asked; Infinity for one that nobody took. */
  const takenFrom = new Map<string, number>();
  for (const { device, preKey } of book.final.pool)
    takenFrom.set(`${device} ${preKey}`, Number.POSITIVE_INFINITY);
  for (const { device, claimer, claimId, preKey } of book.final.claims) {
    const askedAt = firstAskedAt.get(claimKey(claimer, { claimId, target: device }));
    if (preKey !== null && askedAt !== undefined) takenFrom.set(`${device} ${preKey}`, askedAt);
  }
  for (const claim of claims) {
    const preKey = givenTo(claim);
    if (typeof preKey === 'string') {
      takenFrom.set(
        `${claim.asked.target} ${preKey}`,
        firstAskedAt.get(claimKey(claim.device, claim.asked))!,
      );
    }
  }
  const uploads = groupBy(of(book, 'upload').filter(isDone), (upload) => upload.device);
  return claims.flatMap((claim): Violation[] => {
    const { answer, answeredAt, asked } = claim;
    if (answer?.ok !== true || answer.name !== 'claim' || answer.absent !== 'noneLeft') return [];
    // It may have been carried out when it was asked first, and be a repetition of that answer.
    const askedAt = firstAskedAt.get(claimKey(claim.device, asked))!;
    const left = (uploads.get(asked.target) ?? []).flatMap((upload) =>
      upload.answeredAt < askedAt &&
      !mayBeReplaced(book, upload.device, { from: upload.answeredAt, to: answeredAt })
        ? upload.asked.preKeys.filter(
            (preKey) => (takenFrom.get(`${asked.target} ${preKey}`) ?? 0) > answeredAt,
          )
        : [],
    );
    if (left.length === 0) return [];
    return [
      violation(
        'no false empty',
        `${asked.target} had ${left.length} left when ${asked.claimId} was told none`,
      ),
    ];
  });
}

function uploadKey({ device, asked }: RequestOf<'upload'>): string {
  return `${device} ${asked.preKeys.join()}`;
}

/** When each upload was asked for the first time, by its key: the answers of earlier attempts may have been lost. */
function firstUploads(book: Book): Map<string, number> {
  const firstAskedAt = new Map<string, number>();
  for (const upload of of(book, 'upload')) lower(firstAskedAt, uploadKey(upload), upload.askedAt);
  return firstAskedAt;
}

function pastClosedGates(book: Book): Violation[] {
  const rule: Rule = 'nothing passes a closed gate';
  const closings = groupBy(
    book.history.flatMap((event, at) => (event.event === 'gateClosed' ? [{ ...event, at }] : [])),
    (closing) => String(closing.connection),
  );
  const readies = groupBy(of(book, 'ready'), (ready) => String(ready.connection));
  const allChanges = book.requests.flatMap((request) =>
    (request.asked.name === 'upload' || request.asked.name === 'rotate') && request.answer?.ok === true
      ? [{ ...request, keyVersion: 'keyVersion' in request.answer ? request.answer.keyVersion : 0 }]
      : [],
  );
  const changes = groupBy(allChanges, (change) => change.device);
  const changesByConnection = groupBy(allChanges, (change) => String(change.connection));
  const sends = groupBy(of(book, 'send'), sendKey);
  const allOpenings = groupBy(openings(book), (opening) => String(opening.connection));
  const firstAskedAt = firstUploads(book);
  return book.deliveries.flatMap(({ device, connection, at, envelope }): Violation[] => {
    const told = `${envelope.messageId} to ${device} on connection ${connection}`;
    const asked = (readies.get(String(connection)) ?? []).filter((ready) => ready.askedAt < at);
    if (asked.length === 0) return [violation(rule, `${told} before clientReady`)];
    const closedAt = Math.max(
      -1,
      ...(closings.get(String(connection)) ?? [])
        .map((closing) => closing.at)
        .filter((closed) => closed < at),
    );
    // A `clientReady` that was under way when the gate closed may have opened it anew.
    const mayBeOpen = asked.some((ready) => ready.answeredAt > closedAt);
    if (!mayBeOpen) return [violation(rule, `${told} after gateClosed`)];
    if (envelope.kind !== 'message') return [];

    const mine = (allOpenings.get(String(connection)) ?? []).filter((opening) => opening.askedAt < at);
    // One whose answer is not there yet may be the one that it was delivered for.
    if (asked.some((ready) => ready.answeredAt > at || !isDone(ready))) return [];
    const carried = (changesByConnection.get(String(connection)) ?? [])
      .filter((change) => change.askedAt < at)
      .map((change) => change.keyVersion);
    const keyVersion = Math.max(0, ...mine.map((opening) => opening.keyVersion), ...carried);
    const sent = sends.get(messageKey(envelope.sender, device, envelope.messageId)) ?? [];
    // What was first sent after a change was answered was read after it was committed.
    const sentAt = Math.min(...sent.map((send) => send.askedAt));
    const ofDevice = changes.get(device) ?? [];
    const newer = ofDevice.find((change) => change.keyVersion > keyVersion && change.answeredAt < sentAt);
    if (newer !== undefined) {
      return [
        violation(
          rule,
          `${told} at version ${keyVersion}, when ${newer.keyVersion} stood before it was sent`,
        ),
      ];
    }
    // What was accepted for a replaced identity is for nobody.
    const acceptedAt = Math.min(...sent.filter(isDone).map((send) => send.answeredAt));
    const replaced = ofDevice.find(
      (change) =>
        change.asked.name === 'upload' &&
        change.asked.replacesIdentity &&
        firstAskedAt.get(uploadKey(change as RequestOf<'upload'>))! > acceptedAt &&
        mine.some((opening) => opening.keyVersion >= change.keyVersion),
    );
    if (replaced === undefined) return [];
    return [violation(rule, `${told} was accepted for an identity that was replaced since`)];
  });
}

/** What was sent when a newer connection was already served can't come by an older one. */
function superseded(book: Book): Violation[] {
  const served = groupBy(openings(book), (opening) => opening.device);
  const firstAskedAt = new Map<string, number>();
  for (const send of of(book, 'send')) lower(firstAskedAt, send.asked.messageId, send.askedAt);
  return book.deliveries.flatMap(({ device, connection, envelope }): Violation[] => {
    if (envelope.kind !== 'message') return [];
    const sentAt = firstAskedAt.get(envelope.messageId) ?? Number.POSITIVE_INFINITY;
    const newer = (served.get(device) ?? []).find(
      (opening) => opening.connection > connection && opening.answeredAt < sentAt,
    );
    if (newer === undefined) return [];
    return [
      violation(
        'a superseded connection gets nothing',
        `${envelope.messageId} came to ${device} by ${connection}, when ${newer.connection} was served`,
      ),
    ];
  });
}

function lost(book: Book): Violation[] {
  const served = groupBy(openings(book), (opening) => opening.device);
  const acknowledged = new Set(
    book.history.flatMap((event, at) => {
      if (event.event !== 'acknowledged') return [];
      // One that was superseded deletes nothing: what it says does not count.
      const { device, connection } = event;
      const isSuperseded = (served.get(device) ?? []).some(
        (other) => other.connection > connection && other.answeredAt < at,
      );
      return isSuperseded ? [] : event.processed;
    }),
  );
  const safe = new Set<string>();
  for (const { device, envelope } of book.deliveries) {
    if (envelope.kind === 'bounce') safe.add(messageKey(device, envelope.recipient, envelope.messageId));
    else if (acknowledged.has(envelope.id)) safe.add(messageKey(envelope.sender, device, envelope.messageId));
  }
  for (const { device, kind, peer, messageId } of book.final.queued) {
    safe.add(kind === 'message' ? messageKey(peer, device, messageId) : messageKey(device, peer, messageId));
  }
  return of(book, 'send').flatMap((send): Violation[] => {
    const key = sendKey(send);
    if (!isDone(send) || safe.has(key)) return [];
    return [violation('accepted is processed, bounced or pending', key)];
  });
}

function storedOnce(book: Book): Violation[] {
  const idsByMessage = groupBy(book.deliveries, ({ device, envelope }) =>
    envelope.kind === 'message'
      ? messageKey(envelope.sender, device, envelope.messageId)
      : `bounce of ${messageKey(device, envelope.recipient, envelope.messageId)}`,
  );
  return [...idsByMessage].flatMap(([key, deliveries]): Violation[] => {
    const ids = new Set(deliveries.map((delivery) => delivery.envelope.id));
    return ids.size < 2 ? [] : [violation('stored once', `${key} came under ${ids.size} ids`)];
  });
}

/** Without what comes by a connection when a newer one has brought something: it left before, and stood still on its way. */
function byTheNewest(deliveries: readonly Delivery[]): Delivery[] {
  let newest = 0;
  return deliveries.filter(({ connection }) => {
    newest = Math.max(newest, connection);
    return connection === newest;
  });
}

/** On every connection, and over all of them, first offers come in the order in which they were sent one after another. */
function outOfOrder(book: Book): Violation[] {
  const failed = new Set(
    book.history.flatMap((event) => (event.event === 'acknowledged' ? event.failed : [])),
  );
  const firstAsked = new Map<string, number>();
  const firstDone = new Map<string, number>();
  for (const send of of(book, 'send')) {
    const key = sendKey(send);
    lower(firstAsked, key, send.askedAt);
    if (isDone(send)) lower(firstDone, key, send.answeredAt);
  }
  const violations: Violation[] = [];
  const judge = (deliveries: readonly Delivery[], exceptFailed: boolean): void => {
    /** By sender: the delivered message that was sent last, so far. */
    const latest = new Map<string, { key: string; askedAt: number }>();
    const seen = new Set<string>();
    for (const { device, envelope } of deliveries) {
      if (envelope.kind !== 'message') continue;
      const key = messageKey(envelope.sender, device, envelope.messageId);
      if (seen.has(key)) continue;
      seen.add(key);
      if (exceptFailed && failed.has(envelope.id)) continue;
      const before = latest.get(envelope.sender);
      const doneAt = firstDone.get(key) ?? Number.POSITIVE_INFINITY;
      if (before !== undefined && doneAt < before.askedAt) {
        violations.push(violation('in order', `${key} came after ${before.key}, which was sent later`));
      }
      const askedAt = firstAsked.get(key) ?? -1;
      if (before === undefined || askedAt > before.askedAt) latest.set(envelope.sender, { key, askedAt });
    }
  };
  for (const [, deliveries] of groupBy(book.deliveries, (delivery) => delivery.device)) {
    judge(byTheNewest(deliveries), false);
    for (const [, own] of groupBy(deliveries, (delivery) => String(delivery.connection))) judge(own, true);
  }
  return violations;
}

function uncommitted(book: Book): Violation[] {
  const rule: Rule = 'no answer before its commit';
  const violations = book.history.flatMap((event): Violation[] => {
    if (event.event === 'missed') return [violation(rule, `${event.device} is missed: ${event.what}`)];
    if (event.event !== 'witnessed' || event.committed) return [];
    return [violation(rule, `the store knows nothing of what request ${event.request} was answered`)];
  });
  const claimed = new Set(book.final.claims.map((claim) => `${claim.device} ${claim.preKey}`));
  const pooled = new Set(book.final.pool.map((row) => `${row.device} ${row.preKey}`));
  const end = Number.POSITIVE_INFINITY;
  for (const upload of of(book, 'upload')) {
    if (!isDone(upload) || mayBeReplaced(book, upload.device, { from: upload.answeredAt, to: end })) continue;
    for (const preKey of upload.asked.preKeys) {
      const key = `${upload.device} ${preKey}`;
      if (!claimed.has(key) && !pooled.has(key))
        violations.push(violation(rule, `the uploaded ${key} is gone`));
    }
  }
  for (const claim of of(book, 'claim')) {
    const preKey = givenTo(claim);
    if (typeof preKey !== 'string') continue;
    const key = `${claim.asked.target} ${preKey}`;
    if (pooled.has(key)) violations.push(violation(rule, `${key} was given and is still in the pool`));
    const replaced = mayBeReplaced(book, claim.asked.target, { from: claim.askedAt, to: end });
    if (!claimed.has(key) && !replaced)
      violations.push(violation(rule, `nothing tells that ${key} was given`));
  }
  return violations;
}

function invented(book: Book): Violation[] {
  const sent = new Map(of(book, 'send').map((send) => [sendKey(send), send.asked.text]));
  const rule: Rule = 'nothing that nobody sent';
  const violations = book.deliveries.flatMap(({ device, envelope }): Violation[] => {
    const key =
      envelope.kind === 'message'
        ? messageKey(envelope.sender, device, envelope.messageId)
        : messageKey(device, envelope.recipient, envelope.messageId);
    const text = sent.get(key);
    if (text === undefined) return [violation(rule, key)];
    return envelope.kind === 'message' && envelope.text !== text
      ? [violation(rule, `${key} with another text`)]
      : [];
  });
  const uploaded = new Set(
    of(book, 'upload').flatMap((upload) =>
      upload.asked.preKeys.map((preKey) => `${upload.device} ${preKey}`),
    ),
  );
  for (const claim of of(book, 'claim')) {
    const preKey = givenTo(claim);
    if (typeof preKey === 'string' && !uploaded.has(`${claim.asked.target} ${preKey}`)) {
      violations.push(violation(rule, `${claim.asked.target} never uploaded ${preKey}`));
    }
  }
  return violations;
}

function faults(book: Book): Violation[] {
  const rule: Rule = 'no fault of the server';
  return [
    ...book.requests.flatMap(({ answer, asked, device }): Violation[] =>
      answer?.ok === false && answer.code === 'INTERNAL'
        ? [violation(rule, `${asked.name} by ${device}`)]
        : [],
    ),
    ...book.history.flatMap((event): Violation[] =>
      event.event === 'gatewayEnded' && !event.expected
        ? [violation(rule, `a gateway ended: ${event.how}`)]
        : [],
    ),
  ];
}
