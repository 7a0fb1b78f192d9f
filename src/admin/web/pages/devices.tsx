/** One device: why its messages do not arrive, its key set, who claimed, and what waits. */
import { useRef, useState } from 'preact/hooks';
import type { AdminAnswer } from '../../../protocol/inspector/admin-api.ts';
import type { Diagnosis, DiagnosisKind } from '../../../protocol/inspector/diagnosis.ts';
import type { ClaimFacts, KeySetFacts, PendingFacts } from '../../../protocol/inspector/facts.ts';
import { addressOf } from '../address.ts';
import { api } from '../api.ts';
import { claimText } from '../event-text.ts';
import { bytes, count, counted } from '../format.ts';
import { useAsked, useChanges, useKeys } from '../hooks.ts';
import { amend, goTo } from '../navigation.ts';
import type { OverviewFeed } from '../overview-feed.ts';
import { Card, DeviceLink, Empty, Fact, MessageLink, Trouble } from '../parts/bits.tsx';
import { GateBadge } from '../parts/gate.tsx';
import { SocketCard } from '../parts/socket-card.tsx';
import { clockTime, nowMs, relative } from '../time.ts';

type DeviceAnswer = AdminAnswer<'device'>;

export function DevicesPage(props: {
  device: string | null;
  query: URLSearchParams;
  overview: OverviewFeed;
  writable: boolean;
}) {
  const { device, query } = props;
  const field = useRef<HTMLInputElement>(null);
  useKeys({ '/': () => field.current?.select() });
  return (
    <div class="device">
      <form
        class="bar"
        onSubmit={(event) => {
          event.preventDefault();
          const name = field.current!.value.trim();
          if (name !== '') goTo(addressOf('devices', name));
        }}
      >
        <input
          // Another device is another field.
          key={device}
          ref={field}
          type="text"
          aria-label="Device"
          placeholder="alice.1"
          spellcheck={false}
          required
          defaultValue={device ?? ''}
        />
        <button type="submit">Open</button>
      </form>
      {device === null ? (
        <DeviceChoice overview={props.overview} />
      ) : (
        <Device key={device} device={device} messageId={query.get('messageId')} writable={props.writable} />
      )}
    </div>
  );
}

function DeviceChoice({ overview }: { overview: OverviewFeed }) {
  useChanges(overview);
  const low = overview.samples.at(-1)?.lowDevices ?? [];
  const { answer } = useAsked('first sockets', () => api.sockets({}));
  return (
    <>
      <h1 class="hidden">Devices</h1>
      <Empty title="Which device?">
        Write its user and number, as <code>alice.1</code>. A device that was never heard of has a page too:
        it says so.
      </Empty>
      {answer !== null && answer.sockets.length > 0 && (
        <Card
          title="Connected now"
          note={answer.total > 12 ? <a href={addressOf('sockets')}>all {count(answer.total)}</a> : ''}
        >
          <ul class="names">
            {answer.sockets.slice(0, 12).map(({ device, gate, socket }) => (
              <li key={socket}>
                <GateBadge gate={gate} /> <DeviceLink device={device} />
              </li>
            ))}
          </ul>
        </Card>
      )}
      {low.length > 0 && (
        <Card title="Low on prekeys">
          <ul class="names">
            {low.map(({ device }) => (
              <li key={device}>
                <DeviceLink device={device} />
              </li>
            ))}
          </ul>
        </Card>
      )}
    </>
  );
}

function Device({
  device,
  messageId,
  writable,
}: {
  device: string;
  messageId: string | null;
  writable: boolean;
}) {
  const { answer, trouble, askAgain } = useAsked(`${device} ${messageId}`, () =>
    api.device(device, { messageId: messageId ?? undefined }),
  );
  return (
    <>
      <div class="device-head">
        <h1 class="mono">{device}</h1>
        {answer !== null && <DeviceState answer={answer} />}
        <a class="button" href={addressOf('events', null, `device=${encodeURIComponent(device)}`)}>
          Live events
        </a>
      </div>
      <Trouble text={trouble} />
      {answer === null && trouble === null && <Empty title="Asking the store and the nodes…" />}
      <WhyNotDelivered device={device} messageId={messageId} diagnoses={answer?.diagnoses ?? []} />
      {answer !== null && (
        <div class="cards">
          <KeySet answer={answer} />
          <Card
            title="Sockets"
            note={answer.sockets.length === 0 ? '' : counted(answer.sockets.length, 'socket')}
          >
            {answer.sockets.length === 0 && <p class="quiet">None on any node that answers.</p>}
            {answer.sockets.map((socket) => (
              <SocketCard
                key={socket.socket}
                socket={socket}
                pendingCount={null}
                writable={writable}
                onChanged={askAgain}
              />
            ))}
          </Card>
          <Pending pending={answer.pending} device={device} />
          <Claims claims={answer.claims} />
        </div>
      )}
    </>
  );
}

const STATES: Readonly<Record<DeviceAnswer['state'], string>> = {
  neverUploaded: 'never uploaded keys',
  reset: 'keys were reset',
  uploaded: 'keys uploaded',
};

function DeviceState({ answer }: { answer: DeviceAnswer }) {
  const [socket] = answer.sockets;
  return (
    <span class="device-state">
      {socket === undefined ? (
        <span class="quiet">no socket</span>
      ) : (
        <GateBadge gate={socket.gate} keyVersion={socket.keyVersion} />
      )}
      <span class="quiet">{STATES[answer.state]}</span>
      <span class="quiet">
        {answer.pending.count === 0 ? 'nothing pending' : `${count(answer.pending.count)} pending`}
      </span>
    </span>
  );
}

/** `good`: messages pass, or have. `wait`: nothing to do but wait. `stuck`: somebody must act. */
const TONES: Readonly<Record<DiagnosisKind, 'good' | 'wait' | 'stuck'>> = {
  neverUploaded: 'stuck',
  keysReset: 'stuck',
  noSocket: 'stuck',
  neverValidated: 'stuck',
  validatedOlderKeySet: 'stuck',
  notReady: 'stuck',
  tokenExpired: 'stuck',
  windowFull: 'stuck',
  slow: 'stuck',
  notAcknowledged: 'wait',
  putOff: 'wait',
  otherNode: 'wait',
  bounced: 'stuck',
  delivered: 'good',
  neverStored: 'stuck',
  onItsWay: 'wait',
  nothingPending: 'good',
};

const TONE_SIGNS = { good: '✓', wait: '…', stuck: '!' };

function WhyNotDelivered(props: {
  device: string;
  messageId: string | null;
  diagnoses: readonly Diagnosis[];
}) {
  const { device, messageId, diagnoses } = props;
  const [first, ...others] = diagnoses;
  const field = useRef<HTMLInputElement>(null);
  const askFor = (text: string): void =>
    amend(
      addressOf('devices', device, text.trim() === '' ? '' : `messageId=${encodeURIComponent(text.trim())}`),
    );
  return (
    <Card title="Why not delivered?" class={`why why-${first === undefined ? 'wait' : TONES[first.kind]}`}>
      {first !== undefined && (
        <div class="diagnosis" data-kind={first.kind} role="status">
          <span class="diagnosis-sign" aria-hidden="true">
            {TONE_SIGNS[TONES[first.kind]]}
          </span>
          <div>
            <p class="diagnosis-text">{first.text}</p>
            <p class="diagnosis-step">
              <b>Next step</b> {first.nextStep}
            </p>
          </div>
        </div>
      )}
      {others.length > 0 && (
        <details class="diagnosis-others" open>
          <summary>Also true of this device</summary>
          <ul>
            {others.map((other) => (
              <li key={`${other.kind} ${other.text}`} data-kind={other.kind}>
                {other.text} <span class="quiet">{other.nextStep}</span>
              </li>
            ))}
          </ul>
        </details>
      )}
      <form
        class="ask"
        onSubmit={(event) => {
          event.preventDefault();
          askFor(field.current!.value);
        }}
      >
        <label>
          One message of it
          <input
            key={messageId}
            ref={field}
            type="text"
            class="mono"
            placeholder="message id"
            spellcheck={false}
            defaultValue={messageId ?? ''}
          />
        </label>
        <button type="submit">Ask</button>
        {messageId !== null && (
          <>
            <button type="button" class="plain" onClick={() => askFor('')}>
              Ask of the device
            </button>
            <MessageLink messageId={messageId} recipient={device} />
          </>
        )}
      </form>
    </Card>
  );
}

function KeySet({ answer }: { answer: DeviceAnswer }) {
  const { keySet } = answer;
  return (
    <Card title="Key set" note={`key version ${answer.keyVersion}, count version ${answer.countVersion}`}>
      {keySet === null ? (
        <p class="quiet">
          {answer.state === 'reset'
            ? 'It was reset. The device has to upload keys before anybody can write to it.'
            : 'There is none. The device has to upload keys before anybody can write to it.'}
        </p>
      ) : (
        <KeySetTable keySet={keySet} />
      )}
    </Card>
  );
}

function KeySetTable({ keySet }: { keySet: KeySetFacts }) {
  const expiresMs = keySet.signedPreKeyExpiresAt === null ? null : Date.parse(keySet.signedPreKeyExpiresAt);
  return (
    <>
      <div class="pools">
        <Pool
          name="One-time prekeys"
          available={keySet.availableCount}
          claimed={keySet.claimedCount}
          low={keySet.lowThreshold}
        />
        <Pool
          name="One-time PQ prekeys"
          available={keySet.pqAvailableCount}
          claimed={keySet.pqClaimedCount}
          low={keySet.lowThreshold}
        />
      </div>
      <dl class="facts">
        <Fact name="Registration id">{keySet.registrationId}</Fact>
        <Fact name="Signed prekey">
          {keySet.signedPreKeyId === null ? 'none' : `id ${keySet.signedPreKeyId}`}
          {expiresMs !== null && (
            <span class={expiresMs < nowMs() ? 'warned' : 'quiet'}>
              {' '}
              {expiresMs < nowMs() ? 'rotation is due since' : 'rotation is due'}{' '}
              {relative(expiresMs, nowMs())}
            </span>
          )}
        </Fact>
        <Fact name="PQ last resort">
          {keySet.pqLastResortPreKeyId === null ? 'none' : `id ${keySet.pqLastResortPreKeyId}`}
        </Fact>
        {keySet.updatedAt !== null && (
          <Fact name="Changed">
            {relative(Date.parse(keySet.updatedAt), nowMs())} <span class="quiet">{keySet.updatedAt}</span>
          </Fact>
        )}
      </dl>
    </>
  );
}

function Pool({
  name,
  available,
  claimed,
  low,
}: {
  name: string;
  available: number;
  claimed: number;
  low: number;
}) {
  const word = available === 0 ? 'empty' : available < low ? 'low' : '';
  return (
    <div class={`pool${word === '' ? '' : ' is-low'}`}>
      <h3>{name}</h3>
      <p>
        <b>{count(available)}</b> left{word !== '' && <em> {word}</em>}
      </p>
      <meter
        min={0}
        max={Math.max(available + claimed, low, 1)}
        low={low}
        optimum={available + claimed}
        value={available}
        aria-label={`${name} left`}
      />
      <p class="quiet">
        {count(claimed)} handed out · low below {count(low)}
      </p>
    </div>
  );
}

function Pending({ pending, device }: { pending: DeviceAnswer['pending']; device: string }) {
  const { first } = pending;
  const note =
    pending.count > first.length
      ? `the first ${first.length} of ${count(pending.count)}`
      : count(pending.count);
  return (
    <Card title="Pending messages" note={note} class="wide">
      {first.length === 0 ? (
        <p class="quiet">The queue is empty.</p>
      ) : (
        <div class="scroll-x">
          <table>
            <thead>
              <tr>
                <th>Message</th>
                <th>From</th>
                <th>Stored</th>
                <th class="number">Size</th>
                <th>State</th>
                <th>Expires</th>
              </tr>
            </thead>
            <tbody>
              {first.map((envelope) => (
                <tr key={envelope.envelopeId}>
                  <td>
                    <MessageLink messageId={envelope.messageId} recipient={device} />
                    {envelope.kind === 'bounce' && ' (bounce)'}
                  </td>
                  <td>
                    <DeviceLink device={envelope.peer} />
                  </td>
                  <td title={envelope.storedAt}>{relative(Date.parse(envelope.storedAt), nowMs())}</td>
                  <td class="number">{bytes(envelope.bytes)}</td>
                  <td>{pendingState(envelope)}</td>
                  <td title={envelope.expiresAt}>{relative(Date.parse(envelope.expiresAt), nowMs())}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
    </Card>
  );
}

function pendingState(envelope: PendingFacts): string {
  if (envelope.bounceReason !== null) return `on its way back: ${envelope.bounceReason}`;
  const failures = [
    ...(envelope.undecryptableCount > 0 ? [`undecryptable ${envelope.undecryptableCount}×`] : []),
    ...(envelope.temporaryCount > 0 ? [`failed ${envelope.temporaryCount}×`] : []),
  ].join(', ');
  if (envelope.dueAt !== null && Date.parse(envelope.dueAt) > nowMs()) {
    return `put off, due ${relative(Date.parse(envelope.dueAt), nowMs())}${failures === '' ? '' : ` (${failures})`}`;
  }
  return failures === '' ? 'waits' : `waits (${failures})`;
}

const CLAIMS_SHOWN = 10;

function Claims({ claims }: { claims: readonly ClaimFacts[] }) {
  const [showsAll, setShowsAll] = useState(false);
  const shown = showsAll ? claims : claims.slice(0, CLAIMS_SHOWN);
  return (
    <Card title="Claims" note="newest first" class="wide">
      {claims.length === 0 ? (
        <p class="quiet">Nobody has claimed a bundle of this device lately.</p>
      ) : (
        <div class="scroll-x">
          <table>
            <thead>
              <tr>
                <th>Time</th>
                <th>Claimed by</th>
                <th>Given</th>
                <th class="number">Signed prekey</th>
                <th>Claim id</th>
              </tr>
            </thead>
            <tbody>
              {shown.map((claim) => (
                <tr key={`${claim.claimer} ${claim.claimId}`}>
                  <td title={claim.claimedAt}>{clockTime(Date.parse(claim.claimedAt))}</td>
                  <td>
                    <DeviceLink device={claim.claimer} />
                  </td>
                  <td class={claim.keyId === null ? 'warned' : ''}>{claimText(claim)}</td>
                  <td class="number">{claim.signedPreKeyId}</td>
                  <td class="mono" title={claim.claimId}>
                    {claim.claimId.slice(0, 8)}…
                  </td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
      {claims.length > shown.length && (
        <button type="button" class="plain" onClick={() => setShowsAll(true)}>
          Show all {claims.length}
        </button>
      )}
    </Card>
  );
}
