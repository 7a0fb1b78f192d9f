/** Why a server can't listen, as its operator needs to hear it: by the variables that say where. */

export interface ListeningPlace {
  /** Null for every address of the machine. */
  host: string | null;
  port: number;
  /** The variables that name them. */
  hostName: string;
  portName: string;
}

/** @returns an error of one sentence for the faults of a place, and any other fault as it is */
export function listenFault(error: unknown, { host, port, hostName, portName }: ListeningPlace): unknown {
  const code = error instanceof Error && 'code' in error ? String(error.code) : '';
  const where = `${portName} ${port}${host === null ? '' : `, ${hostName} ${host}`}`;
  const reason = REASONS[code]?.({ hostName, portName });
  return reason === undefined ? error : new Error(`can not listen at ${where}: ${reason} (${code})`);
}

type Names = Pick<ListeningPlace, 'hostName' | 'portName'>;

const noSuchName = ({ hostName }: Names): string =>
  `the name does not lead to an address; ${hostName} must be a name or an address of this machine`;

const REASONS: Readonly<Record<string, (names: Names) => string>> = {
  EADDRINUSE: ({ portName }) => `another process listens there; end it, or set ${portName} to another port`,
  EACCES: ({ portName }) => `this user may not; set ${portName} to another port, such as one above 1023`,
  EADDRNOTAVAIL: ({ hostName }) => `this machine has no such address; set ${hostName} to one that it has`,
  ENOTFOUND: noSuchName,
  EAI_AGAIN: noSuchName,
};
