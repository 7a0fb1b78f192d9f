/** What was opened for a while is ended again, in the opposite order. */

/** Run last to first. */
export type Undo = (() => Promise<void> | void)[];

/**
 * Runs every step, and empties the list. A step that fails keeps none of the others from being run.
 *
 * @param onFailure is told of each failure; without it the first is thrown when all are run
 */
export async function undoAll(undo: Undo, onFailure?: (error: Error) => void): Promise<void> {
  const failures: Error[] = [];
  for (const step of undo.splice(0).reverse()) {
    try {
      await step();
    } catch (error) {
      failures.push(error as Error);
      onFailure?.(error as Error);
    }
  }
  if (onFailure === undefined && failures[0] !== undefined) throw failures[0];
}

/**
 * Runs `open`, and gives what it made a `close` that undoes it; where it fails, what was begun is undone.
 *
 * @throws what `open` throws, whatever becomes of undoing it
 */
export async function opened<Made extends object>(
  open: (undo: Undo) => Promise<Made>,
): Promise<Made & { close(): Promise<void> }> {
  const undo: Undo = [];
  try {
    return { ...(await open(undo)), close: () => undoAll(undo) };
  } catch (error) {
    await undoAll(undo, () => {});
    throw error;
  }
}
