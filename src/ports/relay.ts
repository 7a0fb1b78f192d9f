/**
 * Talk between the inspectors of many nodes. Anything may be lost, nothing is kept, and nobody but an inspector with a
 * viewer says anything.
 */
export interface Relay {
  /** Of this node, as the others know it. */
  readonly nodeId: string;

  /** From when it resolves, what others say reaches `onMessage`; with the link away, as soon as it is back. */
  start(onMessage: (from: string, text: string) => void): Promise<void>;

  /** Says it to every other node. @returns how many heard it; 0 while the link is away. Never rejects */
  broadcast(text: string): Promise<number>;

  /** Says it to one node. Returns at once, never throws. */
  send(to: string, text: string): void;

  stop(): Promise<void>;
}
