/** The embedded PostgreSQL can't be had or can't start; the message is one sentence for the operator. */
export class EmbeddedStartError extends Error {
  override readonly name: string = 'EmbeddedStartError';
}

/** Another gateway runs on the folder. */
export class FolderInUseError extends EmbeddedStartError {
  override readonly name = 'FolderInUseError';
}
