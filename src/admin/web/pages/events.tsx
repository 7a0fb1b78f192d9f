/** The live stream: a table that follows, stands still, is filtered, searched with keys, and exported. */
import { useCallback, useEffect, useRef, useState } from 'preact/hooks';
import { filterFromQuery, filterToQuery, type StreamFilter } from '../../../protocol/inspector/filter.ts';
import { addressOf } from '../address.ts';
import {
  bytesOf,
  DIRECTION_SIGNS,
  DIRECTION_WORDS,
  eventsCounted,
  latencyOf,
  nameOf,
  outcomeOf,
  summaryOf,
  toNdjson,
} from '../event-text.ts';
import { bytes, count } from '../format.ts';
import { useChanges, useKeys } from '../hooks.ts';
import { KEPT_EVENTS_MAX, type LiveFeed, type LogLine } from '../live-feed.ts';
import { amend } from '../navigation.ts';
import { Empty, Trouble } from '../parts/bits.tsx';
import { type Column, DataGrid } from '../parts/data-grid.tsx';
import { EventDetail } from '../parts/event-detail.tsx';
import { FilterBar } from '../parts/filter-bar.tsx';
import { GateBadge } from '../parts/gate.tsx';
import { clockTime, duration } from '../time.ts';

type EventLine = Extract<LogLine, { type: 'event' }>;

const cellOf =
  (draw: (event: EventLine['event']) => preact.ComponentChildren): Column<LogLine>['cell'] =>
  (line) =>
    line.type === 'event' ? draw(line.event) : null;

const COLUMNS: readonly Column<LogLine>[] = [
  {
    name: 'time',
    title: 'Time',
    cell: cellOf(({ time }) => {
      const [seconds, milliseconds] = clockTime(Date.parse(time)).split('.');
      return (
        <>
          {seconds}
          <span class="milliseconds">.{milliseconds}</span>
        </>
      );
    }),
  },
  { name: 'node', title: 'Node', cell: cellOf(({ node }) => node) },
  { name: 'device', title: 'Device', cell: cellOf(({ device }) => device ?? '–') },
  {
    name: 'event',
    title: 'Event',
    cell: cellOf((event) => (
      <>
        <span class={`sign sign-${event.direction}`} title={DIRECTION_WORDS[event.direction]}>
          {DIRECTION_SIGNS[event.direction]}
        </span>
        {nameOf(event)}
      </>
    )),
  },
  {
    name: 'outcome',
    title: 'Result',
    cell: cellOf((event) => {
      const { text, tone } = outcomeOf(event);
      return <span class={`outcome-${tone}`}>{text}</span>;
    }),
  },
  {
    name: 'latency',
    title: 'Latency',
    cell: cellOf((event) => {
      const latencyMs = latencyOf(event);
      return latencyMs === null ? '' : duration(latencyMs);
    }),
  },
  {
    name: 'bytes',
    title: 'Size',
    cell: cellOf((event) => {
      const size = bytesOf(event);
      return size === null ? '' : bytes(size);
    }),
  },
  { name: 'gate', title: 'Gate', cell: cellOf(({ gate }) => gate !== null && <GateBadge gate={gate} />) },
  {
    name: 'summary',
    title: 'What',
    cell: (line) => (line.type === 'event' ? summaryOf(line.event) : line.text),
  },
];

export function EventsPage({ live, query }: { live: LiveFeed; query: URLSearchParams }) {
  useChanges(live);
  const { log } = live;
  const [follows, setFollows] = useState(true);
  const [selected, setSelected] = useState<EventLine | null>(null);
  const [compared, setCompared] = useState<EventLine | null>(null);
  const [isFilterShown, setFilterShown] = useState(false);
  const deviceField = useRef<HTMLInputElement>(null);

  const text = query.toString();
  const parsed = filterFromQuery(query);
  const filter: StreamFilter = parsed.ok ? parsed.filter : {};
  useEffect(() => {
    if (parsed.ok) live.watch(parsed.filter);
  }, [live, text]);
  const changeFilter = (next: StreamFilter): void => amend(addressOf('events', null, filterToQuery(next)));

  const select = useCallback((line: LogLine, { compare }: { compare: boolean }): void => {
    if (line.type !== 'event') return;
    if (compare) setCompared((old) => (old?.id === line.id ? null : line));
    else setSelected(line);
  }, []);
  const close = (): void => {
    if (selected === null) setCompared(null);
    setSelected(null);
  };
  useKeys({
    '/': () => {
      setFilterShown(true);
      deviceField.current?.focus();
      deviceField.current?.select();
    },
    ' ': () => live.setPaused(!live.isPaused),
    Escape: close,
    f: () => setFollows((on) => !on),
    c: () => setCompared((old) => (old !== null && old.id === selected?.id ? null : selected)),
  });

  const filterCount = Object.keys(filter).length;
  return (
    <div class={`events${selected === null ? '' : ' has-detail'}`}>
      <h1 class="hidden">Live events</h1>
      <div class="bar">
        <div class="buttons">
          <button
            type="button"
            class={live.isPaused ? 'primary' : ''}
            aria-pressed={live.isPaused}
            title="Pause or go on (space)"
            onClick={() => live.setPaused(!live.isPaused)}
          >
            {live.isPaused ? '▶ Go on' : '❚❚ Pause'}
          </button>
          <button
            type="button"
            aria-pressed={follows}
            title="Keep the newest in sight (f)"
            onClick={() => setFollows(!follows)}
          >
            ↓ Follow
          </button>
          <button
            type="button"
            title="Forget what is listed"
            onClick={() => {
              live.clear();
              setSelected(null);
              setCompared(null);
            }}
          >
            Clear
          </button>
          <button
            type="button"
            disabled={log.length === 0}
            title="Download what is listed"
            onClick={() => download(live)}
          >
            Export
          </button>
          <button
            type="button"
            class={`filter-opener${filterCount > 0 ? ' is-set' : ''}`}
            aria-expanded={isFilterShown}
            onClick={() => setFilterShown(!isFilterShown)}
          >
            Filter{filterCount > 0 ? ` (${filterCount})` : ''}
          </button>
        </div>
        <div class={`filter-place${isFilterShown ? ' is-shown' : ''}`}>
          <FilterBar filter={filter} onChange={changeFilter} deviceField={deviceField} />
        </div>
      </div>
      <Trouble
        text={parsed.ok ? null : `This filter can’t be used: ${parsed.message}. Nothing new is shown.`}
      />
      <div class="split">
        <DataGrid
          name="events"
          label="Live events"
          columns={COLUMNS}
          count={log.length}
          rowAt={log.at}
          keyOf={({ id }) => String(id)}
          toneOf={toneOf}
          selectedIndex={indexOf(live, selected)}
          comparedIndex={indexOf(live, compared)}
          canSelect={({ type }) => type === 'event'}
          onSelect={select}
          follow={{ on: follows && !live.isPaused, onChange: setFollows }}
          forgottenCount={log.forgottenCount}
          empty={<NothingYet live={live} isFiltered={filterCount > 0} />}
        />
        {selected !== null && (
          <EventDetail
            event={selected.event}
            compared={compared === null || compared.id === selected.id ? null : compared.event}
            isPinned={compared?.id === selected.id}
            onPin={() => setCompared((old) => (old?.id === selected.id ? null : selected))}
            onUnpin={() => setCompared(null)}
            onClose={() => setSelected(null)}
          />
        )}
      </div>
      <StatusLine live={live} />
    </div>
  );
}

function toneOf(line: LogLine): string {
  if (line.type === 'note') return 'is-note';
  return outcomeOf(line.event).tone === 'bad' ? 'is-bad' : '';
}

/** Ids rise from line to line, so that the place is found by halving. */
function indexOf({ log }: LiveFeed, line: LogLine | null): number {
  if (line === null) return -1;
  let low = 0;
  let high = log.length - 1;
  while (low <= high) {
    const middle = (low + high) >> 1;
    const { id } = log.at(middle)!;
    if (id === line.id) return middle;
    if (id < line.id) low = middle + 1;
    else high = middle - 1;
  }
  return -1;
}

function NothingYet({ live, isFiltered }: { live: LiveFeed; isFiltered: boolean }) {
  if (live.status !== 'live') return <Empty title="Connecting to the stream…" />;
  return (
    <Empty title={isFiltered ? 'Nothing has matched the filter yet.' : 'Nothing has happened yet.'}>
      The stream begins when you look: what happened before is on the page of the device, or of the message.
    </Empty>
  );
}

function StatusLine({ live }: { live: LiveFeed }) {
  const silent = live.nodes.filter(({ answering }) => !answering);
  return (
    <footer class="status">
      <span class={`line line-${live.status}`}>
        <i aria-hidden="true" />
        {live.isPaused ? 'paused' : live.status}
      </span>
      <span data-testid="kept">{count(live.log.length)} listed</span>
      {live.isPaused && <b>{eventsCounted(live.waitingCount)} waiting</b>}
      <span
        class={live.droppedCount > 0 ? 'warned' : 'quiet'}
        title="Left out by the server: this viewer is too slow"
      >
        {count(live.droppedCount)} dropped
      </span>
      {live.forgottenCount > 0 && (
        <span class="quiet">
          the oldest {count(live.forgottenCount)} are gone: {count(KEPT_EVENTS_MAX)} are kept
        </span>
      )}
      {silent.length > 0 && <span class="warned">{silent.map(({ node }) => node).join(', ')} silent</span>}
      <span class="keys quiet">
        <kbd>/</kbd> filter <kbd>j</kbd>
        <kbd>k</kbd> move <kbd>space</kbd> pause <kbd>f</kbd> follow <kbd>c</kbd> compare <kbd>esc</kbd> close
      </span>
    </footer>
  );
}

function download({ log }: LiveFeed): void {
  const events = log.toArray().flatMap((line) => (line.type === 'event' ? [line.event] : []));
  const address = URL.createObjectURL(new Blob([toNdjson(events)], { type: 'application/x-ndjson' }));
  const link = document.createElement('a');
  link.href = address;
  link.download = `keygate-events-${events[0]?.time.replaceAll(':', '') ?? 'none'}.ndjson`;
  link.click();
  URL.revokeObjectURL(address);
}
