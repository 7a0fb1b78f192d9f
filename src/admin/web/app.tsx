/** The frame around every page: who is logged in, where one can go, and how the line is. */
import { useEffect, useState } from 'preact/hooks';
import type { AdminAnswer } from '../../protocol/inspector/admin-api.ts';
import { addressOf, VIEWS, type View } from './address.ts';
import { ApiError, api, whenSignedOut } from './api.ts';
import { count } from './format.ts';
import { useChanges, useKeys } from './hooks.ts';
import { createLiveFeed, type LiveFeed } from './live-feed.ts';
import { useAddress } from './navigation.ts';
import { createOverviewFeed, type OverviewFeed } from './overview-feed.ts';
import { DevicesPage } from './pages/devices.tsx';
import { EventsPage } from './pages/events.tsx';
import { LoginPage } from './pages/login.tsx';
import { MessagesPage } from './pages/messages.tsx';
import { OverviewPage } from './pages/overview.tsx';
import { SocketsPage } from './pages/sockets.tsx';
import { ThemeSwitch } from './parts/theme-switch.tsx';

export type Session = AdminAnswer<'session'>;

const TITLES: Readonly<Record<View, string>> = {
  overview: 'Overview',
  events: 'Events',
  sockets: 'Sockets',
  devices: 'Devices',
  messages: 'Messages',
};

export function App() {
  const [session, setSession] = useState<Session | null | 'asking'>('asking');
  const [trouble, setTrouble] = useState<string | null>(null);

  const ask = (): Promise<void> =>
    api.session().then(
      (answer) => {
        setTrouble(null);
        setSession(answer);
      },
      (error: unknown) => {
        if (error instanceof ApiError && error.code !== 'UNAUTHENTICATED') setTrouble(error.message);
        setSession(null);
      },
    );
  useEffect(() => {
    whenSignedOut(() => setSession(null));
    void ask();
  }, []);

  if (session === 'asking') return <p class="asking">Asking the gateway…</p>;
  if (session === null) return <LoginPage trouble={trouble} onLogin={ask} />;
  return <Inspector session={session} onLogout={() => setSession(null)} />;
}

function Inspector({ session, onLogout }: { session: Session; onLogout: () => void }) {
  const [live] = useState(createLiveFeed);
  const [overview] = useState(createOverviewFeed);
  const address = useAddress();
  /** Where one was in each view: coming back finds the filter as it was left. */
  const [lastOf, setLastOf] = useState<Partial<Record<View, string>>>({});

  useEffect(() => {
    overview.start();
    return () => {
      overview.stop();
      live.stop();
    };
  }, [live, overview]);
  useEffect(() => {
    document.title = `${address.subject ?? TITLES[address.view]} · Keygate inspector`;
    setLastOf((old) => ({ ...old, [address.view]: location.hash }));
  }, [address]);

  const logOut = (): void => {
    void api.logout().catch(() => {});
    onLogout();
  };
  const navigation: Record<string, () => void> = {};
  for (const [index, view] of VIEWS.entries()) {
    navigation[String(index + 1)] = () => {
      location.hash = lastOf[view] ?? addressOf(view);
    };
  }
  useKeys(navigation);

  return (
    <>
      <button type="button" class="skip" onClick={() => document.getElementById('main')?.focus()}>
        Skip to the content
      </button>
      <header class="top">
        <div class="brand">
          <svg viewBox="0 0 16 16" aria-hidden="true">
            <path d="M3 14V7a5 5 0 0 1 10 0v7M8 2v12M3 9h10" />
          </svg>
          <strong>Keygate</strong>
          <span>inspector</span>
        </div>
        <nav aria-label="Views">
          {VIEWS.map((view, index) => (
            <a
              key={view}
              href={address.view === view ? addressOf(view) : (lastOf[view] ?? addressOf(view))}
              aria-current={address.view === view ? 'page' : undefined}
              title={`${TITLES[view]} (${index + 1})`}
            >
              {TITLES[view]}
            </a>
          ))}
        </nav>
        <div class="top-end">
          <LineState overview={overview} />
          <ThemeSwitch />
          <button type="button" class="plain" onClick={logOut}>
            Log out
          </button>
        </div>
      </header>
      <main id="main" tabIndex={-1} class={`page page-${address.view}`}>
        <Page session={session} live={live} overview={overview} />
      </main>
    </>
  );
}

function Page({ session, live, overview }: { session: Session; live: LiveFeed; overview: OverviewFeed }) {
  const address = useAddress();
  switch (address.view) {
    case 'overview':
      return <OverviewPage overview={overview} session={session} />;
    case 'events':
      return <EventsPage live={live} query={address.query} />;
    case 'sockets':
      return <SocketsPage query={address.query} writable={session.writable} />;
    case 'devices':
      return (
        <DevicesPage
          device={address.subject}
          query={address.query}
          overview={overview}
          writable={session.writable}
        />
      );
    case 'messages':
      return <MessagesPage messageId={address.subject} query={address.query} />;
  }
}

const LINE_WORDS = { off: 'not connected', connecting: 'connecting', live: 'live', lost: 'reconnecting' };

function LineState({ overview }: { overview: OverviewFeed }) {
  useChanges(overview);
  const sample = overview.samples.at(-1);
  const silent = sample?.nodes.filter(({ answering }) => !answering) ?? [];
  return (
    <span class={`line line-${overview.status}`} role="status">
      <i aria-hidden="true" />
      {LINE_WORDS[overview.status]}
      {overview.status === 'live' && sample !== undefined && (
        <span class="line-more">
          {' · '}
          {sample.nodes.length === 1 ? '1 node' : `${count(sample.nodes.length)} nodes`}
          {silent.length > 0 && <b> · {silent.map(({ node }) => node).join(', ')} silent</b>}
        </span>
      )}
    </span>
  );
}
