/** One socket: its facts, its gate's history, and the button that ends it. */
import { useRef, useState } from 'preact/hooks';
import type { SocketFacts } from '../../../protocol/inspector/facts.ts';
import { api } from '../api.ts';
import { bytes, counted } from '../format.ts';
import { clockTime, duration, nowMs, relative } from '../time.ts';
import { Fact, Trouble } from './bits.tsx';
import { GateBadge, GateHistory } from './gate.tsx';

export function SocketCard(props: {
  socket: SocketFacts;
  /** What waits in the device's queue; null while it is not known, or told elsewhere. */
  pendingCount: number | null;
  writable: boolean;
  onChanged: () => void;
}) {
  const { socket, pendingCount } = props;
  return (
    <div class="socket-card">
      <dl class="facts">
        <Fact name="Gate">
          <GateBadge gate={socket.gate} keyVersion={socket.keyVersion} />
        </Fact>
        <Fact name="Node">
          <span class="mono">{socket.node}</span> <span class="quiet">connection {socket.socket}</span>
        </Fact>
        <Fact name="Open since">
          {clockTime(Date.parse(socket.openedAt))}{' '}
          <span class="quiet">{relative(Date.parse(socket.openedAt), nowMs())}</span>
        </Fact>
        {pendingCount !== null && <Fact name="Pending">{counted(pendingCount, 'envelope')}</Fact>}
        <Fact name="Unacknowledged">
          <span class={socket.windowFull ? 'warned' : ''}>
            {counted(socket.windowCount, 'envelope')}, {bytes(socket.windowBytes)}
            {socket.windowFull && ': the window is full'}
          </span>
        </Fact>
        {socket.oldestPushAt !== null && (
          <Fact name="Oldest push">{relative(Date.parse(socket.oldestPushAt), nowMs())}</Fact>
        )}
        <Fact name="Round trip">
          {socket.roundTripMs === null ? 'not measured yet' : duration(socket.roundTripMs)}
        </Fact>
        <Fact name="Buffered">{bytes(socket.bufferedBytes)}</Fact>
        <Fact name="Token">
          <span class={socket.paused ? 'warned' : ''}>
            {socket.paused
              ? 'expired: nothing is handed out'
              : `expires ${relative(Date.parse(socket.tokenExpiresAt), nowMs())}`}
          </span>
        </Fact>
      </dl>
      <h3>Gate history</h3>
      <GateHistory steps={socket.gateHistory} openedAt={socket.openedAt} />
      <Disconnect {...props} />
    </div>
  );
}

function Disconnect({
  socket,
  writable,
  onChanged,
}: {
  socket: SocketFacts;
  writable: boolean;
  onChanged: () => void;
}) {
  const dialog = useRef<HTMLDialogElement>(null);
  const [trouble, setTrouble] = useState<string | null>(null);
  if (!writable) {
    return <p class="quiet">Sockets can’t be disconnected from here: the inspector is read-only.</p>;
  }
  const disconnect = async (): Promise<void> => {
    try {
      const { disconnected } = await api.disconnect({ node: socket.node, socket: socket.socket });
      setTrouble(disconnected ? null : 'The socket was gone already.');
    } catch (error) {
      setTrouble((error as Error).message);
    }
    onChanged();
  };
  return (
    <>
      <Trouble text={trouble} />
      <button type="button" class="danger" onClick={() => dialog.current?.showModal()}>
        Disconnect…
      </button>
      <dialog
        ref={dialog}
        aria-labelledby="disconnect-title"
        onClose={({ currentTarget }) => {
          if (currentTarget.returnValue === 'yes') void disconnect();
        }}
      >
        <form method="dialog">
          <h2 id="disconnect-title">
            Disconnect <span class="mono">{socket.device}</span>?
          </h2>
          <p>
            Its socket on {socket.node} is closed. The client may come back at once; its messages stay. This
            is written to the audit log.
          </p>
          <div class="buttons">
            <button type="submit" value="no">
              Keep it
            </button>
            <button type="submit" value="yes" class="danger">
              Disconnect
            </button>
          </div>
        </form>
      </dialog>
    </>
  );
}
