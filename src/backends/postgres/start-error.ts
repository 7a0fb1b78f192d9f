/** The embedded PostgreSQL can't be had or can't start; the message is one sentence for the operator. */
export class EmbeddedStartError extends Error {
  override readonly name = 'EmbeddedStartError';
}
