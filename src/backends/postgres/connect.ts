/** How the driver reaches PostgreSQL: by which address, with which settings, and what it would do by itself instead. */
import { connect as connectSocket, isIP, type Socket } from 'node:net';
import postgres from 'postgres';
import { HOT_PLAN_SETTINGS, SETTINGS } from './settings.ts';

/** Where PostgreSQL is: a URL, or the socket folder of the embedded one. */
export type PostgresAddress =
  | { kind: 'url'; url: string }
  | { kind: 'socket'; socketDir: string; port: number; user: string; database: string };

/** By which PostgreSQL knows our sessions. */
export const APPLICATION_NAME = 'keygate';
const CONNECT_TIMEOUT_S = 5;
const DEFAULT_PORT = 5432;

/** Behind a pooler nothing is: its URL says so. */
export function isPrepared(address: PostgresAddress): boolean {
  return !(address.kind === 'url' && new URL(address.url).searchParams.get('prepare') === 'false');
}

/** A client of the driver; its connections are made when they are first needed. */
export function connect(
  address: PostgresAddress,
  options: { max: number; prepare?: boolean; connection: Record<string, string | number> },
): postgres.Sql {
  const common: postgres.Options<Record<string, postgres.PostgresType>> = {
    max: options.max,
    prepare: options.prepare ?? true,
    connect_timeout: CONNECT_TIMEOUT_S,
    connection: { application_name: APPLICATION_NAME, ...options.connection } as Record<string, string>,
    onnotice: () => {},
    // Array parameters are cast where they stand; asking the server for its types costs a query per connection.
    fetch_types: false,
    types: {
      int8: { to: 20, from: [20], serialize: String, parse: Number },
      int4Array: { to: 1007, from: [1007], serialize: String, parse: parseNumbers },
      int8Array: { to: 1016, from: [1016], serialize: String, parse: parseNumbers },
    },
    // A failing server is asked again soon but never in a storm.
    backoff: (attempt) => Math.min(2, 0.05 * 2 ** attempt) * (0.5 + Math.random() / 2),
  };
  if (address.kind === 'socket') {
    return postgres({
      ...common,
      ssl: false,
      host: address.socketDir,
      port: address.port,
      user: address.user,
      database: address.database,
    });
  }
  const url = new URL(address.url);
  // The driver would send all of it to PostgreSQL, and let it win over what is set here.
  for (const name of [...url.searchParams.keys()]) {
    if (SET_HERE.has(name.toLowerCase())) url.searchParams.delete(name);
  }
  return postgres(url.toString(), {
    ...common,
    ...addressV6(url),
    ...tlsByAddress(url),
    ...socketsOf(url),
  });
}

const SET_HERE = new Set([
  ...['prepare', 'application_name'],
  ...Object.keys({ ...SETTINGS, ...HOT_PLAN_SETTINGS }),
]);

/** The driver cuts a host at its first colon, and takes lists as they are, which its types don't know. */
function addressV6({ hostname, port }: URL): { host?: string; port?: number } {
  const [, host] = /^\[(.*)\]$/.exec(hostname) ?? [];
  if (host === undefined) return {};
  return { host: [host], port: [Number(port) || DEFAULT_PORT] } as unknown as { host: string; port: number };
}

/**
 * A server that ends a connection in order before it has said anything, as a balancer does that has nobody behind it, is
 * away like one that refuses it. The driver itself would connect again at once, hundreds of times a second.
 */
function socketsOf({ hostname, port }: URL): { socket?: () => Socket } {
  // Where the URL names none, the driver knows which.
  if (hostname === '') return {};
  const to = { host: hostname.replace(/^\[(.*)\]$/, '$1'), port: Number(port) || DEFAULT_PORT };
  return {
    socket() {
      const socket = connectSocket(to);
      socket.once('end', () => {
        if (socket.bytesRead > 0) return;
        const reason = `${to.host}:${to.port} ended the connection before it said anything`;
        socket.destroy(Object.assign(new Error(reason), { code: 'ECONNREFUSED' }));
      });
      // By these the driver names the host to TLS, and in its errors.
      return Object.assign(socket, to);
    },
  };
}

/** What `sslmode` says where no certificate is looked at. */
const UNVERIFIED = new Set([null, 'disable', 'false', 'allow', 'prefer', 'require']);

/** The driver names only hosts that have a name: the certificate of an address would be compared with `localhost`. */
function tlsByAddress({ hostname, searchParams }: URL): { ssl?: { host: string } } {
  const host = hostname.replace(/^\[(.*)\]$/, '$1');
  const asked = searchParams.get('sslmode') ?? searchParams.get('ssl');
  const mode = searchParams.get('sslrootcert') === 'system' ? 'verify-full' : asked;
  return isIP(host) === 0 || UNVERIFIED.has(mode) ? {} : { ssl: { host } };
}

/** `{1,2}` */
function parseNumbers(literal: string): number[] {
  return literal === '{}' ? [] : literal.slice(1, -1).split(',').map(Number);
}
