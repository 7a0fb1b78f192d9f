import { beforeEach, describe, expect, it } from 'vitest';
import { MessageLedger } from '../../src/load-test/message-ledger.ts';

const CLEAN = { lost: 0, unproven: 0, doubled: 0, outOfOrder: 0, redelivered: 0, bounced: 0, foreign: 0 };

let ledger: MessageLedger;
beforeEach(() => {
  ledger = new MessageLedger();
});

function send(messageId: string, { sender = 'alice', recipient = 'bob', startMs = 0 } = {}): void {
  ledger.sent({ messageId, sender, recipient, startMs });
}

function arrive(messageId: string, envelopeId = `envelope of ${messageId}`) {
  return ledger.arrived({ messageId, envelopeId });
}

describe('the books of messages', () => {
  it('find nothing wrong where everything stored arrives once, and give back when it was due', () => {
    send('1', { startMs: 40 });
    ledger.stored('1');
    expect(arrive('1')).toMatchObject({ messageId: '1', startMs: 40 });
    expect(ledger.counts()).toEqual({ ...CLEAN, sent: 1, stored: 1, delivered: 1 });
  });

  it('take an arrival before the answer as the same message', () => {
    send('1');
    arrive('1');
    ledger.stored('1');
    expect(ledger.counts()).toEqual({ ...CLEAN, sent: 1, stored: 1, delivered: 1 });
  });

  it('call lost what was stored and is not there when the queue is empty; before that it is not proven', () => {
    for (const id of ['1', '2', '3']) {
      send(id);
      ledger.stored(id);
    }
    arrive('2');
    expect(ledger.counts()).toMatchObject({ unproven: 2, lost: 0 });
    expect([...ledger.awaitedRecipients()]).toEqual(['bob']);
    ledger.queueWasEmptied('carol', ledger.time);
    expect(ledger.counts()).toMatchObject({ unproven: 2, lost: 0 });
    ledger.queueWasEmptied('bob', ledger.time);
    expect(ledger.counts()).toMatchObject({ unproven: 0, lost: 2 });
  });

  it('call not proven what was stored while the queue was emptied already', () => {
    send('1');
    send('2');
    ledger.stored('1');
    const asOf = ledger.time;
    ledger.stored('2');
    ledger.queueWasEmptied('bob', asOf);
    expect(ledger.counts()).toMatchObject({ unproven: 1, lost: 1 });
  });

  it('call nothing lost that was refused, never answered, or came back', () => {
    send('refused or unanswered');
    send('bounced');
    ledger.stored('bounced');
    ledger.bounced('bounced');
    ledger.bounced('bounced');
    ledger.queueWasEmptied('bob', ledger.time);
    expect([...ledger.awaitedRecipients()]).toEqual([]);
    expect(ledger.counts()).toEqual({ ...CLEAN, sent: 2, stored: 1, delivered: 0, bounced: 1 });
  });

  it('tell a redelivery, which a client drops by its envelope id, from a double, which it can not', () => {
    for (const id of ['again', 'twice']) {
      send(id);
      ledger.stored(id);
      arrive(id);
    }
    expect(arrive('again')).toBeNull();
    expect(ledger.counts()).toMatchObject({ redelivered: 1, doubled: 0 });
    expect(arrive('twice', 'another envelope')).toBeNull();
    arrive('twice', 'another envelope');
    expect(ledger.counts()).toMatchObject({ delivered: 2, redelivered: 1, doubled: 1 });
  });

  it('call out of order what was stored before another was sent, and came after it', () => {
    send('1');
    ledger.stored('1');
    send('2');
    arrive('2');
    arrive('1');
    expect(ledger.counts()).toMatchObject({ delivered: 2, outOfOrder: 1 });
  });

  it('count each that a later one has overtaken, however they come among themselves', () => {
    for (const id of ['1', '2', '3']) {
      send(id);
      ledger.stored(id);
    }
    for (const id of ['3', '1', '2']) arrive(id);
    expect(ledger.counts()).toMatchObject({ delivered: 3, outOfOrder: 2 });
  });

  it('expect no order of what was under way at once, of other senders and recipients, or of redeliveries', () => {
    send('1');
    send('2');
    ledger.stored('1');
    arrive('2');
    arrive('1');
    send('3');
    ledger.stored('3');
    send('4', { sender: 'carol' });
    arrive('4');
    send('5', { recipient: 'dave' });
    arrive('5');
    arrive('3');
    send('6');
    arrive('6');
    arrive('3');
    expect(ledger.counts()).toMatchObject({ delivered: 6, outOfOrder: 0, redelivered: 1 });
  });

  it('know nothing of messages of other runs', () => {
    expect(arrive('of yesterday')).toBeNull();
    ledger.bounced('of yesterday too');
    expect(ledger.counts()).toEqual({ ...CLEAN, sent: 0, stored: 0, delivered: 0, foreign: 2 });
  });
});
