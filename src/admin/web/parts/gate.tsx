/** Gate states as they look everywhere: a shape, a colour and a word. */
import type { GateStepSeen } from '../../../protocol/inspector/facts.ts';
import type { GateName } from '../../../protocol/inspector/values.ts';
import { clockTime, duration } from '../time.ts';

const SHAPES: Readonly<Record<GateName, preact.JSX.Element>> = {
  connected: <circle cx="6" cy="6" r="4" fill="none" stroke="currentColor" stroke-width="1.6" />,
  validated: (
    <>
      <circle cx="6" cy="6" r="4" fill="none" stroke="currentColor" stroke-width="1.6" />
      <path d="M6 2a4 4 0 0 1 0 8z" fill="currentColor" />
    </>
  ),
  open: <circle cx="6" cy="6" r="4.8" fill="currentColor" />,
};

const MEANINGS: Readonly<Record<GateName, string>> = {
  connected: 'Connected: nothing is proven yet, no messages pass',
  validated: 'Validated: keys were compared, no messages pass until the client is ready',
  open: 'Open: messages pass',
};

export function GateBadge({ gate, keyVersion }: { gate: GateName; keyVersion?: number | null }) {
  return (
    <span class={`gate gate-${gate}`} title={MEANINGS[gate]}>
      <svg viewBox="0 0 12 12" aria-hidden="true">
        {SHAPES[gate]}
      </svg>
      {gate}
      {typeof keyVersion === 'number' && <small> v{keyVersion}</small>}
    </span>
  );
}

/** Newest last, as it happened. */
export function GateHistory({ steps, openedAt }: { steps: readonly GateStepSeen[]; openedAt: string }) {
  const openedMs = Date.parse(openedAt);
  return (
    <ol class="history" aria-label="Gate history">
      <li>
        <time dateTime={openedAt}>{clockTime(openedMs)}</time>
        <GateBadge gate="connected" />
        <span class="quiet">socket opened</span>
      </li>
      {steps.map(({ time, to, keyVersion, reason }) => (
        <li key={`${time} ${to}`}>
          <time dateTime={time}>{clockTime(Date.parse(time))}</time>
          <GateBadge gate={to} keyVersion={keyVersion} />
          <span class={reason === null ? 'quiet' : 'closed-because'}>
            {reason === null ? `after ${duration(Date.parse(time) - openedMs)}` : `closed: ${reason}`}
          </span>
        </li>
      ))}
    </ol>
  );
}
