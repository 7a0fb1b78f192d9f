/** Everything of one event, or the difference of two. */
import type { StreamEvent } from '../../../protocol/inspector/events.ts';
import type { RedactedValue } from '../../../protocol/redact.ts';
import { type Difference, differences } from '../diff.ts';
import { bytesOf, claimText, DIRECTION_WORDS, latencyOf, nameOf, outcomeOf } from '../event-text.ts';
import { bytes, counted } from '../format.ts';
import { comparable } from '../redacted-text.ts';
import { clockTime, duration } from '../time.ts';
import { DeviceLink, Fact, MessageLink } from './bits.tsx';
import { GateBadge } from './gate.tsx';
import { RedactedTree } from './redacted.tsx';

export function EventDetail(props: {
  event: StreamEvent;
  /** Set while another event is pinned. */
  compared: StreamEvent | null;
  isPinned: boolean;
  onPin: () => void;
  onUnpin: () => void;
  onClose: () => void;
}) {
  const { event, compared } = props;
  return (
    <aside class="detail" aria-label="Detail">
      <header>
        <h2>{compared === null ? nameOf(event) : 'Difference'}</h2>
        {compared === null ? (
          <button
            type="button"
            aria-pressed={props.isPinned}
            onClick={props.onPin}
            title="Compare others with this one (c)"
          >
            {props.isPinned ? 'Pinned' : 'Pin to compare'}
          </button>
        ) : (
          <button type="button" onClick={props.onUnpin}>
            Unpin
          </button>
        )}
        <button
          type="button"
          class="plain"
          aria-label="Close the detail"
          title="Close (esc)"
          onClick={props.onClose}
        >
          ✕
        </button>
      </header>
      {props.isPinned && <p class="hint">Choose another event to see how it differs from this one.</p>}
      {compared === null ? <Whole event={event} /> : <Compared before={compared} after={event} />}
    </aside>
  );
}

function Whole({ event }: { event: StreamEvent }) {
  const latencyMs = latencyOf(event);
  const size = bytesOf(event);
  const outcome = outcomeOf(event);
  return (
    <>
      <dl class="facts">
        <Fact name="Time">
          {clockTime(Date.parse(event.time))} <span class="quiet">{event.time}</span>
        </Fact>
        <Fact name="Node">
          <span class="mono">{event.node}</span> <span class="quiet">event {event.number}</span>
        </Fact>
        {event.device !== null && (
          <Fact name="Device">
            <DeviceLink device={event.device} />
          </Fact>
        )}
        {event.socket !== null && <Fact name="Connection">{event.socket}</Fact>}
        {event.gate !== null && (
          <Fact name="Gate then">
            <GateBadge gate={event.gate} />
          </Fact>
        )}
        <Fact name="Direction">
          {DIRECTION_WORDS[event.direction]}
          {event.kind === 'request' && ` by ${event.door}`}
        </Fact>
        {outcome.text !== '' && (
          <Fact name="Result">
            <span class={`outcome-${outcome.tone}`}>{outcome.text}</span>
          </Fact>
        )}
        {latencyMs !== null && <Fact name="Latency">{duration(latencyMs)}</Fact>}
        {size !== null && <Fact name="Size">{bytes(size)}</Fact>}
        <KindFacts event={event} />
      </dl>
      {(event.kind === 'request' || event.kind === 'push') && (
        <>
          <Payload title={event.kind === 'request' ? 'Asked' : 'Pushed'} value={event.input} />
          <Payload title={event.kind === 'request' ? 'Answered' : 'Acknowledgement'} value={event.answer} />
        </>
      )}
    </>
  );
}

function KindFacts({ event }: { event: StreamEvent }) {
  switch (event.kind) {
    case 'gate':
      return (
        <>
          <Fact name="Gate">
            <GateBadge gate={event.from} /> → <GateBadge gate={event.to} keyVersion={event.keyVersion} />
          </Fact>
          {event.reason !== null && <Fact name="Closed because">{event.reason}</Fact>}
        </>
      );
    case 'claim':
      return (
        <>
          <Fact name="Claimed by">
            <DeviceLink device={event.peer} />
          </Fact>
          <Fact name="Given">{claimText(event)}</Fact>
          <Fact name="Claim id">
            <span class="mono">{event.claimId}</span>
          </Fact>
        </>
      );
    case 'message':
      return (
        <>
          {event.messageId !== null && (
            <Fact name="Message">
              <MessageLink messageId={event.messageId} recipient={event.device} />
            </Fact>
          )}
          <Fact name="Stage">{event.stage}</Fact>
          {event.peer !== null && (
            <Fact name="Sender">
              <DeviceLink device={event.peer} />
            </Fact>
          )}
          {event.reason !== null && <Fact name="Because">{event.reason}</Fact>}
        </>
      );
    case 'socketClosed':
      return <Fact name="Closed because">{event.reason}</Fact>;
    default:
      return null;
  }
}

function Payload({ title, value }: { title: string; value: RedactedValue }) {
  return (
    <section class="payload" aria-label={title}>
      <h3>{title}</h3>
      {value === null ? (
        <p class="quiet">Nothing, or nothing that can be shown.</p>
      ) : (
        <RedactedTree value={value} />
      )}
    </section>
  );
}

const MARKS: Readonly<Record<Difference['kind'], string>> = {
  same: '',
  changed: '~',
  added: '+',
  removed: '−',
};

function Compared({ before, after }: { before: StreamEvent; after: StreamEvent }) {
  const lines = differences(comparable(before as RedactedValue), comparable(after as RedactedValue));
  const changed = lines.filter(({ kind }) => kind !== 'same');
  const same = lines.filter(({ kind }) => kind === 'same');
  const apartMs = Date.parse(after.time) - Date.parse(before.time);
  return (
    <>
      <p class="hint">
        <b>{nameOf(before)}</b> at {clockTime(Date.parse(before.time))} against <b>{nameOf(after)}</b> at{' '}
        {clockTime(Date.parse(after.time))}, {duration(Math.abs(apartMs))} {apartMs < 0 ? 'before' : 'after'}{' '}
        it.
      </p>
      <table class="difference" aria-label="Difference of two events">
        <thead>
          <tr>
            <th class="mark-cell">
              <span class="hidden">Kind</span>
            </th>
            <th>Field</th>
            <th>Pinned</th>
            <th>This</th>
          </tr>
        </thead>
        <tbody>
          {changed.map((line) => (
            <tr key={line.path} class={`is-${line.kind}`}>
              <td class="mark-cell" title={line.kind}>
                {MARKS[line.kind]}
              </td>
              <td class="mono">{line.path}</td>
              <td class="mono">{'before' in line ? String(line.before) : ''}</td>
              <td class="mono">{'after' in line ? String(line.after) : ''}</td>
            </tr>
          ))}
        </tbody>
      </table>
      <details class="same">
        <summary>{counted(same.length, 'field')} alike</summary>
        <dl class="tree">
          {same.map((line) => (
            <div key={line.path}>
              <dt>{line.path}</dt>
              <dd>{'value' in line ? String(line.value) : ''}</dd>
            </div>
          ))}
        </dl>
      </details>
    </>
  );
}
