/** The page's address: which view, of what, with which filter. It stands in the fragment, so that it can be shared. */

export const VIEWS = ['overview', 'events', 'sockets', 'devices', 'messages'] as const;
export type View = (typeof VIEWS)[number];

export interface Address {
  view: View;
  /** The device or message that the view is of; null for none. */
  subject: string | null;
  query: URLSearchParams;
}

/** Of `#/devices/alice.1?messageId=…`; anything unknown is the overview. */
export function parseAddress(fragment: string): Address {
  const [path = '', query = ''] = fragment.replace(/^#?\/?/, '').split(/\?(.*)/s);
  const [first, subject] = path.split('/');
  const view = VIEWS.find((name) => name === first) ?? 'overview';
  return { view, subject: subject ? decode(subject) : null, query: new URLSearchParams(query) };
}

function decode(text: string): string | null {
  try {
    return decodeURIComponent(text);
  } catch {
    return null;
  }
}

/** The inverse of {@link parseAddress}; `query` is taken as it is. */
export function addressOf(view: View, subject: string | null = null, query = ''): string {
  return `#/${view}${subject === null ? '' : `/${encodeURIComponent(subject)}`}${query === '' ? '' : `?${query}`}`;
}
