/** One message's life, over all nodes. */
import { useRef } from 'preact/hooks';
import type { AdminAnswer } from '../../../protocol/inspector/admin-api.ts';
import type { MessageStage, StreamEvent } from '../../../protocol/inspector/events.ts';
import { addressOf } from '../address.ts';
import { api } from '../api.ts';
import { nameOf, outcomeOf } from '../event-text.ts';
import { useAsked, useKeys } from '../hooks.ts';
import { goTo } from '../navigation.ts';
import { Card, DeviceLink, Empty, Trouble } from '../parts/bits.tsx';
import { GateBadge } from '../parts/gate.tsx';
import { clockTime, duration } from '../time.ts';

type MessageAnswer = AdminAnswer<'message'>;

export function MessagesPage({ messageId, query }: { messageId: string | null; query: URLSearchParams }) {
  const recipient = query.get('recipient') ?? '';
  const idField = useRef<HTMLInputElement>(null);
  const recipientField = useRef<HTMLInputElement>(null);
  useKeys({ '/': () => idField.current?.select() });
  return (
    <div class="message">
      <form
        class="bar"
        onSubmit={(event) => {
          event.preventDefault();
          const id = idField.current!.value.trim();
          const to = recipientField.current!.value.trim();
          if (id !== '')
            goTo(addressOf('messages', id, to === '' ? '' : `recipient=${encodeURIComponent(to)}`));
        }}
      >
        <input
          key={`id ${messageId}`}
          ref={idField}
          type="text"
          class="mono message-id"
          aria-label="Message id"
          placeholder="message id"
          spellcheck={false}
          required
          defaultValue={messageId ?? ''}
        />
        <input
          key={`recipient ${recipient}`}
          ref={recipientField}
          type="text"
          aria-label="Recipient"
          placeholder="recipient, as bob or bob.1"
          spellcheck={false}
          defaultValue={recipient}
        />
        <button type="submit">Trace</button>
      </form>
      {messageId === null ? (
        <Empty title="Which message?">
          Write its message id; with the recipient, the store is asked too. Senders know the id, and the
          events page links to it.
        </Empty>
      ) : (
        <Message key={`${messageId} ${recipient}`} messageId={messageId} recipient={recipient} />
      )}
    </div>
  );
}

function Message({ messageId, recipient }: { messageId: string; recipient: string }) {
  const { answer, trouble } = useAsked(`${messageId} ${recipient}`, () =>
    api.message(messageId, { recipient: recipient || undefined }),
  );
  return (
    <>
      <h1 class="hidden">Message {messageId}</h1>
      <Trouble text={trouble} />
      {answer === null && trouble === null && <Empty title="Asking the store and the nodes…" />}
      {answer !== null && (
        <div class="cards">
          <Recipients answer={answer} recipient={recipient} />
          <Timeline events={inOrder(answer.events)} messageId={messageId} />
        </div>
      )}
    </>
  );
}

const STATE_WORDS: Readonly<Record<MessageAnswer['recipients'][number]['state'], string>> = {
  waiting: 'waits in the queue',
  putOff: 'put off after a failure',
  bounced: 'bounced',
  delivered: 'delivered',
};

function Recipients({ answer, recipient }: { answer: MessageAnswer; recipient: string }) {
  return (
    <Card title="What the store knows" class="wide">
      {answer.recipients.length === 0 ? (
        <p class="quiet">
          {recipient === '' && answer.events.length === 0
            ? 'Nothing was seen of this message. Name its recipient, for the store to be asked.'
            : 'Nothing: it was never stored, or it was finished more than a day ago.'}
        </p>
      ) : (
        <div class="scroll-x">
          <table>
            <thead>
              <tr>
                <th>Recipient</th>
                <th>State</th>
                <th>
                  <span class="hidden">Why not delivered?</span>
                </th>
                <th>Sender</th>
                <th>Stored</th>
              </tr>
            </thead>
            <tbody>
              {answer.recipients.map((one) => (
                <tr key={one.device}>
                  <td>
                    <DeviceLink device={one.device} />
                  </td>
                  <td>
                    <span class={`message-state message-${one.state}`}>{STATE_WORDS[one.state]}</span>
                    {one.reason !== null && <span class="quiet"> {one.reason}</span>}
                  </td>
                  <td>
                    <a
                      href={addressOf(
                        'devices',
                        one.device,
                        `messageId=${encodeURIComponent(answer.messageId)}`,
                      )}
                    >
                      {one.state === 'delivered' ? 'Details' : 'Why not delivered?'}
                    </a>
                  </td>
                  <td>
                    <DeviceLink device={one.sender} />
                  </td>
                  <td title={one.storedAt}>{clockTime(Date.parse(one.storedAt))}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
    </Card>
  );
}

const STAGES: readonly MessageStage[] = ['stored', 'poked', 'pushed', 'putOff', 'acknowledged', 'bounced'];

/** By time; within one millisecond, on clocks of many nodes, in the order of a message's life. */
function inOrder(events: readonly StreamEvent[]): StreamEvent[] {
  const rank = (event: StreamEvent): number => (event.kind === 'message' ? STAGES.indexOf(event.stage) : -1);
  return events.toSorted(
    (one, other) => Date.parse(one.time) - Date.parse(other.time) || rank(one) - rank(other),
  );
}

function Timeline({ events, messageId }: { events: readonly StreamEvent[]; messageId: string }) {
  const [first] = events;
  return (
    <Card title="Timeline" note="as it was seen while somebody looked" class="wide">
      {first === undefined ? (
        <p class="quiet">
          No step was seen. Steps are noted while an inspector looks: leave{' '}
          <a href={addressOf('events', null, `messageId=${encodeURIComponent(messageId)}`)}>its events</a>{' '}
          open.
        </p>
      ) : (
        <ol class="timeline">
          {events.map((event, index) => {
            const beforeMs = Date.parse((events[index - 1] ?? first).time);
            const timeMs = Date.parse(event.time);
            return (
              <li
                key={`${event.node} ${event.number}`}
                class={`stage stage-${event.kind === 'message' ? event.stage : event.kind}`}
              >
                <time dateTime={event.time}>{clockTime(timeMs)}</time>
                <span class="stage-after">
                  {index === 0 ? '' : `+${duration(Math.max(0, timeMs - beforeMs))}`}
                </span>
                <i aria-hidden="true" />
                <span class="stage-what">
                  <b>{event.kind === 'message' ? STAGE_WORDS[event.stage] : nameOf(event)}</b>
                  {event.device !== null && (
                    <>
                      {' '}
                      for <DeviceLink device={event.device} />
                    </>
                  )}
                  {event.gate !== null && <GateBadge gate={event.gate} />}
                  {event.kind === 'message' && event.reason !== null && (
                    <span class="closed-because">{event.reason}</span>
                  )}
                  {event.kind !== 'message' && outcomeOf(event).text !== '' && (
                    <span>{outcomeOf(event).text}</span>
                  )}
                </span>
                <span class="stage-node mono quiet">{event.node}</span>
              </li>
            );
          })}
        </ol>
      )}
    </Card>
  );
}

const STAGE_WORDS = {
  stored: 'Stored',
  poked: 'Poked the serving node',
  pushed: 'Pushed',
  acknowledged: 'Acknowledged',
  putOff: 'Put off',
  bounced: 'Bounced',
};
