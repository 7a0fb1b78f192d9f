/** Who is connected, how each gate stands, and what keeps each socket busy. */
import { useState } from 'preact/hooks';
import type { AdminAnswer } from '../../../protocol/inspector/admin-api.ts';
import { type GateName, gateName } from '../../../protocol/inspector/values.ts';
import { addressOf } from '../address.ts';
import { api } from '../api.ts';
import { bytes, count, counted } from '../format.ts';
import { useAsked, useKeys } from '../hooks.ts';
import { amend, goTo } from '../navigation.ts';
import { DeviceLink, Empty, Trouble } from '../parts/bits.tsx';
import { type Column, DataGrid } from '../parts/data-grid.tsx';
import { GateBadge } from '../parts/gate.tsx';
import { SocketCard } from '../parts/socket-card.tsx';
import { clockTime, duration, nowMs, relative } from '../time.ts';

type ListedSocket = AdminAnswer<'sockets'>['sockets'][number];

const COLUMNS: readonly Column<ListedSocket>[] = [
  { name: 'device', title: 'Device', cell: ({ device }) => <DeviceLink device={device} /> },
  {
    name: 'gate',
    title: 'Gate',
    cell: ({ gate, keyVersion }) => <GateBadge gate={gate} keyVersion={keyVersion} />,
  },
  { name: 'node', title: 'Node', cell: ({ node }) => node },
  {
    name: 'pending',
    title: 'Pending',
    cell: ({ pendingCount }) => (
      <span class={pendingCount ? '' : 'quiet'}>{pendingCount === null ? '–' : count(pendingCount)}</span>
    ),
  },
  {
    name: 'window',
    title: 'Unacknowledged',
    cell: ({ windowCount, windowBytes, windowFull }) => (
      <span class={windowFull ? 'warned' : windowCount === 0 ? 'quiet' : ''}>
        {windowCount === 0
          ? '0'
          : `${count(windowCount)} · ${bytes(windowBytes)}${windowFull ? ' · full' : ''}`}
      </span>
    ),
  },
  {
    name: 'oldest',
    title: 'Oldest push',
    cell: ({ oldestPushAt }) => (oldestPushAt === null ? '' : duration(nowMs() - Date.parse(oldestPushAt))),
  },
  {
    name: 'trip',
    title: 'Round trip',
    cell: ({ roundTripMs }) => (roundTripMs === null ? <span class="quiet">–</span> : duration(roundTripMs)),
  },
  {
    name: 'buffered',
    title: 'Buffered',
    cell: ({ bufferedBytes }) => (
      <span class={bufferedBytes === 0 ? 'quiet' : ''}>{bytes(bufferedBytes)}</span>
    ),
  },
  {
    name: 'token',
    title: 'Token',
    cell: ({ tokenExpiresAt, paused }) => (
      <span class={paused ? 'warned' : ''}>
        {paused ? 'expired' : relative(Date.parse(tokenExpiresAt), nowMs())}
      </span>
    ),
  },
  { name: 'since', title: 'Open since', cell: ({ openedAt }) => clockTime(Date.parse(openedAt)) },
];

export function SocketsPage({ query, writable }: { query: URLSearchParams; writable: boolean }) {
  const device = query.get('device') ?? '';
  const gate = gateName.options.find((name) => name === query.get('gate'));
  const { answer, trouble, askAgain } = useAsked(`${device} ${gate}`, () =>
    api.sockets({ device: device || undefined, gate }),
  );
  const [selectedSocket, setSelectedSocket] = useState<string | null>(null);
  /** What is being typed: the list is drawn anew meanwhile, again and again. */
  const [typed, setTyped] = useState<string | null>(null);
  const sockets = answer?.sockets ?? [];
  const selectedIndex = sockets.findIndex((socket) => keyOf(socket) === selectedSocket);
  const selected = sockets[selectedIndex];

  const change = (next: { device?: string; gate?: GateName | null }): void => {
    const fields = new URLSearchParams();
    const nextDevice = next.device ?? device;
    const nextGate = next.gate === undefined ? gate : next.gate;
    if (nextDevice !== '') fields.set('device', nextDevice);
    if (nextGate) fields.set('gate', nextGate);
    amend(addressOf('sockets', null, fields.toString()));
  };
  useKeys({
    '/': () => document.querySelector<HTMLInputElement>('.page-sockets input')?.select(),
    Escape: () => setSelectedSocket(null),
  });

  const silent = answer?.nodes.filter(({ answering }) => !answering) ?? [];
  return (
    <div class={`sockets${selected === undefined ? '' : ' has-detail'}`}>
      <h1 class="hidden">Sockets</h1>
      <div class="bar">
        <input
          type="text"
          aria-label="Device or user"
          placeholder="alice.1 or alice"
          spellcheck={false}
          value={typed ?? device}
          class={device === '' ? '' : 'is-set'}
          onInput={({ currentTarget }) => setTyped(currentTarget.value)}
          onChange={({ currentTarget }) => {
            setTyped(null);
            change({ device: currentTarget.value.trim() });
          }}
        />
        <fieldset class="toggles">
          <legend class="hidden">Gate</legend>
          {gateName.options.map((name) => (
            <button
              key={name}
              type="button"
              aria-pressed={gate === name}
              onClick={() => change({ gate: gate === name ? null : name })}
            >
              <GateBadge gate={name} />
            </button>
          ))}
        </fieldset>
        {answer !== null && (
          <span class="quiet" role="status">
            {counted(answer.total, 'socket')}
            {answer.total > sockets.length && `, the first ${count(sockets.length)} are listed`} on{' '}
            {counted(answer.nodes.length, 'node')}
          </span>
        )}
      </div>
      <Trouble text={trouble} />
      <Trouble
        text={
          silent.length === 0
            ? null
            : `${silent.map(({ node }) => node).join(', ')} does not answer: its sockets are missing here.`
        }
      />
      <div class="split">
        <DataGrid
          name="sockets"
          label="Sockets"
          columns={COLUMNS}
          count={sockets.length}
          rowAt={(index) => sockets[index]}
          keyOf={keyOf}
          toneOf={({ windowFull, paused }) => (windowFull || paused ? 'is-warned' : '')}
          selectedIndex={selectedIndex}
          onSelect={(socket) => setSelectedSocket(keyOf(socket))}
          onOpen={(socket) => goTo(addressOf('devices', socket.device))}
          empty={
            answer === null ? (
              <Empty title="Asking the nodes…" />
            ) : (
              <Empty
                title={device === '' && gate === undefined ? 'Nobody is connected.' : 'No socket matches.'}
              >
                A device that is missing here has no socket on any node that answers; its own page tells more.
              </Empty>
            )
          }
        />
        {selected !== undefined && (
          <aside class="detail" aria-label="Detail">
            <header>
              <h2>
                <DeviceLink device={selected.device} />
              </h2>
              <a
                class="button"
                href={addressOf('events', null, `device=${encodeURIComponent(selected.device)}`)}
              >
                Events
              </a>
              <button
                type="button"
                class="plain"
                aria-label="Close the detail"
                title="Close (esc)"
                onClick={() => setSelectedSocket(null)}
              >
                ✕
              </button>
            </header>
            <SelectedSocket
              key={selected.socket}
              socket={selected}
              writable={writable}
              onChanged={askAgain}
            />
          </aside>
        )}
      </div>
    </div>
  );
}

/** With why it does not get what waits for it. */
function SelectedSocket(props: { socket: ListedSocket; writable: boolean; onChanged: () => void }) {
  const { device } = props.socket;
  const { answer } = useAsked(device, () => api.device(device, {}));
  return (
    <>
      <SocketCard {...props} pendingCount={props.socket.pendingCount} />
      {answer !== null && <p class="diagnosis-brief">{answer.diagnoses[0]!.text}</p>}
    </>
  );
}

function keyOf({ node, socket }: ListedSocket): string {
  return `${node}-${socket}`;
}
