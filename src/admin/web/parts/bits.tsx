/** Small things that every page uses. */
import type { ComponentChildren } from 'preact';
import { addressOf } from '../address.ts';

export function DeviceLink({ device }: { device: string }) {
  return (
    <a class="mono" href={addressOf('devices', device)}>
      {device}
    </a>
  );
}

export function MessageLink({ messageId, recipient }: { messageId: string; recipient?: string | null }) {
  const query = recipient ? `recipient=${encodeURIComponent(recipient)}` : '';
  return (
    <a class="mono" href={addressOf('messages', messageId, query)} title={messageId}>
      {messageId.slice(0, 8)}…
    </a>
  );
}

/** An error in a sentence, where it matters. */
export function Trouble({ text }: { text: string | null }) {
  if (text === null) return null;
  return (
    <p class="trouble" role="alert">
      {text}
    </p>
  );
}

export function Empty({ title, children }: { title: string; children?: ComponentChildren }) {
  return (
    <div class="empty">
      <p class="empty-title">{title}</p>
      {children !== undefined && <p>{children}</p>}
    </div>
  );
}

export function Fact({ name, children }: { name: string; children: ComponentChildren }) {
  return (
    <div class="fact">
      <dt>{name}</dt>
      <dd>{children}</dd>
    </div>
  );
}

/** A card with its heading, which names the region. */
export function Card({
  title,
  note,
  class: extra = '',
  children,
}: {
  title: string;
  note?: ComponentChildren;
  class?: string;
  children: ComponentChildren;
}) {
  const id = `card-${title.toLowerCase().replaceAll(/[^a-z]+/g, '-')}`;
  return (
    <section class={`card ${extra}`} aria-labelledby={id}>
      <header>
        <h2 id={id}>{title}</h2>
        {note !== undefined && <span class="quiet">{note}</span>}
      </header>
      {children}
    </section>
  );
}
